"""hetfl beside a hand-written torch loop, Flower's Ray simulation and Apple's pfl: `python benchmarks/compare.py`.

`compare_on_gpu` does the same on a GPU, with hetfl in several ways; benchmarks/gpu.py makes a page of that.

Needs the extra `bench`. Every contender runs alone, in a process of its own, one after the other, and so `--repeats` times: a ratio
is between runs that stand beside each other in time. All must come to the same parameters. Writes docs/performance.md with
docs/performance/compare.json and compare.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT))

PAGE, FOLDER = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"

PYTHON = [sys.executable, "-W", "ignore", "-m"]

CONTENDERS = {
    "floor": [*PYTHON, "benchmarks.speed.floor"],
    "hetfl": [*PYTHON, "benchmarks.speed.product"],
    "flower": [*PYTHON, "benchmarks.speed.flower"],
    "pfl": [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.speed.apple"],
}

CONTENDERS |= {f"{name}-plain": CONTENDERS[name] for name in ("flower", "pfl")}  # with the loop of their tutorials

ON_GPU = {**{name: CONTENDERS[name] for name in ("floor", "hetfl", "flower")}, "pfl": [*PYTHON, "benchmarks.speed.apple"]}

WAYS: dict[str, dict[str, Any]] = {  # hetfl's options, by how a contender of its is called
    "hetfl, bf16": {"precision": "bf16"},
    "hetfl, one by one": {"vmap": "off", "workers": 1},
    "hetfl, one by one, 4 streams": {"vmap": "off", "workers": 4},
}

# how many of the contenders run a workload; 2 (floor, hetfl) for the others
PEERS = {"W": 6, "W-small": 6, "heflwr": 6, "tiny-1000": 4}

WORKS = ("W", "W-small", "tiny-10", "tiny-100", "tiny-1000", "hetero", "heflwr", "W-1000")

TARGETS = {
    ("W", "floor"): 1.1, ("W", "flower"): 1 / 1.3, ("W", "pfl"): 1.0, ("W-small", "floor"): 1.15, ("W-small", "flower"): 1 / 1.6,
    ("W-small", "pfl"): 1 / 1.15, ("tiny-1000", "floor"): 1.3, ("tiny-1000", "flower"): 1 / 15, ("hetero", "floor"): 1.15,
}  # fmt: skip

Result = dict[str, Any]


class Memory(threading.Thread):
    """The most memory (PSS: shared pages counted once) that the processes begun since have held, looked at now and then."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self.over = set(pids()), 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            self.most = max(self.most, sum(held(pid) for pid in set(pids()) - self.before))


def pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def held(pid: str) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        return next((1024 * int(line.split()[1]) for line in file if line.startswith("Pss:")), 0)
    return 0


def run(words: Sequence[str], limit: float = 150.0, **more: str) -> Result | None:
    """The line that a contender prints, with its start-up seconds and peak memory; None where it failed or took too long.

    `more` are further variables of its environment.
    """
    memory = Memory()
    memory.start()
    began = time.time()
    how: Any = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": os.environ | more}
    process = subprocess.Popen(words, start_new_session=True, **how)
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return None
    finally:
        memory.over.set()
    line = next((line for line in out.splitlines() if "RESULT " in line), None)
    if line is None:
        print(out[-1500:])
        return None
    found: Result = json.loads(line.split("RESULT ", 1)[1])
    return found | {"start": found.get("first", began) - began, "memory": memory.most}


def compare(work: str, repeats: int) -> dict[str, list[Result]]:
    """`repeats` runs of every contender, in turn. Raises SystemExit where they do not compute the same."""
    found: dict[str, list[Result]] = {}
    for repeat in range(repeats):
        for name, words in list(CONTENDERS.items())[: PEERS.get(work, 2)]:
            result = run([*words, work, *(["plain"] if name.endswith("-plain") else [])])
            if result is None:
                print(work, name, "gave no result")
                continue
            result["median"] = statistics.median(result["seconds"])
            found.setdefault(name, []).append(result)
            print(f"{work} {repeat + 1}/{repeats} {name}: {result['median']:.3f} s a round, norm {result['norm']:.7g}", flush=True)
            reference = found["floor"][0]["norm"]
            if abs(result["norm"] - reference) > 1e-5 * reference:
                raise SystemExit(f"{name} came to other parameters on {work}: norm {result['norm']}, not {reference}")
    return found


def compare_on_gpu(work: str, names: Sequence[str], repeats: int, limit: float, rounds: int = 5) -> Iterator[tuple[str, Result]]:
    """The contenders `names` on one GPU, in turn, `repeats` times, each with its result: `rounds` rounds after one to warm up.

    `off` is how far a contender's parameters are from the first one's, the floor's (their norm, relative).
    """
    reference = None
    for name in list(names) * repeats:
        more = {"HETFL_BENCH_DEVICE": "cuda", "HETFL_BENCH_ROUNDS": str(rounds), "HETFL_BENCH_ACTORS": "4"}
        words = ON_GPU[name.split(",")[0]]
        result = run([*words, work], limit, HETFL_BENCH_MORE=json.dumps(WAYS.get(name, {})), **more)
        if result is None:
            print(work, name, "gave no result", flush=True)
            continue
        reference = reference or result["norm"]
        result |= {"median": statistics.median(result["seconds"]), "off": abs(result["norm"] / reference - 1)}
        print(f"{work} {name}: {1000 * result['median']:.1f} ms a round, off {result['off']:.1e}", flush=True)
        yield name, result


def ratio(found: dict[str, list[Result]], name: str, what: str = "median") -> tuple[float, float, float]:
    """hetfl over `name`, paired: median, lowest and highest."""
    pairs = [a[what] / b[what] for a, b in zip(found["hetfl"], found[name], strict=False) if b[what]]
    return statistics.median(pairs), min(pairs), max(pairs)


def rows(all_of_it: dict[str, dict[str, list[Result]]]) -> list[str]:
    lines = ["| work | contender | s a round (min … max) | hetfl / it (min … max) | target | start-up, s | peak MB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for work, found in all_of_it.items():
        for name, results in found.items():
            times = [r["median"] for r in results]
            start, memory = (statistics.median(r[k] for r in results) for k in ("start", "memory"))
            shown, target = "", ""
            if name != "hetfl":
                middle, low, high = ratio(found, name)
                shown = f"**{middle:.2f}** ({low:.2f} … {high:.2f})"
                limit = TARGETS.get((work, name.removesuffix("-plain")))
                target = "" if limit is None else f"≤ {limit:.2f}: {'yes' if middle <= limit else 'NO'}"
            seconds = f"{statistics.median(times):.3f} ({min(times):.3f} … {max(times):.3f})"
            lines.append(f"| {work} | {name} | {seconds} | {shown} | {target} | {start:.1f} | {memory / 1e6:,.0f} |")
    return lines


def versions() -> str:
    from hetfl.cli.show import find_commit

    names = ("hetfl", "torch", "flwr", "ray", "pfl")
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    found[0] += f" ({commit})" if (commit := find_commit(ROOT)) else ""
    return ", ".join([*found, f"Python {platform.python_version()}"])


def machine() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
        return f"{len(os.sched_getaffinity(0))} cores of {model}"
    return platform.machine()


def page(data: Result, command: str) -> str:
    text = (FOLDER / "notes.md").read_text()
    return "\n".join([
        "# Performance", "",
        f"Written by `{command}` on {data['when']}: {data['machine']} (shared with other jobs: trust the ratios),",
        f"{data['versions']}. {data['repeats']} repeats, contenders in turn, each alone in processes of its own.", "",
        *rows(data["works"]), "", "![ratios](performance/compare.png)", "", *averages(data["aggregate"]["milliseconds"]), "",
        *servers(data["server"]["nets"]), "", *stacks(data["vmap_groups"]["cases"]), "", text,
    ])  # fmt: skip


def averages(mean: Result) -> list[str]:
    floor = mean["floor"]
    lines = [
        f"| {kind} | {mean[kind]['average']:.1f} ms | {mean[kind]['average'] / floor['average']:.2f} | {limit} |"
        for kind, limit in (("prefix", 1.2), ("index", 3.0))
    ]
    said = f"Widths 1 to 1/16, two each, {mean['prefix']['MB']:.0f} MB; over what copying the same bytes takes"
    head = ["| submodels | time | over the copy | target |", "|---|---|---|---|"]
    return ["## Averaging 10 ResNet18 submodels", "", f"{said} ({floor['average']:.1f} ms).", "", *head, *lines]


def servers(nets: list[Result]) -> list[str]:
    lines = [
        f"| {r['net']} | {r['plain']:.2f} s | {r['extract']:.2f} s | {r['extract'] / r['plain']:.2f} | {100 * r['share']:.0f} % |"
        for r in nets
    ]
    return [
        "## FedConv's server phase", "",
        "Tuning the compressors of three size classes (0.75, 0.5, 0.25) on 500 server images, batch 64, beside the same steps of",
        "the same submodels without filters; one thread. Targets: a ratio of 1.3, and at most 15 % for compressing.", "",
        "| net | plain steps | FedConv | ratio | share of compressing, forward and backward |", "|---|---|---|---|---|", *lines,
    ]  # fmt: skip


def stacks(cases: list[Result]) -> list[str]:
    lines = [
        f"| {r['net']} | {r['size']}x{r['size']} | {r['examples']} | {r['parameters']:,} | {r['alone']:.2f} | {r['together']:.2f} |"
        for r in cases
    ]
    head = ["| net | input | examples | parameters | ms a client, alone | in vmap groups of 32 |", "|---|---|---|---|---|---|"]
    return ["## vmap groups", "", "One epoch of a client on one thread.", "", *head, *lines]


def picture(data: Result) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    bars = [(f"{work}\n{name}", ratio(found, name)) for work, found in data["works"].items() for name in found if name != "hetfl"]
    middles = [m for _, (m, _, _) in bars]
    errors = [[m - low for _, (m, low, _) in bars], [high - m for _, (m, _, high) in bars]]
    axes.bar(range(len(bars)), middles, yerr=errors, capsize=3)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="hetfl's seconds / the other's", yscale="log")
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=7, rotation=45)
    figure.savefig(FOLDER / "compare.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", default=",".join(WORKS), help="workloads with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--page", action="store_true", help="write the page again from compare.json, without measuring")
    given = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    store = FOLDER / "compare.json"
    data: Result = json.loads(store.read_text()) if store.exists() else {"works": {}}
    command = "python benchmarks/compare.py"
    if not given.page:
        data |= {"repeats": given.repeats, "machine": machine(), "versions": versions(), "when": time.strftime("%Y-%m-%d")}
        for work in filter(None, given.works.split(",")):
            data["works"][work] = compare(work, 1 if work == "W-1000" else given.repeats)
            store.write_text(json.dumps(data, indent=1) + "\n")
        for part in ("aggregate", "server", "vmap_groups"):
            data[part] = run([*PYTHON, f"benchmarks.speed.{part}"], 400.0)
        store.write_text(json.dumps(data, indent=1) + "\n")
    picture(data)
    PAGE.write_text(page(data, command))


if __name__ == "__main__":
    main()
