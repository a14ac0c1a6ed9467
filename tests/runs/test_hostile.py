"""Run folders of somebody who means harm: every file is whole, and nothing in it is what hetfl writes."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from helpers.cli import hfl
from hetfl.cli import run
from hetfl.runs.journal import NAMES

DEEP = "[" * 100_000 + "]" * 100_000


def seal(path, change):
    """Changes the manifests, so that their own hash is right."""
    for file in (path / "checkpoints").glob("round-*.json"):
        body = json.loads(file.read_text())["body"]
        change(body)
        file.write_text(json.dumps({"body": body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}))


def part(path, data, kind="json"):
    """The name of a part with this content."""
    name = hashlib.sha256(data).hexdigest()
    (path / "checkpoints" / "objects" / f"{name}.{kind}").write_bytes(data)
    return name


def journal(path, line):
    data = line.encode() + b"\n"
    for name in NAMES:
        (path / "checkpoints" / name).write_bytes(data)
    seal(path, lambda body: body["journal"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


UNFINISHED = {
    "no journal": lambda p: seal(p, lambda body: body.pop("journal")),
    "words for bytes": lambda p: seal(p, lambda body: body["journal"].update(bytes="many")),
    "a path for a part": lambda p: seal(p, lambda body: body["tensors"].update(server="../../../../etc/passwd")),
    "a list for parts": lambda p: seal(p, lambda body: body.update(tensors=[1])),
    "deep facts": lambda p: seal(p, lambda body: body["facts"].update(run=part(p, DEEP.encode()))),
    "empty facts": lambda p: seal(p, lambda body: body["facts"].update(run=part(p, b"{}"))),
    "junk for tensors": lambda p: seal(p, lambda body: body["tensors"].update(server=part(p, b"junk", "safetensors"))),
    "no model": lambda p: seal(p, lambda body: body["tensors"].update(server=body["facts"]["run"])),
    "deep rounds": lambda p: journal(p, DEEP),
    "rounds of another kind": lambda p: journal(p, '[{"round": 1}, [{"client": "x"}]]'),
}
FINISHED = {
    "a list": lambda p: (p / "summary.json").write_text("[]"),
    "nothing in it": lambda p: (p / "summary.json").write_text("{}"),
    "deep": lambda p: (p / "summary.json").write_text(DEEP),
    "bytes": lambda p: (p / "metrics.csv").write_bytes(b"\xff\xfe"),
    "a long cell": lambda p: (p / "metrics.csv").write_text("round,x\n1," + "y" * 200_000),
    "another table": lambda p: (p / "clients.csv").write_text("a,b\n1\n2,3,4\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cases", "commands"),
    [("part", UNFINISHED, ("resume", "check-run")), ("whole", FINISHED, ("resume", "check-run", "show", "report"))],
)
def test_every_such_folder_is_told_in_a_sentence(stopped, capsys, monkeypatch, kind, cases, commands):
    monkeypatch.setattr(run, "draw_pictures", lambda folder: None)
    for name, change in cases.items():
        work = stopped / "work"
        shutil.copytree(stopped / kind, work)
        change(work)
        for command in commands:
            code, out, said = hfl(capsys, command, work)
            assert "--debug" not in said, (name, command, said)
            assert "Traceback" not in out + said
            assert code in (0, 1, 2)
        shutil.rmtree(work)


def test_links_in_a_run_folder_lead_to_no_other_file(stopped, capsys, monkeypatch):
    monkeypatch.setattr(run, "draw_pictures", lambda folder: None)
    precious = stopped / "precious"
    precious.write_text("precious")
    for names in ((".lock",), ("metrics.csv", "clients.csv", f"checkpoints/{NAMES[0]}", "weights.safetensors")):
        for link in (stopped / "part" / name for name in names):
            link.unlink(missing_ok=True)
            link.symlink_to(precious)
        code, _, said = hfl(capsys, "resume", stopped / "part")
        assert precious.read_text() == "precious"
        assert "--debug" not in said
        assert code == (2 if ".lock" in names else 0)
        (stopped / "part" / ".lock").unlink(missing_ok=True)
