"""What strategies that remember clients do when a client's width changes between rounds: the table of docs/devices.md."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from helpers.runs import STOPPABLE, play
from hetfl.config import resolve

WIDTHS = (0.5, 0.5, 0.25, 0.5)  # of client 0 by round; client 1 has 0.5, the others the whole model


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = [f"{n},0,{w}" for n, w in enumerate(WIDTHS, 1)] + ["1,1,0.5"]
    path.write_text("round,client,width\n" + "\n".join(rows) + "\n")
    return path


def options(trace, extract, **values):
    changing = {"profile": "trace", "set": {"trace": {"file": str(trace)}, **values.pop("set", {})}}
    small = {"fraction": 1.0, "partition": "iid", "model": "mlp", "model_args": {"hidden": [16, 8]}}
    return resolve({**STOPPABLE, **small, "levels": None, "rounds": 4, "extract": extract, **changing, **values})


def follow(options, look):
    """What `look(experiment)` sees after each round."""
    made = play(options, look)
    return made, [seen for _, _, seen in made.rounds]


DILATORS = {"fedconv": {"dilator_steps": 3, "steps": 3, "start": "random"}}


def test_fedconvs_client_gets_a_new_dilator_and_the_compressors_of_a_width_go_on(trace):
    def look(made):
        plugin = made.plugins.plugins["extract.fedconv"]
        return dict(plugin._dilators), dict(plugin._compressors)

    _, seen = follow(options(trace, "fedconv", set=DILATORS), look)
    first = [dilators[0] for dilators, _ in seen]
    assert first[0] is first[1]
    assert first[2] is not first[1]
    assert first[3] not in (first[1], first[2])  # that of before is not kept for its return
    assert len({id(dilators[1]) for dilators, _ in seen}) == 1
    assert seen[0][1]["0.5"] is seen[3][1]["0.5"]


def alive(masks):
    return sum(int(m.sum()) for m in masks.values())


@pytest.mark.parametrize("extract", ["lotteryfl", "hermes"])
def test_what_was_pruned_does_not_come_back(trace, extract):
    """A narrower budget prunes on, a wider one changes nothing: lotteryfl's ticket and hermes' channels."""
    settings = {"extract": {extract: {"threshold": 0.0, "rate": 0.5}}}

    def look(made):
        plugin = made.plugins.plugins[f"extract.{extract}"]
        client = made.server.clients[0]
        (plan,) = plugin.extract(made.server, [client])
        return (
            {n: m.clone() for n, m in plan.masks.items()}
            if extract == "lotteryfl"
            else {n: u.clone() for n, u in plan.kept.items()}
        )

    _, seen = follow(options(trace, extract, set=settings, limit=400, pretrain_steps=200), look)
    size = alive if extract == "lotteryfl" else lambda kept: sum(len(units) for units in kept.values())
    sizes = [size(each) for each in seen]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]
    for before, after in pairwise(seen):
        for name in after:
            if extract == "hermes":
                assert set(after[name].tolist()) <= set(before[name].tolist())
            else:
                assert not (after[name] & ~before[name]).any()


def test_tailorfl_chooses_other_channels_by_the_importance_that_it_learned_once(trace):
    def look(made):
        plugin = made.plugins.plugins["extract.tailorfl"]
        return plugin._importance[0], {n: len(units) for n, units in plugin._lists.get(0, {}).items()}

    _, seen = follow(options(trace, "tailorfl", set={"extract": {"tailorfl": {"steps": 2}}}), look)
    assert all(torch.equal(seen[0][0][name], importance[name]) for importance, _ in seen for name in importance)
    assert sum(seen[1][1].values()) > sum(seen[2][1].values())
    assert seen[3][1] == seen[1][1]


@pytest.mark.slow
def test_dac_searches_a_width_once_and_finds_it_again(trace):
    def look(made):
        plugin = made.plugins.plugins["extract.dac"]
        return {width: dict(units) for width, units in plugin._kept.items()}

    _, seen = follow(options(trace, "dac", aggregate="cluster", set={"dac": {"epochs": 1}}), look)
    assert list(seen[0]) == [1.0, 0.5]
    assert set(seen[3]) == {1.0, 0.5, 0.25}
    assert all(torch.equal(seen[0][0.5][name], seen[3][0.5][name]) for name in seen[0][0.5])


@pytest.mark.parametrize("extract", ["lgfedavg", "standalone"])
def test_layers_that_stay_with_a_client_begin_anew_where_their_shapes_change(trace, extract):
    def look(made):
        return {name: t.clone() for name, t in made.engine.client_states()[0]["home"].items()}

    made, seen = follow(options(trace, extract), look)
    name = next(n for n, t in seen[0].items() if t.ndim > 1)
    shapes = [tuple(home[name].shape) for home in seen]
    assert shapes[0] == shapes[1] == shapes[3] != shapes[2]
    initial = made.server.builder.initial(
        {g.name: len(u) for g, u in zip(made.server.widths.groups, [], strict=False)} or None, None
    )
    assert name in initial
    moved = [float((a[name] - b[name]).norm()) for a, b in ((seen[0], seen[1]), (seen[1], seen[3]))]
    assert moved[0] > 0
    assert moved[1] > 0


@pytest.mark.parametrize(
    "extract",
    ["fedconv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lotteryfl", "hermes", "tailorfl", "lgfedavg"))],
)
def test_a_stopped_run_goes_on_through_a_change_of_width(tmp_path, trace, stops, extract):
    settings = {"fedconv": DILATORS, "tailorfl": {"extract": {"tailorfl": {"steps": 2}}}}.get(extract, {})
    assert stops.changes_nothing(tmp_path, options(trace, extract, set=settings))
