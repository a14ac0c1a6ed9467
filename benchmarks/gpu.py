"""Everything about one GPU in one go: `python benchmarks/gpu.py`, or benchmarks/gpu.sh. Writes docs/gpu.md.

Parts: versions and card; the tests of tests/integration/test_cuda.py (equality with the CPU, recorded CUDA graphs, same bits); then
hetfl beside the floor, Flower and pfl, in float32 and bf16, in vmap groups and one by one on several streams. `--short` leaves out
most works, `--limit` ends before so many minutes, `--page` writes the page again from what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT))

from benchmarks.compare import WAYS, compare_on_gpu  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"

OURS, PEERS = ["floor", "hetfl"], ["flower", "pfl"]

ALONE = "hetfl, one by one"

WORKS = {  # in this order, as long as there is time
    "W": [*OURS, *WAYS, *PEERS], "hetero": [*OURS, ALONE], "W-small": [*OURS, *PEERS],
    "resnet": [*OURS, "hetfl, bf16", ALONE], "tiny-1000": [*OURS, "pfl"],
}  # fmt: skip

SHORT = {"W-small": [*OURS, "hetfl, bf16", ALONE], "hetero": OURS}

Result = dict[str, Any]


def card() -> Result:
    """The GPU, its driver, and the versions of what runs on it."""
    import torch

    found = {"card": "no GPU", "memory": 0.0}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found = {"card": card.name, "memory": round(card.total_memory / 2**30, 1)}
    versions = {"torch": torch.__version__, "CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    for name in ("flwr", "ray", "pfl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not there"
    versions["Python"] = ".".join(map(str, sys.version_info[:3]))
    return {**found, "versions": versions, "cores": len(os.sched_getaffinity(0)), "when": time.strftime("%Y-%m-%d")}


def test(folder: Path, limit: float, chosen: str | None) -> Result:
    """The outcome of the tests, and how far each strategy's model on the GPU is from the CPU's (test_cuda.py)."""
    began, log, report = time.time(), folder / "tests.log", folder / "tests.xml"
    words = ["-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--durations=10", f"--junitxml={report}"]
    words += ["-n", "6"] if find_spec("xdist") else []
    words += ["tests/integration/test_cuda.py", *(["-k", chosen] if chosen else [])]
    with open(log, "w") as out, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out, timeout=limit)
    text, cases = log.read_text(), list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    said = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped).*?)(?: in .*)?$", text, re.M) or [f"no end within {limit:.0f} s"]
    far = {p.get("name"): [float(v) for v in p.get("value", "").split()] for case in cases for p in case.iter("property")}
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    print(f"tests: {said[-1]}, {time.time() - began:.0f} s", flush=True)
    return {"said": said[-1], "failed": failed, "distances": far, "seconds": time.time() - began}


def measure(data: Result, folder: Path, works: dict[str, list[str]], until: float, repeats: int, each: float) -> None:
    """Fills in `data["works"]`, one work after the other, each result kept at once; no work is begun after `until`."""
    for work, names in works.items():
        if time.time() > until:
            print(f"{work}: left out, the time is over", flush=True)
            continue
        data["works"][work] = {}
        for name, result in compare_on_gpu(work, names, repeats, each):
            data["works"][work].setdefault(name, []).append(result)
            (folder / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")


def rows(works: dict[str, dict[str, list[Result]]]) -> list[str]:
    """The table of works and contenders."""
    lines = ["| work | contender | ms a round (min … max) | over hetfl | parameters off | first client, s | GPU MB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for work, found in works.items():
        if "hetfl" not in found:
            continue
        ours = statistics.median(r["median"] for r in found["hetfl"])
        for name, results in found.items():
            times = [1000 * s for r in results for s in r["seconds"]]
            middle = statistics.median(r["median"] for r in results)
            start, off = statistics.median(r["start"] for r in results), max(r["off"] for r in results)
            shown = f"{1000 * middle:.1f} ({min(times):.1f} … {max(times):.1f})"
            gpu = f"{max(r.get('gpu', 0) for r in results) / 1e6:,.0f}" if results[0].get("gpu") else ""
            over = "" if name == "hetfl" else f"**{middle / ours:.2f}**"
            lines.append(f"| {work} | {name} | {shown} | {over} | {off:.0e} | {start:.1f} | {gpu} |")
    return lines


def page(data: Result) -> str:
    """docs/gpu.md."""
    tests = data.get("tests", {"said": "not run", "failed": [], "distances": {}})
    versions = ", ".join(f"{name} {v}" for name, v in data["card"]["versions"].items())
    distances = sorted(tests["distances"].items(), key=lambda item: (-max(item[1]), item[0]))
    where = f"{data['card']['card']} ({data['card']['memory']} GiB), {data['card']['cores']} CPU cores"
    failed = [f"- failed: `{name}`" for name in tests["failed"]]
    equality = [f"| {pair} | {model:.1e} | {beside:.1e} |" for pair, (model, beside) in distances]
    return "\n".join([
        "# On a GPU", "",
        f"Written by `benchmarks/gpu.sh` on {data['card']['when']}: one {where}, {versions}.", "",
        "## Equality", "", f"`pytest tests/integration/test_cuda.py`: {tests['said']}.", *failed, "",
        "Distance of the global model after two rounds on the GPU from the CPU's, over the way that the model has gone; and of",
        "what clients, branches and plugins keep, over its norm. float32 without TF32; the test says how much is allowed, and why.",
        "",
        "| extraction x aggregation (net) | global model | what else is kept |", "|---|---|---|", *equality, "",
        "## Speed", "", *rows(data["works"]), "", (ROOT / "docs" / "performance" / "gpu-notes.md").read_text(),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs" / "performance", help="for gpu.json and logs")
    parser.add_argument("--short", action="store_true", help="a few minutes: part of the tests and two works")
    parser.add_argument("--limit", type=float, default=18.0, help="minutes after which no further work is begun")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tests", help="only tests that pytest -k chooses so; 'none': no test")
    parser.add_argument("--works", help="only these, with commas")
    parser.add_argument("--page", action="store_true", help="write the page again from gpu.json, without measuring")
    given = parser.parse_args()
    store, until = given.folder / "gpu.json", time.time() + 60 * given.limit
    given.folder.mkdir(parents=True, exist_ok=True)
    data: Result = json.loads(store.read_text()) if store.exists() else {"works": {}}
    if not given.page:
        data["card"] = card()
        if given.tests != "none":
            chosen = given.tests or ("mlp or recorded or bits or sums" if given.short else None)
            data["tests"] = test(given.folder, 60 * given.limit / 2, chosen)
        works = SHORT if given.short else WORKS
        if given.works is not None:
            works = {name: works.get(name, WORKS[name]) for name in filter(None, given.works.split(","))}
        measure(data, given.folder, works, until, 1 if given.short else given.repeats, 90.0)
        store.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))


if __name__ == "__main__":
    main()
