"""Who takes part: each selection against its rule written anew, and what the core refuses."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from helpers.runs import play
from hetfl import Client, Plugin, Profile, hookimpl, registry
from hetfl.config import resolve
from hetfl.errors import RunError
from hetfl.hooks.manager import PluginManager
from hetfl.plugins.selections.availability import Availability
from hetfl.plugins.selections.oort import Oort
from hetfl.plugins.selections.uniform import Uniform
from hetfl.rng import stream

TINY = {
    "dataset": "digits", "limit": 300, "clients": 10, "rounds": 3, "epochs": 1, "batch_size": 16, "pretrain_steps": 0,
    "vmap": "off", "partition": "iid", "server_data": 0, "control": False, "model": "mlp", "model_args": {"hidden": [8, 6]},
    "levels": "1", "extract": "heterofl", "fraction": 0.3, "fleet": "phones-always",
}  # fmt: skip


def server(wanted):
    return SimpleNamespace(wanted=wanted, sample_stream=lambda number: stream(0, "sample", number))


def client(i, last_round=0, **last):
    return Client(i, Profile(), {}, last_round, last)


def test_uniform_draws_all_alike():
    counts = Counter(i for r in range(3000) for i in Uniform().sample(server(3), [client(i) for i in range(10)], r))
    assert all(abs(counts[i] / 900 - 1) < 0.15 for i in range(10))


def test_the_default_is_uniform():
    core = PluginManager({}).sample(server(4), [client(i) for i in range(9)], 2)
    assert core == sorted(Uniform().sample(server(4), [client(i) for i in range(9)], 2))


def test_availability_takes_the_rarest_first():
    """Clients 0 to 4 are always there, 5 and 6 every third round: whoever has been seen least comes first, and is remembered."""
    plugin, seen = Availability(), Counter()
    for round in range(1, 10):
        there = [client(i) for i in (range(7) if round % 3 == 0 else range(5))]
        seen.update(c.id for c in there)
        if round == 6:
            again = Availability()
            again.load_state_dict(plugin.state_dict())
            plugin = again
        chosen = plugin.sample(server(3), there, round)
        assert len(set(chosen)) == 3
        assert max(seen[i] for i in chosen) <= min([seen[c.id] for c in there if c.id not in chosen], default=99)
        assert {5, 6} <= set(chosen) or round % 3


def utility(c, round, bound, alpha):
    """Oort's algorithm 1, lines 11 to 15."""
    value = c.last["examples"] * c.last["loss"] + math.sqrt(0.1 * math.log(round) / c.last_round)
    return value * (bound / c.last["simulated seconds"]) ** alpha if c.last["simulated seconds"] > bound else value


def test_oort_scores_as_the_paper_says():
    known = [client(i, i + 1, examples=10 + i, loss=1 / (i + 1), **{"simulated seconds": 1.0 + i}) for i in range(6)]
    found = Oort(alpha=1.5).score(known, 9)
    assert found == pytest.approx({c.id: utility(c, 9, 3.0, 1.5) for c in known})
    assert found[5] < Oort(alpha=0).score(known, 9)[5]


def test_oort_explores_and_exploits_its_shares():
    """Of 20 clients 10 are known, 5 of them useless: round 1 explores 90 %, a late round 20 %."""
    known = [client(i, 1, examples=10, loss=2.0 if i < 5 else 1e-3, **{"simulated seconds": 1.0}) for i in range(10)]
    fresh = [client(i) for i in range(10, 20)]
    early, late = (Oort().sample(server(5), known + fresh, round) for round in (1, 300))
    assert sum(i >= 10 for i in early) == int(0.9 * 5)
    assert sum(i >= 10 for i in late) == int(0.2 * 5)
    assert {i for i in late if i < 10} <= set(range(5))
    assert len(Oort().sample(server(8), known, 1)) == 8
    assert len(Oort().sample(server(8), fresh[:4], 1)) == 4


@pytest.mark.parametrize("select", [e.name for e in registry.builtins() if e.role == "select"])
def test_every_selection_runs_and_goes_on_to_the_same_bits(tmp_path, stops, select):
    options = resolve({**TINY, "select": select, "fleet": "phones" if select == "availability" else "phones-always"})
    assert stops.changes_nothing(tmp_path, options)


def test_oort_hears_of_losses_and_seconds():
    made = play(resolve({**TINY, "select": "oort"}))
    heard = {i: line for i, line in made.state.history.latest.items() if "loss" in line}
    assert len({row["client"] for row in made.state.client_rows}) == len(heard) > 3
    assert all(line["simulated seconds"] > 0 for line in heard.values())


class Answers(Plugin):
    answer: list[int] = []

    @hookimpl
    def sample(self, server, clients, round):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "chose 0 clients, 0 different ones, where 1 to 3 are wanted"),
        ([1, 1], "chose 2 clients, 1 different ones"),
        ([1, 2, 3, 4], "chose 4 clients"),
        ([1, 77], "chose client 77, which is not among those that are there"),
    ],
)
def test_a_wrong_answer_is_one_sentence(answer, said):
    with pytest.raises(RunError, match=said):
        PluginManager({"select.answers": Answers(answer=answer)}).sample(server(3), [client(i) for i in range(9)], 1)


@pytest.mark.parametrize(("values", "population"), [({"fleet": None}, 10), ({}, 3), ({"fleet": None, "select": "oort"}, 3)])
def test_privacy_is_not_amplified_by_a_choice(values, population):
    made = play(resolve({**TINY, "rounds": 1, **values}))
    assert (made.server.sampled, made.server.population) == (3, population)
    assert torch.isfinite(next(iter(made.server.state.values()))).all()


@pytest.mark.parametrize("select", [Oort, Availability, Uniform])
def test_chance_is_another_one_every_round(select):
    """Where nothing speaks for one client or another, nobody comes first round after round."""
    chosen = [tuple(sorted(select().sample(server(4), [client(i) for i in range(40)], round))) for round in range(1, 6)]
    assert len(set(chosen)) == 5
    assert len({i for ids in chosen for i in ids}) > 8


@pytest.mark.parametrize("select", [Oort, Availability, Uniform])
def test_answers_are_ids_of_those_that_are_there(select):
    there = [client(i, 1, examples=9, loss=1.0) for i in (11, 14, 17, 23)]
    for number in range(1, 6):
        assert len(set(select().sample(server(3), there, number)) & {11, 14, 17, 23}) == 3
