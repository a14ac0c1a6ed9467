"""Fleets, devices and availability against figures worked out by hand or drawn anew."""

import math
import statistics

import pytest

from hetfl.errors import UsageError
from hetfl.profiling import fleets
from hetfl.profiling.availability import Availability, interpolate
from hetfl.profiling.cost import Cost
from hetfl.profiling.device import Device, Work
from hetfl.profiling.steptime import StepTime

COST = Cost(10, 1000, 100, 400, 10, 5000, 8)
DEVICE = Device("d", "a device", StepTime(1e-3, 1e-6, 1e-6), 1.0, 1e6, 2.0, 1000.0, 500.0, 0.25, 1e-3, 2e-3)
WORK = Work(COST, 4, 32, 2000, 1000)


def test_a_round_is_its_steps_its_bytes_and_latency():
    spent = DEVICE.spend(WORK)
    assert spent.down == 0.25 + 2000 / 1000
    assert spent.up == 0.25 + 1000 / 500
    assert spent.compute == pytest.approx(4 * (10 * 1e-3 + 3 * 1000 * 8 * 1e-6 + 5000 * 1e-6))
    assert spent.joules == pytest.approx(2.0 * spent.compute + 2000 * 1e-3 + 1000 * 2e-3)


def test_a_round_that_is_broken_off_costs_what_was_done():
    whole = DEVICE.spend(WORK)
    assert DEVICE.spend(WORK, 0).joules == 0
    assert DEVICE.spend(WORK, whole.down).joules == pytest.approx(2.0)
    assert DEVICE.spend(WORK, whole.down + whole.compute / 2).joules == pytest.approx(2.0 + whole.compute)
    assert DEVICE.spend(WORK, 1e9).joules == whole.joules


def test_partial_work_ends_in_time_and_one_step_more_would_not():
    limit = DEVICE.spend(WORK).seconds - 0.01
    assert DEVICE.fitting_steps(WORK, limit) == 3
    assert DEVICE.fitting_steps(WORK, limit + 1) == 4
    assert DEVICE.fitting_steps(WORK, 4.5) == 0


def test_every_class_and_fleet_says_where_its_figures_come_from():
    table = fleets.read_builtin()
    assert all(len(entry["from"]) > 5 for kind in ("class", "fleet", "availability") for entry in table[kind].values())
    assert {f.name for f in fleets.list_fleets()} == set(table["fleet"])
    assert all(part > 0 for part in table["reference"]["step"])


def test_phones_have_the_published_spread():
    """Download lognormal(8.55, 0.47) kb/s; speed of a class from peak TFLOP/s against the reference."""
    fleet = fleets.find_fleet("phones-always")
    logs = [math.log(fleet.device(i, 400, 3).down * 8 / 1000) for i in range(400)]
    assert statistics.fmean(logs) == pytest.approx(8.55, abs=0.1)
    assert statistics.stdev(logs) == pytest.approx(0.47, abs=0.06)
    assert fleet.device(7, 400, 3) == fleet.device(7, 400, 3) != fleet.device(7, 400, 4)
    reference = fleets.read_builtin()["reference"]
    assert fleet.typical("phone-low").step.mac == pytest.approx(reference["step"][1] * 0.15 / 0.061)


def test_phones_are_there_as_seldom_as_the_traces():
    """FLHetBench's traces: ready 9.5 % of the time on average; what the fitted parameters give lies near, before any burn-in."""
    when = fleets.find_fleet("phones").when(0)
    for day in (0, 2):
        share = statistics.fmean(when.is_ready(i, day * 86400.0 + 3600 * 10) for i in range(1500))
        assert 0.06 < share < 0.16


def test_sessions_and_gaps_alternate_and_repeat():
    made = [Availability((3, 0.5), (4, 0.5), 1e6, {}, seed) for seed in (5, 5)]
    now, seen = 0.0, []
    for _ in range(200):
        ready, end = made[0].is_ready(2, now), made[0].next_change(2, now)
        assert end > now
        assert made[0].is_ready(2, (now + end) / 2) is ready
        assert made[0].is_ready(2, end) is not ready
        seen.append(end - now if ready else 0.0)
        now = end
    assert statistics.median(math.log(s) for s in seen[1:] if s) == pytest.approx(3, abs=0.2)
    assert made[1].next_change(2, now - 1e-6) == now  # asked late, the same


def test_who_asks_only_until_a_moment_learns_of_changes_before_it():
    when, asked = (Availability((8, 2), (7, 2), 1e6, {3: 1.5, 15: 0.5}, 1) for _ in range(2))
    for client in range(40):
        now = client * 2000.0
        change = when.next_change(client, now)
        found = asked.next_change(client, now, now + 5000)
        assert found == change if change < now + 5000 else found >= now + 5000


def test_the_rhythm_is_a_line_through_its_hours():
    points = [(4.0, 1.42), (13.0, 0.71)]
    assert interpolate(points, 4) == 1.42
    assert interpolate(points, 8.5) == pytest.approx((1.42 + 0.71) / 2)
    assert interpolate(points, 23) == pytest.approx(0.71 + 0.71 * 10 / 15)
    assert interpolate(points, 1) == pytest.approx(0.71 + 0.71 * 12 / 15)
    busy = Availability((60, 0.1), (60, 0.1), 1e6, {3: 1.5, 15: 0.5}, 0)
    night, noon = (statistics.fmean(busy.is_ready(i, 86400 * 2 + hour * 3600.0) for i in range(3000)) for hour in (3, 15))
    assert night == pytest.approx(0.5, abs=0.03)
    assert noon == pytest.approx(0.5 / 3, abs=0.03)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[fleet.a]\nabout=''\nclasses='nano:-1'\nfrom='x'", "share -1 of nano must be above 0"),
        ("[fleet.a]\nabout=''\nclasses='nani'\nfrom='x'", "no device class 'nani'; did you mean 'nano'?"),
        ("[fleet.a]\nabout=''\nclasses='nano'\nfrom='x'\nup=[-3, 0]", "Fleet.up: a median above 0 is needed"),
        ("[fleet.a]\nabout=''\nclasses='nano'\nfrom='x'\nup=[nan, 0]", "Fleet.up.0: "),
        ("[fleet.a]\nabout=''\nclasses='nano'\nfrom='x'\navailability='phone'", "no availability 'phone'; did you mean 'phones'?"),
        (
            "[fleet.a]\nabout=''\nclasses='b'\nfrom='x'\n[class.b]\nwhat='b'\nmemory='0GB'\ntflops=1\nwatts=1\nfrom='x'",
            "is no amount",
        ),
        ("[fleet.a]\nabout=''\nclasses='b'\nfrom='x'\n[class.b]\nwhat='b'\nmemory='1GB'\nwatts=1\nfrom='x'", "tflops or step"),
        ("[fleet.a]\nabout=''\nclasses='nano'", "Fleet.from: "),
        ("[clas.b]\nwhat='b'", "has 'clas'; did you mean 'class'?"),
        ("[fleet]\na='nano:1'", "every fleet and class is a table"),
        ("[class]", "must hold one [fleet.NAME], not 0"),
        ("[fleet", "cannot be read"),
    ],
)
def test_a_bad_fleet_gets_one_sentence(tmp_path, text, said):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        fleets.find_fleet(str(path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_fleet_of_a_wrong_name_names_the_nearest():
    with pytest.raises(UsageError, match="no device class or fleet 'phonse'; did you mean 'phones'"):
        fleets.find_fleet("phonse")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        fleets.find_fleet("none.toml")
