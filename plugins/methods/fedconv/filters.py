"""FedConv's filters: one small kernel a spatial tap that shrinks a weight tensor, or grows a small one (spec fedconv 2).

A tensor is seen as images: (out, in) for every spatial tap, one row for a vector. A kernel of (n - m + 1) turns n rows into m
(correlation) or m rows into n (transposed). Where an axis joins the channels of several groups, each part has its own filter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hetfl import Selection, State
from hetfl.submodel.blocks import is_leading
from hetfl.submodel.plan import WHOLE
from hetfl.submodel.widths import Axis

Side = tuple[int, int]

MOST_PARTS = 64

SLIGHT = 4096  # entries of a block's kernels up to which it is computed together with others

MOST_ENTRIES = 1 << 20  # of a block's windows; more are correlated by spectra

NEGATIVE, POSITIVE = 0.001, 0.85


def mlr(x: Tensor, times: int = 1) -> Tensor:
    """The modified leaky ReLU: 0.85 x above 0, 0.001 x below (spec 2.4), `times` times."""
    for _ in range(times):
        x = torch.where(x >= 0, POSITIVE * x, NEGATIVE * x)
    return x


@dataclass(frozen=True, eq=False)
class Part:
    """A run of positions of an axis, of which the first `kept` remain."""

    positions: Tensor
    kept: int


@dataclass(frozen=True, eq=False)
class Block:
    """The part of a tensor that one set of filters (one a tap) works on, as (taps, rows, columns)."""

    name: str
    rows: Part
    columns: Part
    taps: int

    @property
    def large(self) -> tuple[int, int]:
        return len(self.rows.positions), len(self.columns.positions)

    @property
    def small(self) -> tuple[int, int]:
        return self.rows.kept, self.columns.kept

    @property
    def kernel(self) -> tuple[int, int]:
        return self.large[0] - self.small[0] + 1, self.large[1] - self.small[1] + 1

    @cached_property
    def spectral(self) -> bool:
        """Whether the Fourier form is cheaper, by a count of operations alone."""
        direct = math.prod(self.small) * math.prod(self.kernel)
        area = math.prod(self.large)
        return direct > 12 * area * math.log2(area + 1)


def blocks(selection: Selection, name: str, tensor: Tensor) -> list[Block]:
    """How filters tile one tensor for the submodel `selection` of leading channels; one cut along a third dim is only sliced."""
    axes, index = selection.widths.axes.get(name, {}), selection.index.get(name, WHOLE)
    if max(axes, default=0) > 1:
        return []
    lines = [parts(axes.get(d), index.get(d), n) for d, n in enumerate(tensor.shape[:2])]
    rows, columns = lines if len(lines) == 2 else ([Part(torch.arange(1), 1)], lines[0])
    taps = math.prod(tensor.shape[2:])
    return [Block(name, r, c, taps) for r in rows for c in columns]


def parts(axis: Axis | None, index: Tensor | None, size: int) -> list[Part]:
    """An axis as runs whose kept positions lead; a layout with too many runs is taken by position instead of filtered."""
    if axis is None or index is None:
        return [Part(torch.arange(size), size)]
    broken = (axis.group[1:] != axis.group[:-1]) | (axis.unit[1:] < axis.unit[:-1])
    runs = torch.arange(size).tensor_split((broken.nonzero().squeeze(1) + 1).tolist())
    if len(runs) > MOST_PARTS:
        return [Part(index, len(index))]
    kept = torch.isin(torch.arange(size), index)
    return [Part(run, int(kept[run].sum())) for run in runs]


def images(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The block of `tensor` at `rows` and `columns` as (taps, rows, columns)."""
    if tensor.ndim == 1:
        return pick(tensor, 0, columns)[None, None]
    block = pick(pick(tensor, 0, rows), 1, columns)
    return block.reshape(*block.shape[:2], -1).permute(2, 0, 1)


def pick(tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    return tensor.narrow(dim, 0, len(positions)) if is_leading(positions) else tensor.index_select(dim, positions)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Filters of some blocks that are computed as one: `taps` of them in all, one entry of a vector (taps,) each; `v` are all
    kernels, one after the other."""

    blocks: list[int]
    sides: list[tuple[int, int, int]]  # of each block's kernels: taps, rows, columns

    @cached_property
    def lengths(self) -> Tensor:
        """Entries of each tap's kernel."""
        return torch.tensor([kr * kc for taps, kr, kc in self.sides for _ in range(taps)])

    @cached_property
    def tap(self) -> Tensor:
        """The tap that each entry of `v` belongs to."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    @property
    def sizes(self) -> list[int]:
        """Entries of p, q, g and v."""
        taps = len(self.lengths)
        return [taps, taps, taps, int(self.lengths.sum())]

    def shaped(self, v: Tensor) -> Tensor:
        """`v`, of one block (taps, entries): sums and products of these need no positions."""
        return v.view(len(self.lengths), -1) if len(self.blocks) == 1 else v

    def sums(self, v: Tensor) -> Tensor:
        """The sum of each tap's entries."""
        return v.sum(1) if v.ndim == 2 else torch.segment_reduce(v, "sum", lengths=self.lengths, unsafe=True)

    def over(self, of_taps: Tensor) -> Tensor:
        """A value of each tap beside each of its entries."""
        return of_taps[:, None] if len(self.blocks) == 1 else of_taps.index_select(0, self.tap)

    def kernels(self, v: Tensor) -> list[Tensor]:
        """Each block's (taps, rows, columns)."""
        parts = v.flatten().split([math.prod(side) for side in self.sides])
        return [part.view(side) for part, side in zip(parts, self.sides, strict=True)]


def bundled(blocks: Sequence[Block]) -> list[Bundle]:
    """The slight blocks as one bundle, each other block as one of its own."""
    sides = [(b.taps, *b.kernel) for b in blocks]
    slight = [i for i, side in enumerate(sides) if math.prod(side) <= SLIGHT]
    groups = [slight, *([i] for i in range(len(blocks)) if i not in set(slight))]
    return [Bundle(group, [sides[i] for i in group]) for group in groups if group]


class Filters:
    """The filters of one size class or one client.

    `flat` holds all that can be trained, so that an optimiser has one tensor: for each block p, q, g (taps,) and V (taps, kr, kc).
    """

    def __init__(self, selection: Selection, blocks: Sequence[Block], weights: Sequence[Sequence[Tensor]] | None = None) -> None:
        self.selection, self.blocks, self.bundles = selection, list(blocks), bundled(blocks)
        self.touched = weights is not None
        self.flat = self._joined([delta(b) for b in self.blocks] if weights is None else weights)

    def _joined(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        parts = [weights[i][k].flatten() for bundle in self.bundles for k in range(4) for i in bundle.blocks]
        return torch.cat(parts) if parts else torch.zeros(0)

    def parts(self, flat: Tensor) -> list[tuple[Tensor, ...]]:
        """p, q, g and v of every bundle within a tensor of the form of `flat`."""
        parts = flat.split([n for bundle in self.bundles for n in bundle.sizes])
        return [parts[i : i + 4] for i in range(0, len(parts), 4)]

    def split(self, flat: Tensor) -> list[list[Tensor]]:
        """p, q, g and V of every block within a tensor of the form of `flat`."""
        found: list[list[Tensor]] = [[] for _ in self.blocks]
        for bundle, (*vectors, v) in zip(self.bundles, self.parts(flat), strict=True):
            pieces = [vector.split([side[0] for side in bundle.sides]) for vector in vectors]
            for block, *of_block in zip(bundle.blocks, *pieces, bundle.kernels(v), strict=True):
                found[block] = of_block
        return found

    @property
    def weights(self) -> list[list[Tensor]]:
        return self.split(self.flat)

    def randomise(self, generator: torch.Generator) -> None:
        """The reference's start: V uniform in +-1/sqrt(kr kc), g its norm, p and q uniform in +-1 (spec 2.8)."""
        self.flat, self.touched = self._joined([drawn(b, generator) for b in self.blocks]), True

    def frozen(self) -> Filters:
        """A copy as it is now, for a plan that outlives further tuning."""
        other = copy.copy(self)
        other.flat = self.flat.detach().clone()
        return other

    def state_dict(self) -> State:
        return {f"{i}.{k}": w.detach() for i, block in enumerate(self.weights) for k, w in zip("pqgV", block, strict=True)}

    def load_state_dict(self, state: State) -> None:
        self.flat = self._joined([[state[f"{i}.{k}"] for k in "pqgV"] for i in range(len(self.blocks))])
        self.touched = True


def tiled(selection: Selection, like: State, parameters: Sequence[str]) -> list[Block]:
    """The blocks of all `parameters`."""
    return [block for name in parameters for block in blocks(selection, name, like[name])]


def delta(block: Block) -> list[Tensor]:
    """The start at which compression is the leading slice and dilation placement there: V one at (0, 0), g 1, p and q 0."""
    v = torch.zeros(block.taps, *block.kernel)
    v[:, 0, 0] = 1
    return [torch.zeros(block.taps), torch.zeros(block.taps), torch.ones(block.taps), v]


def drawn(block: Block, generator: torch.Generator) -> list[Tensor]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    v = uniform(block.taps, *block.kernel) / math.sqrt(math.prod(block.kernel))
    return [uniform(block.taps), uniform(block.taps), v.flatten(1).norm(dim=1), v]


def kernel(g: Tensor, v: Tensor) -> Tensor:
    """K = g V / ||V||, a weight norm with one scale a tap."""
    scale: Tensor = g / v.flatten(1).norm(dim=1).clamp(min=1e-12)
    return scale[:, None, None] * v


class Compressor:
    """Filters over one fixed global state: windows and spectra of its images are computed once, and again and again filtered."""

    def __init__(self, filters: Filters, state: State, times: int = 0, residual: str = "all") -> None:
        self.filters, self.state, self.times, self.residual = filters, state, times, residual
        self.images = [Correlation(b, images(state[b.name], b.rows.positions, b.columns.positions)) for b in filters.blocks]
        self.keep = [self._keep(bundle) for bundle in filters.bundles]

    def __call__(self) -> State:
        """The small tensors that the filters make of the state, differentiable in the filters' weights."""
        plain = self.filters.selection.take(self.state)
        if not self.filters.touched:
            return plain
        for name, pieces in gathered(self.filters.blocks, self.pieces()).items():
            plain[name] = assembled(pieces, plain[name])
        return plain

    def pieces(self) -> list[Tensor]:
        """What every block comes to, in their order."""
        found: dict[int, Tensor] = {}
        for bundle, weights, keep in zip(self.filters.bundles, self.filters.parts(self.filters.flat), self.keep, strict=True):
            made = filtered(*weights, keep, bundle, [self.images[i] for i in bundle.blocks])
            found |= {i: mlr(y, self.times) for i, y in zip(bundle.blocks, made, strict=True)}
        return [found[i] for i in range(len(found))]

    def _keep(self, bundle: Bundle) -> Tensor:
        """For each tap 1 where the image stays beside its projection, else 0."""
        kept = [float(kept_beside(taps, self.residual)) for taps, _, _ in bundle.sides for _ in range(taps)]
        return torch.tensor(kept)


def kept_beside(taps: int, residual: str) -> bool:
    """Whether an image stays beside its projection: always, or for convolutions."""
    return residual == "all" or (residual == "taps" and taps > 1)


class Correlation:
    """The images of a block, one a tap, made ready for kernels to be correlated with them: few entries as windows, else spectra."""

    def __init__(self, block: Block, x: Tensor) -> None:
        self.block = block
        (sr, sc), (kr, kc) = block.small, block.kernel
        few = block.taps * sr * sc * kr * kc <= MOST_ENTRIES
        self.windows = x.unfold(1, kr, 1).unfold(2, kc, 1).reshape(block.taps, sr * sc, kr * kc) if few else None
        self.spectrum = None if few else torch.fft.rfft2(x)

    def __call__(self, k: Tensor) -> Tensor:
        """Each tap's image (n, m) with its kernel (kr, kc): the valid (n - kr + 1, m - kc + 1)."""
        rows, columns = self.block.large
        side = rows - k.shape[1] + 1, columns - k.shape[2] + 1
        if self.spectrum is not None:
            return valid(self.spectrum, k, (rows, columns), side)
        assert self.windows is not None
        forward = k.shape[1:] == self.block.kernel
        return torch.bmm(self.windows if forward else self.windows.mT, k.reshape(len(k), -1, 1)).view(-1, *side)


class Filtering(torch.autograd.Function):
    """(keep + p) g (x * U) + q g sum(U) with U = V / ||V|| for each tap (spec 2.2), the blocks of a bundle in one piece.

    x is fixed: the gradient of U is x * gradient. Autograd's own way through the dozen small steps of every block can take longer
    than the net that is tuned.
    """

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, q: Tensor, g: Tensor, v: Tensor, keep: Tensor, bundle: Bundle, correlations: Sequence[Correlation]
    ) -> tuple[Tensor, ...]:
        v = bundle.shaped(v)
        size = bundle.sums(v * v).sqrt_().clamp_(min=1e-12)
        unit = v / bundle.over(size)
        total, share = bundle.sums(unit), p + keep
        ctx.bundle, ctx.correlations = bundle, correlations
        ctx.save_for_backward(q, g, unit, size, total, share)
        levels = (q * g * total).split([side[0] for side in bundle.sides])
        turned = zip(correlations, bundle.kernels(unit * bundle.over(share * g)), levels, strict=True)
        return tuple(correlate(k).add_(level[:, None, None]) for correlate, k, level in turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, g, unit, size, total, share), bundle = ctx.saved_tensors, ctx.bundle
        turned = [correlate(grad).flatten() for correlate, grad in zip(ctx.correlations, grads, strict=True)]
        across = bundle.shaped(torch.cat(turned) if len(turned) > 1 else turned[0])
        sums = torch.cat([grad.sum((1, 2)) for grad in grads])
        along, level = bundle.sums(across * unit), sums * total
        of_g = share * along + q * level
        of_v = across.mul_(bundle.over(share * g)).add_(bundle.over(q * g * sums)).sub_(unit * bundle.over(g * of_g))
        return g * along, g * level, of_g, of_v.div_(bundle.over(size)).flatten(), None, None, None


filtered: Callable[..., tuple[Tensor, ...]] = Filtering.apply


def valid(spectrum: Tensor, k: Tensor, large: Side, side: Side) -> Tensor:
    """The first `side` entries of the circular correlation of images (taps, *large), given by their spectrum, with kernels k."""
    whole: Tensor = torch.fft.irfft2(spectrum * torch.fft.rfft2(k, s=large).conj(), s=large)
    return whole[:, : side[0], : side[1]]


class Spreading(torch.autograd.Function):
    """Full convolution of images with kernels by their spectra; both gradients are valid correlations of the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, k: Tensor, large: Side) -> Tensor:
        whole: Tensor = torch.fft.irfft2(torch.fft.rfft2(x, s=large) * torch.fft.rfft2(k, s=large), s=large)
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, k, ctx.large = inputs
        ctx.save_for_backward(x, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, k), spectrum = ctx.saved_tensors, torch.fft.rfft2(grads[0], s=ctx.large)
        of_x = valid(spectrum, k, ctx.large, x.shape[1:]) if ctx.needs_input_grad[0] else None
        of_k = valid(spectrum, x, ctx.large, k.shape[1:]) if ctx.needs_input_grad[1] else None
        return of_x, of_k, None


spreading: Callable[..., Tensor] = Spreading.apply


def gathered(whole: Sequence[Block], pieces: Sequence[Tensor]) -> dict[str, list[tuple[Block, Tensor]]]:
    found: dict[str, list[tuple[Block, Tensor]]] = {}
    for block, piece in zip(whole, pieces, strict=True):
        found.setdefault(block.name, []).append((block, piece))
    return found


def assembled(pieces: Sequence[tuple[Block, Tensor]], like: Tensor) -> Tensor:
    """The small tensor made of its blocks, in the order of their rows and columns."""
    if len(pieces) == 1:
        whole = pieces[0][1]
        return whole.permute(1, 2, 0).reshape(like.shape) if like.ndim > 1 else whole.reshape(like.shape)
    lines: dict[int, list[Tensor]] = {}
    for block, piece in pieces:
        lines.setdefault(id(block.rows), []).append(piece)
    whole = torch.cat([torch.cat(line, dim=2) for line in lines.values()], dim=1)
    return whole.permute(1, 2, 0).reshape(like.shape) if like.ndim > 1 else whole.reshape(like.shape)


def dilate(filters: Filters, small: State, like: State, times: int = 0, residual: str = "all", flat: Tensor | None = None) -> State:
    """`small` grown to the shapes of `like` by transposed correlation; tensors without filters are left out (spec 2.3).

    `flat`: weights to take in place of the filters' own, as here and in `coverage`.
    """
    grown: State = {}
    for block, (p, q, g, v) in zip(filters.blocks, filters.split(filters.flat if flat is None else flat), strict=True):
        x = images_of_small(block, small[block.name], filters)
        x = (kept_beside(block.taps, residual) + p)[:, None, None] * x + q[:, None, None]
        y = mlr(spread(x, kernel(g, v), block), times)
        grown[block.name] = placed(block, y, grown.get(block.name), like[block.name])
    return grown


def coverage(filters: Filters, like: State, flat: Tensor | None = None) -> State:
    """How much of each grown entry comes from the client: the same growth of ones with |kernel| (findings 6.5)."""
    grown: State = {}
    for block, (_, _, g, v) in zip(filters.blocks, filters.split(filters.flat if flat is None else flat), strict=True):
        ones = torch.ones(block.taps, *block.small)
        y = spread(ones, kernel(g, v).abs(), block).clamp(min=0)
        grown[block.name] = placed(block, y, grown.get(block.name), like[block.name])
    return grown


def spread(x: Tensor, k: Tensor, block: Block) -> Tensor:
    """Transposed correlation, stride 1: (taps, m, n) -> (taps, m + kr - 1, n + kc - 1)."""
    if not block.spectral:
        return F.conv_transpose2d(x[None], k[:, None], groups=block.taps)[0]
    return spreading(x, k, block.large)


def images_of_small(block: Block, small: Tensor, filters: Filters) -> Tensor:
    """The client's part of a block: the places in the small tensor where the block's kept positions lie."""
    index = filters.selection.index.get(block.name, WHOLE)

    def where(part: Part, dim: int, size: int) -> Tensor:
        kept = part.positions[: part.kept]
        return torch.isin(index[dim], kept).nonzero().squeeze(1) if dim in index else torch.arange(size)

    if small.ndim == 1:
        return images(small, torch.arange(1), where(block.columns, 0, small.shape[0]))
    return images(small, where(block.rows, 0, small.shape[0]), where(block.columns, 1, small.shape[1]))


def placed(block: Block, y: Tensor, so_far: Tensor | None, like: Tensor) -> Tensor:
    """The block's images written to its places in a tensor of the shape of `like`."""
    if so_far is None and block.large == (like.shape[0] if like.ndim > 1 else 1, like.shape[min(1, like.ndim - 1)]):
        return y.permute(1, 2, 0).reshape(like.shape) if like.ndim > 1 else y.reshape(like.shape)
    full = torch.zeros_like(like) if so_far is None else so_far.clone()
    if like.ndim == 1:
        return full.index_copy(0, block.columns.positions, y.reshape(-1))
    values = y.permute(1, 2, 0).reshape(*block.large, *like.shape[2:])
    rows = full.index_select(0, block.rows.positions).index_copy(1, block.columns.positions, values)
    return full.index_copy(0, block.rows.positions, rows)
