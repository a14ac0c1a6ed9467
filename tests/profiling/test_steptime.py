"""Step times fitted from widths, against an independent solver and rule."""

import pytest
import torch
from torch import nn

from hetfl.profiling.cost import Cost, measure_cost
from hetfl.profiling.steptime import StepTime, fit_step_time

TRUE = StepTime(op=2e-5, mac=1e-10, byte=4e-10)


def cost(width, ops=200):
    return Cost(0, int(4e6 * width**2), 0, 0, ops, int(3e7 * width), 32)


def step(c):
    return 2e-5 * c.ops + 1e-10 * 3 * c.macs * c.batch + 4e-10 * c.written


def test_no_term_is_silently_zero():
    """Each of the three parts of a prediction is as it was made, where three widths tell them apart."""
    costs = [cost(w) for w in (1, 0.5, 0.25)]
    found = fit_step_time(costs, [step(c) for c in costs])
    assert found.op == pytest.approx(TRUE.op, rel=0.02)
    assert found.mac == pytest.approx(TRUE.mac, rel=0.02)
    assert found.byte == pytest.approx(TRUE.byte, rel=0.02)


def test_two_widths_leave_no_part_out_and_predict_a_third():
    costs = [cost(w) for w in (1, 0.25)]
    found = fit_step_time(costs, [step(c) for c in costs])
    assert min(found.op, found.mac, found.byte) > 0
    assert found.seconds(cost(0.5)) == pytest.approx(step(cost(0.5)), rel=0.1)


def test_a_part_that_would_be_negative_is_zero():
    """Seconds that fall as bytes grow: the least squares over all parts would have a negative one."""
    costs = [Cost(0, 1000 * k, 0, 0, 1, 1000 * (4 - k), 1) for k in (1, 2, 3)]
    found = fit_step_time(costs, [1.0, 2.0, 3.0])
    assert found.byte == pytest.approx(0, abs=1e-5)
    assert found.mac > 0


def test_short_batches_cost_by_their_examples_and_operations_by_the_step():
    one = cost(1)
    assert TRUE.seconds(one, 3, 70) == pytest.approx(3 * 2e-5 * 200 + 70 / 32 * (step(one) - 2e-5 * 200))
    assert TRUE.scaled(5).seconds(one) == pytest.approx(5 * step(one))


def test_costs_count_what_a_training_step_does():
    """Bytes and operations of a step of a linear layer, by hand: activations grow with the batch, gradients do not."""
    x, y, model = torch.randn(2, 6), torch.arange(2), nn.Linear(6, 4)
    small, large = measure_cost(model, x, y, 8), measure_cost(model, x, y, 16)
    assert small.ops == large.ops > 5
    assert (small.batch, large.batch) == (8, 16)
    parameters = 4 * (6 * 4 + 4)
    assert small.written > 8 * 4 * 4 + parameters  # the logits, the gradients of the parameters
    assert large.written - small.written >= 8 * 4 * 4 * 3  # logits, log-softmax and the logits' gradient of 8 examples more
