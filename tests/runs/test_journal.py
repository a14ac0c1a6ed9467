"""The journal of finished rounds: what a kill leaves, what damage does, and that checkpoints do not grow."""

from __future__ import annotations

import json

import pytest

from hetfl.runs.checkpoint import Checkpoints, Snapshot
from hetfl.runs.folder import RunFolder
from hetfl.runs.journal import NAMES, Journal, Mark

ROUNDS = [
    ({"round": n, "loss": 0.1 * n}, [{"client": 0, "level": "0.5"}, {"client": 1, "loss": float("inf")}]) for n in range(1, 5)
]


def test_what_a_kill_left_half_written_is_cut_off(tmp_path):
    journal = Journal(tmp_path)
    journal.add(ROUNDS[:1])
    mark = journal.add(ROUNDS[1:3])
    for name in NAMES:
        with open(tmp_path / name, "ab") as file:
            file.write(json.dumps(ROUNDS[3]).encode()[:20])
    again = Journal(tmp_path)
    assert list(again.read(mark)) == ROUNDS[:3]
    again.cut(mark)
    assert (tmp_path / NAMES[0]).stat().st_size == mark.length
    assert list(again.read(again.add(ROUNDS[3:]))) == ROUNDS
    again.cut(Mark())
    assert list(again.read(again.add(ROUNDS[3:]))) == ROUNDS[3:]


@pytest.mark.parametrize("damaged", NAMES)
def test_a_damaged_file_is_read_from_the_other_and_written_anew(tmp_path, damaged):
    mark = Journal(tmp_path).add(ROUNDS)
    data = bytearray((tmp_path / damaged).read_bytes())
    data[30] ^= 1
    (tmp_path / damaged).write_bytes(data)
    journal = Journal(tmp_path)
    assert journal.faults(mark) == {damaged: "is not what was written"}
    assert list(journal.read(mark)) == ROUNDS
    journal.cut(mark)
    assert journal.faults(mark) == {}


def test_a_checkpoint_is_as_large_after_500_rounds_as_after_5(tmp_path):
    store, sizes = Checkpoints(tmp_path, keep=1), []
    for before, number in ((0, 5), (5, 500)):
        rounds = [({"round": n}, [{"client": 1, "loss": 0.25}]) for n in range(before, number)]
        store.save(Snapshot(number, {}, {"run": {}}), rounds)
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file() and file.name not in NAMES))
    assert sizes[1] - sizes[0] < 10  # the numbers' own digits
    assert len(list(Checkpoints(tmp_path).load(print).rounds)) == 500


def test_without_a_whole_journal_the_checkpoint_is_damaged_and_a_run_begun_anew_keeps_its_own(stopped, stops):
    part = stopped / "part"
    for name in NAMES:
        (part / "checkpoints" / name).write_bytes(b"0" * (part / "checkpoints" / name).stat().st_size)
    watch = stops.go_on(part)
    assert sum("neither copy of the rows of its rounds is what was written" in note for note in watch.notes) == 2
    assert any("begins anew" in note for note in watch.notes)
    assert stops.equal(stopped / "whole", part)


def test_checkpoints_of_later_rounds_give_way_to_those_of_a_run_that_goes_back(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for number in (7, 8):
        store.save(Snapshot(number))
    again = Checkpoints(tmp_path, keep=2)
    again.begin(None)
    again.save(Snapshot(0))
    assert Checkpoints(tmp_path).load(print).round == 0


def test_a_run_that_went_on_has_the_summary_of_one_that_was_not_stopped(stopped, stops):
    stops.go_on(stopped / "part")
    whole, part = (RunFolder(stopped / name).read("summary.json") for name in ("whole", "part"))
    for summary in (whole, part):
        for name in [name for name in summary if "seconds" in name]:
            del summary[name]
        for level in summary["levels"]:
            del level["seconds"]
    assert whole == part


def test_a_file_that_is_a_link_is_written_anew_and_what_it_leads_to_stays(tmp_path):
    first = Journal(tmp_path).add([({"round": 1}, [])])
    other = tmp_path / "of another run"
    other.write_bytes((tmp_path / NAMES[0]).read_bytes() + b"more\n")
    (tmp_path / NAMES[1]).unlink()
    (tmp_path / NAMES[1]).symlink_to(other)
    journal = Journal(tmp_path)
    assert journal.faults(first) == {NAMES[1]: "is a link, through which nothing is written"}
    journal.cut(first)
    journal.add([({"round": 2}, [])])
    assert other.read_bytes().endswith(b"more\n")
    assert (tmp_path / NAMES[1]).read_bytes() == (tmp_path / NAMES[0]).read_bytes()
