"""A run file has no module imported that the command line does not name or allow."""

from __future__ import annotations

import pytest

from hetfl.cli.main import main


@pytest.mark.parametrize("line", ['model = "os:system"', 'wrap = ["os:system"]', 'extract = "evil.code:Plugin"'])
def test_a_run_files_modules_need_leave(tmp_path, capsys, line):
    (tmp_path / "run.toml").write_text(line)
    words = ["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = " ".join(capsys.readouterr().err.split())
    assert (ended.value.code, "allow it with --allow" in said) == (2, True)
    module = "evil" if "evil" in line else "os"
    with pytest.raises(SystemExit) as ended:
        main([*words, "--allow", module])
    assert "allow it with" not in capsys.readouterr().err
