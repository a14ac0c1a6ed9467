"""The networks' sizes and what they freeze."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetfl.models.zoo import LSTM, Encoder, FedConvHAR, GoogLeNet, MobileNetV2


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: GoogLeNet(10, 3), 6166250),
        (lambda: MobileNetV2(10, 3), 2236682),
        (lambda: FedConvHAR(5, 1, 30), 15141),
        (lambda: Encoder(4, 50265, 514, 768, 12, 12, 3072), 124647940),
        (lambda: LSTM(5, 1, (100, 6)), 18757),
    ],
)
def test_parameter_counts(make, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count


def test_frozen_affine_of_the_harbox_net():
    norms = [m for m in FedConvHAR(5, 1, 30).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2
    assert not any(p.requires_grad for m in norms for p in m.parameters())
