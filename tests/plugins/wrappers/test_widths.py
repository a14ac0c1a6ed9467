"""Widths that the server allots: over the rounds (grow), over the clients of a round (ration)."""

from types import SimpleNamespace

import pytest

from helpers.runs import ready
from hetfl import Client, Plugin, Profile, hookimpl
from hetfl.errors import RunError
from hetfl.hooks.answers import find_allotment_fault
from hetfl.hooks.manager import PluginManager
from hetfl.plugins.wrappers.grow import Grow
from hetfl.plugins.wrappers.ration import Ration
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback


def test_widths_rise_in_equal_steps_to_the_whole_one():
    grow = Grow(start=0.25, until=0.5, stages=4)
    found = [grow.find_factor(round, 16) for round in range(1, 17)]
    assert found == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75] + [1.0] * 10
    assert Grow(start=0.1, until=1, stages=2).find_factor(10, 10) == 1.0
    server = SimpleNamespace(options=SimpleNamespace(rounds=16))
    assert grow.allot(server, [1.0, 0.5], 3) == [0.5, 0.25]


def people(*pairs):
    """Clients with these (width that they afford, examples x loss or None)."""
    return [Client(i, Profile(w), last={} if n is None else {"examples": 10, "loss": n / 10}) for i, (w, n) in enumerate(pairs)]


def allotted(budget, clients):
    return Ration(budget=budget).allot(None, clients, [client.profile.width for client in clients])


def test_who_has_most_to_learn_from_gets_the_widest_part_within_the_budget():
    clients = people((1.0, 5), (1.0, 9), (0.5, 9.5), (0.25, 1))
    assert allotted(1.0, clients) == [1.0, 1.0, 0.5, 0.25]
    assert allotted(0.4, clients) == [0.5, 1.0, 0.5, 0.25]  # 0.25 + 1 + 0.25 + 0.0625 of 1.6
    assert allotted(0.12, clients) == [0.25, 0.25, 0.5, 0.25]  # 0.4375 of 0.48
    assert allotted(0.1, clients) == [0.25] * 4
    assert allotted(0.001, clients) == [0.25] * 4
    assert allotted(0.4, people((1.0, 9), (1.0, None), (0.25, 9))) == [0.25, 1.0, 0.25]
    late = Client(1, Profile(1.0), last={"fault": "it would have been late"})
    assert allotted(0.4, [people((1.0, 9))[0], late, people((0.25, 9))[0]]) == [1.0, 0.25, 0.25]


@pytest.mark.parametrize("extract", ["heterofl", "fjord", "fedrolex", "fiarse"])
def test_grow_goes_over_the_papers_four_extractions(extract):
    made = ready(
        2, extract=extract, rounds=2, wrap=("grow",), levels="1:2,0.5:2", clients=4, set={"grow": {"until": 1, "stages": 2}}
    )
    first, second = ({r["client"]: r for r in made.state.client_rows if r["round"] == n} for n in (1, 2))
    assert {row["level"] for row in first.values()} == {"0.25", "0.125"}
    assert {row["level"] for row in second.values()} == {"1", "0.5"}
    assert all(row["bottleneck"] == f"allotted {row['level']} of {second[i]['level']}" for i, row in first.items())
    assert all(first[i]["parameters"] < second[i]["parameters"] for i in first)
    assert all(row["bytes down"] < second[i]["bytes down"] for i, row in first.items())


def test_what_grow_holds_back_for_now_is_no_want_of_the_fleet():
    notes = list[str]()
    made = ready(0, extract="heterofl", rounds=2, wrap=("grow",), levels="1:2,0.5:2", clients=4)
    made.state.callback = SimpleNamespace(
        **{name: lambda *_: None for name in dir(NoCallback) if name[0] != "_"},
    )
    made.state.callback.note = notes.append
    run_round(made.state, 1, made.engine)
    assert made.state.rows[0]["clients"] == 4
    assert not any("no client affords the whole model" in text for text in notes)


def test_an_allotment_beyond_what_a_device_affords_names_the_plugin():
    class Greedy(Plugin):
        @hookimpl
        def allot(self, clients):
            return [1.0] * len(clients)

    said = r"^wrap plugin 'greedy' gave client 1 the width 1.0, where it affords 0.5 \(allot, round 3\)$"
    with pytest.raises(RunError, match=said):
        PluginManager({"wrap.greedy": Greedy()}).allot(None, people((1.0, 1), (0.5, 1)), 3)


@pytest.mark.parametrize(
    ("answer", "said"), [([1.0], "did not answer with 2 widths"), ("ab", "2 widths"), ([0, 1], "the width 0,")]
)
def test_no_allotment_is_refused(answer, said):
    assert said in find_allotment_fault(answer, people((1.0, 1), (1.0, 1)))
    assert find_allotment_fault([0.5, 1], people((1.0, 1), (1.0, 1))) is None
