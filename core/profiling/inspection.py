"""What `hfl inspect` and `hfl profile` show of a model: its width groups, what is frozen and why, and what each width costs."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hetfl.config import DataOptions, resolve
from hetfl.data import loading
from hetfl.data.catalog import KNOWN
from hetfl.data.dataset import Examples
from hetfl.data.inputs import Inputs
from hetfl.data.kinds import CLASSIFY
from hetfl.errors import NotApplicable, UsageError, unknown
from hetfl.files import reason
from hetfl.models import factory, normalization
from hetfl.models.adapters import add_adapters, parse_adapter
from hetfl.models.early_exit import MultiExitNet, add_exits
from hetfl.models.folders import PREFIX, read_config
from hetfl.models.frozen import freeze
from hetfl.profiling.cost import Cost, measure_cost
from hetfl.profiling.fleets import format_fleet
from hetfl.profiling.meter import MakeStep, Meter, free_memory
from hetfl.profiling.steptime import fit_step_time
from hetfl.rng import stream
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.depth import Depth
from hetfl.submodel.ranks import find_rank_groups
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.residual import find_blocks
from hetfl.submodel.tracing.table import Heads
from hetfl.submodel.tracing.verify import compare_cut
from hetfl.submodel.widths import Widths, unit_count


@dataclass(frozen=True)
class LevelReport:
    """A level's submodel: its cost, and the largest difference between its outputs and those of the masked whole model."""

    ratio: float
    cost: Cost
    error: float


@dataclass(frozen=True)
class ModelReport:
    """A traced model: `members` are the tensors' dims that each group cuts, as name[dim]; `blocks` are the residual blocks that may
    be left out; finding both took `seconds`."""

    model: str
    inputs: Inputs
    widths: Widths
    members: dict[str, list[str]]
    blocks: tuple[str, ...]
    levels: list[LevelReport]
    seconds: float


@dataclass(frozen=True)
class WidthReport:
    """A width on this machine: its cost, the seconds of a training step, and which limits it exceeds."""

    ratio: float
    cost: Cost
    seconds: float
    exceeded: str


def inspect_model(
    name: str, args: Mapping[str, Any], inputs: Inputs, levels: Sequence[float], *,
    batch: int = 32, heads: Heads = "width", norm_policy: str = "auto",
) -> ModelReport:  # fmt: skip
    """Builds the model `name` for `inputs`, traces it and measures the submodel of every level in (0, 1].

    Raises UsageError where the model cannot be built or run.
    """
    model = normalization.replace_norms(factory.build_model(name, args, inputs, 0), norm_policy)
    started = time.perf_counter()
    meter = make_meter(model, inputs, batch, heads)
    blocks, widths, rows = find_blocks(model, inputs.batch()), meter.builder.widths, []
    seconds = time.perf_counter() - started
    for ratio in levels:
        error = 0.0
        if widths.groups:
            error = compare_cut(widths, model, [inputs.batch()], widths.prefix(ratio), stream(0, "inspect"))[1]
        rows.append(LevelReport(ratio, meter.width_cost(ratio), error))
    return ModelReport(name, inputs, widths, widths.members(), blocks, rows, seconds)


AXES = ("width", "rank", "depth", "blocks")

EXITS = 4  # classifiers that a model gets for its depth to be cut


@dataclass(frozen=True)
class AxisReport:
    """What a model costs when `axis` alone is cut to `ratio`; `trained` are those of its parameters that are trained."""

    axis: str
    ratio: float
    cost: Cost
    trained: int


@dataclass(frozen=True, eq=False)
class AxisCutter:
    """Cuts one axis of a model at a time. `ranks` are the width groups that are ranks of adapters, `blocks` the residual blocks,
    `deep` is the model with EXITS classifiers; each where it is asked for."""

    builder: SubmodelBuilder
    ranks: Collection[str]
    blocks: tuple[str, ...]
    deep: MultiExitNet | None

    def cut(self, axis: str, ratio: float) -> nn.Module:
        """The model of which `axis` alone is cut to `ratio`."""
        if axis == "depth":
            assert self.deep is not None
            return copy.deepcopy(self.deep.at_depth(unit_count(self.deep.depth, ratio)))
        if axis == "blocks":
            return self.builder.build(self.builder.full | Depth(skipped=self.blocks[math.ceil(ratio * len(self.blocks)) :]).sizes)
        groups = self.builder.widths.groups
        ours = {g.name for g in groups if (g.name in self.ranks) == (axis == "rank")}
        return self.builder.build({g.name: unit_count(g.size, ratio if g.name in ours else 1) for g in groups})


def make_cutter(model: nn.Module, inputs: Inputs, axes: Sequence[str], adapter: str | None, heads: Heads) -> AxisCutter:
    """What cuts `axes` of `model`, which gets the adapters that are asked for. Raises NotApplicable as `measure_axes` does."""
    x = inputs.batch()
    if adapter and (spec := parse_adapter(adapter)):
        add_adapters(model, spec, x, inputs.answer)
    if "depth" in axes and inputs.kind.tokens:
        raise NotApplicable(
            "not applicable: exits answer with a number for each class, once for an example; --axis blocks needs none"
        )
    deep = add_exits(copy.deepcopy(model), x, inputs.classes, EXITS, 0) if "depth" in axes else None
    builder = SubmodelBuilder(model, trace(model, x, heads=heads))
    ranks = find_rank_groups(builder.widths) if "rank" in axes or adapter else {}
    if adapter:
        builder = SubmodelBuilder(freeze(model), builder.widths)
    blocks = find_blocks(model, x) if "blocks" in axes else ()
    if "blocks" in axes and not blocks:
        raise NotApplicable("not applicable: the model has no residual blocks that could be left out; --axis depth gives it exits")
    if deep is not None and adapter:
        freeze(deep)
    return AxisCutter(builder, ranks, blocks, deep)


def measure_axes(
    name: str, args: Mapping[str, Any], inputs: Inputs, axes: Sequence[str], levels: Sequence[float], adapter: str | None, *,
    batch: int = 32, heads: Heads = "width", norm_policy: str = "auto",
) -> list[AxisReport]:  # fmt: skip
    """Cuts one axis of the model `name` at a time, with the adapters that `adapter` asks for, and measures what is left.

    width: all channels but ranks; rank: those of adapters alone; depth: the layers up to one of EXITS classifiers; blocks: the
    residual blocks, the first of which stay. Raises UsageError for another axis and for a model that does not answer as the task
    wants it, and NotApplicable for ranks without adapters, blocks of a model that has none and depth where an exit cannot answer.
    """
    for axis in axes:
        if axis not in AXES:
            raise unknown("axis", axis, AXES)
    model = normalization.replace_norms(factory.build_model(name, args, inputs, 0), norm_policy)
    factory.refuse_other_answers(name, model, inputs.batch(), inputs.answer)
    cutter, found = make_cutter(model, inputs, axes, adapter, heads), []
    for axis, ratio in itertools.product(axes, levels):
        small = cutter.cut(axis, ratio)
        trained = sum(p.numel() for p in small.parameters() if p.requires_grad)
        cost = measure_cost(small, inputs.batch(), inputs.targets(), batch, kind=inputs.kind)
        found.append(AxisReport(axis, ratio, cost, trained))
    return found


def measure_widths(
    name: str, args: Mapping[str, Any], inputs: Inputs, levels: Sequence[float], *,
    batch: int, steps: int, deadline: float, share: float, make_step: MakeStep,
) -> list[WidthReport]:  # fmt: skip
    """Each width of the model `name` measured on this machine, against a deadline for `steps` steps, as `make_step` makes
    them, and a share of free memory."""
    meter, allowed = make_meter(factory.build_model(name, args, inputs, 0), inputs, batch), share * free_memory()
    data, reports = make_examples(inputs), []
    for ratio in levels:
        cost, seconds = meter.width_cost(ratio), meter.step_seconds(make_step, data, ratio)
        used, taken = cost.memory / 1e6, seconds * steps
        exceeded = [f"it needs {used:,.0f} MB, {allowed / 1e6:,.0f} MB may be used"] if cost.memory > allowed else []
        exceeded += [f"it takes {taken:.3g} s, the deadline is {deadline:g} s"] if taken > deadline else []
        reports.append(WidthReport(ratio, cost, seconds, "; ".join(exceeded)))
    return reports


def export_fleet(path: Path, model: str, reports: Sequence[WidthReport], share: float, watts: float) -> str:
    """Writes this device as a fleet file of one class; returns how well the fitted step time meets what was measured.

    Raises UsageError where there are fewer than two widths, or the file cannot be written.
    """
    if len(reports) < 2:
        raise UsageError("--export needs two widths or more, e.g. --levels 1,0.25")
    fit = fit_step_time([r.cost for r in reports], [r.seconds for r in reports])
    worst = max(abs(fit.seconds(r.cost) / r.seconds - 1) for r in reports)
    widths = ", ".join(f"{r.ratio:g}" for r in reports)
    none = [part for part, seconds in asdict(fit).items() if not seconds]
    fitted = f"fitted within {worst:.0%}" + (f", nothing left for {' and '.join(none)}" if none else "")
    source = f"step: measured on {model} at widths {widths}, {fitted}; memory: {share:g} of what was free; watts: as given"
    try:
        path.write_text(format_fleet("this", "this device", fit, share * free_memory(), watts, source), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {reason(error)}") from error
    return f"step times {fitted}"


def make_meter(model: nn.Module, inputs: Inputs, batch: int, heads: Heads = "width") -> Meter:
    """Traces `model` and makes a meter of its submodels, for local batches of `batch` examples of `inputs`."""
    builder = SubmodelBuilder(model, trace(model, inputs.batch(), heads=heads))
    return Meter(resolve({"batch_size": batch}), builder, make_examples(inputs))


def make_examples(inputs: Inputs) -> Examples:
    """Two random examples."""
    return Examples(inputs.batch(), inputs.targets(), torch.arange(2), inputs.kind)


def choose_inputs(model: str, dataset: str | None, shape: str | None, classes: int | None, vocab: int | None) -> Inputs:
    """What to build `model` for: as given, else as `dataset` has it, else as the first data set whose usual model it is."""
    if shape is not None:
        return Inputs(parse_shape(shape), classes or 10, vocab)
    options = DataOptions.model_validate({})
    if dataset is None and model.startswith(PREFIX):
        return Inputs((options.tokens,), classes or 2, vocab or read_config(model.removeprefix(PREFIX)).get("vocab_size"))
    name = dataset or next((short for short, known in KNOWN.items() if known.model == model), "cifar10")
    if name not in KNOWN or KNOWN[name].task != CLASSIFY.name:
        return loading.load(
            DataOptions.model_validate({"dataset": name, "partition": "iid", "clients": 1, "server_data": 0})
        ).inputs
    known = KNOWN[name]
    found = Inputs((options.tokens,), known.classes, options.vocab) if known.text else Inputs(known.shape, known.classes)
    return Inputs(found.shape, classes or found.classes, vocab or found.vocab)


def parse_shape(shape: str) -> tuple[int, ...]:
    """The shape that a text such as 3x32x32 names. Raises UsageError."""
    try:
        sides = tuple(int(side) for side in shape.split("x"))
    except ValueError:
        sides = ()
    if not sides or min(sides) < 1:
        raise UsageError(f"--input takes the shape of one example such as 3x32x32 or 128, not '{shape}'")
    return sides
