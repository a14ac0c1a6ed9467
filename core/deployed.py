"""The two halves of an exported app: the ServerApp that drives the run, and the ClientApp of a node."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from hetfl.core import blueprint, data, ground, remote, roles
from hetfl.core.apps import client_app as inner
from hetfl.core.config import RunOptions, resolve
from hetfl.core.data import Federation, Holding
from hetfl.core.errors import UsageError
from hetfl.core.remote import Place
from hetfl.core.wire import Wire

RUN, OUTLINE, EVENTS = "run.toml", "outline.json", "events.jsonl"


class Diary:
    """Tells whoever reads events.jsonl in the run folder what a display would be told."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def tell(self, **event: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(event) + "\n")

    def phase(self, round: int, name: str) -> None:
        self.tell(phase=[round, name])

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
        out = Path(str(context.run_config.get("out") or "runs/flower")).absolute()
        out.mkdir(parents=True, exist_ok=True)
        diary = Diary(out / EVENTS)
        try:
            drive(resolve({**tomllib.loads((home / RUN).read_text()), "out": out}), out, diary, grid)
        except BaseException as error:
            diary.tell(failed=f"{type(error).__name__}: {error}")
            raise

    return app


def drive(options: RunOptions, out: Path, diary: Diary, grid: Grid) -> None:
    """The run, or the rest of it where `out` has a part."""
    from hetfl.core import experiment
    from hetfl.core.checkpoint import Checkpoints
    from hetfl.core.record import Folder

    folder = Folder(out)
    folder.lock()
    if (out / "summary.json").exists():
        diary.tell(ended=folder.read("summary.json"))
        return
    moment = Checkpoints(out / experiment.CHECKPOINTS, options.keep_checkpoints).load(diary.note)
    diary.tell(ended=experiment.run(options, folder, diary, moment, grid))


# a node


def client_app(home: Path) -> ClientApp:
    """The ClientApp of the app in folder `home`. What a node has of its own is in its node config:

    `partition-id`, `num-partitions`; `data`, a folder of its own examples (default: its part of the run's data set); `memory`, the
    folder in which its client remembers; `allow`, plugins and models beside the built-in ones that it will load, with commas.
    """
    from hetfl.core.export import modes

    outline = json.loads((home / OUTLINE).read_text())

    def where(context: Context) -> Place:
        memory = Path(str(context.node_config.get("memory") or default_memory())) / outline["key"]
        given = {name: str(context.node_config.get(name, "")) for name in ("data", "allow", "num-partitions", "partition-id")}
        return Place((home / RUN).read_text(), memory, json.dumps({**given, "home": str(home)}))

    return remote.client_app(where, mods=modes(outline["mods"]))


def default_memory() -> Path:
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "hetfl"


def site(config: str, node: str) -> ClientApp:
    """The run's ClientApp on a node. Raises UsageError for what the node does not allow."""
    options, own = resolve(tomllib.loads(config)), json.loads(node)
    home = Path(own["home"])
    refuse(options, [part.strip() for part in own["allow"].split(",")], home)
    outline = json.loads((home / OUTLINE).read_text())
    federation = holding(options, own["data"], int(own["partition-id"]), int(own["num-partitions"]))
    if list(federation.classes) != outline["classes"]:
        raise UsageError(f"this node's data have the classes {', '.join(federation.classes)}, not {', '.join(outline['classes'])}")
    return inner(ground.outlined(options, federation, blueprint.read(outline["widths"])).site(Wire()))


def refuse(options: RunOptions, allowed: Sequence[str], home: Path) -> None:
    """Raises UsageError for plugins and models that are neither built in nor allowed here; before any is imported."""
    for entry in roles.chosen(options):
        if entry.source != "built-in" and not {entry.name, f"{entry.role}.{entry.name}", entry.source.split()[0]} & set(allowed):
            raise UsageError(f"this node does not allow the {entry.role} plugin '{entry.name}' of {entry.source} (--allow)")
    if options.model and not permitted(options.model, allowed, home):
        raise UsageError(f"this node does not allow the model '{options.model}' (--allow)")


def permitted(model: str, allowed: Sequence[str], home: Path) -> bool:
    """Whether a node builds the model `model`: of the zoo, within the app itself, or allowed by its module or library."""
    module, colon, _ = model.partition(":")
    inside = (home / Path(*module.split("."))).with_suffix(".py").exists()
    return not colon or inside or module in allowed or module.split(".")[0] in allowed or model in allowed


class Alone(Sequence[Holding]):
    """The clients as one of them sees them: all have what it has."""

    def __init__(self, own: Holding, clients: int) -> None:
        self._own, self._clients = own, clients

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, client: Any) -> Any:
        return self._own


def holding(options: RunOptions, folder: str, client: int, clients: int) -> Federation:
    """The data of a node: those in `folder`, or its part of the run's data set."""
    if not folder:
        return data.load(options)
    mine = {"dataset": folder, "clients": 1, "partition": "iid", "server_data": 0.0, "limit": None}
    found = data.load(options.model_copy(update=mine))
    return replace(found, clients=Alone(found.clients[client if client < len(found.clients) else 0], clients))  # type: ignore[arg-type]


def begin(half: str) -> Path:
    """The folder of an app by the path of one of its halves, its own modules importable."""
    folder = Path(half).parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder
