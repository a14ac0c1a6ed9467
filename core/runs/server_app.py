"""The ServerApp of an exported app: runs the experiment and logs its events."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hetfl.config import RunOptions, resolve
from hetfl.engines.flower.manifest import EVENTS, RUN
from hetfl.parallel import end_with_parent
from hetfl.runs.folder import RunFolder
from hetfl.runs.runner import load_snapshot, run
from hetfl.runs.snapshot import describe_changes


class EventLog:
    """Tells whoever reads events.jsonl in the run folder what a display would be told."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def tell(self, **event: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(event) + "\n")

    def phase(self, round: int, name: str) -> None:
        self.tell(phase=[round, name])

    def fact(self, text: str) -> None:
        self.tell(fact=text)

    def note(self, text: str) -> None:
        self.tell(note=text)

    def alarm(self, text: str) -> None:
        self.tell(alarm=text)

    def done(self, row: dict[str, Any]) -> None:
        self.tell(done=row)


def server_app(home: Path) -> ServerApp:
    """The ServerApp of the app in folder `home`; its run folder is `out` of the run config."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        end_with_parent()  # a SuperLink that is killed leaves its ServerApp behind, which would hold the run folder
        out = Path(str(context.run_config.get("out") or "runs/flower")).absolute()
        out.mkdir(parents=True, exist_ok=True)
        log = EventLog(out / EVENTS)
        try:
            drive(resolve({**tomllib.loads((home / RUN).read_text()), "out": out}), out, log, grid)
        except BaseException as error:
            log.tell(failed=f"{type(error).__name__}: {error}")
            raise

    return app


def drive(options: RunOptions, out: Path, log: EventLog, grid: Grid) -> None:
    """The run, or the rest of it where `out` has a part."""
    folder = RunFolder(out)
    folder.lock()
    if (out / "summary.json").exists():
        log.tell(ended=folder.read("summary.json"))
        return
    snapshot = load_snapshot(options, folder, log)
    log.tell(ended=run(options, folder, log, snapshot, grid, describe_changes(snapshot, options) if snapshot else ()))
