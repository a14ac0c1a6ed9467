"""What pictures show, without looking at pixels."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from hetfl.cli import pictures
from hetfl.runs.folder import RunFolder


@pytest.mark.parametrize(("name", "words"), [
    ("global@test", "global model"), ("level-0.5@test", "level 0.5"), ("control@test", "server-only control"),
    ("sent-0.5@test", ""), ("global@test loss", ""), ("client@own", ""), ("mean level@test", ""), ("round", ""),
])  # fmt: skip
def test_curves_are_of_one_moment_and_named_in_words(name, words):
    assert pictures.describe_curve(name) == words


def test_rounds_are_whole_numbers():
    axes = Figure().subplots()
    rows = [{"round": str(r), "global@test": "0.5", "sent-1@test": "0.4"} for r in (1, 2, 3)]
    pictures.plot_curves(axes, rows, "a title")
    assert [line.get_label() for line in axes.lines] == ["global model"]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert axes.get_title() == "a title"


def test_a_run_with_a_fleet_is_drawn_over_simulated_time_and_energy(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "save", lambda figure, folder, name: drawn.setdefault(name, figure.axes[0]))
    monkeypatch.setattr(pictures, "show_partition", lambda figure, facts: figure.subplots())
    clock = [{"simulated seconds so far": 0.25 * n, "joules so far": 3 * n} for n in (1, 2)]
    for fleet in (False, True):
        folder = RunFolder(tmp_path / str(fleet)).open()
        folder.json("summary.json", {"extract": "a", "aggregate": "b", "dataset": "c", "clients": 2, "metric": "accuracy"})
        folder.json("run.json", {})
        folder.table("metrics.csv", [{"round": n, "global@test": n / 4, **(clock[n - 1] if fleet else {})} for n in (1, 2)])
        drawn.clear()
        pictures.draw_run(folder)
        assert drawn.keys() == {"curves", "partition", *(("curves-seconds", "curves-joules") if fleet else ())}
    assert drawn["curves-seconds"].lines[0].get_xdata().tolist() == [0.25, 0.5]
    assert drawn["curves-joules"].get_xlabel() == "joules"


def test_a_band_is_one_deviation_about_the_mean():
    axes = Figure().subplots()
    pictures.plot_band(axes, [{1: 10.0, 2: 20.0}, {1: 14.0, 2: 20.0, 3: 9.0}], "k", "-", "it")
    assert axes.lines[0].get_ydata().tolist() == [12.0, 20.0]
    ys = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == (pytest.approx(12 - 8**0.5), 20.0)


def test_ticks_of_scaling_do_not_collide():
    axes = Figure().subplots()
    axes.set_xscale("log")
    pictures.mark_counts(axes, [10, 11, 12, 100, 110, 1000])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["10", "100", "1,000"]
    assert not len(axes.xaxis.get_minorticklocs())


@pytest.mark.saves_pictures
def test_the_same_figure_is_the_same_bytes_in_every_form(tmp_path):
    def drawn(name):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        with pictures_style():
            figure = pictures.new_figure(3, 2)
            pictures.plot_curves(figure.subplots(), [{"round": "1", "global@test": "0.5"}], "t")
            pictures.save(figure, folder, "curves")
        return {path.name: path.read_bytes() for path in folder.path.iterdir()}

    one = drawn("a")
    assert one.keys() == {"curves.png", "curves.svg", "curves.pdf"}
    assert one == drawn("b")


def pictures_style():
    import matplotlib

    return matplotlib.rc_context(pictures.STYLE)
