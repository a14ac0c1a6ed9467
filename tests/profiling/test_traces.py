"""Fleets from traces of others; a pickle is never executed."""

import math
import os
import pickle
from random import Random

import pytest

from helpers.cli import hfl
from hetfl.errors import UsageError
from hetfl.profiling.fleets import find_fleet
from hetfl.profiling.pickles import read_plain_pickle
from hetfl.profiling.traces import format_traces, read_traces

PLAIN = {1: {"computation": 3.5, "x": (1, 2, 3, 4), "y": (1, 2), "z": [True, None, "a" * 300, -5, 2**70], "t": ()}, "b": [[], {}]}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_and_code_is_not_run(tmp_path, protocol):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    shared = {**PLAIN, 3: PLAIN["b"]}
    assert read_plain_pickle(pickle.dumps(shared, protocol)) == shared
    for value in (Attack(), {1: {"computation": Attack()}}, {1: os.system}, {1: Random(0)}, {1: 1j}):
        with pytest.raises(UsageError, match=r"^it holds more than numbers, text, lists and dicts \(\w+"):
            read_plain_pickle(pickle.dumps(value, protocol))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", [b"", b"abc", pickle.dumps(PLAIN)[:-5], b"e.", b"(.", b"K\x01K\x02."])
def test_a_broken_pickle_is_one_sentence(data):
    with pytest.raises(UsageError, match=r"^it is no whole pickle: ") as refused:
        read_plain_pickle(data)
    assert "\n" not in str(refused.value)


def capacities(count=2000):
    """Latencies lognormal(5, 0.8) ms, bandwidths lognormal(8, 0.5) kb/s."""
    draw = Random(1)
    return {i: {"computation": draw.lognormvariate(5, 0.8), "communication": draw.lognormvariate(8, 0.5)} for i in range(count)}


def behaviour(count=400):
    """Sessions lognormal(6, 1), gaps lognormal(7, 0.5) seconds, as FedScale's entries."""
    draw, found = Random(2), {}
    for client in range(count):
        now, active, inactive = 10.0, [], []
        for _ in range(6):
            active.append(now)
            inactive.append(now + draw.lognormvariate(6, 1))
            now = inactive[-1] + draw.lognormvariate(7, 0.5)
        found[client] = {"duration": 1, "active": active, "inactive": inactive, "finish_time": now, "model": "x"}
    return found


def test_fedscales_pickles_become_a_fleet(capsys, tmp_path):
    paths = [tmp_path / "client_device_capacity", tmp_path / "client_behave_trace"]
    for path, value in zip(paths, (capacities(), behaviour()), strict=True):
        path.write_bytes(pickle.dumps(value))
    code, out, _ = hfl(capsys, "fleets", "--import", paths[0], "--import", paths[1], "--out", tmp_path / "mine.toml")
    assert (code, "fleet file: " in out) == (0, True)
    fleet = find_fleet(str(tmp_path / "mine.toml"))
    assert fleet.down[0] == pytest.approx(math.exp(8) / 1000, rel=0.05)
    assert fleet.down[1] == pytest.approx(0.5, abs=0.03)
    assert fleet.rhythm.session == pytest.approx((6, 1), abs=0.06)
    assert fleet.rhythm.gap == pytest.approx((7, 0.5), abs=0.06)
    speeds = [fleet.kinds[f"mine-{kind}"].tflops / 0.15 for kind in ("slow", "mid", "fast")]
    assert speeds == pytest.approx([math.exp(-0.8 * 1.15), 1, math.exp(0.8 * 1.15)], rel=0.08)  # octiles of the normal
    assert [share for _, share in fleet.members()] == [1, 2, 1]
    assert "fitted to client_device_capacity, client_behave_trace" in fleet.source


def test_csv_traces_say_the_same(tmp_path):
    csv, sessions = tmp_path / "capacity.csv", tmp_path / "sessions.csv"
    csv.write_text(
        "computation,communication\n" + "".join(f"{c['computation']},{c['communication']}\n" for c in capacities(40).values())
    )
    rows = [(i, *pair) for i, each in behaviour(9).items() for pair in zip(each["active"], each["inactive"], strict=True)]
    sessions.write_text("client,start,end\n" + "".join(f"{i},{start},{end}\n" for i, start, end in rows))
    found = read_traces([csv, sessions])
    (tmp_path / "a").write_bytes(pickle.dumps(capacities(40)))
    (tmp_path / "b").write_bytes(pickle.dumps(behaviour(9)))
    other = read_traces([tmp_path / "a", tmp_path / "b"])
    other.sources = found.sources
    assert format_traces("x", found) == format_traces("x", other)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "computation,communication\n-1,5\n", "computation of client line 2 is -1, where a number above 0 is needed"),
        ("a.csv", "computation,communication\nnan,5\n", "computation of client line 2 is nan"),
        ("a.csv", "computation,communication\n1e400,5\n", "computation of client line 2 is 1e400"),
        ("a.csv", "computation,communication\n1,\n", "communication of client line 2 is , where"),
        ("a.csv", "computation,communication\n1,2\n", "1 devices are too few"),
        ("a.csv", "client,start,end\n0,5,3\n", "the sessions of client 0 overlap, or end before they begin"),
        ("a.csv", "client,start,end\n0,1,9\n0,5,12\n", "the sessions of client 0 overlap"),
        ("a.csv", "client,start,end\n0,1,9\n0,,12\n", "start of client 0 is "),
        ("a.csv", "client,start,end\n0,1,9\n1,2,5\n", "0 gaps between sessions are too few to fit"),
        ("a.csv", "round,battery\n1,2\n", "it needs rows with the columns computation and communication, or client, start and end"),
        ("a.csv", "", "it needs rows with the columns"),
        ("a.csv", b"\xff\xfe", "it is no CSV file"),
        ("a", pickle.dumps([1, 2]), "it is no dict of clients' dicts"),
        ("a", pickle.dumps({1: {"speed": 3}}), "client 1 has neither computation and communication nor active and inactive"),
        ("a", pickle.dumps({1: {"active": [1], "inactive": []}}), "client 1 does not have as many ends of sessions as begins"),
        ("a", pickle.dumps({1: {"computation": 10**400, "communication": 1}}), "computation of client 1 is 1000"),
        ("a", b"cos\nsystem\n(S'true'\ntR.", "it holds more than numbers, text, lists and dicts (GLOBAL os system)"),
    ],
)
def test_a_bad_trace_is_one_sentence(capsys, tmp_path, name, text, said):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    code, _, err = hfl(capsys, "fleets", "--import", path, "--out", tmp_path / "x.toml")
    assert (code, said in err.replace("\n", " "), (tmp_path / "x.toml").exists()) == (2, True, False), err


def test_a_trace_or_a_file_that_cannot_be_is_one_sentence(capsys, tmp_path):
    assert "cannot be read: No such file" in hfl(capsys, "fleets", "--import", tmp_path / "none")[2].replace("\n", " ")
    (tmp_path / "a.csv").write_text("computation,communication\n" + "1,2\n" * 9)
    for out, said in ((tmp_path / "x.csv", "--out takes a file NAME.toml"), (tmp_path / "no" / "x.toml", "cannot be written: ")):
        code, _, err = hfl(capsys, "fleets", "--import", tmp_path / "a.csv", "--out", out)
        assert (code, said in err.replace("\n", " ")) == (2, True), err
