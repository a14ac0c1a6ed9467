"""What stands at the head of a run, a line for each thing, and what looks wrong in it before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hetfl.data.dataset import FederatedDataset
from hetfl.data.inputs import Inputs
from hetfl.errors import plural
from hetfl.models.adapters import list_adapters, parse_adapter
from hetfl.models.casting import is_low
from hetfl.models.state import tensors
from hetfl.profiling.cost import count_parameters
from hetfl.rounds.setup import Setup
from hetfl.submodel.builder import SubmodelBuilder

ELASTIC = 0.8  # share of a model's entries that can be cut, below which a narrow client carries much more than its width says

LOST = 0.1  # share of the training examples that nobody holds, from which on it is worth a word

PICTURE = (1, 3, 4)  # channels that a picture may have


def describe_setup(setup: Setup) -> list[str]:
    """The run's model, inputs, examples, and who holds them, in a line each."""
    federation, widths, model = setup.federation, setup.builder.widths, setup.builder.model
    sizes, public = federation.train_sizes, federation.public
    classes, kind = (federation.class_counts > 0).sum(1).tolist(), federation.kind
    groups = "classes" if kind.by_class else f"of {len(federation.classes)} groups"
    server = f", {len(public.tune)} + {len(public.holdout)} with the server (to tune on, held out)" if public else ""
    return [
        f"model: {setup.options.model}, {count_parameters(model):,} parameters, {widths.elastic():.1%} of its entries can be cut",
        *describe_adapters(setup.options.adapter, setup.builder),
        f"inputs: {describe_inputs(federation.inputs)}; {kind.describe(federation.inputs.classes)}",
        f"examples: {sum(sizes):,} to train on with {len(sizes)} clients{server}, {len(federation.test):,} to test on",
        f"who holds what: {span(sizes)} examples of {span(classes)} {groups} a client ({setup.options.partition}; partition.csv)",
    ]


def describe_adapters(given: str | None, builder: SubmodelBuilder) -> list[str]:
    """What is trained of a model with adapters, by what their output is multiplied, and the hash of what is not."""
    if given is None:
        return []
    spec, layers = parse_adapter(given), len(list_adapters(tensors(builder.model)))
    scale = f", alpha / rank = {spec.scale:g} whatever ranks a client has" if spec else ""
    trained, base = sum(p.numel() for p in builder.model.parameters()), str(builder.base_hash)
    heads = ", heads included" if any(".lora_" not in name for name, _ in builder.model.named_parameters()) else ""
    held = "; it is held in bfloat16, adapters and arithmetic are float32" if is_low(builder.model) else ""
    return [
        f"adapters: {given}, in {plural(layers, 'layer')}{scale}; {trained:,} parameters are trained{heads}; "
        f"the base (sha256 {base[:12]}…) is not sent{held}"
    ]


def describe_inputs(inputs: Inputs) -> str:
    """The shape of an example and what its dims are read as."""
    shape = "x".join(map(str, inputs.shape))
    if inputs.vocab is not None:
        return f"{shape} of {inputs.vocab:,} token ids"
    return f"{shape} (channels x height x width)" if len(inputs.shape) == 3 else shape


def span(numbers: Sequence[int]) -> str:
    """The least and the greatest: "3 to 9", "4" where they are equal."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def find_oddities(setup: Setup) -> list[str]:
    """A sentence for each thing about data and model that looks like a mistake, and what to do about it."""
    return [*odd_data(setup.federation), *odd_model(setup)]


def odd_data(federation: FederatedDataset) -> Iterator[str]:
    """What looks wrong in the data: pictures with channels last, a class without examples or beside which there is none, losses."""
    shape = federation.shape
    if federation.inputs.vocab is None and len(shape) == 3 and shape[2] in PICTURE and shape[0] > 4 < shape[1]:
        yield (
            f"the inputs are read as {shape[0]} channels of {shape[1]}x{shape[2]}: where they are {shape[0]}x{shape[1]} pictures, "
            "channels last, give them as (N, channels, height, width), such as x.transpose(0, 3, 1, 2)"
        )
    if federation.kind.by_class and len(federation.classes) < 2:
        yield f"the data have one class, '{federation.classes[0]}': every answer is right, and accuracy says nothing"
    empty = [name for name, count in zip(federation.classes, federation.class_counts.sum(0).tolist(), strict=True) if not count]
    if empty and federation.kind.by_class and len(federation.classes) > 1:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        yield f"{len(empty)} of the {len(federation.classes)} classes ({shown}) have no training example with any client"
    whole = federation.unused + sum(federation.train_sizes) + sum(federation.test_sizes)
    if federation.unused > LOST * whole:
        yield f"{federation.unused:,} of the clients' {whole:,} training examples are left out by the partition: nobody holds them"


def odd_model(setup: Setup) -> Iterator[str]:
    """That a narrow client carries much more of the model than its width says, and the first reason for it."""
    widths, share = setup.builder.widths, setup.builder.widths.elastic()
    if share >= ELASTIC:
        return
    whole = count_parameters(setup.builder.model)
    quarter = {name: len(units) for name, units in widths.prefix(0.25).items()}
    carried = count_parameters(setup.builder.build(quarter)) / whole
    reason = next((f"; {name}: {why}" for name, why in widths.frozen.items()), "")
    yield (
        f"only {share:.1%} of the model's entries can be cut: a client of width 0.25 carries {carried:.0%} of its parameters "
        f"(hfl inspect shows what is frozen{reason})"
    )
