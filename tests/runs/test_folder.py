"""Run folders."""

from __future__ import annotations

from hetfl.runs.folder import RunFolder, csv_text


def test_rows_are_appended_until_a_column_is_new(tmp_path):
    folder, rows = RunFolder(tmp_path), [{"round": 1}]
    for more in ({"round": 2}, {"round": 3, "x": 0.5}, {"round": 4}):
        folder.table("t.csv", rows)
        rows.append(more)
    folder.table("t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == "round,x\n1,\n2,\n3,0.5\n4,\n"


def test_texts_in_tables_are_no_formulas_and_have_no_control_characters():
    rows = [{"=1+1": "@SUM(A1)", "b": -3.5, "c": "-cmd|x", "d": "a\x1b[31m\x9b\nb"}]
    text = csv_text(list(rows[0]), [dict(zip(rows[0], rows[0], strict=True)), *rows])
    assert text == "'=1+1,b,c,d\n'@SUM(A1),-3.5,'-cmd|x,\"a[31m\nb\"\n"
