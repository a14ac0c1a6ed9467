"""Plans against the rule written anew, and against what a run then takes."""

import pytest

from helpers.cli import hfl
from hetfl import registry
from hetfl.config import resolve
from hetfl.profiling.cost import Cost
from hetfl.profiling.fleets import find_fleet
from hetfl.profiling.planning import Limits, group_extractions, plan_classes
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare

GRID = (1.0, 0.5, 0.25)


def cost(r):
    return Cost(int(8e5 * r**2), int(1e8 * r**2), int(5e8 * r), int(3.2e6 * r**2), 100, int(2e8 * r), 32)


def rule(device, kind, ratio, seconds):
    """Whether a width ends in time, by hand: 10 steps of 32 examples."""
    computed, share = cost(ratio if kind == "channel" else 1.0), 1.0
    sent = cost(ratio).bytes if kind == "channel" else computed.bytes * ratio**2 + (computed.parameters / 8 if ratio < 1 else 0)
    train = 10 * (device.step.op * 100 + device.step.mac * 3 * 32 * computed.macs + device.step.byte * computed.written)
    return share * (2 * device.latency + int(sent) / device.down + train + int(sent) / device.up) <= seconds


@pytest.mark.parametrize("kind", ["channel", "entry"])
@pytest.mark.parametrize("seconds", [1.0, 3.0, 8.0, 30.0])
def test_each_class_holds_the_largest_width_that_ends_in_time(kind, seconds):
    fleet = find_fleet("phones")
    for found in plan_classes(fleet, kind, cost, GRID, 10, 320, Limits(seconds=seconds)):
        able = [r for r in GRID if rule(fleet.typical(found.name), kind, r, seconds)]
        assert found.width == max(able, default=None)
        assert found.binds.startswith("deadline: ") or found.width == 1


def test_memory_energy_and_bytes_bind_too():
    fleet = find_fleet("phones")
    heavy = plan_classes(fleet, "channel", lambda r: Cost(1, 1, int(4e9 * r), 1, 1, 1, 1), GRID, 1, 1, Limits())
    assert [c.width for c in heavy] == [0.25, 0.25, 0.5]
    assert heavy[0].binds == "memory: 2,000 of 1,000 MB"
    assert {c.binds[:6] for c in plan_classes(fleet, "channel", cost, GRID, 10, 320, Limits(joules=5.0))} == {"energy"}
    sent = plan_classes(fleet, "channel", cost, GRID, 10, 320, Limits(bytes=2e6))
    assert [(c.width, c.binds) for c in sent] == [(0.5, "bytes: 6.4 of 2 MB")] * 3


def test_every_extraction_stands_in_one_group():
    groups = group_extractions(registry.builtins())
    assert sorted(name for names in groups.values() for name in names) == sorted(
        e.name for e in registry.builtins() if e.role == "extract"
    )
    assert "heterofl" in groups["channel"]
    assert "fiarse" in groups["entry"]
    assert "full" in groups["whole"]


def test_a_run_takes_what_was_planned():
    values = {
        "dataset": "digits", "limit": 300, "clients": 3, "epochs": 1, "pretrain_steps": 0, "partition": "iid", "server_data": 0,
        "model": "mlp", "extract": "heterofl", "levels": "0.5", "fleet": "fedgmr", "own_test": 0.0,
    }  # fmt: skip
    made = prepare(resolve(values), NoCallback())
    run_round(made.state, 1, made.engine)
    made.close()
    examples = len(made.federation.clients[0].train)
    planned = plan_classes(
        find_fleet("fedgmr"), "channel", made.state.meter.width_cost, [0.5], -(-examples // 32), examples, Limits()
    )
    assert [row["simulated seconds"] for row in made.state.client_rows] == pytest.approx([c.spent.seconds for c in planned])
    assert [row["joules"] for row in made.state.client_rows] == pytest.approx([c.spent.joules for c in planned])


def test_the_command_says_what_binds(capsys):
    words = ("plan", "--fleet", "phones", "--model", "mlp", "--input", "1x8x8")
    code, out, _ = hfl(capsys, *words, "--deadline", "60")
    assert code == 0
    assert "100 rounds with 100% of the fleet" in out
    code, out, err = hfl(capsys, *words, "--deadline", "0.05")
    assert code == 2
    assert "no class can take part" in out
    assert "hfl: no class of the fleet 'phones' holds any width of mlp: phone-low: deadline: " in err
    for more, said in (
        (("--deadline", "-3"), "--deadline takes a number above 0, not -3"),
        (("--energy", "nan"), "--energy takes a number above 0, not nan"),
        (("--traffic", "lots"), "--traffic: 'lots' is no amount"),
        (("--levels", "2"), "--levels takes width ratios"),
    ):
        code, _, err = hfl(capsys, *words, *more)
        assert code == 2
        assert said in err
