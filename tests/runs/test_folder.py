"""Run folders."""

from __future__ import annotations

from hetfl.runs.folder import RunFolder, csv_text


def test_rows_are_appended_until_a_column_is_new(tmp_path):
    folder, text = RunFolder(tmp_path), 'a "quoted", text\nof two lines'
    for row in ({"round": 1}, {"round": -2, "why": text}, {"round": 3, "x": 0.5, "why": "=1+1"}, {"round": 4}):
        folder.append("t.csv", [row])
    assert (tmp_path / "t.csv").read_text() == ('round,why,x\n1,,\n-2,"a ""quoted"", text\nof two lines",\n3,\'=1+1,0.5\n4,,\n')
    RunFolder(tmp_path).append("t.csv", [{"round": 1}])  # as a run does that begins or goes on
    assert (tmp_path / "t.csv").read_text() == "round\n1\n"


def test_tables_are_in_utf8_whatever_the_locale_says(tmp_path, monkeypatch):
    def narrow(path, *words, encoding="ascii", **options):
        return open(path, *words, encoding=encoding, **options)

    monkeypatch.setattr("hetfl.runs.folder.open", narrow, raising=False)
    folder = RunFolder(tmp_path)
    for row in ({"a": "é"}, {"a": "ü"}, {"a": "ü", "b": "ß"}):
        folder.append("t.csv", [row])
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == "a,b\né,\nü,\nü,ß\n"


def test_texts_in_tables_are_no_formulas_and_have_no_control_characters():
    rows = [{"=1+1": "@SUM(A1)", "b": -3.5, "c": "-cmd|x", "d": "a\x1b[31m\x9b\nb"}]
    text = csv_text(list(rows[0]), [dict(zip(rows[0], rows[0], strict=True)), *rows])
    assert csv_text(["a"], [{"a": "\n=1+1"}, {"a": "\uff1d1"}, {"a": "\u202egnp.exe"}]) == "\"'\n=1+1\"\n'\uff1d1\ngnp.exe\n"
    assert csv_text(["a"], [{"a": "no file 'b\udcfc.npz'"}]).encode() == b"no file 'b.npz'\n"
    assert text == "'=1+1,b,c,d\n'@SUM(A1),-3.5,'-cmd|x,\"a[31m\nb\"\n"
