"""Ranks beside widths and full fine-tuning, on a base trained here: `HETFL_DATA=../shared/data python benchmarks/ranks.py`.

An encoder is trained on one half of ag_news and saved as a run's folder; every method then adapts it to the other half, divided
among 20 clients by Dirichlet(0.1), for the same rounds; a seed whose partition leaves a client nothing is passed over. Learning
rates are chosen by the clients' held-out examples on a seed of their own (`--choose`); the test split, every second row of it,
chooses nothing. Each run's figures go to docs/ranks/adapted.json, where a run that is there already is not run again; the table of
docs/ranks.md is made from it. Without ag_news in $HETFL_DATA nothing is done.

`--large --device cuda` does the same with an encoder of 23 million parameters (docs/ranks/large.json).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from cells import fill_section, list_values, show_spread

import hetfl

ROOT = Path(__file__).parents[1]
PAGE, PLACE = ROOT / "docs" / "ranks.md", ROOT / "docs" / "ranks"

MODEL: dict[str, Any] = {
    "model": "encoder", "tokens": 32, "server_data": 0.0, "control": False, "progress": False,
}  # fmt: skip
BASE: dict[str, Any] = {"clients": 1, "partition": "iid", "extract": "full", "optimizer": "adam", "lr_round_decay": 0.7,
                        "rounds": 6, "epochs": 1, "eval_every": 6}  # fmt: skip
ADAPT: dict[str, Any] = {
    "clients": 20, "fraction": 0.5, "alpha": 0.1, "levels": "1:5,0.5:5,0.25:5,0.125:5", "epochs": 1, "optimizer": "adam",
}  # fmt: skip
RANKS: dict[str, Any] = {"adapter": "lora:rank=16,alpha=16,target=linear", "extract": "loraranks"}
# the model, and learning rates: of the base, where all is trained and for adapters (--choose)
SMALL: dict[str, Any] = {"name": "adapted", "model_args": {"width": 96}, "base": 1e-3, "whole": 1e-4, "adapters": 1e-3}
LARGE: dict[str, Any] = {"name": "large", "model_args": {"width": 512, "layers": 6, "heads": 8}, "base": 1e-4, "whole": 1e-5,
                         "adapters": 1e-4}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning (`full` x `fedavg`)": {"extract": "full"},
    "widths (`heterofl` x `overlap`)": {"extract": "heterofl"},
    "rank 16 for all (`full` x `fedavg`)": {**RANKS, "extract": "full"},
    "`loraranks` x `overlap`": RANKS,
    "`loraranks` x `flexlora`": {**RANKS, "aggregate": "flexlora"},
    "`loraranks` x `flexlora`, by rank": {**RANKS, "aggregate": "flexlora", "set": {"flexlora": {"by_rank": True}}},
    "`loraranks` x `flora`": {**RANKS, "aggregate": "flora"},
    "`loraranks` x `hetlora`": {**RANKS, "aggregate": "hetlora"},
    "`loraranks`, `ffa`": {**RANKS, "wrap": ["ffa"]},
    "`loraranks`, `fedsa`": {**RANKS, "wrap": ["fedsa"]},
}
SHOWN = ("global@test", "level-0.125@test", "submodel@own", "personal@own")


def halve(source: Path, place: Path) -> tuple[Path, Path]:
    """Folders with the even and the odd training examples of ag_news in `source`; both have the even test examples."""
    for k, name in enumerate(("first", "second")):
        (place / name / "ag_news").mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            table = pq.read_table(next(source.glob(f"{split}*.parquet")))
            begin = k if split == "train" else 0
            pq.write_table(table.take(list(range(begin, len(table), 2))), place / name / "ag_news" / f"{split}.parquet")
    return place / "first" / "ag_news", place / "second" / "ag_news"


def adapt(
    size: dict[str, Any], method: str, data: Path, base: Path, seed: int, rounds: int, device: str, lr: float = 0.0
) -> dict[str, Any]:
    """One run's row: accuracies after its last round, and what its clients took."""
    values, began = METHODS[method], time.process_time()
    lr = lr or size["adapters" if "adapter" in values else "whole"]
    run = hetfl.run(**MODEL, **ADAPT, **values, model_args=size["model_args"], data=data, base=base, lr=lr, rounds=rounds,
                    eval_every=rounds, seed=seed, partition_seed=seed, device=device)  # fmt: skip
    last, clients = run.metrics.iloc[-1], run.clients
    ends = {level: clients[clients["level"] == level].iloc[0] for level in (clients["level"].max(), clients["level"].min())}
    return {
        "method": method, "seed": seed, "rounds": rounds, "lr": lr,
        "accuracy": {name: float(last[name]) for name in SHOWN if name in last and last[name] == last[name]},
        "bytes": float((clients["bytes down"] + clients["bytes up"]).mean()),
        **{what: [int(end[what]) for end in ends.values()] for what in ("parameters", "memory", "MACs")},
        "cpu seconds": time.process_time() - began,
    }  # fmt: skip


def choose(size: dict[str, Any], data: Path, base: Path, device: str) -> None:
    """Prints what each learning rate comes to on clients' held-out examples after four rounds of a seed that the table lacks."""
    for method in ("full fine-tuning (`full` x `fedavg`)", "`loraranks` x `overlap`"):
        for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3):
            found = adapt(size, method, data, base, 100, 4, device, lr)
            print(method, lr, f"{found['accuracy']['submodel@own']:.1%}", f"{found['cpu seconds']:.0f} s", flush=True)


def make_table(rows: list[dict[str, Any]]) -> str:
    """The rows by method: accuracies over the seeds, then what a client takes; of `fedsa`, which makes no global model, its own."""
    heads = ["method", "seeds", *(f"`{name}`" for name in SHOWN), "bytes of a client and round", "memory, MB", "MACs, M"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in METHODS:
        ours = [row for row in rows if row["method"] == method]
        if not ours:
            continue
        cells = [str(len(ours))]
        cells += [show_spread(list_values((row["accuracy"] for row in ours), name)) for name in SHOWN]
        cells.append(f"{statistics.fmean(row['bytes'] for row in ours) / 1e3:,.0f} kB")
        cells += [" to ".join(f"{v / 1e6:,.1f}" for v in dict.fromkeys(ours[0][what])) for what in ("memory", "MACs")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=ROOT / "runs" / "ranks", help="folder for the halves and the base")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--choose", action="store_true", help="only try learning rates")
    parser.add_argument("--large", action="store_true", help="23 million parameters in place of one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--begin", type=int, default=0, help="the first seed")
    parser.add_argument("--rows", type=Path, help="file of the runs' figures; the page's table is then left as it is")
    parser.add_argument("--base-lr", type=float, help="another learning rate of the base's training")
    asked = parser.parse_args()
    size = LARGE if asked.large else SMALL
    source = Path(os.environ.get("HETFL_DATA", "")) / "ag_news"
    if not source.is_dir():
        raise SystemExit("there is no ag_news in $HETFL_DATA: nothing to do")
    table = asked.rows or PLACE / f"{size['name']}.json"
    first, second = halve(source, asked.place)
    base = asked.place / f"base-{size['name']}"
    if not (base / "summary.json").exists():
        hetfl.run(**MODEL, **BASE, model_args=size["model_args"], lr=asked.base_lr or size["base"], device=asked.device, data=first,
                  out=base, overwrite=True)  # fmt: skip
    start = hetfl.load(base).metrics.iloc[-1]
    print(f"base: {start['global@test']:.1%} on test, {start['client@own']:.1%} on what it was not trained on", flush=True)
    if asked.choose:
        choose(size, second, base, asked.device)
        return
    rows = json.loads(table.read_text()) if table.exists() else []
    done = 0
    for seed in range(asked.begin, asked.begin + 10 * asked.seeds):
        if done == asked.seeds:
            break
        try:
            for method in METHODS:
                if not any((r["method"], r["seed"], r["rounds"]) == (method, seed, asked.rounds) for r in rows):
                    rows.append(adapt(size, method, second, base, seed, asked.rounds, asked.device))
                    print(json.dumps(rows[-1]), flush=True)
                    table.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        except hetfl.UsageError as error:  # of the partition: some clients would hold nothing
            print(f"seed {seed} is passed over: {error}", flush=True)
            continue
        done += 1
    if asked.rows is None:
        fill_section(PAGE, size["name"], f"\n{make_table(rows)}\n\n")


if __name__ == "__main__":
    main()
