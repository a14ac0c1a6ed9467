"""What came of a run, or of many, for a program or a notebook: tables, the summary, the model."""

from __future__ import annotations

import copy
import io
from collections.abc import Collection, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load
from torch import nn

from hetfl.config import RunOptions, resolve
from hetfl.data.dataset import Examples, FederatedDataset
from hetfl.data.inputs import Inputs
from hetfl.data.kinds import find_kind
from hetfl.errors import RunError, UsageError, nearest, plural
from hetfl.hooks.loading import load_plugins
from hetfl.hooks.manager import PluginManager
from hetfl.models.frozen import base_hash, freeze, round_base
from hetfl.models.state import State, load_state, tensors
from hetfl.registry import ROLES
from hetfl.rounds import setup
from hetfl.rounds.rows import is_detail
from hetfl.runs import leaderboard
from hetfl.runs.cell import TrialResult
from hetfl.runs.folder import BASE_HASH, MemoryFolder, RunFolder
from hetfl.runs.given import Given
from hetfl.runs.peft import write_adapters
from hetfl.runs.process import one_at_a_time
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.plan import Selection
from hetfl.submodel.widths import prefix


class Run:
    """A run that has ended, or (from `hetfl.load`) one that is under way and whose tables hold the rounds so far.

    `metrics` has a row a round, `clients` a row a client and round, `summary` what `hfl show` prints; `model` is the global model,
    `submodel(width)` a smaller one; `options` are the resolved ones; `path` is the run's folder, None where nothing was written.
    """

    def __init__(self, folder: RunFolder, given: Given | None = None, names: dict[str, Any] | None = None) -> None:
        self._folder, self._given, self.names = folder, given or Given(), names or {}

    @property
    def path(self) -> Path | None:
        return None if isinstance(self._folder, MemoryFolder) else self._folder.path

    @cached_property
    def options(self) -> RunOptions:
        """Every option with its value; what was given as an object has the name that it had in the run."""
        values = self._folder.settings()
        return resolve({**values, **self.names})

    @property
    def metrics(self) -> pd.DataFrame:
        """The columns of metrics.csv (docs/metrics.md), a row a round."""
        return self._table("metrics.csv")

    @property
    def clients(self) -> pd.DataFrame:
        """The columns of clients.csv, a row for each client of each round."""
        return self._table("clients.csv")

    @property
    def summary(self) -> dict[str, Any]:
        """Accuracies, costs, bytes, where the time went, and what to beware of."""
        return dict(self._folder.read("summary.json"))

    @property
    def weights(self) -> State:
        """The final global weights by name; of a run with adapters those that it trained."""
        return load(self._read("weights.safetensors"))

    @cached_property
    def model(self) -> nn.Module:
        """The global model with its final weights, the frozen base included, in evaluation mode, on the CPU.

        Raises RunError where that base is not the run's: its --base is another by now.
        """
        model, facts = setup.adapt_model(*self._parts), self._folder.read("run.json")
        low = self._parts[0].base_dtype == "bfloat16"
        model = round_base(model) if low else model
        if BASE_HASH in facts and facts[BASE_HASH] != base_hash(freeze(copy.deepcopy(model), low)):
            raise RunError("the frozen base of the model is not the one that this run had (--base)")
        return load_state(model, {**tensors(model), **self.weights}).eval()

    def submodel(self, width: float) -> nn.Module:
        """A new, smaller module of width ratio `width` in (0, 1], with the leading part of the final weights.

        The first `ceil(width * size)` units of each width group, as HeteroFL sends them (spec heterofl 2.1). Where a method chooses
        its units otherwise (a window, by importance, by learned filters), its clients had other submodels than this.
        """
        if not 0 < width <= 1:
            raise UsageError(f"a width ratio in (0, 1] is needed, not {width}")
        part = Selection(self._builder.widths, self._builder.widths.select(prefix(width)))
        return load_state(self._builder.build(part.sizes), part.take(self.weights)).eval()

    def export_peft(self, folder: str | Path) -> None:
        """Writes the adapters of a run with --adapter lora as peft keeps them: PeftModel.from_pretrained(model, folder) loads them
        into the model that the run began with."""
        write_adapters(self.model, self.weights, self.options, Path(folder))

    @cached_property
    def _builder(self) -> SubmodelBuilder:
        with one_at_a_time:
            model, widths = setup.trace_model(*self._parts)
            return SubmodelBuilder(setup.freeze_base(self.options, model), widths)

    @cached_property
    def _parts(self) -> tuple[RunOptions, FederatedDataset, PluginManager]:
        """What the run's model is built from, without its data: the shape of an example and the number of classes are enough."""
        self.require({"model", *ROLES})
        facts, options = self._folder.read("run.json"), self.options.model_copy(update={"device": "cpu"})
        classes = tuple(facts["classes"])
        vocab = None if options.mean else options.vocab  # a resolved run has a mean unless its inputs are token ids
        inputs = Inputs(tuple(facts["input shape"]), facts["outputs"], vocab, find_kind(facts["task"]), facts["pad"])
        two, empty = Examples(inputs.batch(), inputs.targets(), torch.arange(2), inputs.kind), torch.zeros(0, dtype=torch.int64)
        data = FederatedDataset(options.dataset, classes, (), None, two, "", empty, inputs, options.model or "", {})
        return options, data, load_plugins(options)

    def require(self, fields: Collection[str]) -> None:
        """Raises UsageError where one of `fields` was given to the run as an object and is not here."""
        here = {"data" if field == "dataset" else field for field in [*self.names, *(field for field, _ in self._given.keys)]}
        facts = self._folder.read("run.json") if self._folder.holds("run.json") else {}
        for field, what in facts.get("given as objects", {}).items():
            if field in fields and field not in here:
                raise UsageError(
                    f"the {field} was given as an object ({what['class']}), which is not here: give it again, {field}=…"
                )

    def _table(self, name: str) -> pd.DataFrame:
        data = self._read(name)
        return pd.read_csv(io.BytesIO(data)) if data.strip() else pd.DataFrame()

    def _read(self, name: str) -> bytes:
        try:
            return self._folder.bytes_of(name)
        except FileNotFoundError as error:
            raise UsageError(f"the run in '{self._folder.path}' has not got so far: it holds no {name}") from error

    def _title(self) -> str:
        options = self.options
        clients = plural(options.clients, "client")
        return f"{options.extract} x {options.aggregate} on {options.dataset}, {clients}, seed {options.seed}"

    def _accuracy(self) -> dict[str, float]:
        """The last value of every accuracy."""
        metrics = self._table("metrics.csv")
        names = [name for name in metrics if "@" in name and not is_detail(name)]
        return {name: float(metrics[name].dropna().iloc[-1]) for name in names if metrics[name].notna().any()}

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value:.1%}" for name, value in self._accuracy().items())
        return f"Run({self._title()}: {plural(len(self.metrics), 'round')}, {told}; {self.path or 'in memory'})"

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><td>{escape(name)}</td><td>{value:.1%}</td></tr>" for name, value in self._accuracy().items())
        notes = "".join(f"<div>{escape(note)}</div>" for note in self.summary["notes"])
        where = f"{plural(len(self.metrics), 'round')}, {escape(str(self.path or 'in memory'))}"
        return f"<b>{escape(self._title())}</b> <small>{where}</small><table>{cells}</table>{notes}"


class Matrix:
    """What came of many runs: `results` has a row a run, `leaderboard` a row a pair, the best first; `path` is None in memory."""

    def __init__(self, trials: Sequence[TrialResult], metric: str, path: Path | None) -> None:
        self.trials, self.metric, self.path = tuple(trials), metric, path

    @property
    def results(self) -> pd.DataFrame:
        """The columns of matrix.csv: a run that failed or is not applicable says why."""
        return pd.DataFrame([trial.row for trial in self.trials])

    @property
    def leaderboard(self) -> pd.DataFrame:
        """`rank` by the metric that the matrix was asked for."""
        return self.rank(self.metric)

    def rank(self, metric: str) -> pd.DataFrame:
        """Mean and 95 % interval of `metric` over the seeds for each pair and point of the sweep, by mean rank."""
        measured = {name for trial in self.trials for name in trial.row if "@" in name}
        if measured and metric not in measured:
            raise UsageError(
                f"metric '{metric}' is not among what was measured{nearest(metric, measured)} ({', '.join(sorted(measured))})"
            )
        return pd.DataFrame(
            [line for row in leaderboard.rank_pairs(self.trials, metric) for line in leaderboard.csv_rows(row, metric)]
        )

    @property
    def failed(self) -> list[TrialResult]:
        return [trial for trial in self.trials if trial.status == "failed"]

    def __repr__(self) -> str:
        bad = f"; {len(self.failed)} failed, the first: {self.failed[0].row['why']}" if self.failed else ""
        return f"Matrix({len(self.trials)} runs{bad})\n{self.leaderboard.to_string(index=False)}"

    def _repr_html_(self) -> str:
        bad = f"<div>{len(self.failed)} failed, the first: {escape(str(self.failed[0].row['why']))}</div>" if self.failed else ""
        return f"{self.leaderboard.to_html(index=False)}{bad}"
