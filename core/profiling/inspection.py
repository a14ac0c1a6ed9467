"""What `hfl inspect` tells of a model: its width groups, what is frozen and why, and what each level costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetfl.config import DataOptions
from hetfl.data import loading
from hetfl.data.catalog import KNOWN
from hetfl.data.inputs import Inputs
from hetfl.errors import UsageError
from hetfl.models import factory, normalization
from hetfl.profiling import cost as costs
from hetfl.profiling.cost import Cost
from hetfl.profiling.meter import free_memory, time_step
from hetfl.rng import stream
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.table import Heads
from hetfl.submodel.tracing.verify import compare_cut
from hetfl.submodel.widths import Widths


@dataclass(frozen=True)
class LevelReport:
    """A level's submodel: its cost, and how far its outputs are from those of the masked full model."""

    ratio: float
    cost: Cost
    error: float


@dataclass(frozen=True)
class ModelReport:
    model: str
    inputs: Inputs
    widths: Widths
    members: dict[str, list[str]]  # of each group: the tensors that it cuts, as name[dim]
    levels: list[LevelReport]
    seconds: float


def inspect_model(
    name: str, args: Mapping[str, Any], inputs: Inputs, levels: Sequence[float], *,
    batch: int = 32, heads: Heads = "width", norm_policy: str = "auto",
) -> ModelReport:  # fmt: skip
    """Builds the model `name` for `inputs`, traces it and measures the sliced module of every level in (0, 1].

    Raises UsageError where the model cannot be built or run.
    """
    model = normalization.replace_norms(factory.build_model(name, args, inputs, 0), norm_policy)
    x, started = inputs.batch(), time.perf_counter()
    widths = trace(model, x, heads=heads)
    seconds, rows = time.perf_counter() - started, []
    for ratio in levels:
        kept = widths.prefix(ratio)
        error = compare_cut(widths, model, [x], kept, stream(0, "inspect"))[1] if widths.groups else 0.0
        rows.append(LevelReport(ratio, costs.measure_cost(build_submodel(widths, model, kept), x, inputs.classes, batch), error))
    return ModelReport(name, inputs, widths, widths.members(), rows, seconds)


@dataclass(frozen=True)
class WidthReport:
    """A width on this machine: its cost, the seconds of a training step, and which limits it exceeds."""

    ratio: float
    cost: Cost
    seconds: float
    exceeded: str


def measure_widths(
    name: str, args: Mapping[str, Any], inputs: Inputs, levels: Sequence[float], *,
    batch: int, steps: int, deadline: float, share: float,
) -> list[WidthReport]:  # fmt: skip
    """Each width of the model `name` measured on this machine, against a deadline for `steps` steps and a share of free memory."""
    model, x = factory.build_model(name, args, inputs, 0), inputs.batch()
    widths, allowed = trace(model, x), share * free_memory()
    x, y = x[torch.arange(batch) % len(x)], torch.arange(batch) % inputs.classes
    offers = []
    for ratio in levels:
        small = build_submodel(widths, model, widths.prefix(ratio))
        spent, seconds = costs.measure_cost(small, x, inputs.classes, batch), time_step(small, x, y)
        over = [f"memory: {allowed / 1e6:,.0f} MB may be used"] if spent.memory > allowed else []
        over += [f"deadline: {seconds * steps:.3g} of {deadline:g} s"] if seconds * steps > deadline else []
        offers.append(WidthReport(ratio, spent, seconds, "; ".join(over)))
    return offers


def choose_inputs(model: str, dataset: str | None, shape: str | None, classes: int | None, vocab: int | None) -> Inputs:
    """What to build `model` for: as given, else as `dataset` has it, else as the data set whose own model it is."""
    if shape is not None:
        return Inputs(parse_shape(shape), classes or 10, vocab)
    name = dataset or next((short for short, known in KNOWN.items() if known.model == model), "cifar10")
    if name not in KNOWN:
        return loading.load(
            DataOptions.model_validate({"dataset": name, "partition": "iid", "clients": 1, "server_data": 0})
        ).inputs
    known, options = KNOWN[name], DataOptions.model_validate({})
    found = Inputs((options.tokens,), known.classes, options.vocab) if known.text else Inputs(known.shape, known.classes)
    return Inputs(found.shape, classes or found.classes, vocab or found.vocab)


def parse_shape(shape: str) -> tuple[int, ...]:
    try:
        sides = tuple(int(side) for side in shape.split("x"))
    except ValueError:
        sides = ()
    if not sides or min(sides) < 1:
        raise UsageError(f"--input takes the shape of one example such as 3x32x32 or 128, not '{shape}'")
    return sides
