"""The gallery's recipes print what the page shows."""

from __future__ import annotations

import runpy

import pytest

from helpers.paths import DOCS
from helpers.printed import mask, same_bits_expected
from hetfl.config import resolve
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder

FEDERATED = {"extract": "heterofl", "aggregate": "overlap", "model": "mlp", "limit": 300, "rounds": 2, "epochs": 1}  # recipe 4

GALLERY = runpy.run_path(str(DOCS / "gallery.py"))


def test_there_are_ten_recipes_and_each_shows_something():
    recipes = GALLERY["recipes"]()
    assert [title.split(".")[0] for title, _ in recipes] == [str(n) for n in range(1, 11)]
    assert all(blocks[-1][0] == "text" and blocks[-1][1].strip() for _, blocks in recipes)


@pytest.mark.slow
def test_the_recipes_print_what_the_page_shows(tmp_path, stops):
    """To the digit, seconds masked, where the CPU computes the bits of the one that made the page. Elsewhere trained digits, and
    tables in which these decide what is best, may differ: there each command must end well and print as many lines."""
    for title, blocks in GALLERY["recipes"]():
        with GALLERY["kitchen"](tmp_path):
            for shown, printed in GALLERY["play"](blocks):
                there, here = mask(shown), mask(printed)
                if same_bits_expected():
                    assert here == there, title
                else:
                    assert len(here) == len(there), title
    runner.run(resolve({**FEDERATED, "clients": 3, "vmap": "off"}), RunFolder(tmp_path / "alone").open(), NoCallback())
    assert stops.equal(tmp_path / "three", tmp_path / "alone"), "a federation has the bits of the local engine"
