"""Predicts the training step of a third width from two measured ones, and of a model from others; prints the errors.

OMP_NUM_THREADS=1 python benchmarks/steptime.py
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch

from hetfl.config import resolve
from hetfl.data.inputs import Inputs
from hetfl.models import factory
from hetfl.profiling.cost import Cost
from hetfl.profiling.inspection import make_examples, make_meter
from hetfl.profiling.steptime import fit_step_time
from hetfl.training.local import make_step

IMAGE, TEXT = Inputs((3, 32, 32), 10), Inputs((64,), 4, 8192)
MODELS = {"cnn": IMAGE, "resnet18": IMAGE, "mobilenetv2": IMAGE, "encoder": TEXT}
CASES = (((1.0, 0.25), 0.5), ((0.5, 0.25), 1.0), ((1.0, 0.5), 0.25))  # the widths measured, the width predicted
WIDTHS = (1.0, 0.5, 0.25)


def measure(model: str, inputs: Inputs, batch: int, repeats: int) -> dict[float, tuple[Cost, float]]:
    """The cost and the least of the medians of three passes over the widths, in turn, so that a busy moment harms none alone."""
    meter, data = make_meter(factory.build_model(model, {}, inputs, 0), inputs, batch), make_examples(inputs)
    step = partial(make_step, options=resolve({"batch_size": batch}), kind=inputs.kind)
    passes = [{w: meter.step_seconds(step, data, w, repeats) for w in WIDTHS} for _ in range(3)]
    return {w: (meter.width_cost(w), min(p[w] for p in passes)) for w in WIDTHS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(name, inputs, asked.batch, asked.repeats) for name, inputs in MODELS.items()}
    for measured, third in CASES:
        errors = {}
        for name, widths in found.items():
            fit = fit_step_time(*zip(*(widths[w] for w in measured), strict=True))
            cost, seconds = widths[third]
            errors[name] = fit.seconds(cost) / seconds - 1
        median = statistics.median(map(abs, errors.values()))
        shown = ", ".join(f"{name} {error:+.0%}" for name, error in errors.items())
        print(f"width {third:g} from {measured[0]:g} and {measured[1]:g}: {shown}; median {median:.0%}")
    for name, widths in found.items():
        others = [point for other, points in found.items() if other != name for point in points.values()]
        fit = fit_step_time(*zip(*others, strict=True))
        shown = ", ".join(f"{fit.seconds(c) / s - 1:+.0%} at {w:g}" for w, (c, s) in widths.items())
        print(f"{name} from the other models: {shown}")
    every = [point for points in found.values() for point in points.values()]
    fit = fit_step_time(*zip(*every, strict=True))
    print(f"all together: {fit}")
    for name, widths in found.items():
        print(name, ", ".join(f"{w:g}: {1000 * s:.1f} ms, {fit.seconds(c) / s - 1:+.0%}" for w, (c, s) in widths.items()))


if __name__ == "__main__":
    main()
