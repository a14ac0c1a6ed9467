"""Options: one merge of nested tables, run files that say everything, digests that differ where the content does."""

from __future__ import annotations

import hashlib
import tomllib

import pytest
import torch

from helpers.paths import ROOT
from hetfl.config import check_option, format_run_file, merge_options, read_run_file, resolve
from hetfl.digest import digest_json, digest_tensors
from hetfl.errors import UsageError


def test_options_are_merged_table_by_table():
    base = {"set": {"a": {"x": 1, "y": 2}, "b": 1}, "rounds": 3}
    assert merge_options(base, {"set": {"a": {"x": 3}, "b": {"z": 4}}}) == {
        "set": {"a": {"x": 3, "y": 2}, "b": {"z": 4}},
        "rounds": 3,
    }
    assert base == {"set": {"a": {"x": 1, "y": 2}, "b": 1}, "rounds": 3}
    assert merge_options({"set": {"a": 1}}, {"set": 2}) == {"set": 2}


def test_a_run_file_has_the_options_of_every_wrapper():
    options = resolve({"wrap": ("clip", "dp")})
    text = format_run_file(options, {"wrap.clip": {"norm": 1.0}, "wrap.dp": {"noise": 0.1, "target": None}})
    assert tomllib.loads(text)["set"] == {"wrap": {"clip": {"norm": 1.0}, "dp": {"noise": 0.1}}}
    assert resolve(tomllib.loads(text)).wrap == options.wrap


def test_an_unknown_option_is_named_with_the_nearest():
    check_option("rounds")
    with pytest.raises(UsageError, match=r"unknown option 'ronds'; did you mean 'rounds'\?"):
        check_option("ronds")


def test_digests_of_tensors_are_of_names_types_shapes_and_values():
    a, b = torch.arange(6.0), torch.arange(6.0).view(2, 3)
    found = [{"a": a}, {"b": a}, {"a": b}, {"a": a.int()}, {"a": a + 1}, {"a": a, "b": b}, {"a": torch.zeros(0)}, {"a": a.sum()}]
    assert len({digest_tensors(tensors) for tensors in found}) == len(found)
    assert digest_tensors({"a": b.T}) == digest_tensors({"a": b.T.contiguous()})
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})


def test_the_digest_of_a_runs_weights_is_of_names_and_values():
    wanted = hashlib.sha256(b"w" + b"\0\0\x80?" + b"n" + b"\2\0\0\0\0\0\0\0").hexdigest()
    assert digest_tensors({"w": torch.ones(1), "n": torch.tensor(2)}, shapes=False) == wanted


@pytest.mark.parametrize("content", [b"lr = " + b"[" * 20_000 + b"]" * 20_000, b"\xff\xfe\x00", b"lr = = 1"])
def test_a_run_file_that_is_none_is_one_sentence(tmp_path, content):
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"^run file '.*run\.toml' (is not TOML|cannot be read): "):
        read_run_file(tmp_path / "run.toml")


def test_nothing_that_lasts_is_timed_by_the_wall_clock():
    """A clock that jumps ends no wait and makes nobody late."""
    assert not [path for place in ("core", "cli") for path in (ROOT / place).rglob("*.py") if "time.time()" in path.read_text()]
