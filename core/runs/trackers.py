"""Experiment trackers as observers of a run: TensorBoard, MLflow, Weights & Biases, Trackio, through one adapter."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hetfl.config import RunOptions
from hetfl.errors import UsageError, unknown
from hetfl.runs.observers import Observers

Start = Callable[[str, Mapping[str, Any], Path], tuple[Callable[[dict[str, float], int], None], Callable[[], None]]]


class Tracker:
    """Gives a tracker the run's options at its start, the numbers of every round as it ends, and the summary's accuracies.

    An observer for `hetfl.run(callback=…)` and `hfl run --track`. Names are those of metrics.csv. Raises UsageError for a tracker
    that is unknown or not installed.
    """

    def __init__(self, name: str, project: str = "hetfl") -> None:
        if name not in STARTS:
            raise unknown("tracker", name, set(STARTS))
        package, self._start = STARTS[name]
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"the tracker '{name}' is not installed: pip install {package}")
        self._name, self._project = name, project
        self._log: Callable[[dict[str, float], int], None] = lambda values, step: None
        self._finish: Callable[[], None] = lambda: None

    def on_run_start(self, facts: Mapping[str, Any]) -> None:
        options: RunOptions = facts["options"]
        folder = Path(facts["path"]) if facts["path"] else Path()
        values = {k: str(v) for k, v in options.model_dump(mode="json", exclude_none=True).items()}
        self._log, self._finish = self._start(self._project, values, folder)

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._log(numbers, int(row["round"]))

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        means = {f"summary {name}": float(values.get("last three", values["last"])) for name, values in summary["accuracy"].items()}
        self._log(means, int(summary["rounds"]))
        self.close()

    def close(self) -> None:
        """Ends the tracker's own run, also where ours was stopped."""
        finish, self._finish = self._finish, lambda: None
        finish()


@contextmanager
def tracking(names: Sequence[str], options: RunOptions, path: Path) -> Iterator[Observers]:
    """Observers of a run that lies in `path`, for the trackers of `names`, which are ended whatever becomes of the run."""
    trackers = [Tracker(name) for name in names]
    watch = Observers(trackers)
    watch.tell("on_run_start", {"options": options, "path": path})
    try:
        yield watch
    finally:
        for tracker in trackers:
            tracker.close()


def start_tensorboard(project: str, options: Mapping[str, Any], folder: Path) -> Any:
    """Event files in the run folder's `tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("options", "\n".join(f"    {name} = {value}" for name, value in options.items()))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def start_mlflow(project: str, options: Mapping[str, Any], folder: Path) -> Any:
    """A run of the experiment `project` where MLFLOW_TRACKING_URI says. MLflow's names have no @."""
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(project)
    mlflow.start_run(run_name=folder.name or None)
    mlflow.log_params(options)

    def log(values: dict[str, float], step: int) -> None:
        mlflow.log_metrics({name.replace("@", " at "): value for name, value in values.items()}, step=step)

    return log, mlflow.end_run


def start_like_wandb(package: str) -> Start:
    """Of wandb, and of trackio, which has the same calls; WANDB_MODE=offline keeps wandb's files in the run folder."""

    def start(project: str, options: Mapping[str, Any], folder: Path) -> Any:
        module = importlib.import_module(package)
        where = {"dir": str(folder)} if package == "wandb" else {}
        run = module.init(project=project, name=folder.name or None, config=dict(options), **where)

        def log(values: dict[str, float], step: int) -> None:
            module.log(values, step=step)

        return log, run.finish

    return start


STARTS: dict[str, tuple[str, Start]] = {
    "tensorboard": ("tensorboard", start_tensorboard),
    "mlflow": ("mlflow", start_mlflow),
    "wandb": ("wandb", start_like_wandb("wandb")),
    "trackio": ("trackio", start_like_wandb("trackio")),
}
