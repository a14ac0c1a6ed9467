"""Compression again, faster: the same function as `compression.plain_form` up to rounding (benchmarks/speed/server.py has both).

Three things are saved: windows or spectra of the fixed images are computed once for all steps; the blocks with small kernels are
computed together, for their dozen small operations each cost more than their arithmetic; and the gradient is written out by hand,
for the image is fixed: with U = V / ||V||, y = (r + p) g (x * U) + q g sum(U), and the gradient of U is x * gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hetfl.plugins.methods.fedconv.filters import Weights
from hetfl.plugins.methods.fedconv.tiling import Block

SMALL = 4096  # entries of a block's kernels up to which it is computed together with others

MOST_ENTRIES = 1 << 20  # of a block's windows; more are correlated by spectra


def fast_form(
    blocks: Sequence[Block], images: Sequence[Tensor], residuals: Sequence[float]
) -> Callable[[Sequence[Weights]], list[Tensor]]:
    """From the weights of all blocks to their small images (taps, *small), as `compression.plain_form`."""
    correlations = [Correlation(b, x) for b, x in zip(blocks, images, strict=True)]
    bundles = bundle_blocks(blocks)
    shares = [torch.tensor([residuals[i] for i in b.blocks for _ in range(blocks[i].taps)]) for b in bundles]

    def compress(weights: Sequence[Weights]) -> list[Tensor]:
        small: dict[int, Tensor] = {}
        for bundle, residual in zip(bundles, shares, strict=True):
            p, q, g, v = (torch.cat([weights[i][k].flatten() for i in bundle.blocks]) for k in range(4))
            images = compress_bundle(p, q, g, v, residual, bundle, [correlations[i] for i in bundle.blocks])
            small |= dict(zip(bundle.blocks, images, strict=True))
        return [small[i] for i in range(len(blocks))]

    return compress


@dataclass(frozen=True, eq=False)
class Bundle:
    """Blocks (by their numbers) that are computed as one.

    p, q and g are vectors (taps,) over the taps of all of them, v is one vector of all entries of all kernels in the order of taps.
    """

    blocks: list[int]
    shapes: list[tuple[int, int, int]]  # of each block's kernels: taps, rows, columns

    @cached_property
    def lengths(self) -> Tensor:
        """Entries of each tap's kernel."""
        return torch.tensor([kr * kc for taps, kr, kc in self.shapes for _ in range(taps)])

    @cached_property
    def tap(self) -> Tensor:
        """The tap that each entry of `v` belongs to."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    def reshape(self, v: Tensor) -> Tensor:
        """`v`, of one block alone as (taps, entries), for which sums and products need no `tap`."""
        return v.view(len(self.lengths), -1) if len(self.blocks) == 1 else v

    def sum_taps(self, v: Tensor) -> Tensor:
        """The sum (taps,) of each tap's entries."""
        return v.sum(1) if v.ndim == 2 else torch.segment_reduce(v, "sum", lengths=self.lengths, unsafe=True)

    def expand(self, of_taps: Tensor) -> Tensor:
        """A value for each tap (taps,) beside each of the tap's entries in `v`."""
        return of_taps[:, None] if len(self.blocks) == 1 else of_taps.index_select(0, self.tap)

    def split(self, v: Tensor) -> list[Tensor]:
        """Each block's kernels (taps, rows, columns)."""
        parts = v.flatten().split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def bundle_blocks(blocks: Sequence[Block]) -> list[Bundle]:
    """The blocks with small kernels as one bundle, each other block as one of its own."""
    shapes = [(b.taps, *b.kernel) for b in blocks]
    small = [i for i, shape in enumerate(shapes) if math.prod(shape) <= SMALL]
    groups = [small, *([i] for i in range(len(blocks)) if i not in set(small))]
    return [Bundle(group, [shapes[i] for i in group]) for group in groups if group]


class Correlation:
    """The images (taps, rows, columns) of a block, ready to be correlated: as windows where those are small, else spectra.

    Spectra are taken along the dims in which kernels have more than one entry, the dims that are cut.
    """

    def __init__(self, block: Block, x: Tensor) -> None:
        self.block = block
        (sr, sc), (kr, kc) = block.small, block.kernel
        self.dims = [dim for dim, entries in ((1, kr), (2, kc)) if entries > 1]
        few = not self.dims or block.taps * sr * sc * kr * kc <= MOST_ENTRIES
        self.windows = x.unfold(1, kr, 1).unfold(2, kc, 1).reshape(block.taps, sr * sc, kr * kc) if few else None
        self.spectrum = None if few else torch.fft.rfftn(x, dim=self.dims)

    def __call__(self, k: Tensor) -> Tensor:
        """The valid correlation of each tap's image (n, m) with its kernel (kr, kc): (taps, n - kr + 1, m - kc + 1).

        `k` are kernels, or gradients in the shape of the small images: their correlation has the kernels' shape.
        """
        rows, columns = self.block.large
        height, width = rows - k.shape[1] + 1, columns - k.shape[2] + 1
        if self.windows is None:
            return self.correlate_circularly(k)[:, :height, :width]
        windows = self.windows if k.shape[1:] == self.block.kernel else self.windows.mT
        return torch.bmm(windows, k.reshape(len(k), -1, 1)).view(-1, height, width)

    def correlate_circularly(self, k: Tensor) -> Tensor:
        """The circular correlation along the cut dims, by spectra; in the other dim a gradient, as long as the image, is summed."""
        lengths = [self.block.large[dim - 1] for dim in self.dims]
        product = self.spectrum * torch.fft.rfftn(k, s=lengths, dim=self.dims).conj()
        for dim in {1, 2}.difference(self.dims):
            product = product if k.shape[dim] == 1 else product.sum(dim, keepdim=True)
        circular: Tensor = torch.fft.irfftn(product, s=lengths, dim=self.dims)
        return circular


class CompressBundle(torch.autograd.Function):
    """(r + p) g (x * U) + q g sum(U), with U = V / ||V||, for each tap of a bundle; the small images of each of its blocks."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, q: Tensor, g: Tensor, v: Tensor, residual: Tensor, bundle: Bundle, correlations: Sequence[Correlation]
    ) -> tuple[Tensor, ...]:
        v = bundle.reshape(v)
        norm = bundle.sum_taps(v * v).sqrt_().clamp_(min=1e-12)
        unit = v / bundle.expand(norm)
        total, share = bundle.sum_taps(unit), p + residual
        ctx.bundle, ctx.correlations = bundle, correlations
        ctx.save_for_backward(q, g, unit, norm, total, share)
        kernels = bundle.split(unit * bundle.expand(share * g))
        offsets = (q * g * total).split([shape[0] for shape in bundle.shapes])
        return tuple(x(k).add_(offset[:, None, None]) for x, k, offset in zip(correlations, kernels, offsets, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, g, unit, norm, total, share), bundle = ctx.saved_tensors, ctx.bundle
        of_kernels = [x(grad).flatten() for x, grad in zip(ctx.correlations, grads, strict=True)]
        of_unit = bundle.reshape(torch.cat(of_kernels) if len(of_kernels) > 1 else of_kernels[0])
        sums = torch.cat([grad.sum((1, 2)) for grad in grads])
        along, offset = bundle.sum_taps(of_unit * unit), sums * total
        of_g = share * along + q * offset
        of_v = of_unit.mul_(bundle.expand(share * g)).add_(bundle.expand(q * g * sums)).sub_(unit * bundle.expand(g * of_g))
        return g * along, g * offset, of_g, of_v.div_(bundle.expand(norm)).flatten(), None, None, None


compress_bundle: Callable[..., tuple[Tensor, ...]] = CompressBundle.apply
