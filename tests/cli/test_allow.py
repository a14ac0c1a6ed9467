"""A run file has no module imported that the command line does not name or allow."""

from __future__ import annotations

import pytest

from helpers.cli import hfl


@pytest.mark.parametrize("line", ['model = "os:system"', 'wrap = ["os:system"]', 'extract = "evil.code:Plugin"'])
def test_a_run_files_modules_need_leave(tmp_path, capsys, line):
    (tmp_path / "run.toml").write_text(line)
    words = ["run", tmp_path / "run.toml", "--out", tmp_path / "r"]
    code, _, said = hfl(capsys, *words)
    assert (code, "allow it with --allow" in said) == (2, True)
    assert "allow it with" not in hfl(capsys, *words, "--allow", "evil" if "evil" in line else "os")[2]
