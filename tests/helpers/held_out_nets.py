"""Modules that cannot be used, or only in part."""

from __future__ import annotations

import torch
from torch import nn


class NoWidth(nn.Module):
    """Nothing but the head."""

    def __init__(self, classes):
        super().__init__()
        self.a = nn.Linear(64, classes)

    def forward(self, x):
        return self.a(x.flatten(1))


def coloured(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def thousand():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 1000))


class Two(nn.Module):
    def forward(self, x, lengths):
        return x


class Aux(nn.Module):
    """Answers with an object that has logits, and with a further head in training."""

    def __init__(self, classes):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 16), nn.Linear(16, classes), nn.Linear(16, classes)

    def forward(self, x):
        h = torch.relu(self.a(x.flatten(1)))
        return Answer(self.b(h) + (self.c(h) if self.training else 0))


class Answer:
    def __init__(self, logits):
        self.logits = logits
