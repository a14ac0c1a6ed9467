"""Folders of runs that have ended, with the numbers that a test wants."""

from __future__ import annotations

import json

from hetfl.config import format_run_file, resolve
from hetfl.runs.folder import RunFolder


def ended(path, accuracies, rows=(), clients=(), **options):
    """A run folder with these accuracies, by name, and rows of its tables."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.write("config.toml", format_run_file(resolve({"extract": "heterofl", "aggregate": "overlap", **options})))
    levels = [{"level": "1", "parameters": 100, "MACs": 10, "bytes down": 5, "bytes up": 6}, {"level": "0.5", "parameters": 25}]
    accuracy = {name: {"last": value, "last three": value} for name, value in accuracies.items()}
    folder.write("summary.json", json.dumps({"accuracy": accuracy, "levels": levels}))
    folder.table("metrics.csv", rows)
    folder.table("clients.csv", clients)
    return path
