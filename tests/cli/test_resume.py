"""hfl resume."""

from __future__ import annotations

from typer.testing import CliRunner

from helpers.cli import exit_code, run_words
from hetfl.cli.main import app
from hetfl.runs.folder import RunFolder


def test_resume_on_the_command_line(tmp_path, capsys):
    runner = CliRunner()
    assert runner.invoke(app, run_words(tmp_path / "a")).exit_code == 0
    done = runner.invoke(app, ["resume", str(tmp_path / "a")])
    assert done.exit_code == 0
    assert "has ended" in done.output
    for path, why in ((tmp_path / "none", "no run folder"), (tmp_path, "no run folder")):
        assert exit_code("resume", path) == 2
        assert why in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").write_text("")
    assert exit_code("resume", tmp_path / "empty") == 2
    assert "start it again" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(tmp_path, capsys):
    holder = RunFolder(tmp_path / "a").open()
    holder.write("config.toml", 'extract = "heterofl"\n')
    assert exit_code("resume", tmp_path / "a") == 2
    assert "another process" in capsys.readouterr().err
