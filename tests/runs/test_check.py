"""hfl check-run, hfl show and hfl resume on folders that were changed or damaged."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from helpers import cli
from hetfl.cli import run
from hetfl.config import read_run_file, resolve
from hetfl.errors import RunError, UsageError
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.checkpoint import Checkpoints
from hetfl.runs.folder import RunFolder


def hfl(capsys, *words):
    """(its exit code, all that a command says)."""
    code, *said = cli.hfl(capsys, *words)
    return code, " ".join(said)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(path, old, new):
    text = (path / "config.toml").read_text()
    assert old in text
    (path / "config.toml").write_text(text.replace(old, new))


def test_no_flipped_bit_voids_both_checkpoints(stopped, stops):
    part = stopped / "part"
    files = sorted(file for file in (part / "checkpoints").rglob("*") if file.is_file())
    assert list((part / "checkpoints" / "copies").iterdir())
    for file in files:
        shutil.copytree(part / "checkpoints", stopped / "kept")
        flip(file)
        found = Checkpoints(part / "checkpoints").load(lambda _: None)
        assert found is not None, file
        assert found.round >= 2
        shutil.rmtree(part / "checkpoints")
        (stopped / "kept").rename(part / "checkpoints")
    flip(part / "checkpoints" / "rounds.jsonl")
    shared = sorted((part / "checkpoints" / "copies").iterdir())
    flip(part / "checkpoints" / "objects" / shared[0].name)
    watch = stops.go_on(part)
    assert any("damaged parts, which their copies have mended" in note for note in watch.notes)
    assert any("'rounds.jsonl', the rows of finished rounds, is not what was written" in note for note in watch.notes)
    assert stops.equal(stopped / "whole", part)


def test_check_run_names_what_is_damaged(stopped, capsys):
    whole = stopped / "whole"
    code, said = hfl(capsys, "check-run", whole)
    assert (code, "weights.safetensors: ok" in said, "clients.csv: ok" in said) == (0, True, True)
    flip(whole / "weights.safetensors")
    (whole / "metrics.csv").write_text((whole / "metrics.csv").read_text().replace("\n2,", "\n7,"))
    (whole / "config.toml").write_text("rounds = 'many'")
    newest = max((whole / "checkpoints").glob("round-*.json"))
    newest.write_text(newest.read_text()[:-9])
    code, said = hfl(capsys, "check-run", whole)
    assert code == 1
    assert f"are damaged: config.toml, {newest.name}, metrics.csv, weights.safetensors" in said
    code, said = hfl(capsys, "show", whole)
    assert code == 1
    assert "weights.safetensors is not what the run left" in said
    assert hfl(capsys, "check-run", stopped)[0] == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr = 0.05", "lr = 0.1", "lr is 0.1, it was 0.05"),
        ("\nseed = 0", "\nseed = 1", "seed is 1, it was 0"),
        ('mix = "1:2,0.5:2"', 'mix = "1"', "'mix': '1'"),
        ('aggregate = "overlap"', 'aggregate = "fedavg"', "aggregate is 'fedavg', it was 'overlap'"),
    ],
)
def test_a_run_that_was_edited_goes_on_only_with_force(stopped, capsys, old, new, said):
    part = stopped / "part"
    edit(part, old, new)
    if "fedavg" in new:
        edit(part, '[set.aggregate.overlap]\nweighting = "uniform"\n', "")
    code, text = hfl(capsys, "resume", part)
    assert code == 2, text
    assert said in text
    assert "--force" in text
    code, text = hfl(capsys, "resume", part, "--force")
    if "fedavg" in new:
        assert code == 1
        assert "the run has nothing that aggregate.fedavg could go on from" in text
    else:
        assert code == 0
        assert any("went on after round 3 although" in note for note in RunFolder(part).read("summary.json")["notes"])


def test_another_version_is_another_run(stopped, monkeypatch):
    from hetfl.runs import snapshot

    options = resolve({**read_run_file(stopped / "part" / "config.toml"), "out": stopped / "part"})
    found = snapshot.version
    monkeypatch.setattr(snapshot, "version", lambda name: "9.9" if name == "torch" else found(name))
    with pytest.raises(UsageError, match=r"torch is 9.9, it was \d"):
        runner.resume_run(options, RunFolder(stopped / "part"), NoCallback())


def test_other_instructions_of_the_cpu_are_noted(stopped, stops, monkeypatch):
    from hetfl.runs import snapshot

    monkeypatch.setattr(snapshot.torch.backends.cpu, "get_cpu_capability", lambda: "NEON")
    stops.go_on(stopped / "part")
    assert any(
        "other instructions of the CPU (NEON, they were" in n for n in RunFolder(stopped / "part").read("summary.json")["notes"]
    )


def test_what_changes_no_result_may_be_changed(stopped, stops):
    edit(stopped / "part", "workers = 2", "workers = 1\ntimeout = 600.0")
    stops.go_on(stopped / "part")
    assert stops.equal(stopped / "whole", stopped / "part")


def test_random_damage_never_goes_unseen(stopped):
    draws, part = random.Random(0), stopped / "part"
    whole = Checkpoints(part / "checkpoints").load(lambda _: None)
    for _ in range(20):
        shutil.copytree(part / "checkpoints", stopped / "kept")
        file = draws.choice([f for f in (part / "checkpoints").rglob("*") if f.is_file()])
        data = bytearray(file.read_bytes())
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        file.write_bytes(bytes(data))
        found = Checkpoints(part / "checkpoints").load(lambda _: None)
        assert found is not None
        assert found.round < whole.round or json.dumps(found.facts) == json.dumps(whole.facts)
        shutil.rmtree(part / "checkpoints")
        (stopped / "kept").rename(part / "checkpoints")


@pytest.mark.slow
def test_a_run_whose_files_were_damaged_at_random_goes_on_to_the_same_bits_or_is_refused(stopped, stops, capsys, monkeypatch):
    """None begins anew. `HETFL_DAMAGES` says how many are tried."""
    monkeypatch.setattr(run, "draw_pictures", lambda folder: None)
    draws, part = random.Random(0), stopped / "part"
    files = sorted(file for file in part.rglob("*") if file.is_file() and file.stat().st_size)
    for number in range(int(os.environ.get("HETFL_DAMAGES", "8"))):
        work, file = stopped / f"work{number}", draws.choice(files).relative_to(part)
        shutil.copytree(part, work)
        data = bytearray((work / file).read_bytes())
        data[draws.randrange(len(data))] ^= draws.randrange(1, 256)
        (work / file).write_bytes(data)
        code, said = hfl(capsys, "resume", work)
        assert "begins anew" not in said, file
        assert (code == 2 and file.name == "config.toml") or (code == 0 and stops.equal(stopped / "whole", work)), (file, said)


def test_a_checkpoint_of_other_plugins_is_refused_in_a_sentence(stopped):
    options = resolve({**read_run_file(stopped / "part" / "config.toml"), "out": stopped / "part", "wrap": ("quantize",)})
    with pytest.raises(RunError, match=r"nothing that wrap\.quantize could go on from"):
        runner.resume_run(options, RunFolder(stopped / "part"), NoCallback(), force=True)
