"""A federation of ours that ends badly: one sentence, and the file with what Flower said."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hetfl.engines.flower import warm
from hetfl.engines.flower.superlink import LocalFederation
from hetfl.errors import RunError


@pytest.mark.parametrize(
    ("there", "why"),
    [
        ({"superlink"}, "the federation's server ended without a result; what it said is in '.*run.log'$"),
        (set(), "the SuperLink ended in mid-run, and the run with it; what it said is in '.*superlink.log'$"),
    ],
)
def test_a_run_that_tells_no_result_names_who_ended_and_where_it_stands(tmp_path, monkeypatch, there, why):
    made = LocalFederation(tmp_path, 1, tls=False)
    (tmp_path / "run.log").write_text("rting logstream for run_id 1 INFO")
    monkeypatch.setattr(made, "_start", lambda *words: None)
    monkeypatch.setattr(made, "running", lambda name: name in there)
    with pytest.raises(RunError, match=why) as said:
        list(made.events(tmp_path / "app", tmp_path))
    assert "logstream" not in str(said.value)


def test_a_command_of_flowers_that_fails_leaves_its_words_in_a_file(tmp_path, monkeypatch):
    (tmp_path / "flwr").write_text("#!/bin/sh\necho torn box; exit 1\n")
    (tmp_path / "flwr").chmod(0o755)
    monkeypatch.setattr("hetfl.engines.flower.superlink.BIN", tmp_path)
    made = LocalFederation(tmp_path, 1, tls=False)
    with pytest.raises(RunError, match=r"^flwr supernode register failed; what it said is in '.*flwr.log'$"):
        made.flwr("supernode", "register", "key")
    assert (tmp_path / "flwr.log").read_text() == "torn box\n"


@pytest.mark.skipif(sys.platform != "linux", reason="stubs are for Linux")
def test_the_process_that_is_forked_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "selectors.py").write_text("raise SystemExit('not the one of Python')\n")
    commands, home = {}, tmp_path / "home"
    monkeypatch.setattr(LocalFederation, "_superlink", lambda self: None)
    monkeypatch.setattr(LocalFederation, "_start", lambda self, name, *words: commands.update({name: words}))
    with LocalFederation(home, 0, tls=False):
        process = subprocess.Popen(commands["warm"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 20
        while process.poll() is None and not (home / warm.SOCKET).exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert (home / warm.SOCKET).exists()
    finally:
        process.kill()
        process.wait()
