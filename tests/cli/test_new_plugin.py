"""What `hfl new-plugin` writes installs, and its tests pass."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import get_args

import pytest

from helpers.cli import hfl
from hetfl.cli.new_plugin import Kind
from hetfl.hooks.loading import roles_of
from hetfl.testing.report import check_plugin
from hetfl.testing.subject import Subject

QUICK = ["repeats", "order_changes_nothing", "federation_changes_nothing", "puts_back_what_it_takes", "answers_a_width",
         "keeps_uncovered_entries", "agrees_with_its_oracle"]  # fmt: skip


@pytest.mark.parametrize("role", get_args(Kind))
def test_a_template_is_a_right_plugin(role):
    kind = importlib.import_module(f"hetfl.cli.templates.{role}").Template
    oracle = importlib.import_module(f"hetfl.cli.templates.{role}_oracle").check_by_hand
    assert (roles_of(kind) or ["wrap"]) == [role]
    report = check_plugin(Subject(role, kind(), oracles=[oracle]), only=QUICK)
    assert report.ran >= 4
    assert report.count("passed") == report.ran, [r for r in report.results if r.status != "passed"]


@pytest.mark.slow
@pytest.mark.parametrize("role", ["wrap"])
def test_it_installs_and_reaches_gold(role, tmp_path, capsys, monkeypatch):
    pytest.importorskip("setuptools", reason="building without network needs setuptools")
    monkeypatch.chdir(tmp_path)
    assert hfl(capsys, "new-plugin", "my-method", "--kind", role)[0] == 0
    site = tmp_path / "site"
    how = ["-q", "--no-deps", "--no-build-isolation", "--target", str(site), "./my-method"]
    assert subprocess.run([sys.executable, "-m", "pip", "install", *how]).returncode == 0
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "my-method"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    words = [sys.executable, "-m", "hetfl.cli.main", "check", "my-method", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tier"] == "gold"


def test_the_files_speak_of_the_new_plugin_alone(tmp_path, capsys):
    code, out, _ = hfl(capsys, "new-plugin", "my-method", "--kind", "wrap", "--out", tmp_path / "p")
    assert (code, "hfl check my-method" in out) == (0, True)
    texts = [path.read_text() for path in (tmp_path / "p").rglob("*") if path.is_file()]
    assert len(texts) == 5
    assert not [text for text in texts if "Template" in text or "templates" in text or "$" in text]
    assert any("class TestMyMethod(WrapChecks)" in text for text in texts)


@pytest.mark.parametrize(("words", "said"), [
    (["My Method"], "is no name for a plugin"),
    (["heterofl"], "the role extract has a plugin 'heterofl' already"),
    (["json"], "there is a Python module 'json' already"),
    (["mine", "--kind", "extractor"], "'extractor' is not one of"),
])  # fmt: skip
def test_bad_names_are_refused_in_one_sentence(tmp_path, capsys, words, said):
    code, _, err = hfl(capsys, "new-plugin", *words, "--out", tmp_path / "p")
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "p").exists()


def test_what_is_there_is_not_written_over(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert "is not an empty folder" in hfl(capsys, "new-plugin", "my-method", "--out", tmp_path)[2]
