"""What the strategies that cut depth share."""

from __future__ import annotations

from types import SimpleNamespace

from helpers.oracles import T, close
from hetfl import Client, Patch, Profile, Update, Updates
from hetfl.data.kinds import find_kind
from hetfl.plugins.methods.depth import merge_by_level
from hetfl.plugins.methods.depthfl import DepthFL
from hetfl.submodel.plan import grow


def test_a_level_keeps_what_is_its_own_through_rounds_that_do_not_teach_it():
    server = SimpleNamespace(state={"shared": T([0.0]), "a": T([0.0]), "b": T([0.0])}, branches={})
    server.clients = {0: Client(0, Profile(1.0)), 1: Client(1, Profile(0.5))}
    server.branch = lambda name: grow(server.branches[name], server.state)[0] if name in server.branches else None

    def play(*taught):
        updates = [Update(client, {n: Patch(T([v])) for n, v in values.items()}, 1.0) for client, values in taught]
        merged = merge_by_level(server, Updates(updates, server.state), lambda update: ("a", "b"), "uniform")
        server.state, server.branches = merged.state, merged.branches
        return {level: {n: float(p.values) for n, p in own.items()} for level, own in merged.branches.items()}

    play((0, {"shared": 2.0, "a": 1.0, "b": 2.0}), (1, {"shared": 4.0, "a": 3.0, "b": 4.0}))
    found = play((1, {"shared": 6.0, "a": 5.0}))
    assert found == {"level 1": {"a": 1.0, "b": 2.0}, "level 0.5": {"a": 5.0, "b": 4.0}}
    assert {name: float(t) for name, t in server.state.items()} == {"shared": 6.0, "a": 1.0, "b": 2.0}


def test_depthfl_asks_the_task_kind_for_the_loss_of_an_exit_and_for_the_distance_of_two():
    kind, options = find_kind("regress"), SimpleNamespace(rounds=10)
    task = SimpleNamespace(model=SimpleNamespace(depth=2, every=False), round=4, options=options, kind=kind, loss=None)
    next(DepthFL().fit(task))
    assert close(task.loss(T([[1.0, 3.0]]), T([[0.0]])), 1 + 9 + 4 + 4)
    assert "lm" not in DepthFL.tasks  # an exit answers for the mean over positions
