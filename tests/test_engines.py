"""One strategy on every engine: what crosses a process boundary, and that results do not depend on where clients run."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from hetfl.config import resolve
from hetfl.profiling.node import Profile
from hetfl.rounds.messages import Instruction
from hetfl.rounds.records import MalformedError, RecordCodec, decoded, encoded
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import experiment, runner
from hetfl.runs.experiment import prepare
from hetfl.runs.folder import RunFolder
from hetfl.submodel import encoding
from hetfl.training.task import Reply

TINY = {
    "limit": 200, "clients": 4, "rounds": 2, "epochs": 1, "pretrain_steps": 5, "levels": "1:2,0.5:2", "control": False,
    "cohorts": "off", "workers": 2,
}  # fmt: skip

dtypes = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.int8])

quick = settings(deadline=None, max_examples=40)


def tensor(shape, dtype, seed):
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return found > 0 if dtype == torch.bool else found.abs().to(dtype)


@quick
@given(st.lists(st.integers(0, 5), max_size=4), dtypes, st.integers(0, 9))
def test_an_array_comes_back_as_it_was(shape, dtype, seed):
    was = tensor(shape, dtype, seed)
    assert torch.equal(decoded(encoded(was)), was)
    assert torch.equal(decoded(encoded(was.T.contiguous().T if was.ndim == 2 else was)), was)


@quick
@given(st.data())
def test_a_mutated_array_is_refused_or_is_an_array(data):
    """A byte fuzzer: never another error, never more memory than the bytes that came."""
    raw = bytearray(encoded(tensor((4, 3), torch.float32, 0)))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        found = decoded(bytes(raw))
    except MalformedError:
        return
    assert found.numel() * found.element_size() <= len(raw)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def masked():
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(3), "c": torch.tensor(4)}
    masks = {"a": torch.rand(7, 5, generator=generator) > 0.6}
    return {**state, "a": state["a"] * masks["a"]}, masks


def test_what_a_client_is_sent_comes_back_as_it_was():
    state, masks = masked()
    for down in (
        Instruction(3, state, {"g": 4}, None, masks, {"x": torch.ones(2)}, {"a", "c"}, True, True),
        Instruction(1, state, None, "mlp"),
        Instruction(1, {}, {}),
    ):
        back = RecordCodec().open(RecordCodec().seal(down))
        assert (back.round, back.sizes, back.model, back.up, back.held, back.local) == (
            down.round, down.sizes, down.model, down.up, down.held, down.local,
        )  # fmt: skip
        assert same(back.state, down.state)
        assert same(back.masks, down.masks)
        assert same(back.extras, down.extras)


def test_replies_profiles_scores_and_rounds_come_back_as_they_were():
    state, masks = masked()
    reply = Reply(state, 7, {"loss": 0.5}, {"x": torch.ones(2)}, {"g": torch.tensor([0, 2])}, masks)
    back = RecordCodec().open(RecordCodec().seal(RecordCodec().pack(reply, masks)))
    assert back.packed == {"a"}
    assert same(encoding.fill_masked(back.state, masks), state)
    assert (back.examples, back.metrics) == (7, {"loss": 0.5})
    assert same(back.extras, reply.extras)
    assert same(back.kept, reply.kept)
    assert same(back.masks, masks)
    for small in (Profile(0.5, "memory"), {"accuracy": 0.25}, {}, 4):
        assert RecordCodec().open(RecordCodec().seal(small)) == small


def test_payloads_are_as_large_as_they_are_said_to_be():
    state, masks = masked()
    content = RecordCodec().seal(Instruction(1, state, {"g": 1}, None, masks, {"x": torch.ones(2)}))
    arrays = sum(len(name.encode()) + len(array.data) for name, array in content.array_records["arrays"].items())
    beside = sum(len(name.encode()) + len(v) for name, v in content.config_records["config"].items() if isinstance(v, bytes))
    assert arrays + beside == encoding.payload_bytes(state, masks) + encoding.payload_bytes({"extra/x": torch.ones(2)})
    assert encoding.payload_bytes(state, masks, positions=False) == arrays
    assert ArrayRecord(state).count_bytes() > arrays


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.config_records.pop("config"),
        lambda c: c.array_records.pop("arrays"),
        lambda c: c.config_records["config"].__setitem__("form", "code"),
        lambda c: c.config_records["config"].__setitem__("examples", "many"),
        lambda c: c.config_records["config"].__setitem__("values", "{"),
        lambda c: c.config_records["config"].__setitem__("mask/a", b"no array"),
        lambda c: c.config_records["config"].__setitem__("shapes", '{"a": [100000, 100000]}'),
    ],
)
def test_a_spoilt_message_is_refused_in_a_sentence(spoil):
    state, masks = masked()
    content = RecordCodec().seal(RecordCodec().pack(Reply(state, 7, masks=masks), masks))
    spoil(content)
    with pytest.raises(MalformedError, match=r"^\w.*"):
        RecordCodec().open(content)


def ran(engine, **values):
    made = prepare(resolve({**TINY, **values, "engine": engine}), NoCallback())
    try:
        made.rounds.start(made.grid)
    finally:
        made.close()
    metrics = [{k: v for k, v in row.items() if "@" in k or "bytes" in k} for row in made.rounds.rows]
    return made.server.state, metrics, made.rounds.client_rows


def alike(**values):
    (state, metrics, clients), (state2, metrics2, clients2) = ran("local", **values), ran("processes", **values)
    assert all("fault" not in row for row in clients + clients2), [row.get("traceback") for row in clients2]
    assert same(state, state2)
    assert metrics == metrics2


def test_processes_give_the_bits_of_threads():
    alike(extract="fiarse", aggregate="hermes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"extract": "fedconv", "aggregate": "kld"},
        {"extract": "hermes"},
        {"extract": "lgfedavg"},
        {"extract": "heterofl", "norm_policy": "local", "model": "cnn", "model_args": {"widths": [8, 16]}},
    ],
)
def test_every_kind_of_strategy_gives_the_same_in_processes(values):
    alike(**values)


def folder_of(stops, path, engine, rounds=None, **values):
    options = resolve({**TINY, "rounds": 3, **values, "engine": engine})
    runner.run(options, RunFolder(path).open(), stops.Stopping(rounds))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's own processes
@pytest.mark.parametrize(
    "values",
    [{"extract": "fedconv", "aggregate": "kld"}, {"extract": "fiarse", "aggregate": "overlap"}, {"extract": "hermes"}],
    ids=lambda v: v["extract"],
)
def test_flowers_simulation_gives_the_bits_of_the_local_engine(tmp_path, stops, values):
    """Structured, masked and personal strategies, and a run that goes on with the memory on the clients' disks."""
    here, there = folder_of(stops, tmp_path / "local", "local", **values), folder_of(stops, tmp_path / "ray", "ray", **values)
    assert stops.equal(here, there)
    if values["extract"] == "hermes":
        with pytest.raises(stops.Stopped):
            folder_of(stops, tmp_path / "part", "ray", rounds=1, **values)
        stops.go_on(tmp_path / "part")
        assert stops.equal(here, tmp_path / "part")


@pytest.mark.slow
def test_a_process_that_dies_takes_no_more_than_its_client_with_it():
    made = prepare(resolve({**TINY, "extract": "heterofl", "engine": "processes", "workers": 1}), NoCallback())
    try:
        made.rounds.step(1, made.grid)
        for pid in made.grid._crew._all[0]._processes:
            os.kill(pid, signal.SIGKILL)
        made.rounds.step(2, made.grid)
    finally:
        made.close()
    faults = [row["fault"] for row in made.rounds.client_rows if "fault" in row]
    assert faults == ["its profile: the client's process ended before it answered"]
    assert made.rounds.rows[-1]["left out"] == 1


def test_private_names_of_flower_stay_in_one_module_and_this_version_has_them():
    from importlib.metadata import version
    from pathlib import Path

    from hetfl.engines import flower_internals as private

    assert version("flwr").startswith(private.TESTED), f"hetfl is tested with flwr {private.TESTED}"
    root = Path(private.__file__).parents[1]
    for path in [*root.glob("core/*.py"), *root.glob("plugins/*.py"), *root.glob("cli/*.py")]:
        text = path.read_text()
        assert path.name == "private.py" or ("flwr.supercore" not in text and '"_message_id"' not in text), path


def test_an_unfit_flower_is_said_in_a_sentence(monkeypatch):
    import importlib
    import sys

    from hetfl.engines import flower_internals as private
    from hetfl.errors import UsageError

    monkeypatch.setitem(sys.modules, "flwr.supercore.run", None)
    with pytest.raises(UsageError, match=r"flwr .* lacks what hetfl needs of it .* install flwr 1\.41"):
        importlib.reload(private)


def test_flowers_client_mods_work_on_submodels(tmp_path):
    from flwr.app import Message

    from hetfl.config import write
    from hetfl.engines.flower.export import build_mods
    from hetfl.engines.flower_internals import number
    from hetfl.engines.local import context, node
    from hetfl.engines.node import NodeConfig, client_app

    made = prepare(resolve({**TINY, "extract": "heterofl", "aggregate": "overlap", "levels": "0.5:1"}), NoCallback())
    plan = made.server.select(lambda size: torch.arange((size + 1) // 2))
    state, place = plan.take(made.server.state), NodeConfig(write(experiment.resolved(made), made.plugins.options()), tmp_path)
    moved = []
    for mods in ([], [["LocalDpMod", 0.01, 0.0, 8.0, 1e-5], ["message_size_mod"], ["arrays_size_mod"]]):
        message = Message(RecordCodec().seal(Instruction(1, state, plan.sizes)), node(0), "train", group_id="1")
        number(message, "m")
        reply = RecordCodec().open(client_app(lambda _: place, build_mods(mods))(message, context(0, 4)).content)
        moved.append(float(torch.stack([(reply.state[n] - state[n]).norm() for n in state]).norm()))
    assert moved[0] > 0.02
    assert moved[1] == pytest.approx(0.01, rel=1e-3)
    assert list((tmp_path / "0").glob("*.safetensors"))
