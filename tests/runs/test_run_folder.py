"""Run folders: what --overwrite may replace, and when."""

from __future__ import annotations

import json

import pytest

from helpers.cli import ONE_ROUND, exit_code
from hetfl.errors import UsageError
from hetfl.runs.folder import MARK, RunFolder, is_run_folder, list_strangers

TINY = ["--extract", "heterofl", *ONE_ROUND]


def begun(path, text="precious"):
    """A run folder with a result in it."""
    folder = RunFolder(path).open()
    folder.json("run.json", {"versions": {"hetfl": "0"}})
    folder.write("summary.json", text)
    folder.release()
    return path


def aside(path):
    return path.with_name(f".{path.name}.replaced")


@pytest.mark.parametrize("name", ["config.toml", "pyproject.toml", "run.json"])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    assert exit_code("run", *TINY, "--out", tmp_path, "--overwrite") == 2
    assert "holds no run of hetfl, so --overwrite does not replace it" in " ".join(capsys.readouterr().err.split())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_runs_of_before_the_mark_are_known_by_their_versions(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"versions": {"hetfl": "0.1.0"}}))
    assert is_run_folder(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"versions": ["torch"]}))
    assert not is_run_folder(tmp_path)
    (tmp_path / MARK).write_text("")
    assert is_run_folder(tmp_path)


def test_what_somebody_put_into_a_run_folder_is_not_deleted_with_it(tmp_path, capsys):
    old = begun(tmp_path / "r")
    (old / ".git").mkdir()
    assert exit_code("run", *TINY, "--out", old, "--overwrite") == 2
    assert "holds '.git', which no run leaves" in " ".join(capsys.readouterr().err.split())
    assert (old / "summary.json").read_text() == "precious"


def test_what_a_run_leaves_is_known(tmp_path):
    assert exit_code("run", *TINY, "--fleet", "fedgmr", "--out", tmp_path / "r") == 0
    assert exit_code("report", tmp_path / "r") == 0
    assert list_strangers(tmp_path / "r") == []


@pytest.mark.parametrize(
    "words",
    [
        ["--extract", "heterofll"],
        ["--rounds", "0"],
        ["--set", "heterofl.scalar=true"],
        ["--dataset", "mnists"],
        ["--model-args", "hiden=3"],
        ["--levels", "1:2,1.5:3"],
    ],
)
def test_a_run_that_is_refused_leaves_the_old_one(tmp_path, words):
    old = begun(tmp_path / "r")
    assert exit_code("run", *TINY, *words, "--out", old, "--overwrite") == 2
    assert (old / "summary.json").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, ImportError])
def test_a_run_that_fails_before_it_begins_leaves_the_old_one(tmp_path, monkeypatch, error):
    from hetfl.runs import runner

    def fail(*_):
        raise error

    monkeypatch.setattr(runner, "prepare", fail)
    old = begun(tmp_path / "r")
    assert exit_code("run", *TINY, "--out", old, "--overwrite") == (130 if error is KeyboardInterrupt else 1)
    assert (old / "summary.json").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_run_that_begins_replaces_the_old_one(tmp_path):
    old = begun(tmp_path / "r")
    assert exit_code("run", *TINY, "--out", old, "--overwrite") == 0
    assert json.loads((old / "summary.json").read_text())["rounds"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_the_old_run_is_there_until_commit_and_comes_back_without_it(tmp_path):
    old = begun(tmp_path / "r")
    folder = RunFolder(old).open(overwrite=True)
    assert not (old / "summary.json").exists()
    assert (aside(old) / "summary.json").read_text() == "precious"
    folder.write("half.txt", "")
    folder.release()
    assert (old / "summary.json").read_text() == "precious"
    assert not (old / "half.txt").exists()
    folder = RunFolder(old).open(overwrite=True)
    folder.commit()
    folder.discard()
    assert not list(tmp_path.iterdir())


def test_a_process_killed_before_its_run_began_has_not_lost_the_old_one(tmp_path):
    old = begun(tmp_path / "r")
    killed = RunFolder(old).open(overwrite=True)
    killed._lock.release()  # as the system does for a process that is gone
    folder = RunFolder(old).open(overwrite=True)
    assert (aside(old) / "summary.json").read_text() == "precious"
    folder.release()
    assert (old / "summary.json").read_text() == "precious"


def test_a_link_is_followed_and_the_current_folder_stays(tmp_path, monkeypatch):
    old = begun(tmp_path / "r")
    (tmp_path / "link").symlink_to(old)
    folder = RunFolder(tmp_path / "link").open(overwrite=True)
    folder.write("summary.json", "new")
    folder.commit()
    assert (old / "summary.json").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    folder.release()
    monkeypatch.chdir(old)
    with pytest.raises(UsageError, match="it is the current folder"):
        RunFolder(old).open(overwrite=True)


def test_a_folder_in_use_is_not_replaced(tmp_path):
    old = begun(tmp_path / "r")
    holder = RunFolder(old)
    holder.lock()
    with pytest.raises(UsageError, match="is being run by another process"):
        RunFolder(old).open(overwrite=True)
    assert (old / "summary.json").read_text() == "precious"
    del holder
    folder = RunFolder(old).open(overwrite=True)  # the lock went with its holder
    folder.release()
