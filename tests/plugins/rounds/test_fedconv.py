"""Rounds of FedConv, with trained compressors and dilators, against the same rounds in plain torch."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from helpers.plain import UNEQUAL, Federation, cross_entropy, cut, descend, forward, kl, leading, mean, paste, tune

WIDTHS = (1.0, 0.5, 0.25)

EXACT = {"patience": 0, "batch_size": 8, "lr": 0.02, "dilator_lr": 0.01}


def centred(w):
    """The weights up to a shift of all logits: its gradient is 0, so that Adam follows rounding errors."""
    return {n: t - t.mean(0) if n[0] == "5" else t for n, t in w.items()}


def image(t):
    return t if t.ndim == 2 else t[None]


def kernels(state, units):
    """The kernel's shape of every tensor: an axis of n entries of which m remain takes n - m + 1."""
    small = cut(state, units)
    return {n: [a - b + 1 for a, b in zip(image(t).shape, image(small[n]).shape, strict=True)] for n, t in state.items()}


def at_slice(state, units):
    """Filters that give the leading slice: p = q = 0, g = 1, V = 1 at (0, 0)."""
    found = {}
    for n, shape in kernels(state, units).items():
        v = torch.zeros(shape)
        v[0, 0] = 1.0
        found |= {f"{n}/p": torch.zeros(1), f"{n}/q": torch.zeros(1), f"{n}/g": torch.ones(1), f"{n}/V": v}
    return found


def at_random(state, units, draws):
    """V uniform in +-1 / sqrt(kr kc), g its norm, p and q uniform in +-1 (spec fedconv 2.8)."""
    found = {}
    for n, shape in kernels(state, units).items():
        v, p, q = (torch.rand(s, generator=draws) * 2 - 1 for s in ((1, *shape), (1,), (1,)))
        v = v[0] / math.sqrt(math.prod(shape))
        found |= {f"{n}/p": p, f"{n}/q": q, f"{n}/g": v.norm()[None], f"{n}/V": v}
    return found


def kernel(f, n):
    return (f[f"{n}/g"] * f[f"{n}/V"] / f[f"{n}/V"].norm())[None, None]


def filtered(f, w, residual, mlr, convolve):
    """MLR(K * (p x + q + r x)) of every tensor (spec 2.3, 2.4)."""
    found = {}
    for n, t in w.items():
        x = (f[f"{n}/p"] + residual) * image(t) + f[f"{n}/q"]
        y = convolve(x[None, None], kernel(f, n))[0, 0]
        y = torch.where(y >= 0, 0.85 * y, 0.001 * y) if mlr else y
        found[n] = y.reshape(y.shape if t.ndim == 2 else -1)
    return found


def test_fedconv_that_distils_and_dilates_updates(simulate):
    """The default's parts (docs/strategies/fedconv.md): T = 2, filters from the slice, the update over its coverage"""
    options = {"fedconv": {**EXACT, "steps": 12, "first_steps": 15, "dilator_steps": 12}}
    plain = Federation(simulate(0, extract="fedconv", aggregate="overlap", set=options, **UNEQUAL))
    units = [leading(w) for w in WIDTHS]
    compressors, dilators = ([at_slice(plain.first, u) for u in units] for _ in range(2))

    def distilled(answers, teacher, filters, rows, lr):
        """The filters after tuning the model `answers(filters)` towards the teacher's logits."""
        goal, held = forward(teacher, plain.x), forward(teacher, plain.held_x)
        loss = lambda f, at: 4 * kl(forward(answers(f), plain.x[at]), goal[at], 2.0)  # noqa: E731
        judge = lambda f: 4 * kl(forward(answers(f), plain.held_x), held, 2.0)  # noqa: E731
        return tune(filters, judge, loss, rows, lr)

    def one_round(state, r):
        pasted = []
        for c, u in enumerate(units):
            if c == 0:
                pasted.append(paste(descend(state, plain.batches(c, r), cross_entropy), u, state))
                continue
            rows = plain.cycle(len(plain.x), 8, 15 if r == 1 else 12, f"compressor {WIDTHS[c]:g}", r)
            compress = lambda f: filtered(f, state, 1, 0, F.conv2d)  # noqa: E731
            compressors[c] = distilled(compress, state, compressors[c], rows, 0.02)
            sent = compress(compressors[c])
            trained = descend(sent, plain.batches(c, r), cross_entropy)
            change = {n: trained[n] - t for n, t in sent.items()}

            def grown(f, change=change, trained=trained):
                """The update, and how much of each entry the client covers."""
                cover = {n: F.conv_transpose2d(torch.ones(1, 1, *image(t).shape), kernel(f, n).abs()) for n, t in trained.items()}
                cover = {n: t.reshape(state[n].shape) for n, t in cover.items()}
                return filtered(f, change, 1, 0, F.conv_transpose2d), cover

            def dilate(f, grown=grown):
                update, cover = grown(f)
                return {n: t + update[n] / cover[n].clamp(min=1) for n, t in state.items()}

            rows = plain.cycle(len(plain.x), 8, 12, "dilator", r, c)
            dilators[c] = distilled(dilate, trained, dilators[c], rows, 0.01)
            update, cover = grown(dilators[c])
            pasted.append(({n: t + update[n] / cover[n].clamp(min=1e-12) for n, t in state.items()}, cover))
        return mean(state, pasted)

    plain.follow(one_round, seen=centred, within=1e-4)
    assert any(float(f["3.weight/p"].abs().max()) > 1e-4 for f in compressors)
    assert any(float(f["3.weight/p"].abs().max()) > 1e-4 for f in dilators)


def test_fedconv_after_its_code(simulate):
    """spec fedconv 2.3 to 2.5, 2.8, 2.9: random filters, MLR, labels, weights dilated, uploads tuned, fewer epochs from round 6"""
    own = {
        "start": "random", "objective": "ce", "residual": "conv", "mlr": 1, "epochs": 3, "late_epochs": 1, "dilate": "weights",
        "dilator_epochs": 2, "upload_epochs": 2, "server_epochs": 2, "halve_every": 3,
    }  # fmt: skip
    values = {**UNEQUAL, "rounds": 6, "server_batch_size": 8, "set": {"fedconv": {**EXACT, **own}}}
    plain = Federation(simulate(0, extract="fedconv", aggregate="overlap", **values))
    units, each = [leading(w) for w in WIDTHS], math.ceil(len(plain.x) / 8)
    compressors = [at_random(plain.first, u, plain.stream(f"compressor {w:g}")) for u, w in zip(units, WIDTHS, strict=True)]
    dilators = [at_random(plain.first, u, plain.stream(f"dilator {c}")) for c, u in enumerate(units)]

    def fitted(answers, x, rows, lr):
        loss = lambda f, at: cross_entropy(answers(f), plain.x[at], plain.y[at])  # noqa: E731
        judge = lambda f: cross_entropy(answers(f), plain.held_x, plain.held_y)  # noqa: E731
        return tune(x, judge, loss, rows, lr)

    def one_round(state, r):
        pasted, epochs, rate = [], {5: (3, 2), 6: (1, 1)}[r], {5: 0.5, 6: 0.25}[r]
        state = fitted(lambda w: w, state, plain.cycle(len(plain.x), 8, 2 * each, "server", r), 1e-4)
        for c, u in enumerate(units):
            sent = state
            if c:
                rows = plain.cycle(len(plain.x), 8, epochs[0] * each, f"compressor {WIDTHS[c]:g}", r)
                compress = lambda f: filtered(f, state, 0, 1, F.conv2d)  # noqa: E731
                compressors[c] = fitted(compress, compressors[c], rows, 0.02 * rate)
                sent = compress(compressors[c])
            trained = descend(sent, plain.batches(c, r), cross_entropy)
            trained = fitted(lambda w: w, trained, plain.cycle(len(plain.x), 8, 2 * each, "upload", r, c), 1e-4)
            if c == 0:
                pasted.append(paste(trained, u, state))
                continue
            dilate = lambda f, trained=trained: filtered(f, trained, 0, 1, F.conv_transpose2d)  # noqa: E731
            dilators[c] = fitted(dilate, dilators[c], plain.cycle(len(plain.x), 8, epochs[1] * each, "dilator", r, c), 0.01 * rate)
            pasted.append((dilate(dilators[c]), {n: torch.ones_like(t) for n, t in state.items()}))
        return mean(state, pasted)

    plain.follow(one_round, first=5, seen=centred, within=1e-4)
