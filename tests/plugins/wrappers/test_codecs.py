"""Codecs: unbiased where they say so, exact where nothing is lost, the same on every engine, and no way to spoil a round."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.runs import EXTRACTIONS, ready
from helpers.states import same
from hetfl import Plugin, hookimpl
from hetfl.engines.flower.records import RecordCodec
from hetfl.hooks.manager import PluginManager
from hetfl.plugins.wrappers.codec import PLACES, fingerprint
from hetfl.plugins.wrappers.quantize import Quantize
from hetfl.plugins.wrappers.sign import Sign
from hetfl.plugins.wrappers.topk import TopK
from hetfl.rng import stream
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.loop import run_round
from hetfl.submodel import encoding


def task(places=0, memory=None, round=1):
    """What a codec needs of a client's task."""
    own = {} if memory is None else memory
    extras = {PLACES: torch.tensor(places)}
    return SimpleNamespace(extras=extras, client_state=own, stream=lambda purpose: stream(3, purpose, round, 0))


def through(codec, update, at=None):
    """What arrives of an update."""
    return codec.decode(codec.encode(at or task(), update, update), update)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([8, 16]), st.integers(0, 99), st.sampled_from([1e-20, 1e-4, 1.0, 1e5, 1e30]), st.integers(1, 300))
def test_quantising_is_unbiased_and_within_a_step(bits, seed, size, block):
    """The mean over many draws is the update, to five standard errors; a step is the block's largest over 127 or 32767."""
    update, codec, number = {"w": size * drawn(seed, 7, 30)}, Quantize(bits=bits, block=block), 400
    arrived = torch.stack([through(codec, update, task(round=r))["w"] for r in range(number)]).double()
    blocks = update["w"].flatten().split(block)
    step = torch.cat([(b.abs().max() / (2 ** (bits - 1) - 1)).expand(len(b)) for b in blocks]).double().view(7, 30)
    error = arrived - update["w"].double()
    assert bool(arrived.isfinite().all())
    assert bool((error.abs() <= step * (1 + 1e-3)).all())
    assert bool((error.mean(0).abs() <= 5 * 0.5 * step / number**0.5 + 1e-6 * update["w"].abs()).all())


def test_small_updates_do_not_drown_and_one_outlier_spoils_its_block_alone():
    """Weights of size 1, an update of rms 1e-4: it is the update that is rounded."""
    update = {"w": 1e-4 * drawn(0, 100, 100)}
    spoilt = {"w": update["w"].clone()}
    spoilt["w"][0, 0] = 1e5
    for change, rest in ((update, slice(None)), (spoilt, slice(3, None))):
        arrived = through(Quantize(), change)["w"][rest].flatten()
        assert float(torch.cosine_similarity(arrived, change["w"][rest].flatten(), 0)) > 0.999
    assert through(Quantize(), spoilt)["w"][0, 0] == pytest.approx(1e5, rel=0.01)
    assert through(Quantize(bits=16), spoilt)["w"].isfinite().all()


@pytest.mark.parametrize("codec", [TopK(share=0.1), Sign(), Quantize(feedback=True)])
def test_what_a_round_loses_arrives_later(codec):
    """The sum of what arrived is that of the updates but for the memory; an update of nothing sends what is due."""
    memory, updates = {}, [{"w": drawn(r, 20, 20), "b": drawn(r, 5)} for r in range(6)]
    arrived = [through(codec, update, task(memory=memory, round=r)) for r, update in enumerate(updates)]
    for name in ("w", "b"):
        due = memory.get(f"{type(codec).__name__}/{name}", torch.zeros(()))
        assert torch.allclose(sum(a[name] for a in arrived) + due, sum(u[name] for u in updates), atol=1e-4)
    assert float(memory[f"{type(codec).__name__}/w"].norm()) > 0
    assert float(through(codec, {"w": torch.zeros(20, 20), "b": torch.zeros(5)}, task(memory=memory, round=9))["w"].norm()) > 0


def test_a_client_of_another_plan_has_nothing_to_make_up_for():
    memory, update = {}, {"w": drawn(0, 20, 20)}
    through(TopK(), update, task(1, memory))
    other = through(TopK(), update, task(2, memory))
    assert torch.equal(other["w"], through(TopK(), update)["w"])
    assert not torch.equal(through(TopK(), update, task(2, memory))["w"], other["w"])


def test_plans_are_told_apart_by_the_entries_that_they_take():
    made = ready(0, extract="heterofl")
    server = made.server
    whole, half = (server.select(lambda n, r=r: torch.arange(round(r * n))) for r in (1.0, 0.5))
    rolled = server.select(lambda n: torch.arange(n // 2) + 1)
    name, bias = next((n, t) for n, t in half.take(server.state).items() if t.ndim == 1)
    masked = replace(half, masks={name: torch.arange(len(bias)) > 2})
    assert len({int(fingerprint(server, plan)) for plan in (whole, half, rolled, masked)}) == 4
    assert torch.equal(fingerprint(server, half), fingerprint(server, replace(half, masks={})))


@pytest.mark.parametrize(("extract", "stays"), [("heterofl", True), ("fedrolex", False)])
def test_rolling_submodels_are_told_apart_in_a_run(extract, stays):
    """FedRolex's models have new channels, or the same in another order, every round, so nothing is carried on to others."""
    made = ready(0, extract=extract, aggregate="overlap", wrap=("topk",))
    seen = []
    for r in (1, 2):
        run_round(made.state, r, made.engine)
        seen.append({i: int(s["memory"][PLACES]) for i, s in made.engine.client_states().items()})
    assert [seen[0][i] == seen[1][i] for i in range(4)] == [stays] * 4


class Plain(Plugin):
    """A codec that loses nothing."""

    @hookimpl
    def encode(self, update):
        return {f"{name}!": t + 0 for name, t in update.items()}

    @hookimpl
    def decode(self, encoded):
        return {name[:-1]: t for name, t in encoded.items()}


@pytest.mark.parametrize("extract", [e for i, e in enumerate(EXTRACTIONS) if i % 2 or e in ("fedmd", "lotteryfl", "heterofl")])
def test_a_codec_that_loses_nothing_changes_nothing(monkeypatch, extract):
    """Cut, masked, personal, deep and rolling submodels: what a client changed is put on what it was sent, entry by entry."""
    from hetfl.rounds import setup

    values = {"model": "cnn", "model_args": {"widths": [8, 8]}} if extract in ("heterofl", "hermes", "scalefl", "fiarse") else {}
    values |= {"set": {extract: {"threshold": 0.0}}} if extract in ("lotteryfl", "hermes") else {}
    values |= {"server_data": 0.2, "vmap": "off"}
    whole, load = ready(2, extract=extract, **values), setup.loading.load_plugins
    monkeypatch.setattr(setup.loading, "load_plugins", lambda o: PluginManager({**load(o).plugins, "wrap.plain": Plain()}))
    coded = ready(2, extract=extract, **values)
    assert not any("fault" in row for row in coded.state.client_rows), coded.state.client_rows[0]["fault"]
    for name, t in whole.server.state.items():
        assert torch.allclose(t.double(), coded.server.state[name].double(), atol=1e-4), name


def test_codecs_stand_within_each_other():
    """The last wrap is the innermost: the values that topk leaves are quantised, and their places travel as they are."""
    made = ready(1, extract="full", wrap=("quantize", "topk"), set={"topk": {"share": 0.5}})
    alone = ready(1, extract="full", wrap=("topk",), set={"topk": {"share": 0.5}})
    exact = ready(1, extract="full")
    assert not any("fault" in row for row in made.state.client_rows)
    bytes_up = [m.state.rows[0]["bytes up"] for m in (made, alone, exact)]
    assert bytes_up == sorted(bytes_up)
    assert bytes_up[0] < 0.8 * bytes_up[1]
    other = ready(1, extract="full", wrap=("topk", "quantize"))
    assert "give topk as a later --wrap" in other.state.client_rows[0]["fault"]


@pytest.mark.parametrize("extract", ["heterofl", "fiarse", "hermes", "lgfedavg", "scalefl"])
def test_what_a_download_loses_is_not_lost_from_the_global_model(extract):
    """Clients that change nothing of what they got leave the server with what it had."""
    lossy = {"wrap": ("quantize",), "set": {"quantize": {"down": True}}}
    made = ready(0, extract=extract, lr=1e-30, **lossy)
    before, full = {n: t.clone() for n, t in made.server.state.items()}, ready(1, extract=extract, lr=1e-30)
    run_round(made.state, 1, made.engine)
    assert not any("fault" in row for row in made.state.client_rows)
    assert all(torch.allclose(t, made.server.state[n], atol=1e-6) for n, t in before.items() if n in encoding.list_updated(before))
    assert made.state.rows[0]["bytes down"] < 0.5 * full.state.rows[0]["bytes down"]


SPOILT = {
    "a place too far": ("topk", lambda e, n: {**e, f"{n}/at": e[f"{n}/at"] + 30_000}, "positions of"),
    "a place twice": ("topk", lambda e, n: {**e, f"{n}/at": e[f"{n}/at"] * 0}, "positions of"),
    "values without places": ("topk", lambda e, n: {k: t for k, t in e.items() if k != f"{n}/at"}, "not ("),
    "too few steps": ("quantize", lambda e, n: {**e, f"{n}/step": e[f"{n}/step"][:1]}, "steps for blocks"),
    "an infinite step": ("quantize", lambda e, n: {**e, f"{n}/step": e[f"{n}/step"] / 0}, "NaN or infinity"),
    "a step that overflows": ("quantize", lambda e, n: {**e, f"{n}/step": e[f"{n}/step"] * 0 + 3e38}, "NaN or infinity"),
    "too few codes": ("quantize", lambda e, n: {**e, n: e[n][:300], f"{n}/step": e[f"{n}/step"][:2]}, "not ("),
    "a bit too few": ("sign", lambda e, n: {**e, f"{n}/number": e[f"{n}/number"] + 9}, "bytes of signs"),
    "a huge number": ("sign", lambda e, n: {**e, f"{n}/number": torch.tensor(2**31 - 1, dtype=torch.int32)}, "bytes of signs"),
    "a tensor missing": ("sign", lambda e, n: {k: t for k, t in e.items() if not k.startswith(n)}, "not those that were sent"),
    "a tensor more": ("sign", lambda e, n: {**e, "x": torch.ones(2)}, "not those that were sent"),
    "a type that does not travel": ("sign", lambda e, n: {**e, n: torch.ones(2, dtype=torch.complex64)}, "does not travel"),
    "no tensor": ("sign", lambda e, n: {**e, n: "bits"}, "does not travel"),
    "far too much": ("sign", lambda e, n: {**e, n: torch.ones(1 << 20, dtype=torch.uint8)}, "are taken"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_update_that_cannot_be_decoded_leaves_its_client_out(monkeypatch, name):
    wrap, spoil, said = SPOILT[name]
    train = ClientRuntime.train

    def answer(self, client, sent, state):
        reply = train(self, client, sent, state)
        if client == 1:
            reply.encoded = spoil(reply.encoded, next(n for n, t in sent.state.items() if t.numel() > 500))
        return reply

    monkeypatch.setattr(ClientRuntime, "train", answer)
    made = ready(1, extract="full", wrap=(wrap,), vmap="off")
    faults = {row["client"]: row["fault"] for row in made.state.client_rows if "fault" in row}
    assert faults.keys() == {1}
    assert said in faults[1]


@pytest.mark.parametrize("wrap", [("quantize",), ("topk",), ("sign",), ("quantize", "topk")])
@pytest.mark.parametrize("extract", ["heterofl", "lotteryfl", "hermes"])
def test_flower_messages_carry_the_same_bits_in_as_many_bytes(monkeypatch, wrap, extract):
    """A run whose replies go through Flower's records is the run in which they are handed over."""
    values = {"extract": extract, "aggregate": "overlap", "wrap": wrap, "vmap": "off"}
    values |= {"set": {"quantize": {"down": True}}} if "quantize" in wrap else {}
    here = ready(2, **values)
    train, sizes, down = ClientRuntime.train, [], []

    def weigh(content):
        arrays = sum(len(name.encode()) + len(array.data) for name, array in content.array_records["arrays"].items())
        parts = {
            k.split("/", 1)[1]: v
            for k, v in content.config_records["config"].items()
            if k.startswith(("encoded/", "extra/", "kept/"))
        }
        return arrays + sum(len(k.encode()) + len(v) for k, v in parts.items())

    def carried(self, client, sent, state):
        content = RecordCodec().encode(sent)
        down.append((client, weigh(content) + sum(encoding.mask_bytes(*named) for named in sent.masks.items())))
        sent = RecordCodec().decode(content)
        reply = train(replace(self, pack=RecordCodec().pack), client, sent, state)
        content = RecordCodec().encode(reply)
        sizes.append((client, weigh(content) + sum(encoding.mask_bytes(*named) for named in reply.masks.items())))
        return RecordCodec().decode(content)

    monkeypatch.setattr(ClientRuntime, "train", carried)
    there = ready(2, **values)
    assert same(here.server.state, there.server.state)
    for column, weighed in (("bytes up", sizes), ("bytes down", down)):
        rows = [(row["client"], row[column]) for row in there.state.client_rows]
        assert rows == [(row["client"], row[column]) for row in here.state.client_rows]
        assert sorted(rows) == sorted(weighed)


def test_topk_finds_its_places_in_large_tensors():
    """Places beyond the reach of 16 bits take 32."""
    update = {"w": torch.zeros(70_000)}
    update["w"][torch.tensor([3, 40_000, 69_999])] = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(through(TopK(share=3 / 70_000), update)["w"], update["w"])
