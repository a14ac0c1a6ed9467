"""hetfl itself: the work's options through `runner.run`, timed from its own metrics."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.work import asked, norm, report


class Watch:
    """Notes when the first clients began, and keeps each round's row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.first = 0.0

    def phase(self, round: int, name: str) -> None:
        if name == "fit" and not self.first:
            self.first = time.time()

    def done(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        print(text)

    alarm = fact = note


def main() -> None:
    from hetfl.config import resolve
    from hetfl.runs import runner
    from hetfl.runs.folder import RunFolder

    work, watch = asked(), Watch()
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run").open()
        runner.run(resolve(work.values), folder, watch)
        from safetensors.torch import load_file

        state = load_file(folder.path / "weights.safetensors")
    rows = watch.rows[1:]
    if work.options.eval_every > 1:  # only the last round evaluates
        rows[-1]["seconds"] -= rows[-1].pop("seconds evaluate")
    phases = sorted({k for row in rows for k in row if k.startswith("seconds ")})
    trained = (t for name, t in state.items() if "running" not in name and t.is_floating_point())
    report(
        seconds=[row["seconds"] for row in rows], first=watch.first, norm=norm(trained),
        phases={p.removeprefix("seconds "): sum(r.get(p, 0.0) for r in rows) / len(rows) for p in phases},
    )  # fmt: skip


if __name__ == "__main__":
    main()
