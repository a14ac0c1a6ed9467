"""The cache of decoded data: the same bits with and without, rebuilt when it is damaged."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.datasets import KINDS, parts, rows, same, write
from hetfl.config import DataOptions
from hetfl.data.loading import load


@pytest.mark.parametrize("kind", KINDS)
def test_same_options_same_bits_with_and_without_cache(numbered, cache, monkeypatch, kind):
    options = DataOptions(dataset=str(numbered), partition=kind, clients=5, alpha=1)
    miss, hit = load(options), load(options)
    monkeypatch.setenv("HETFL_CACHE", os.devnull)
    assert same(miss, hit)
    assert same(miss, load(options))
    assert len(list(cache.iterdir())) == 2
    other = load(options.model_copy(update={"partition_seed": 1}))
    assert other.fingerprint != miss.fingerprint


def test_changed_files_are_read_again(tmp_path):
    folder = write(tmp_path / "d", rows(0, 100))
    options = DataOptions(dataset=str(folder), partition="iid", clients=2)
    before = load(options)
    write(folder, rows(0, 200))
    assert sum(map(len, parts(load(options)))) == 2 * sum(map(len, parts(before)))


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text", "folder"])
def test_damaged_cache_is_rebuilt(cache, harm):
    whole = load(DataOptions())
    for file in cache.iterdir():
        data = file.read_bytes()
        flipped = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        file.unlink()
        if harm == "folder":
            file.mkdir()
        else:
            file.write_bytes({"cut": data[:-1], "flip": flipped, "empty": b"", "text": b"hello" * 99}[harm])
    assert same(load(DataOptions()), whole)
    assert not list(cache.glob("*.tmp"))
    assert harm == "folder" or sum(file.stat().st_size for file in cache.iterdir()) > 100_000


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_warm_load_imports_no_data_library(cache):
    load(DataOptions())
    code = (
        "import sys; from hetfl.data.loading import load; from hetfl.config import DataOptions; load(DataOptions());"
        "print([m for m in ('datasets', 'flwr_datasets', 'PIL', 'pyarrow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, env=environment()
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
