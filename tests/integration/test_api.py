"""`import hetfl` for people: runs in memory, objects in place of names, the same bits as the command line's."""

from __future__ import annotations

import doctest
import inspect
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import hetfl
from helpers.terminal import stop_python
from hetfl import Merged, Plan, Plugin, RunError, Updates, UsageError, hookimpl, mean, prefix
from hetfl.data import catalog
from hetfl.models import factory
from hetfl.runs import api

SMALL = {
    "extract": "heterofl", "model": "mlp", "model_args": {"hidden": [12, 8]}, "limit": 200, "clients": 3, "rounds": 2, "epochs": 1,
    "pretrain_steps": 3, "control": False, "partition": "iid", "progress": False, "levels": "1,0.5,0.5",
}  # fmt: skip


def small(**more):
    return hetfl.run(**{**SMALL, **more})


@pytest.fixture(scope="module")
def first():
    return small()


class Net(nn.Module):
    def __init__(self, classes=3, hidden=10):
        super().__init__()
        self.first, self.last = nn.Linear(8, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.flatten(1))))


def numbers(count=240, classes=3):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % classes
    x = torch.randn(count, 8, generator=generator)
    x[torch.arange(count), y] += 4
    return x, y


OWN = {**SMALL, "limit": None, "model": None, "model_args": None}


class Halves(Plugin):
    """The leading half of every group, and a count of the rounds that this object has seen."""

    ratio: float = 0.5
    _rounds: int = 0

    @hookimpl
    def extract(self, server, clients, round) -> list[Plan]:
        self._rounds += 1
        server.notes.append(f"{self._rounds} rounds at {self.ratio}")
        return [server.select(prefix(self.ratio)) for _ in clients]


class Plain(Plugin):
    @hookimpl
    def aggregate(self, server, updates, round) -> Merged:
        updates = Updates(updates, server.state)
        return Merged(mean(updates, [1.0] * len(updates)))


def test_importing_hetfl_imports_nothing_heavy():
    code = (
        "import hetfl, sys; names = {'run', 'load', 'resume', 'matrix', 'Run'}; assert names <= {*dir(hetfl)} & {*hetfl.__all__};"
        "heavy = {'torch', 'flwr', 'pandas', 'rich', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docstrings_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = 0
    for name in ("run", "load", "resume", "matrix"):
        for test in doctest.DocTestFinder().find(getattr(api, name), name, globs={}):
            runner = doctest.DocTestRunner()
            runner.run(test)
            assert runner.failures == 0
            found += bool(test.examples)
    assert found == 4


def test_a_run_in_memory_has_its_tables_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = small()
    assert run.path is None
    assert list(tmp_path.iterdir()) == []
    assert run.metrics["round"].tolist() == [1, 2]
    assert len(run.clients) == 6
    assert run.summary["rounds"] == 2
    assert run.options.rounds == 2
    assert run.options.aggregate == "overlap"
    assert "heterofl x overlap on digits" in repr(run)
    assert "<table>" in run._repr_html_()


def test_the_model_scores_as_the_run_says(first):
    from hetfl.data.loading import load

    x, y = load(first.options).test.all()
    with torch.no_grad():
        right = (first.model(x).argmax(1) == y).double().mean()
    assert float(right) == pytest.approx(first.metrics["global@test"].iloc[-1])
    assert not first.model.training
    assert first.model is first.model


def test_a_submodel_is_the_leading_part(first):
    half, whole = first.submodel(0.5), first.model
    weights, part = dict(whole.named_parameters()), dict(half.named_parameters())
    assert [t.shape for t in part.values()] != [t.shape for t in weights.values()]
    for name, tensor in part.items():
        assert torch.equal(tensor, weights[name][tuple(slice(n) for n in tensor.shape)])
    assert half(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert torch.equal(dict(first.submodel(1).named_parameters())["1.weight"], weights["1.weight"])
    with pytest.raises(UsageError, match="width ratio in"):
        first.submodel(0)


def test_the_same_bits_as_a_folder_and_as_the_command_line(first, tmp_path):
    written = small(out=tmp_path / "a")
    assert written.path == tmp_path / "a"
    assert written.summary["weights sha256"] == first.summary["weights sha256"]
    loaded = hetfl.load(tmp_path / "a")
    untimed = [name for name in first.metrics if "seconds" not in name]
    pd.testing.assert_frame_equal(loaded.metrics[untimed], first.metrics[untimed])
    pd.testing.assert_frame_equal(loaded.clients, written.clients)
    assert torch.equal(loaded.model(torch.ones(1, 1, 8, 8)), first.model(torch.ones(1, 1, 8, 8)))
    words = ["--extract", "heterofl", "--model", "mlp", "--model-args", "hidden=[12,8]", "--limit", "200", "--clients", "3"]
    words += [
        "--rounds",
        "2",
        "--epochs",
        "1",
        "--pretrain-steps",
        "3",
        "--no-control",
        "--partition",
        "iid",
        "--levels",
        "1,0.5,0.5",
    ]
    command = [sys.executable, "-m", "hetfl.cli.main", "run", *words, "--out", str(tmp_path / "b")]
    subprocess.run(command, check=True, capture_output=True)
    assert hetfl.load(tmp_path / "b").summary["weights sha256"] == first.summary["weights sha256"]


def test_threads_get_the_same_and_the_process_keeps_its_settings(first):
    def go():
        found.append(small().summary["weights sha256"])

    found, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    state = (
        torch.get_rng_state(),
        datasets.logging.get_verbosity(),
        datasets.are_progress_bars_disabled(),
        dict(os.environ),
        sys.stderr,
    )
    try:
        threads = [threading.Thread(target=go) for _ in range(2)]
        for thread in threads:
            thread.start()
        go()
        for thread in threads:
            thread.join()
        assert found == [first.summary["weights sha256"]] * 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled(), dict(os.environ), sys.stderr)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rouns": 3}, "unknown option 'rouns'; did you mean 'rounds'"),
        ({"fedconv.epochs": 3}, 'set={"fedconv": {"epochs": …}}'),
        ({"set": {"overlap.weighting": "samples"}}, 'set={"overlap": {"weighting": …}}'),
        ({"rounds": 0}, "rounds: "),
        ({"data": "digits", "dataset": "digits"}, "one option"),
        ({"model": "mpl"}, "did you mean 'mlp'"),
        ({"extract": "heterofol"}, "did you mean 'heterofl'"),
        ({"model": 3}, "give a name, a torch.nn.Module or a factory"),
        ({"extract": nn.Linear(1, 1)}, "a Plugin class or an object of one"),
        ({"callback": SimpleNamespace(on_round_ended=print)}, "did you mean 'on_round_end'"),
        ({"progress": "yes"}, "progress is True, False or 'auto'"),
        ({"engine": "flower"}, "exported apps"),
        ({"ray_address": "10.0.0.9:1"}, "ray_address is for engine ray, not local"),
        ({"clients": 500}, "clients 500 is more than"),
    ],
)
def test_refusals_are_one_sentence_in_a_programs_words(given, sentence):
    with pytest.raises(UsageError) as refused:
        small(**given)
    assert sentence in str(refused.value)
    assert "--" not in str(refused.value)


def test_a_module_is_copied_and_its_weights_are_the_first():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    run = hetfl.run(**{**OWN, "model": net, "data": numbers(), "pretrain_steps": 0, "rounds": 4, "epochs": 10})
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert isinstance(run.model, Net)
    assert run.metrics["global@test"].iloc[-1] > 0.8
    assert run.options.model.startswith("object:Net-")
    frozen = hetfl.run(**{**OWN, "model": net, "data": numbers(), "pretrain_steps": 0, "rounds": 1, "lr": 1e-12})
    assert all(torch.allclose(before[name], tensor) for name, tensor in frozen.model.state_dict().items())


def test_factories_get_what_they_ask_for():
    seen = []

    def make(classes, inputs):
        seen.append((classes, inputs.shape))
        return Net(classes)

    run = hetfl.run(**{**OWN, "model": make, "data": numbers()})
    assert set(seen) == {(3, (8,))}
    assert run.model.last.out_features == 3
    assert hetfl.run(**{**OWN, "model": lambda: Net(), "data": numbers()}).model.first.in_features == 8


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y, self.classes = x, y, ["a", "b", "c"]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def test_data_of_every_form_are_the_same_data():
    x, y = numbers()
    table = datasets.Dataset.from_dict({"features": x.tolist(), "label": y.tolist()})
    forms = {
        "tensors": (x, y), "arrays": (x.numpy(), y.numpy()), "TensorDataset": TensorDataset(x, y),
        "list": list(zip(x, y, strict=True)),
        "split": {"train": (x, y)}, "table": table, "tables": datasets.DatasetDict(train=table),
    }  # fmt: skip
    shas = {name: hetfl.run(**{**OWN, "model": Net, "data": data}).summary["weights sha256"] for name, data in forms.items()}
    assert len(set(shas.values())) == 1, shas
    named = hetfl.run(**{**OWN, "model": Net, "data": {"train": Items(x[60:], y[60:]), "test": Items(x[:60], y[:60])}})
    assert named.summary["weights sha256"] != shas["tensors"]
    assert named._folder.read("run.json")["classes"] == ["a", "b", "c"]
    assert named._folder.read("run.json")["examples"]["test"] == 60


def test_token_ids_are_not_scaled():
    ids, y = torch.randint(0, 40, (120, 6), generator=torch.Generator().manual_seed(0)), torch.arange(120) % 2

    class Bag(nn.Module):
        def __init__(self, vocab):
            super().__init__()
            self.table, self.last = nn.Embedding(vocab, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.table(x).mean(1))

    run = hetfl.run(**{**OWN, "model": Bag, "data": (ids, y)})
    assert run.model.table.num_embeddings == int(ids.max()) + 1
    assert run.submodel(0.5)(ids[:2]).shape == (2, 2)


def test_pictures_of_pillow_become_channels_first():
    from PIL import Image

    pictures = [(Image.fromarray(np.full((8, 8, 3), i % 2 * 200, np.uint8)), i % 2) for i in range(60)]
    run = hetfl.run(**{**OWN, "model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 2)), "data": pictures})
    assert run._folder.read("run.json")["input shape"] == [3, 8, 8]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (3, "the train data are a int"),
        ({"tain": numbers()}, "did you mean 'train'"),
        ({"test": numbers()}, "need a train split"),
        ((torch.zeros(3, 2), [0, None, 1]), "labels must be whole numbers or names"),
        ((torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64)), "3 inputs and 4 labels"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "(N, …) is needed"),
        ((torch.full((3, 2), torch.nan), [0, 1, 0]), "not finite"),
        ((torch.zeros(3, 2), [0, 1, 0], [1, 1, 1]), "3 parts"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 1)], "different shapes"),
        ([torch.zeros(2)], "no pair (x, y)"),
        ({"train": (torch.zeros(3, 2), [0, 1, 0]), "test": (torch.zeros(3, 4), [0, 1, 0])}, "differ in shape"),
        ({"train": datasets.Dataset.from_dict({"features": [[1.0]], "label": [0]}), "test": numbers()}, "all are"),
    ],
)
def test_bad_data_are_refused_in_one_sentence(data, sentence):
    with pytest.raises(UsageError) as refused:
        hetfl.run(**{**OWN, "model": Net, "data": data})
    assert sentence in str(refused.value)


def test_owners_need_a_column():
    with pytest.raises(UsageError, match="do not say whose each example is"):
        hetfl.run(**{**OWN, "model": Net, "data": numbers(), "partition": "natural"})
    x, y = numbers()
    table = datasets.Dataset.from_dict({"features": x.tolist(), "label": y.tolist(), "user": [i % 4 for i in range(len(y))]})
    assert hetfl.run(**{**OWN, "model": Net, "data": table, "partition": "natural"}).summary["clients"] == 4


def test_plugins_as_objects_and_classes():
    half = Halves(ratio=0.25)
    run = small(extract=half, aggregate=Plain)
    assert half._rounds == 0
    assert run.summary["notes"][:2] == ["1 rounds at 0.25", "2 rounds at 0.25"]
    assert run.options.set["extract"] == {"Halves": {"ratio": 0.25}}
    assert run.model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert small(extract=half).summary["notes"][0] == "1 rounds at 0.25"
    assert small(extract=Halves, set={"Halves": {"ratio": 1.0}}).summary["notes"][0] == "1 rounds at 1.0"
    assert small(extract=half, set={"Halves": {"ratio": 1.0}}).summary["notes"][0] == "1 rounds at 1.0"
    with pytest.raises(UsageError, match=r"Halves\.ratio"):
        small(extract=Halves, set={"Halves": {"ratio": "wide"}})
    assert run._folder.read("run.json")["given as objects"]["extract"]["class"].endswith("Halves")


def test_objects_are_forgotten_with_the_last_run_that_needs_them():
    run = hetfl.run(**{**OWN, "model": Net(), "data": numbers(), "rounds": 1})
    assert run.options.model in factory.LOCAL
    assert run.options.dataset in catalog.LOCAL
    names = run.options.model, run.options.dataset
    del run
    assert names[0] not in factory.LOCAL
    assert names[1] not in catalog.LOCAL


@pytest.mark.parametrize("engine", ["processes", "ray"])
@pytest.mark.parametrize(
    ("given", "instead"),
    [({"model": Net}, "module:factory"), ({"data": numbers()}, "a folder or a file"), ({"extract": Halves}, "module:Class")],
)
def test_objects_and_other_processes_do_not_meet(engine, given, instead):
    with pytest.raises(UsageError, match=rf"{engine}.*{instead}"):
        hetfl.run(**{**OWN, **given, "engine": engine})


def test_processes_run_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = small(engine="processes", workers=1)
    assert run.summary["weights sha256"] == small(vmap="off").summary["weights sha256"]
    assert list(tmp_path.glob("hetfl-*")) == []


def test_callbacks_have_the_methods_that_they_have():
    class Seen:
        def __init__(self):
            self.calls = []

        def on_run_start(self, info):
            self.calls.append(("start", info["options"].rounds))

        def on_round_start(self, round):
            self.calls.append(("round", round))

        def on_round_end(self, row):
            self.calls.append(("end", row["round"], row["clients"]))

        def on_run_end(self, summary):
            self.calls.append(("over", summary["rounds"]))

    class Phases:
        def __init__(self):
            self.names = set()

        def on_phase(self, round, name):
            self.names.add(name)

    seen, phases = Seen(), Phases()
    small(callback=[seen, phases])
    assert seen.calls == [("start", 2), ("round", 1), ("end", 1, 3), ("round", 2), ("end", 2, 3), ("over", 2)]
    assert {"data", "model", "fit", "aggregate", "evaluate"} <= phases.names


def test_progress_shows_where_it_is_asked_for(capsys):
    small(progress=True)
    assert "2/2  global@test" in capsys.readouterr().out
    small(progress="auto")
    assert capsys.readouterr().out == ""


def test_a_notebook_gets_one_line_that_changes(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=lambda *_, **__: handle))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    small(progress="auto", rounds=1)
    assert "starting" in shown[0]
    assert "1/1  global@test" in shown[-1]


class Stop:
    def on_round_end(self, row):
        raise RuntimeError("enough")


def test_a_run_that_was_stopped_goes_on(tmp_path):
    net, whole = Net(), {**OWN, "data": numbers(), "rounds": 2}
    ended = hetfl.run(**{**whole, "model": net, "extract": Halves(ratio=0.5)})
    with pytest.raises(RuntimeError, match="enough"):
        hetfl.run(**{**whole, "model": net, "extract": Halves(ratio=0.5), "out": tmp_path / "a", "callback": Stop()})
    part = hetfl.load(tmp_path / "a")
    assert part.metrics["round"].tolist() == [1]
    with pytest.raises(UsageError, match="has not ended yet"):
        _ = part.summary
    with pytest.raises(UsageError, match="was given as an object"):
        _ = part.model
    with pytest.raises(UsageError, match="not what this run began with"):
        hetfl.resume(tmp_path / "a", model=Net(), data=numbers(), extract=Halves, progress=False)
    again = {"model": net, "data": numbers(), "extract": Halves(ratio=0.5)}
    resumed = hetfl.resume(tmp_path / "a", **again, progress=False)
    assert resumed.summary["weights sha256"] == ended.summary["weights sha256"]
    assert hetfl.load(tmp_path / "a", model=Net(), extract=Halves).submodel(0.5).first.out_features == 5
    with pytest.raises(UsageError, match="did you mean 'model'"):
        hetfl.load(tmp_path / "a", modle=net)
    with pytest.raises(UsageError, match="is no run folder"):
        hetfl.load(tmp_path / "b")


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError):
        small(out=tmp_path / "a", clients=500)
    assert not (tmp_path / "a").exists()
    small(out=tmp_path / "a", rounds=1)
    with pytest.raises(UsageError, match="not empty"):
        small(out=tmp_path / "a", rounds=1)


def test_a_matrix_ranks_names_and_objects(tmp_path):
    base = {name: value for name, value in SMALL.items() if name not in ("extract", "rounds")}
    found = hetfl.matrix(["heterofl", Halves(ratio=1.0)], "overlap", seeds=2, controls=False, rounds=1, **base)
    assert len(found.results) == 4
    assert found.results["status"].tolist() == ["ok"] * 4
    assert {name.partition("-")[0] for name in found.leaderboard["extract"]} == {"heterofl", "Halves"}
    assert found.path is None
    assert "Matrix(4 runs)" in repr(found)
    with pytest.raises(UsageError, match="did you mean 'global@test'"):
        found.rank("global@tset")
    out = {**base, "out": tmp_path, "controls": False, "rounds": 1}
    written = hetfl.matrix("heterofl", seeds=[0], sweep={"lr": [0.01, 0.1]}, **out)
    assert written.results["lr"].tolist() == [0.01, 0.1]
    assert (tmp_path / "leaderboard.csv").exists()
    again = hetfl.matrix("heterofl", seeds=[0], sweep={"lr": [0.01, 0.1]}, **out)
    assert [trial.cached for trial in again.trials] == [True, True]


def test_a_run_that_fails_is_a_row_of_the_matrix():
    class Broken(Plugin):
        @hookimpl
        def extract(self, server, clients, round):
            raise RunError("no luck")

    base = {name: value for name, value in SMALL.items() if name not in ("extract", "rounds")}
    found = hetfl.matrix([Broken, "heterofl"], "overlap", seeds=1, controls=False, rounds=1, **base)
    assert found.results["status"].tolist() == ["failed", "ok"]
    assert "1 failed, the first: no luck" in repr(found)


def test_editors_see_every_option():
    shown = inspect.signature(hetfl.run).parameters
    assert {"rounds", "seed", "levels", "set", "model", "data"} <= shown.keys()
    assert shown["rounds"].default == 10


def test_a_run_that_asks_no_client_has_an_empty_table():
    run = small(extract="serveralone", aggregate="overlap")
    assert run.clients.empty
    assert len(run.metrics) == run.summary["rounds"]


STOPPED = """
import hetfl

class Say:
    def on_phase(self, round, name):
        print(round, name, flush=True)

class Loud(hetfl.Plugin):
    @hetfl.hookimpl(wrapper=True)
    def fit(self, task):
        print("training", flush=True)
        return (yield)

if __name__ == "__main__":
    long = dict(limit=600, clients=4, rounds=1000, epochs=20, pretrain_steps=3, control=False, vmap="off", progress=False)
    try:
        CALL
    except KeyboardInterrupt:
        print("it arrived", flush=True)
        raise
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "when"),
    [
        ("hetfl.run(extract='heterofl', callback=Say(), **long)", "2 fit"),
        ("hetfl.run(extract='heterofl', callback=Say(), engine='processes', **long)", "2 fit"),
        ("hetfl.matrix('heterofl', 'overlap', wrap=Loud, seeds=1, controls=False, **long)", "training"),
    ],
    ids=["local", "processes", "matrix"],
)
def test_ctrl_c_arrives_in_a_script_and_ends_it(tmp_path, call, when):
    """KeyboardInterrupt is raised where hetfl was called, and the script ends as Python ends by it, not aborted within torch."""
    (tmp_path / "script.py").write_text(STOPPED.replace("CALL", call))
    ended = stop_python([str(tmp_path / "script.py")], when)
    assert "it arrived" in ended.said
    assert ended.code == -signal.SIGINT
    assert "terminate called" not in ended.said
    assert ended.seconds < 20  # most of which Python takes to leave
