"""The command line in this process."""

from __future__ import annotations

import pytest

from hetfl.cli.main import main

TINY = ["--limit", "200", "--clients", "3", "--rounds", "2", "--epochs", "1", "--pretrain-steps", "3"]


ONE_ROUND = ["--limit", "120", "--clients", "3", "--rounds", "1", "--epochs", "1", "--pretrain-steps", "3", "--model", "mlp"]


QUICK = ["--extract", "heterofl", "--aggregate", "overlap", *TINY]


def exit_code(*words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    return ended.value.code


def hfl(capsys, *words):
    """(its exit code, what a command prints, what it says on the error stream), white space folded."""
    code, said = exit_code(*words), capsys.readouterr()
    return code, " ".join(said.out.split()), " ".join(said.err.split())


def run_words(path, *more):
    flags = ["--limit", "200", "--clients", "4", "--rounds", "6", "--epochs", "1", "--pretrain-steps", "20", "--workers", "2"]
    return ["run", "--out", str(path), *flags, *more]
