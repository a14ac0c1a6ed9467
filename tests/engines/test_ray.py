"""Clients on a Ray cluster."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.ray_nodes import begins_ray, cluster
from helpers.runs import FOUR_CLIENTS
from hetfl.config import format_run_file, resolve
from hetfl.data import loading
from hetfl.engines.local import Call
from hetfl.engines.pickling import pack, to_bytes, unpack
from hetfl.errors import RunError, UsageError
from hetfl.models.state import tensors
from hetfl.profiling.node import Profile
from hetfl.rounds.messages import Failure, Instruction
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.setup import build_model, build_setup
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder

engine = pytest.importorskip("hetfl.engines.ray")
RayError = engine.RayError

KILLED = {
    **FOUR_CLIENTS, "rounds": 4, "extract": "hermes", "wrap": ("helpers.deadly:Slow",), "on_client_error": "retry",
}  # fmt: skip


def watching(stops, nodes, number):
    """A callback that kills a node while clients of round 2 train, and stops the run after round 3."""

    class Killing(stops.Stopping):
        def phase(self, round, name):
            if (round, name) == (2, "fit"):
                threading.Timer(0.2, nodes.kill, [number]).start()

    return Killing(3)


class Actor:
    """Answers at once, unless its client is among `slow` or `deadly`."""

    def __init__(self, ray):
        self.options = lambda **_: SimpleNamespace(remote=lambda job: Actor(ray))
        self.begun = SimpleNamespace(remote=lambda: ray.versions)
        self.answer = SimpleNamespace(remote=lambda kind, client, call, state: ("call", client))


class FakeRay:
    """One machine with two cores, on which every actor has answered at the next look."""

    def __init__(self):
        self.put, self.slow, self.deadly, self.killed = (lambda packed: packed), set(), set(), 0
        self.versions = {name: engine.version(name) for name in engine.BITS}
        self.places, self.alive = 2.0, True

    def nodes(self):
        return [{"NodeID": "ab" * 28, "Alive": self.alive, "NodeManagerHostname": "host", "Resources": {"CPU": self.places}}]

    def wait(self, refs, timeout):
        return [ref for ref in refs if ref is self.versions or ref[1] not in self.slow], []

    def get(self, ref):
        if ref is self.versions:
            return ref
        if ref[1] in self.deadly:
            raise RayError("gone")
        return to_bytes(Profile(ref[1] / 10)), to_bytes({"memory": {"seen": torch.ones(1)}})

    def kill(self, actor):
        self.killed += 1


@pytest.fixture
def small(monkeypatch):
    """(engine, ray): of five clients on a machine of two actors that are not there."""
    fake = FakeRay()
    monkeypatch.setattr(engine, "ray", fake)
    monkeypatch.setattr(engine, "LOOK", 0.01)
    made = engine.RayEngine.__new__(engine.RayEngine)
    engine.KeepingEngine.__init__(made, 5)
    made._options, made._gpus, made._began, made._job = resolve({"timeout": 0.05, "wait": 0.1}), 0.0, False, None
    made._class, made._workers, made._answered, made._refused = Actor(fake), [], [], {}
    return made, fake


def test_every_client_is_answered_and_keeps_what_it_left(small):
    made, _ = small
    assert {client: answer.width for client, answer in made.ask("train", dict.fromkeys(range(5), 1))} == {
        client: client / 10 for client in range(5)
    }
    assert made.client_states()[3]["memory"]["seen"].tolist() == [1]


def test_an_actor_that_dies_or_is_late_takes_one_client_and_is_replaced(small):
    made, fake = small
    fake.deadly, fake.slow = {1}, {2}
    found = dict(made.ask("train", dict.fromkeys(range(5), 1)))
    assert {client: answer.reason for client, answer in found.items() if isinstance(answer, Failure)} == {
        1: "its actor on the Ray node host ended before it answered",
        2: "it gave no answer within 0.05 s, and its actor was ended",
    }
    assert fake.killed == 2
    assert made.client_states()[1] == made.client_states()[2] == {}
    assert len(made._workers) == 2


def test_who_asks_once_more_amid_the_answers_gets_its_own(small):
    """A client that failed is asked again while the others' answers are still to come."""
    made, fake = small
    fake.deadly, found = {0}, {}
    for client, answer in made.ask("train", dict.fromkeys(range(5), 1)):
        found[client] = answer
        if client == 0:
            fake.deadly = set()
            found |= dict(made.ask("train", {0: 1}))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert not any(isinstance(answer, Failure) for answer in found.values())


def test_a_node_with_other_versions_takes_no_part(small):
    made, fake = small
    fake.versions = {**fake.versions, "torch": "1.0"}
    with pytest.raises(RunError, match=r"no node .* can take clients: it has torch 1\.0, not "):
        list(made.ask("profile", {0: 1}))
    assert made.notices == [f"the Ray node host takes no part: it has torch 1.0, not {engine.version('torch')}"]


def test_a_cluster_without_a_free_core_is_waited_for_and_then_named(small):
    made, fake = small
    fake.places = 0.0
    with pytest.raises(RunError, match=r"no node of the Ray cluster had a core free within 0\.1 s \(--wait\)"):
        list(made.ask("profile", {0: 1}))


@pytest.mark.slow
@begins_ray
def test_a_node_that_is_killed_costs_a_try_of_its_client_and_the_run_goes_on_elsewhere(tmp_path, stops):
    """Of two nodes one is killed in mid-round; then the run goes on, on the other. The bits are those of a run on threads."""
    runner.run(resolve(KILLED), RunFolder(tmp_path / "local").open(), NoCallback())
    with cluster() as nodes:
        number = nodes.add_node()
        there = resolve({**KILLED, "engine": "ray", "ray_address": nodes.address})
        with pytest.raises(stops.Stopped):
            runner.run(there, RunFolder(tmp_path / "ray").open(), watch := watching(stops, nodes, number))
        assert [note for note in watch.notes if "ended before it answered" in note]
        after = stops.go_on(tmp_path / "ray")
    assert not [note for note in after.notes if "takes no part" in note]
    assert stops.equal(tmp_path / "local", tmp_path / "ray")


@pytest.fixture(params=["shared", "built"])
def based(request, tmp_path, monkeypatch):
    """(job, path, how, builder): what actors of a run are begun with, the weights of its --base, and the run's own builder."""
    if request.param == "built":
        monkeypatch.setattr(engine, "pack_based", lambda model: None)
    monkeypatch.setattr(engine, "connect", lambda *_: False)
    monkeypatch.setattr(engine, "ray", fake := FakeRay())
    fake.remote, fake.places, fake.get = (lambda _: Actor(fake)), 0.0, lambda ref: ref
    values = {**FOUR_CLIENTS, "extract": "heterofl", "model": "mlp", "adapter": "lora:rank=2"}
    weights = tensors(build_model(resolve(values), loading.load(resolve(values)), "mlp"))
    save_file(weights, path := tmp_path / "base.safetensors")
    setup = build_setup(resolve({**values, "base": path}), NoCallback())
    made = engine.RayEngine(setup.runtime(), format_run_file(setup.options, setup.plugins.options()))
    return made._job, path, request.param, setup.builder


def test_a_node_has_the_base_of_the_run_or_begins_no_actor(based):
    job, path, how, builder = based
    actor = engine.ClientActor(job)
    assert actor._runtime.builder.base_hash == builder.base_hash
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    if how == "shared":
        assert engine.ClientActor(job)._runtime.builder.base_hash == builder.base_hash
    else:
        with pytest.raises(UsageError, match=r"the frozen base of this node's model is not that of the run: .* \(--base\)"):
            engine.ClientActor(job)


def test_a_state_that_several_are_sent_is_put_once(monkeypatch):
    monkeypatch.setattr(engine.ray, "put", lambda packed: packed)
    shared, own = {"w": torch.arange(3.0)}, {"w": torch.zeros(3)}
    calls = [Call("train", i, Instruction(1, state, None), {}) for i, state in enumerate([shared, own, shared])]
    found = engine.share_states([*calls, Call("profile", 3, 1, {})])
    assert found.keys() == {id(shared)}
    assert torch.equal(unpack(found[id(shared)])["w"], shared["w"])


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_large_tensors_travel_apart_and_uncopied():
    big = torch.arange(100_000.0)
    data, large = pack({"big": big, "again": big, "small": torch.ones(3)})
    assert len(large) == 1
    assert len(data) < 2000
    back = unpack((data, large))
    assert back["big"] is back["again"]
    assert back["big"].data_ptr() == big.data_ptr()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"client_gpus": 0.5}, "--client-gpus needs --device cuda"),
        ({"device": "cuda:1"}, "with --engine ray, --device is cuda"),
    ],
)
def test_gpus_that_an_actor_cannot_have_are_refused(values, why):
    with pytest.raises(UsageError, match=why):
        engine.count_gpus(resolve(values))
    assert engine.count_gpus(resolve({"device": "cuda", "client_gpus": 0.25})) == 0.25
    assert engine.count_gpus(resolve({"device": "cuda"})) == 1


@pytest.mark.parametrize(("address", "why"), [("127.0.0.1:1", "refused"), ("somewhere", "HOST:PORT"), ("ray://a:1", "from a node")])
def test_no_cluster_there_is_one_sentence_at_once(address, why, monkeypatch):
    monkeypatch.setattr(engine.ray, "init", lambda *_, **__: pytest.fail("Ray would try for minutes"))
    with pytest.raises(UsageError, match=f"no Ray cluster can be used at '{address}'.*{why}"):
        engine.connect(address, [], None)


def places(cpus, gpus=0.0, share=0.0):
    return engine.RayEngine._count_places(SimpleNamespace(_gpus=share), {"CPU": cpus, "GPU": gpus})


def test_a_node_has_as_many_actors_as_its_cores_and_shares_of_gpus():
    assert places(4.0) == 4
    assert places(16.0, 1.0, 0.1) == 10
    assert places(2.0, 8.0, 1.0) == 2
    assert places(8.0, 0.0, 1.0) == 0
