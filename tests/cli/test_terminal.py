"""What the terminal shows: foreign text as it is, help in panels, completion, versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from rich.console import Group

from helpers.cli import ONE_ROUND, exit_code
from hetfl import registry
from hetfl.cli import console, live, render
from hetfl.config import RunOptions, format_flag, resolve

TINY = ["--extract", "heterofl", *ONE_ROUND]

NASTY = "cannot open \udcfc[/data/x] [red]:smile: \x1b[31m\x1b]0;title\x07 \x9b2J\u202e[/]"

SHOWN = "cannot open [/data/x] [red]:smile: ]0;title 2J[/]"


def hfl(capsys, *words):
    code, said = exit_code(*words), capsys.readouterr()
    return code, said.out, said.err


def python(*words, **env):
    """hfl in a process of its own."""
    env = {**os.environ, "COLUMNS": "140", **env}
    return subprocess.run([sys.executable, "-m", "hetfl.cli.main", *words], capture_output=True, text=True, env=env)


def test_errors_with_brackets_and_control_characters_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    from hetfl.rounds import loop

    def fail(self, *_):
        raise ValueError(NASTY)

    monkeypatch.setattr(loop, "run_round", fail)
    code, _, err = hfl(capsys, "run", *TINY, "--out", tmp_path / "a")
    assert code == 1
    assert f"the run failed: ValueError: {SHOWN} (--debug" in err


def test_paths_with_brackets_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = hfl(capsys, "run", *TINY, "--out", "m2[/x]")
    assert code == 0
    assert "seed 0 -> m2[/x]" in out
    assert "run folder: m2[/x]" in out
    assert hfl(capsys, "show", "m2[/x]")[0] == 0
    code, _, err = hfl(capsys, "run", *TINY, "--out", "m2[/x]")
    assert code == 2
    assert "the run folder 'm2[/x]' is not empty" in err
    code, _, err = hfl(capsys, "run", "[/x].toml", "--roundz[/]", "3")
    assert (code, "No such option '--roundz[/]'" in err) == (2, True)


def test_tables_displays_and_plugins_print_foreign_text_as_it_is(tmp_path, capsys):
    def shown(what):
        what()
        return " ".join(capsys.readouterr().out.split())

    words = " ".join(SHOWN.split())
    assert shown(lambda: console.console.print(render.table([NASTY], [[NASTY]]))).count(words) == 2
    entry = registry.Entry("wrap", NASTY, "x:y", NASTY, NASTY, NASTY)
    assert shown(lambda: render.print_plugins([entry])).count("[/data/x]") >= 2
    assert shown(lambda: console.console.print(Group(console.plain_text(NASTY)))) == words
    display = live.RoundDisplay(resolve({"extract": NASTY}), tmp_path / NASTY.replace("/", "|"))
    assert words in shown(display.__enter__)
    assert shown(lambda: display.note(NASTY)) == f"note: {words}"
    assert shown(lambda: display.alarm(NASTY)) == f"ALARM: {words}"


def test_help_shows_the_main_options_first_then_panels_by_subject():
    out = python("run", "--help").stdout
    titles = re.findall(r"╭─ (.*?) ─", out)
    panels = ["Plugins and model", "Data", "Local training", "Server", "Rounds", "Where and how clients run"]
    assert titles == ["Arguments", "Options", *panels]
    first, *_ = out.split("Plugins and model")
    for name in ("extract", "aggregate", "dataset", "clients", "rounds", "seed", "out"):
        assert format_flag(name) in first
    assert "--momentum" not in first
    text = " ".join(out.replace("│", " ").split())
    assert "--clients INTEGER number of clients [default: 10]" in text
    assert "--optimizer CHOICE local optimiser, fresh each round (sgd, adam)" in text
    assert "--set NAME=VALUE options of the chosen plugins, plugin.option=value; may be repeated" in text
    assert (
        "--lr-milestones INTEGER rounds after which lr is multiplied by --lr-decay; may be repeated, or given with commas" in text
    )
    assert not [name for name in RunOptions.model_fields if format_flag(name) not in out]


@pytest.mark.parametrize("command", ["matrix", "scale", "federate", ["export", "flower"], "inspect", "show"])
def test_every_command_has_help(command):
    done = python(*([command] if isinstance(command, str) else command), "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


def test_help_says_what_an_argument_and_its_default_are():
    out = " ".join(python("reproduce", "--help").stdout.replace("│", " ").split())
    assert "[TABLE] a table by name (default: all)" in out
    assert "seeds of a row (default: as the table says)" in out


def test_bare_hfl_shows_help_and_no_error():
    done = python()
    assert (done.returncode, done.stderr) == (2, "")
    assert "Federated learning with models of different sizes" in done.stdout


def test_versions_and_the_short_name_of_the_list(capsys):
    code, out, _ = hfl(capsys, "--version")
    assert code == 0
    assert re.match(r"hetfl \S+ (\([0-9a-f]{10}\+?\) )?\(contract \S+\) torch \S+ flwr \S+ datasets \S+\n", out)
    assert hfl(capsys, "version")[1] == out
    assert hfl(capsys, "plugins") == hfl(capsys, "list-plugins")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("hfl ru", "run"),
        ("hfl run --extract fedr", "fedrolex"),
        ("hfl run --partition dir", "dirichlet"),
        ("hfl run --preset heflwr/mnist-iid-f", "heflwr/mnist-iid-fjord"),
    ],
)
def test_the_shell_completes(line, wanted):
    code = "import sys; from hetfl.cli.main import main; sys.argv[0] = 'hfl'; main([])"
    env = {**os.environ, "_HFL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert wanted in done.stdout.split()
