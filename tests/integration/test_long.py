"""Long runs, and a disk that is full in earnest."""

from __future__ import annotations

import subprocess
from contextlib import suppress

import psutil
import pytest

from helpers.runs import FOUR_CLIENTS
from hetfl.config import resolve
from hetfl.errors import RunError
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder

LONG = {
    "limit": 60, "clients": 2, "batch_size": 64, "epochs": 1, "pretrain_steps": 0, "partition": "iid", "control": False,
    "model": "mlp", "model_args": {"hidden": [4]}, "levels": "1,0.5", "extract": "heterofl", "workers": 1, "vmap": "off",
    "eval_every": 50,
}  # fmt: skip


class Watching(NoCallback):
    """Memory, files and sizes after every hundredth round."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def done(self, row):
        if row["round"] % 100 == 0:
            files = [f for f in (self.path / "checkpoints").rglob("*") if f.is_file()]
            tables = sum((self.path / name).stat().st_size for name in ("metrics.csv", "clients.csv"))
            tensors = sum(f.stat().st_size for f in files if f.suffix == ".safetensors")
            self.seen.append((psutil.Process().memory_info().rss, tables, tensors, len(files)))


@pytest.mark.slow
def test_a_long_run_has_flat_memory_linear_tables_and_constant_state(tmp_path):
    watch = Watching(tmp_path / "r")
    runner.run(resolve({**LONG, "rounds": 400}), RunFolder(tmp_path / "r").open(), watch)
    memory, tables, tensors, files = zip(*watch.seen, strict=True)
    assert memory[3] - memory[1] < 200 * 20_000  # the rows themselves are 2 to 5 kB a round
    assert abs((tables[3] - tables[2]) / (tables[1] - tables[0]) - 1) < 0.1
    assert len(set(tensors)) == 1
    assert max(files) < 40


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_ends_the_run_in_a_sentence_and_it_goes_on_with_room(tmp_path, small_disk, stops):
    options = {**FOUR_CLIENTS, "extract": "heterofl", "model": "mlp", "model_args": {"hidden": [60]}, "rounds": 3}
    runner.run(resolve(options), RunFolder(tmp_path / "whole").open(), NoCallback())

    class Filling(NoCallback):
        def done(self, row):
            if row["round"] == 1:
                with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
                    while file.write(bytes(1 << 12)):
                        pass

    with pytest.raises(RunError, match=r"No space left on device"):
        runner.run(resolve(options), RunFolder(small_disk / "part").open(), Filling())
    (small_disk / "filler").unlink()
    stops.go_on(small_disk / "part")
    assert stops.equal(tmp_path / "whole", small_disk / "part")
