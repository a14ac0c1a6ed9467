"""What each axis of a model costs."""

from __future__ import annotations

import pytest

from hetfl.data.inputs import Inputs
from hetfl.data.kinds import find_kind
from hetfl.errors import NotApplicable, UsageError
from hetfl.profiling.inspection import measure_axes


def test_ranks_save_bytes_and_little_else():
    inputs, levels = Inputs((1, 8, 8), 10, None), (1.0, 0.25)
    found = measure_axes(
        "cnn", {"widths": (16, 16, 32)}, inputs, ("width", "rank", "depth"), levels, "lora:rank=8,target=conv", batch=4
    )
    cost = {(r.axis, r.ratio): r.cost for r in found}
    whole = cost["rank", 1.0]
    assert whole == cost["width", 1.0]

    def share(axis, what):
        return getattr(cost[axis, 0.25], what) / getattr(cost[axis, 1.0], what)

    assert min(share("rank", "macs"), share("rank", "memory")) > 0.7 > 0.5 > share("rank", "bytes")
    assert max(share("width", "macs"), share("width", "memory")) < 0.5
    assert share("depth", "macs") < 0.8
    halves, head = 8 * (9 + 16 * 9 + 16 * 9) + 8 * (16 + 16 + 32), 32 * 10 + 10
    assert [r.trained for r in found if r.axis == "rank"] == [halves + head, halves // 4 + head]
    assert all(r.cost.parameters > 3 * r.trained for r in found if r.axis == "rank" and r.ratio == 0.25)


def test_blocks_are_counted_on_the_cut_model():
    inputs, args = Inputs((6,), 4, 30), {"width": 8, "layers": 4, "heads": 2}
    whole, half = measure_axes("encoder", args, inputs, ("blocks",), (1.0, 0.5), None, batch=4)
    layer = 4 * (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 2 * 16
    assert whole.cost.parameters - half.cost.parameters == 2 * layer
    assert half.cost.bytes < whole.cost.bytes - 8 * layer
    assert max(half.cost.macs / whole.cost.macs, half.cost.memory / whole.cost.memory) < 0.7
    with pytest.raises(NotApplicable, match="no residual blocks"):
        measure_axes("cnn", {"widths": (4, 4)}, Inputs((1, 8, 8), 10, None), ("blocks",), (1.0,), None)


def test_an_axis_is_refused_where_the_model_cannot_answer():
    texts, language = Inputs((6,), 4, 50), Inputs((6,), 50, 50, find_kind("lm"))
    small = {"width": 8, "layers": 1, "heads": 2}
    with pytest.raises(UsageError, match="logits of shape"):
        measure_axes("decoder", small, texts, ["width"], [1.0], None)
    with pytest.raises(NotApplicable, match="exits answer with a number for each class"):
        measure_axes("decoder", small, language, ["depth"], [1.0], None)
