"""README shows what its command prints, to the digit where bits are equal."""

from __future__ import annotations

import re

import pytest

from helpers.paths import ROOT
from helpers.printed import mask, same_bits_expected, show, without_trained_digits


@pytest.mark.slow
def test_readmes_output_is_what_the_command_prints(tmp_path):
    """Seconds are masked. Where the CPU has other instructions than the one README was made on, trained digits may differ: there
    they are masked too, and all the rest (names, examples, parameters, MACs, bytes, who holds what) must still be the same."""
    text = (ROOT / "README.md").read_text()
    command = re.search(r"^pip install .*&& (hfl run .*)$", text, re.M)[1]
    shown = next(
        block for block in re.findall(r"^```\n(.*?)^```$", text, re.S | re.M) if block.startswith("fedconv x kld on digits")
    )
    printed = [line for line in mask(show(command, tmp_path)) if not line.startswith(("round ", "run folder: "))]
    there, here = ([re.sub(r"-> runs/.*", "-> runs/…", line) for line in lines] for lines in (mask(shown), printed))
    if not same_bits_expected():
        there, here = without_trained_digits(there), without_trained_digits(here)
    assert here == there
