"""The command line in this process."""

from __future__ import annotations

import pytest

from hetfl.cli.main import main

TINY = ["--limit", "200", "--clients", "3", "--rounds", "2", "--epochs", "1", "--pretrain-steps", "3"]


QUICK = ["--extract", "heterofl", "--aggregate", "overlap", *TINY]


def hfl(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    out = capsys.readouterr()
    return ended.value.code, " ".join(out.out.split()), " ".join(out.err.split())


def run_words(path, *more):
    flags = ["--limit", "200", "--clients", "4", "--rounds", "6", "--epochs", "1", "--pretrain-steps", "20", "--workers", "2"]
    return ["run", "--out", str(path), *flags, *more]
