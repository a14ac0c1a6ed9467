"""`hfl plan`: what fits a fleet, and what a round takes there, before anything trains."""

from __future__ import annotations

from typing import Annotated

import typer

from hetfl import config, registry
from hetfl.cli import render
from hetfl.cli.options import Debug, ModelArgs, parse_pairs
from hetfl.cli.show import Classes, Dataset, Shape, Vocab, parse_ratios
from hetfl.errors import UsageError


def plan(
    model: Annotated[str, typer.Option(help="model of the zoo, package.module:factory, timm:name, transformers:type …")],
    fleet: Annotated[str, typer.Option(help="devices: a name (hfl fleets), a mix of classes, a file")],
    dataset: Dataset = None,
    shape: Shape = None,
    classes: Classes = None,
    vocab: Vocab = None,
    model_args: ModelArgs = None,
    levels: Annotated[str, typer.Option(help="width ratios to choose from, in (0, 1]")] = "1,0.75,0.5,0.25,0.125,0.0625",
    examples: Annotated[int, typer.Option(min=1, help="training examples of a client")] = 500,
    epochs: Annotated[int, typer.Option(min=1, help="local epochs a round")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="local batch size")] = 32,
    deadline: Annotated[float | None, typer.Option(help="seconds that a round may take")] = None,
    energy: Annotated[float | None, typer.Option(help="joules that a round may take of a device")] = None,
    traffic: Annotated[str | None, typer.Option(help="bytes that a round may send both ways, e.g. 20MB")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds to predict the time of")] = 100,
    debug: Debug = False,
) -> None:
    """Show which width each device class of a fleet can hold under every extraction, what a round takes, and what binds."""
    ratios = parse_ratios(levels)
    for flag, limit in (("--deadline", deadline), ("--energy", energy)):
        if limit is not None and not 0 < limit < float("inf"):
            raise UsageError(f"{flag} takes a number above 0, not {limit:g}")
    from hetfl.models import factory
    from hetfl.profiling import inspection, planning
    from hetfl.profiling.capacity import parse_quantity
    from hetfl.profiling.fleets import find_fleet

    try:
        limits = planning.Limits(deadline, energy, parse_quantity(traffic) if traffic is not None else None)
    except ValueError as error:
        raise UsageError(f"--traffic: {error}") from error
    chosen = find_fleet(fleet)
    options = config.resolve({"epochs": epochs, "batch_size": batch_size})
    trained, steps = options.count_work(examples)
    inputs = inspection.choose_inputs(model, dataset, shape, classes, vocab)
    built = factory.build_model(model, parse_pairs(model_args or [], "--model-args"), inputs, 0)
    cost = inspection.make_meter(built, inputs, batch_size).width_cost
    plans = {
        kind: (names, planning.plan_classes(chosen, kind, cost, ratios, steps, trained, limits))
        for kind, names in planning.group_extractions(registry.entries()).items()
        if names
    }
    render.print_plans(f"{model} on the fleet {chosen.name}", plans, rounds)
    if all(each.width is None for _, found in plans.values() for each in found):
        tightest = next(each for _, found in plans.values() for each in found)
        raise UsageError(f"no class of the fleet '{chosen.name}' holds any width of {model}: {tightest.name}: {tightest.binds}")
