"""Simulated time against the same sums done anew, and what may not depend on the real speed of anything."""

import time
from dataclasses import replace
from itertools import count

import pytest

from helpers.runs import SIX_DEVICES, play
from hetfl.config import resolve
from hetfl.engines.flower.records import RecordCodec
from hetfl.errors import RunError, UsageError
from hetfl.profiling.cost import Cost
from hetfl.profiling.device import Work
from hetfl.profiling.fleets import find_fleet
from hetfl.rounds.clock import Clock, Turn, judge
from hetfl.rounds.messages import Instruction
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare

TINY = {**SIX_DEVICES, "rounds": 2}


def ran(**values):
    made = play(resolve({**TINY, **values}))
    _, made.last, _ = made.rounds[-1]
    return made


def seconds_of(made, row):
    """A client's round, from the published figures of FedGMR's classes and hetfl's reference step."""
    table, examples = find_fleet("fedgmr"), len(made.federation.clients[row["client"]].train)
    kind = table.kinds[row["device"]]
    cost = made.state.meter.width_cost(float(row["level"]))
    op, mac, byte = (part * table.reference.tflops / kind.tflops for part in table.reference.step)
    steps = -(-examples // 8)
    train = steps * op * cost.ops + examples / 8 * (mac * 3 * cost.macs * 8 + byte * cost.written)
    return row["bytes down"] / (kind.down[0] * 1e6 / 8) + train + row["bytes up"] / (kind.up[0] * 1e6 / 8), train


def test_rows_say_what_each_client_and_the_round_took():
    made = ran()
    first, second = made.state.rows
    people = [row for row in made.state.client_rows if row["round"] == 1]
    assert [row["device"] for row in people] == [f"fedgmr-{c}" for c in ("high", "high", "medium", "medium", "low", "low")]
    for row in people:
        seconds, train = seconds_of(made, row)
        assert row["simulated seconds"] == pytest.approx(seconds)
        joules = 10 * train + 8e-9 * (137 * row["bytes down"] + 283 * row["bytes up"])
        assert row["joules"] == pytest.approx(joules)
    assert first["simulated seconds"] == max(row["simulated seconds"] for row in people)
    assert first["joules"] == pytest.approx(sum(row["joules"] for row in people))
    assert second["simulated seconds so far"] == first["simulated seconds"] + second["simulated seconds"]
    assert second["joules so far"] == first["joules"] + second["joules"]


def test_who_is_late_is_dropped_before_it_trains():
    """FedGMR's low class sends at 0.1 Mb/s: 12.5 kB a second."""
    made = ran(deadline=0.2)
    late = [row for row in made.state.client_rows if row.get("dropped")]
    assert {row["device"] for row in late} == {"fedgmr-low"}
    assert all(row["dropped"].startswith("late: ") and row["dropped"].endswith(" of 0.2 s") for row in late)
    assert all(row["bytes up"] == 0 and "seconds" not in row and row["joules"] > 0 for row in late)
    assert [row["simulated seconds"] for row in made.state.rows] == [pytest.approx(0.2)] * 2
    assert made.state.rows[0]["dropped"] == 2
    assert made.state.rows[0]["left out"] == 0
    assert sorted(made.last.assignments) == [0, 1, 2, 3]


def test_partial_work_ends_in_time_and_is_merged():
    """4 of the 6 steps of a Raspberry Pi at full width fit before the deadline; all are done at half width."""
    made, dropped = (ran(fleet="rpi4:1", deadline=0.0295, on_deadline=how, rounds=1) for how in ("partial", "drop"))
    merged = [row for row in made.state.client_rows if not row.get("dropped")]
    assert len(merged) == 6
    assert [row["client"] for row in dropped.state.client_rows if row.get("dropped")] == [0, 1, 2]
    assert all(row["simulated seconds"] <= 0.0295 for row in merged)
    assert [made.last.turns[client].work.steps for client in range(6)] == [4, 4, 4, 6, 6, 6]
    four = ran(fleet=None, local_steps=4, rounds=1).state.client_rows
    assert [row["change"] for row in made.state.client_rows[:3]] == pytest.approx([row["change"] for row in four[:3]], rel=1e-4)
    assert made.state.client_rows[3]["change"] != pytest.approx(four[3]["change"], rel=1e-2)


def test_the_first_to_arrive_are_merged_where_more_were_asked():
    made = ran(fraction=0.5, over_select=1.6, rounds=1)
    people = made.state.client_rows
    assert len(people) == 5  # ceil(3 * 1.6)
    kept = sorted(row["simulated seconds"] for row in people if not row.get("dropped"))
    others = [row for row in people if row.get("dropped")]
    assert len(kept) == 3
    assert all(row["dropped"] == "not needed: 3 had arrived" for row in others)
    assert min(row["simulated seconds"] for row in others) >= kept[-1] == made.state.rows[0]["simulated seconds"]


def test_memory_is_a_hard_gate(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(
        "[fleet.small]\nabout='x'\nclasses='nano:1,tiny:1'\nfrom='x'\n"
        "[class.tiny]\nwhat='a tiny thing'\nmemory='16kB'\ntflops=1\nwatts=1\nfrom='x'"
    )
    made = ran(fleet=str(path), rounds=1)
    fates = {row["device"]: row.get("dropped", "") for row in made.state.client_rows}
    assert fates["nano"] == ""
    assert fates["tiny"].startswith("memory: ")
    assert fates["tiny"].endswith("of 8,000 bytes that training may use of a tiny thing")


def test_only_who_is_there_is_asked_and_the_clock_waits_for_them():
    made = ran(fleet="phones", clients=12, rounds=3, levels="1", min_clients=1)
    when = find_fleet("phones").when(0)
    begins = [0.0, *(row["simulated seconds so far"] for row in made.state.rows)]
    for number, row in enumerate(made.state.rows, 1):
        asked = {r["client"] for r in made.state.client_rows if r["round"] == number}
        now = begins[number - 1]
        while not (ready := {i for i in range(12) if when.is_ready(i, now)}):
            now = min(when.next_change(i, now) for i in range(12))
        assert asked == ready
        assert row["simulated seconds"] >= now - begins[number - 1]


def test_clients_that_are_never_there_at_once_end_the_run(monkeypatch):
    monkeypatch.setattr("hetfl.rounds.clock.MOST_CHANGES", 50)
    with pytest.raises(RunError, match=r"^in [\d,]+ hours of simulated time no 12 clients of the fleet were there at once"):
        ran(fleet="phones", clients=12, min_clients=12)


def test_who_leaves_before_it_ends_is_dropped():
    fleet = find_fleet("phones-always")
    clock = Clock(fleet, resolve(TINY), [8] * 6)
    turn = Turn(None, fleet.typical("phone-low"), *[None] * 3)
    turn.work = Work(Cost(1, 1, 1, 1, 1, 1, 1), 1, 1, 100, 100)
    turn.spent, turn.limit = turn.device.spend(turn.work), 0.05
    judge(turn, clock.options)
    assert turn.fate.startswith("it left: ")
    assert turn.fate.endswith(" of 0.05 s")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"deadline": 1e-4},
            r"^no client of the fleet 'fedgmr' gets through round 1; the fastest, client \d: late: .* of 0.0001 s$",
        ),
        ({"fleet": "rpi4:1", "on_deadline": "partial", "deadline": 1e-3}, "gets through round 1"),
    ],
)
def test_a_deadline_that_nobody_meets_ends_the_run(values, said):
    with pytest.raises(RunError, match=said):
        ran(**values)


@pytest.mark.parametrize("values", [{"deadline": 3.0}, {"over_select": 1.3}])
def test_simulated_time_needs_a_fleet(values):
    with pytest.raises(UsageError, match=r"^--(deadline|over-select) needs simulated time: give a fleet with --fleet"):
        prepare(resolve({**TINY, "fleet": None, **values}), NoCallback())


def test_without_a_fleet_there_is_no_clock():
    made = ran(fleet=None, rounds=1)
    assert not [name for row in [*made.state.rows, *made.state.client_rows] for name in row if "simul" in name or "joule" in name]


def simulated(made):
    rows = [*made.state.rows, *made.state.client_rows]
    return [{k: v for k, v in row.items() if "simulated" in k or "seconds" not in k} for row in rows]


@pytest.mark.parametrize("schedule", ["sync", "fedbuff"])
def test_the_clock_reads_no_clock_of_this_machine(monkeypatch, schedule):
    """A machine whose time goes by leaps, and which has other workers, gives the same rows."""
    options = {"schedule": schedule, "fraction": 0.5, "over_select": 1.5 if schedule == "sync" else 1, "fleet": "phones-always"}
    options |= {"deadline": 0.5, "on_deadline": "partial"}
    one = simulated(ran(**options))
    moments = (n**3 for n in count())
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(moments)))
    assert simulated(ran(**options, workers=2)) == one


@pytest.mark.slow
def test_processes_simulate_what_threads_do():
    options = {"fleet": "rpi4:1", "deadline": 0.0295, "on_deadline": "partial", "vmap": "off", "schedule": "fedbuff", "buffer": 4}
    assert simulated(ran(**options)) == simulated(ran(**options, engine="processes", workers=2))


def test_a_stopped_run_goes_on_at_the_same_time(tmp_path, stops):
    options = resolve({**TINY, "rounds": 3, "fleet": "phones", "levels": "1", "over_select": 1.3, "fraction": 0.5, "clients": 8})
    assert stops.changes_nothing(tmp_path, options)


def test_the_number_of_steps_travels():
    sent = Instruction(1, {}, None, steps=7)
    assert RecordCodec().decode(RecordCodec().encode(sent)).steps == 7
    assert RecordCodec().decode(RecordCodec().encode(replace(sent, steps=0))).steps == 0
