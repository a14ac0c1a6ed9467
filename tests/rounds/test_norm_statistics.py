"""Batch norm's statistics under each policy."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import NORMED, run
from hetfl.errors import UsageError


@pytest.mark.parametrize("policy", ["static", "recalibrate"])
def test_statistics_policies(tmp_path, policy):
    """spec heterofl 2.4: statistics come from passes, not from the mean of what clients tracked."""
    values = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 8]}, "rounds": 1}
    mean, _ = run(tmp_path / "a", **values)
    other, _ = run(tmp_path / "b", norm_policy=policy, **values)
    assert not torch.equal(mean["1.running_var"], other["1.running_var"])
    assert torch.equal(mean["0.weight"], other["0.weight"])


def test_local_statistics_never_travel(tmp_path):
    weights, local = run(tmp_path / "a", norm_policy="local", **NORMED)
    _, all_of_it = run(tmp_path / "b", norm_policy="aggregate", **NORMED)
    _, again = run(tmp_path / "c", norm_policy="local", workers=1, **NORMED)
    assert local["bytes up"] < all_of_it["bytes up"]
    assert local["bytes down"] < all_of_it["bytes down"]
    assert local["accuracy"] == again["accuracy"]
    assert int(weights["1.num_batches_tracked"]) >= 0
    with pytest.raises(UsageError, match="--norm-policy local needs public data"):
        run(tmp_path / "d", norm_policy="local", server_data=0, **NORMED)
