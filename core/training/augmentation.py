"""Random crops and flips of pictures in local training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hetfl.config import RunOptions


def augment(x: Tensor, options: RunOptions, generator: torch.Generator) -> Tensor:
    """Pictures x (N, C, H, W) as `options.augment` says, each by draws of its own from `generator`, which is on the CPU.

    `crop`: shifted by up to `options.crop_padding` pixels, with what was black (a raw value of 0) where nothing is left; `flip`:
    mirrored from left to right, every other one. What is drawn depends on N alone.
    """
    if not options.augment or not len(x):
        return x
    n, _, height, width = x.shape
    pad = options.crop_padding if "crop" in options.augment else 0
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < (0.5 if "flip" in options.augment else 0.0)
    across = torch.arange(width).expand(n, width)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.where(flip, across.flip(1), across)
    black = black_of(x, options)
    framed = F.pad(x - black, (pad,) * 4) + black
    picked = framed[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(3, 1).contiguous()


def black_of(x: Tensor, options: RunOptions) -> Tensor:
    """The value of a raw 0 in each channel of the normalised pictures x, (C, 1, 1)."""
    if len(options.mean) != x.shape[1] or len(options.std) != x.shape[1]:
        return x.new_zeros(x.shape[1], 1, 1)
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (options.mean, options.std))
    return (-mean / std)[:, None, None]
