"""Ctrl-C, SIGTERM and SIGHUP in a pseudo-terminal: every engine ends within two seconds or so and says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.cli import exit_code
from helpers.terminal import stop_hfl
from hetfl.cli import stopping
from hetfl.files import write_file

LONG = ["--extract", "heterofl", "--limit", "600", "--clients", "4", "--rounds", "100000", "--epochs", "20",
        "--pretrain-steps", "3", "--no-control", "--vmap", "off"]  # fmt: skip
SOON = 3.0  # seconds, on a loaded machine


def begun_by(path):
    """The command lines of processes, other than this one, that name `path`; those of hetfl's workers and of Ray too."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(path) in words and file.parent.name != str(os.getpid()):
            found.append(words)
    return found


def test_ctrl_c_in_mid_round_ends_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "a run"
    ended = stop_hfl(["run", *LONG, "--out", out], "round 2: fit")
    assert ended.code == 130
    assert ended.seconds < SOON
    assert f"hfl: stopped; hfl resume '{out}' goes on after round 1" in ended.said
    assert "Traceback" not in ended.said
    assert "terminate called" not in ended.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "when", "how", "code"),
    [
        ("local", "round 1: fit", "SIGTERM", 143),
        ("local", "round 1: fit", "SIGHUP", 129),
        ("processes", "round 1: profile", "SIGTERM", 143),
        ("processes", "round 2: fit", "^C", 130),
        ("ray", "2: fit", "^C", 130),
    ],
)
def test_every_engine_ends_soon_and_goes_on(tmp_path, engine, when, how, code):
    ended = stop_hfl(["run", *LONG, "--engine", engine, "--out", tmp_path / "r"], when, how)
    assert ended.code == code
    assert ended.seconds < SOON
    sentence = "goes on after round 1" if "2" in when else "begins the run again"
    assert sentence in ended.said.splitlines()[-1] + ended.said.splitlines()[-2]
    assert "Traceback" not in ended.said
    with open(os.devnull, "wb") as nothing:
        words = [sys.executable, "-m", "hetfl.cli.main", "resume", str(tmp_path / "r")]
        going = subprocess.Popen(words, stdout=nothing, stderr=nothing)
    try:
        until = time.monotonic() + 180
        lines = 3 if "2" in when else 2
        table = tmp_path / "r" / "metrics.csv"
        while not (table.exists() and len(table.read_text().splitlines()) >= lines) and time.monotonic() < until:
            time.sleep(0.1)
        assert len(table.read_text().splitlines()) >= lines
    finally:
        going.terminate()
        assert going.wait(10) == 143


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("^C", 130)])
def test_a_federation_ends_soon_and_leaves_no_process(tmp_path, how, code):
    words = [w for w in LONG if w not in ("--clients", "4", "--vmap", "off")]
    ended = stop_hfl(["federate", "--nodes", 2, "--tls", *words, "--out", tmp_path / "r"], "round 1: fit", how)
    assert (ended.code, ended.seconds < SOON) == (code, True)
    assert "begins the run again" in ended.said
    assert "Traceback" not in ended.said
    assert begun_by(tmp_path / "r") == []


@pytest.mark.parametrize("engine", ["local", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_run_that_one_client_ends_has_exit_code_1(tmp_path, engine):
    """Not 134: the others are in training."""
    words = [*LONG, "--engine", engine, "--on-client-error", "fail", "--wrap", "helpers.deadly:Failing", "--workers", "4"]
    ended = stop_hfl(["run", *words, "--out", tmp_path / "r"], "never")
    assert ended.code == 1
    assert "client 1: ValueError: not today (--on-client-error fail)" in ended.said
    assert "terminate called" not in ended.said


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    code = "import os, signal\nfrom hetfl.cli import stopping\nstopping.begin(True)\nos.kill(os.getpid(), signal.SIGHUP)\nprint(1)"
    words = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_a_main_thread_that_does_not_end_is_ended():
    code = (
        "import signal, threading\nfrom hetfl.cli import stopping\nstopping.begin(True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray puts its own\n"
        "print('ready', flush=True)\nthreading.Event().wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert stopping.GRACE - 0.2 < time.monotonic() - began < SOON
    assert process.communicate()[1] == "hfl: stopped\n"


def test_the_sentence_says_what_the_folder_holds(tmp_path):
    tell = stopping.tell_resume(tmp_path / "r")
    assert tell() == f"stopped; the run in '{tmp_path / 'r'}' had not begun"
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    write_file(tmp_path / "r" / "config.toml", b"")
    assert "before round 1 was kept" in tell()
    write_file(tmp_path / "r" / "checkpoints" / "round-000012.json", b"")
    assert tell() == f"stopped; hfl resume {tmp_path / 'r'} goes on after round 12"
    write_file(tmp_path / "r" / "summary.json", b"")
    assert "had ended" in tell()


def test_ctrl_c_within_a_program_is_exit_code_130(tmp_path, monkeypatch, capsys):
    from hetfl.runs import runner

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "prepare", interrupted)
    assert exit_code("run", *LONG, "--out", tmp_path / "r") == 130
    assert "begins the run again" in capsys.readouterr().err
