"""Rounds within clip, dp and quantize, against the same rounds in plain torch."""

from __future__ import annotations

import pytest
import torch

from helpers.plain import UNEQUAL, Federation, cross_entropy, cut, descend, leading, mean, paste

WIDTHS = (1.0, 0.5, 0.25)


def clipped_changes(plain, state, r, most, widths=WIDTHS):
    """What each client returns: its change, scaled to a norm of at most `most`; and the norms before."""
    pasted, norms = [], []
    for c, width in enumerate(widths):
        sent = cut(state, leading(width))
        trained = descend(sent, plain.batches(c, r), cross_entropy)
        norms.append(float(torch.cat([(trained[n] - t).flatten() for n, t in sent.items()]).norm()))
        shorter = {n: t + min(1.0, most / norms[-1]) * (trained[n] - t) for n, t in sent.items()}
        pasted.append(paste(shorter, leading(width), state))
    return pasted, norms


def test_clip(simulate):
    """The L2 norm of a client's whole update is at most the bound; a smaller one is left alone."""
    values = {**UNEQUAL, "wrap": ("clip",), "set": {"clip": {"norm": 0.2}, "overlap": {"weighting": "samples"}}}
    plain, seen = Federation(simulate(0, extract="heterofl", aggregate="overlap", **values)), []

    def one_round(state, r):
        pasted, norms = clipped_changes(plain, state, r, 0.2)
        seen.extend(norms)
        return mean(state, pasted, plain.sizes)

    plain.follow(one_round)
    assert min(seen) < 0.2 < max(seen)


def test_dp_without_noise_clips_and_counts_clients_alike(simulate):
    """McMahan et al., ICLR 2018: whatever the number of a client's examples, it counts once."""
    values = {**UNEQUAL, "wrap": ("dp",), "set": {"dp": {"norm": 0.12, "noise": 0.0}, "overlap": {"weighting": "samples"}}}
    plain = Federation(simulate(0, extract="full", aggregate="overlap", **values))
    plain.follow(lambda state, r: mean(state, clipped_changes(plain, state, r, 0.12, (1, 1, 1))[0]))


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_quantize(simulate, form):
    """Half precision, or 255 steps between the largest magnitude of a tensor and its negative."""
    values = {**UNEQUAL, "wrap": ("quantize",), "set": {"quantize": {"form": form}}}
    plain = Federation(simulate(0, extract="heterofl", aggregate="overlap", **values))

    def coded(t):
        if form == "fp16":
            return t.half().float()
        step = t.abs().max() / 127
        return (t / step).round() * step

    def one_round(state, r):
        pasted = []
        for c, w in enumerate(WIDTHS):
            trained = descend(cut(state, leading(w)), plain.batches(c, r), cross_entropy)
            pasted.append([paste(t, leading(w), state) for t in (trained, {n: coded(v) for n, v in trained.items()})])
        exact, found = (mean(state, [both[i] for both in pasted]) for i in (0, 1))
        assert max(float((found[n] - t).abs().max()) for n, t in exact.items()) > 1e-5
        return found

    plain.follow(one_round, rounds=1)
    whole = [row for row in plain.made.state.client_rows if row["client"] == 0]
    assert all(row["bytes up"] < row["bytes down"] * (0.75 if form == "fp16" else 0.6) for row in whole)
