"""What dp releases, what one client can move in it, and an attack that must not find more than the epsilon it claims."""

from __future__ import annotations

import math
import stat
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from helpers.runs import STOPPABLE, ready
from hetfl import Client, Coverage, Merged, Patch, Profile, ReceivedReply, Reply, Update, running_mean
from hetfl.config import resolve
from hetfl.plugins.wrappers.dp import DP, compute_epsilon, find_shares
from hetfl.rng import secret_normal
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.checkpoint import Checkpoints
from hetfl.runs.folder import RunFolder

SHAPES = {"w": (3, 4), "b": (3,)}


class Columns:
    """The plan of the columns `kept` of w, and the whole of b."""

    def __init__(self, kept):
        self.kept = torch.tensor(sorted(kept))

    def take(self, state):
        return {"w": state["w"][:, self.kept], "b": state["b"]}

    def put(self, trained):
        return {"w": Patch(trained["w"], {1: self.kept}), "b": Patch(trained["b"])}


def serve(state, sampled, averages="covering", key=bytes(32), population=None):
    """What dp sees of a server."""
    return SimpleNamespace(
        state=state, sampled=sampled, population=population or sampled, averages=averages, notes=[], reachable={},
        options=SimpleNamespace(norm_policy="aggregate", rounds=1, schedule="sync"),
        secret_normal=lambda purpose, number, shape: secret_normal(key, purpose, number, tuple(shape)),
    )  # fmt: skip


def release(dp, server, replies, round=1):
    """A round of dp around the core's mean: `replies` are (plan, what the client sends, its examples)."""
    updates, covered = [], []
    for i, (plan, state, examples) in enumerate(replies):
        received = ReceivedReply(Client(i, Profile()), plan, plan.take(server.state), Reply(state, examples))
        update = dp.receive(received).update()
        updates.append(Update(i, {n: Patch(p.values.clone(), p.index) for n, p in update.patches.items()}, update.weight))
        covered.append(Coverage(i, {n: Patch(torch.empty(0), p.index) for n, p in update.patches.items()}, False))
    merged = running_mean(server.state, updates, lambda u: u.weight, absent=server.averages == "all")
    return dp.finalize(server, Merged(merged), covered, round)


def random_state(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


replies = st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(0, 9999), st.floats(1e-3, 1e3), st.integers(0, 10**6))


@settings(deadline=None, max_examples=60)
@given(st.lists(replies, max_size=4), st.tuples(st.none() | replies, st.none() | replies), st.sampled_from(["covering", "all"]))
def test_replacing_a_client_moves_the_sum_by_at_most_twice_the_norm(others, pair, averages):
    """Whatever the client sends, covers or says of its examples, and whoever else covers what it does; it may fail, too."""
    state, dp = random_state(0), DP(norm=0.7, noise=1.3)

    def reply(columns, seed, size, examples):
        plan = Columns(columns)
        sent, change = plan.take(state), plan.take(random_state(seed, size))
        return plan, {name: t + change[name] for name, t in sent.items()}, examples

    sampled = len(others) + 1
    both = [
        release(dp, serve(state, sampled, averages), [*(reply(*r) for r in others), *([] if own is None else [reply(*own)])]).state
        for own in pair
        if others or own is not None
    ]
    if len(both) == 2:
        moved = torch.cat([(both[0][n] - both[1][n]).flatten() for n in SHAPES])
        assert sampled * float(moved.norm()) <= 2 * 0.7 * (1 + 1e-4)


def test_the_noise_is_on_every_entry_that_travels_and_is_over_the_sampled_clients():
    state = {"w": torch.zeros(4000, 3), "stay": torch.ones(2), "seen": torch.tensor(3)}
    merged = Merged({"w": torch.tensor([1.0, 1.0, 0.0]).expand(4000, 3).clone(), "stay": state["stay"], "seen": torch.tensor(8)})
    covered = [Coverage(i, {"w": Patch(torch.empty(0), {1: torch.tensor(c)}), "seen": Patch(torch.empty(0))}, False)
               for i, c in enumerate([[0, 1], [0], [0]])]  # fmt: skip
    found = DP(norm=2.0, noise=1.5).finalize(serve(state, 5), merged, covered, 1)
    assert found.state["w"].std(0).tolist() == pytest.approx([0.6] * 3, rel=0.1)
    assert found.state["w"].mean(0).tolist() == pytest.approx([3 / 5, 1 / 5, 0.0], abs=0.05)
    assert torch.equal(found.state["stay"], state["stay"]), "a tensor that nobody was sent"
    assert found.state["seen"] == 3, "a counter is published without noise, so it is not published"
    again = DP(norm=2.0, noise=1.5).finalize(serve(state, 5), merged, covered, 2)
    assert abs(float(torch.corrcoef(torch.stack([found.state["w"][:, 2], again.state["w"][:, 2]]))[0, 1])) < 0.1


@pytest.mark.parametrize(
    ("noise", "sampled", "clients", "rounds", "epsilon"),
    [(2.0, 100, 100, 1, 4.377), (2.0, 10, 100, 100, 14.05), (1.0, 10, 100, 100, 83.94)],
)
def test_epsilon_is_that_of_a_sum_that_moves_by_twice_the_norm(noise, sampled, clients, rounds, epsilon):
    """Without sampling the exact one of the Gaussian mechanism: delta = Phi(1/2s - es) - exp(e) Phi(-1/2s - es), s = noise / 2."""
    found = compute_epsilon(noise, 1e-5, sampled, clients, rounds)
    assert found == pytest.approx(epsilon, rel=1e-3)
    if sampled == clients:
        s, phi = noise / 2, lambda x: 0.5 * math.erfc(-x / math.sqrt(2))
        assert phi(0.5 / s - found * s) - math.exp(found) * phi(-0.5 / s - found * s) == pytest.approx(1e-5, rel=1e-3)


def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_sampling():
    assert compute_epsilon(1.0, 1e-5, 100, 100, 1) < compute_epsilon(1.0, 1e-5, 100, 100, 10)
    assert compute_epsilon(2.0, 1e-5, 100, 100, 10) < compute_epsilon(1.0, 1e-5, 100, 100, 10)
    assert compute_epsilon(1.0, 1e-5, 10, 100, 10) < compute_epsilon(1.0, 1e-5, 100, 100, 10)
    assert compute_epsilon(0.0, 1e-5, 10, 100, 10) == math.inf


def attack(dp, trials=100_000, delta=1e-5, confidence=0.99):
    """A lower bound on epsilon by the best threshold of a likelihood-ratio test, from what dp releases.

    The canary sends the same change in one place or its opposite; the noise of every place is drawn alike, so a tensor of many
    places is as many trials. Three other clients send nothing. The first half of the trials chooses the threshold, and the bound is
    Clopper and Pearson's on the second.
    """
    seen = []
    for sign in (1, -1):
        one = {"w": torch.zeros(1)}
        sent = [{"w": torch.full((1,), sign * 1e6)}, *({"w": torch.zeros(1)} for _ in range(3))]
        clipped = [dp.receive(ReceivedReply(Client(i, Profile()), None, one, Reply(s, 1))).reply for i, s in enumerate(sent)]
        moved = sum(r.state["w"] for r in clipped) / len(clipped)
        covered = [Coverage(i, {"w": Patch(torch.empty(0))}, False) for i in range(4)]
        server = serve({"w": torch.zeros(trials)}, 4, key=bytes([sign % 256]) * 32)
        seen.append(dp.finalize(server, Merged({"w": moved.expand(trials)}), covered, 1).state["w"])
    (chosen, positive), (guess, negative) = (found.view(2, -1) for found in seen)

    def bound(a, b, threshold):
        n, hits, alarms = len(a), int((a > threshold).sum()), int((b > threshold).sum())
        risk = (1 - confidence) / 2
        least = float(beta.ppf(risk, hits, n - hits + 1)) if hits else 0.0
        most = float(beta.ppf(1 - risk, alarms + 1, n - alarms))
        return math.log((least - delta) / most) if least > delta else 0.0

    best = max(
        torch.cat([chosen, guess]).quantile(torch.linspace(0.5, 0.9999, 200)).tolist(), key=lambda t: bound(chosen, guess, t)
    )
    return bound(positive, negative, best)


@pytest.mark.parametrize(("norm", "noise"), [(1.0, 2.0), (0.01, 2.0), (3.0, 4.0)])
def test_an_attack_finds_no_more_than_the_epsilon_that_is_claimed(norm, noise):
    """And would find more than an accountant says that is told a replaced client moves the sum by the norm alone."""
    found = attack(DP(norm=norm, noise=noise))
    assert found <= compute_epsilon(noise, 1e-5, 4, 4, 1)
    assert found > compute_epsilon(2 * noise, 1e-5, 4, 4, 1), "the audit is too weak to notice a sensitivity of one norm"


NORMED = {"model": "cnn", "model_args": {"widths": [8, 8]}, "server_data": 0.1}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"extract": "full", "aggregate": "overlap"}, None),
        ({"extract": "heterofl", "aggregate": "fedavg"}, None),
        ({"extract": "heterofl", **NORMED, "norm_policy": "aggregate"}, None),
        ({"extract": "heterofl", **NORMED, "norm_policy": "recalibrate"}, None),
        ({"extract": "full", "aggregate": "median"}, "no mean of what clients send"),
        ({"extract": "heterofl", **NORMED, "norm_policy": "static"}, "publishes the clients' statistics without noise"),
        ({"extract": "lotteryfl", "aggregate": "overlap"}, "no mean of what clients send"),
        ({"extract": "hermes", "aggregate": "overlap", "set": {"hermes": {"threshold": 0.0}}}, "mean of what clients send"),
        ({"extract": "full", "fleet": "jetsons", "schedule": "fedbuff"}, "depends on other clients' devices"),
    ],
)
def test_epsilon_is_reported_only_where_the_mechanism_is_the_accountants(values, why):
    made = ready(1, **{"wrap": ("dp",), **values})
    assert ("epsilon" in made.state.rows[0]) == (why is None)
    assert why is None or any("no epsilon can be given" in note and why in note for note in made.server.notes)


def test_the_noise_is_the_servers_secret_and_outlasts_a_stop(tmp_path, stops):
    """Equal seeds give other noise; a run that goes on has that of before, from a file that only its owner can read."""
    values = {**STOPPABLE, "extract": "heterofl", "aggregate": "overlap", "wrap": ("dp",), "rounds": 3}
    with pytest.raises(stops.Stopped):
        runner.run(resolve(values), RunFolder(tmp_path / "a").open(), stops.Stopping(1))
    (tmp_path / "b").mkdir()
    snapshot = Checkpoints(tmp_path / "a" / "checkpoints").load(str)
    for name in ("a", "b"):
        folder = RunFolder(tmp_path / name)
        runner.run(resolve({**values, "out": folder.path}), folder, NoCallback(), snapshot)
    assert stops.equal(tmp_path / "a", tmp_path / "b")
    runner.run(resolve(values), RunFolder(tmp_path / "c").open(), NoCallback())
    assert not stops.equal(tmp_path / "a", tmp_path / "c")
    key = bytes(snapshot.tensors["secret"]["key"].tolist())
    holders = [
        path
        for path in (tmp_path / "a").rglob("*")
        if path.is_file() and (key in path.read_bytes() or key.hex().encode() in path.read_bytes())
    ]
    assert holders
    assert all(path.parent.name in ("objects", "copies") and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in holders)


def test_who_takes_part_is_drawn_from_the_secret_too():
    """Sampling hides a client only from those who cannot foresee it."""
    values = {"extract": "full", "clients": 20, "fraction": 0.25, "levels": "1"}
    seen = [
        tuple(sorted(row["client"] for row in ready(1, **values, wrap=w).state.client_rows))
        for w in ((), (), ("dp",), ("dp",), ("dp",))
    ]
    assert seen[0] == seen[1]
    assert len(set(seen[2:])) > 1


def test_a_seed_of_its_own_repeats_the_noise_and_says_what_that_costs(tmp_path, stops):
    values = {"extract": "full", "wrap": ("dp",), "set": {"dp": {"seed": 7}}}
    one, two = ready(1, **values), ready(1, **values)
    assert all(torch.equal(t, two.server.state[n]) for n, t in one.server.state.items())
    assert any("can take it off" in note for note in one.server.notes)
    heard = stops.Stopping(None)
    runner.run(resolve({**STOPPABLE, **values, "rounds": 1}), RunFolder(tmp_path / "a").open(), heard)
    assert "can take it off" in heard.notes[0], "said before the first round"


def test_the_reported_epsilon_is_that_of_all_rounds_so_far():
    rows = ready(3, extract="full", wrap=("dp",), set={"dp": {"noise": 2.0}}).state.rows
    assert [row["epsilon"] for row in rows] == pytest.approx([compute_epsilon(2.0, 1e-5, 4, 4, r) for r in (1, 2, 3)])


def test_no_epsilon_is_given_where_a_client_sends_more_than_its_clipped_tensors():
    server, state = serve({"w": torch.zeros(3)}, 2), {"w": torch.ones(3)}
    for more in (False, True):
        covered = [Coverage(0, {"w": Patch(torch.empty(0))}, False), Coverage(1, {"w": Patch(torch.empty(0))}, more)]
        assert ("epsilon" in DP().finalize(server, Merged(state), covered, 1).facts) != more
    assert "extras" in server.notes[-1]


@pytest.mark.parametrize("averages", ["covering", "all"])
def test_a_client_that_failed_counts_as_a_change_of_nothing(averages):
    """x + (sum of d) / m with m = 3 sampled, of whom two answered, whatever the aggregation's own denominator."""
    state, whole = random_state(0), Columns(range(4))
    sent = [(whole, {n: t + k for n, t in state.items()}, 10) for k in (1.0, 2.0)]
    found = release(DP(norm=100.0, noise=0.0), serve(state, 3, averages), sent).state
    assert all(torch.allclose(found[n], t + 1.0, atol=1e-5) for n, t in state.items())


def test_each_tensor_has_noise_of_its_own_and_no_variance_becomes_negative():
    state = {"a": torch.zeros(500), "b": torch.zeros(500), "n.running_var": torch.full((500,), 0.1)}
    covered = [Coverage(0, {n: Patch(torch.empty(0)) for n in state}, False)]
    found = DP().finalize(serve(state, 2), Merged(dict(state)), covered, 1).state
    assert abs(float(torch.corrcoef(torch.stack([found["a"], found["b"]]))[0, 1])) < 0.3
    assert float(found["n.running_var"].min()) == 0
    assert float(found["a"].min()) < 0


def test_entries_behind_a_mask_are_covered_by_nobody():
    server = serve({"w": torch.zeros(3)}, 4)
    covered = [Coverage(0, {"w": Patch(torch.empty(0), {}, torch.tensor([1.0, 0.0, 0.5]))}, False),
               Coverage(1, {"w": Patch(torch.empty(0))}, False)]  # fmt: skip
    assert find_shares(server, covered)["w"].tolist() == [0.5, 0.25, 0.375]


def test_entries_that_no_plan_ever_takes_get_no_noise():
    server, dp = serve({n: torch.zeros(shape) for n, shape in SHAPES.items()}, 1), DP(noise=2.0)
    server.reachable = {"w": torch.eye(3, 4, dtype=torch.bool)}
    found = release(dp, server, [(Columns(range(4)), {n: torch.zeros(shape) for n, shape in SHAPES.items()}, 1)]).state
    assert torch.equal(found["w"] != 0, server.reachable["w"])
    assert found["b"].all()


def test_another_seed_is_another_noise():
    keys = []
    for seed in (7, 7, 8):
        server = serve({"w": torch.zeros(1)}, 1)
        DP(seed=seed).prepare(server)
        keys.append(server.key)
    assert keys[0] == keys[1] != keys[2]
