"""Data sets by name: from a folder of them, from the Hub, and those that nobody can download."""

from __future__ import annotations

import datasets
import httpx
import huggingface_hub
import pytest

from helpers.data_files import IMAGES, png, refused, same, write
from hetfl.config import DataOptions
from hetfl.data.catalog import KNOWN, find_dataset
from hetfl.data.loading import load


def test_short_names_are_looked_for_on_the_shelf(tmp_path, monkeypatch):
    images = {"image": [png(i) for i in range(40)], "label": [0, 1] * 20}
    write(tmp_path / "mnist", images, features=IMAGES)
    monkeypatch.setenv("HETFL_DATA", str(tmp_path))
    federation = load(DataOptions(dataset="mnist", clients=1, partition="iid", server_data=0))
    values = (federation.test.x[:, 0, 0, 0] * 0.3081 + 0.1307) * 255
    assert values.round().int().tolist() == list(range(40))
    assert find_dataset("ylecun/mnist").known is KNOWN["mnist"]
    monkeypatch.delenv("HETFL_DATA")
    assert find_dataset("mnist").hub == "ylecun/mnist"


def hub(monkeypatch, answer, splits=None):
    def dataset_info(self, name, **_):
        if isinstance(answer, Exception):
            raise answer
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=answer)

    def load_dataset(name, revision=None):
        assert revision == answer
        return splits

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_data_sets_are_cached_too(cache, monkeypatch):
    split = datasets.Dataset.from_dict({"image": [png(i) for i in range(40)], "label": [0, 1] * 20}, features=IMAGES)
    hub(monkeypatch, "abc", datasets.DatasetDict(train=split, test=split))
    options = DataOptions(dataset="some/thing", clients=2, partition="iid")
    first = load(options)
    assert (first.dataset, first.shape, len(first.test)) == ("some/thing", (1, 4, 4), 40)
    hub(monkeypatch, httpx.ConnectError("down"))
    assert same(load(options), first)


NOT_FOUND = huggingface_hub.errors.RepositoryNotFoundError(
    "404", response=httpx.Response(404, request=httpx.Request("GET", "http://x"))
)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            httpx.ConnectError("no route"),
            r"cannot load data set 'a/b': .*Hub could not be reached \(no route\); the folder of a",
        ),
        (
            NOT_FOUND,
            r"the Hub has no data set 'a/b' that is open to you; the folder of a local copy can be given instead$",
        ),
        (
            ValueError("Config name is missing.\nPick"),
            r"cannot load data set 'a/b': Config name is missing; the folder",
        ),
        (None, r"data set 'a/b' has no train split \(it has unseen\)$"),
    ],
)
def test_hub_failures_are_one_sentence(cache, monkeypatch, answer, sentence):
    hub(monkeypatch, answer, {"unseen": None})
    refused({"dataset": "a/b"}, sentence)


def test_a_known_set_out_of_reach_has_a_place(cache, monkeypatch):
    monkeypatch.delenv("HETFL_DATA", raising=False)
    hub(monkeypatch, httpx.ConnectError("no route"), {})
    refused({"dataset": "mnist"}, r"a local copy can be given instead, or put into \$HETFL_DATA as 'mnist'$")


def test_data_that_nobody_can_download_ask_for_a_folder():
    refused({"dataset": "harbox"}, r"^data set 'harbox' cannot be downloaded: give its folder with --dataset PATH/harbox")
