"""Device profiles: what a device's limits leave of the model, and what binds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetfl.plugins.profiles import measure
from hetfl.plugins.profiles.budget import Budget
from hetfl.plugins.profiles.devices import Devices
from hetfl.plugins.profiles.measure import Measure
from hetfl.plugins.profiles.schedule import Trace
from hetfl.profiling import cost
from hetfl.profiling.cost import Cost
from hetfl.profiling.fleets import find_fleet
from hetfl.profiling.node import Node
from hetfl.submodel.slicing import build_submodel


def priced(ratio):
    return Cost(int(1000 * ratio**2), int(10_000 * ratio**2), int(1_000_000 * ratio), int(4000 * ratio**2))


def node(client=0, clients=1, round=1, seconds=0.01):
    return Node(client, clients, round, 0, priced, lambda ratio: seconds * ratio, examples=100, steps=10)


def test_fedconvs_testbed_has_its_ratios():
    """field notes 4: A4000 and 1080 Ti 1, P500 and TX2 0.75, Nano 0.5, Raspberry Pi 0.25"""
    found = [Devices().profile(node(client, 20)).width for client in range(20)]
    assert found == [1.0] * 4 + [0.75] * 8 + [0.5] * 4 + [0.25] * 4
    assert "Jetson Nano has 0.236 TFLOP/s" in Devices(fleet="nano").profile(node()).bottleneck


def test_a_devices_memory_binds_too():
    huge = replace(node(), cost=lambda ratio: replace(priced(ratio), memory=int(3e9)))
    with pytest.raises(ValueError, match=r"even width 0.25 is too much: memory: training may use 1 GB of laptop, Quadro P500"):
        Devices(fleet="p500").profile(huge)


def test_under_a_deadline_the_width_that_ends_in_time_counts():
    """Of a link of 1 kB/s both ways and 4000 r^2 bytes each way, 5 s allow r^2 < 0.625."""
    device = replace(find_fleet("fedgmr").typical("fedgmr-high"), down=1000.0, up=1000.0)
    asked = replace(node(), device=device, deadline=5.0)
    assert Devices().profile(asked).width == 0.75
    assert Devices().profile(asked).bottleneck == "deadline: 8 of 5 s on FedGMR's high class"


@pytest.mark.parametrize(
    ("options", "width", "binding"),
    [
        ({"memory": "600kB"}, 0.5, "memory: 750,000 of 600,000 at width 0.75"),
        ({"macs": 2500}, 0.5, "macs: 5,625 of 2,500 at width 0.75"),
        ({"parameters": "63"}, 0.25, "parameters: 250 of 63 at width 0.5"),
        ({"parameters": "1k"}, 1.0, ""),
        ({"memory": "600kB", "parameters": "63"}, 0.25, "parameters: 250 of 63 at width 0.5"),
        ({"deadline": 1.0, "flops": "2M", "bandwidth": "1GB"}, 0.5, "deadline: 1.69 of 1 s at width 0.75"),
        ({"deadline": 1.0, "flops": "1G", "bandwidth": "4kB"}, 0.5, "deadline: 1.13 of 1 s at width 0.75"),
    ],
)
def test_budgets(options, width, binding):
    found = Budget(**options).profile(node())
    assert found.width == width
    assert found.bottleneck == binding


def test_budgets_are_dealt_over_clients():
    plugin = Budget(parameters="1k:1,300:2,70:1")
    assert [plugin.profile(node(client, 4)).width for client in range(4)] == [1.0, 0.5, 0.5, 0.25]


def test_budget_reads_the_sliced_module(simulate):
    made = simulate(
        extract="heterofl", aggregate="overlap", profile="budget", levels=None, set={"budget": {"parameters": "300"}}, steps=1
    )
    width = float(made.state.client_rows[0]["level"])
    widths, model = made.server.widths, made.server.builder.model
    counted = {r: cost.count_parameters(build_submodel(widths, model, widths.prefix(r))) for r in (1, 0.5, 0.25)}
    assert width == max(r for r, p in counted.items() if p <= 300)
    assert made.state.client_rows[0]["bottleneck"].startswith("parameters: ")


def test_measure_asks_the_machine_once():
    plugin = Measure(deadline=0.06)
    assert plugin.profile(node(seconds=0.01)).width == 0.5
    assert plugin.profile(node(seconds=9.0)).width == 0.5
    assert plugin.profile(node(client=1, seconds=0.01)).bottleneck.startswith("deadline: 0.075 of 0.06 s at width 0.75")


def test_measure_leaves_a_share_of_the_free_memory(monkeypatch):
    """Of 1 MB that is free half is 500 kB, what width 0.5 takes"""
    monkeypatch.setattr(measure, "free_memory", lambda: 1_000_000)
    assert Measure(share=0.5).profile(node()).width == 0.5
    assert Measure(share=0.8).profile(node()).width == 0.75


def test_a_trace_of_battery_and_load(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("round,client,width,battery,load\n1,0,1,1,0\n3,0,1,0.6,0.1\n1,1,0.5,,\n2,1,,0.01,\n4,0,1,1,0.6\n")
    plugin = Trace(file=file)
    assert [plugin.profile(node(0, 3, r)).width for r in (1, 2, 3, 4)] == [1, 1, 0.5, 0.25]
    assert [plugin.profile(node(1, 3, r)).width for r in (1, 2)] == [0.5, 0.25]
    assert plugin.profile(node(0, 3, 3)).bottleneck == "width 1, battery 0.6, load 0.1"
    assert plugin.profile(node(2, 3, 1)).width == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no row"),
        ("round,client,width\n1,x,1\n", "line 2: needs whole numbers round and client"),
        ("round,client,width\n1,0,1.5\n", r"line 2: .* lie in \[0, 1\]"),
        ("client,width\n0,1\n", "line 2: needs whole numbers"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        Trace(file=tmp_path / "t.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        Trace(file=tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("plugin", "options", "said"),
    [
        (Budget, {"memory": "lots"}, "'lots' is no amount, such as 256MB"),
        (Budget, {"grid": "1,2"}, r"ratio 2 is outside \(0, 1\]"),
        (Budget, {"macs": "1M:x"}, "is not value:share"),
        (Devices, {"fleet": "nnao"}, "did you mean 'nano'"),
        (Devices, {"grid": "a"}, "'a' is no ratio"),
        (Measure, {"grid": "0"}, "outside"),
    ],
)
def test_bad_options_of_profiles_are_refused(plugin, options, said):
    with pytest.raises(ValueError, match=said):
        plugin(**options)
