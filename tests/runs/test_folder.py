"""Run folders."""

from __future__ import annotations

from hetfl.runs.folder import RunFolder


def test_rows_are_appended_until_a_column_is_new(tmp_path):
    folder, rows = RunFolder(tmp_path), [{"round": 1}]
    for more in ({"round": 2}, {"round": 3, "x": 0.5}, {"round": 4}):
        folder.table("t.csv", rows)
        rows.append(more)
    folder.table("t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == "round,x\n1,\n2,\n3,0.5\n4,\n"
