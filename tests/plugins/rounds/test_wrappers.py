"""Rounds within clip, dp and the codecs, against the same rounds in plain torch."""

from __future__ import annotations

import pytest
import torch

from helpers.plain import UNEQUAL, Federation, cross_entropy, cut, descend, leading, mean, paste

WIDTHS = (1.0, 0.5, 0.25)


def changes(plain, state, r, arrive=lambda sent, r: sent):
    """What the server cuts for each client, and what the client changes of what arrives."""
    for c, width in enumerate(WIDTHS):
        sent = cut(state, leading(width))
        arrived = arrive(sent, r)
        trained = descend(arrived, plain.batches(c, r), cross_entropy)
        yield c, width, sent, {n: trained[n] - t for n, t in arrived.items()}


def clipped_changes(plain, state, r, most):
    """What each client is taken to return: its change, scaled to a norm of at most `most`; and the norms before."""
    pasted, norms = [], []
    for _, width, sent, change in changes(plain, state, r):
        norms.append(float(torch.cat([t.flatten() for t in change.values()]).norm()))
        shorter = {n: t + min(1.0, most / norms[-1]) * change[n] for n, t in sent.items()}
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


@pytest.mark.parametrize("aggregate", ["overlap", "fedavg"])
def test_dp_without_noise_is_the_clipped_sum_over_the_sampled_clients(simulate, aggregate):
    """McMahan et al., ICLR 2018: clients count once, whatever their examples, and the denominator does not depend on them."""
    values = {**UNEQUAL, "wrap": ("dp",), "set": {"dp": {"norm": 0.12, "noise": 0.0}}}
    values["set"] |= {"overlap": {"weighting": "samples"}} if aggregate == "overlap" else {}
    plain = Federation(simulate(0, extract="heterofl", aggregate=aggregate, **values))

    def one_round(state, r):
        pasted, _ = clipped_changes(plain, state, r, 0.12)
        return {n: t + sum(cover[n] * (new[n] - t) for new, cover in pasted) / len(WIDTHS) for n, t in state.items()}

    plain.follow(one_round)


def follow_codec(plain, coded, loses=True, **how):
    """Two rounds in which every change of more than 128 entries arrives as `coded(change, entry's memory, generator)`."""
    kept = {}

    def one_round(state, r):
        pasted, lossless = [], []
        for c, width, sent, change in changes(plain, state, r, **how):
            generator, arrived = plain.stream(plain.codec, r, c), {}
            for n, t in change.items():
                arrived[n], kept[c, n] = coded(t, kept.get((c, n), 0.0), generator) if t.numel() > 128 else (t, 0.0)
            pasted.append(paste({n: t + arrived[n] for n, t in sent.items()}, leading(width), state))
            lossless.append(paste({n: t + change[n] for n, t in sent.items()}, leading(width), state))
        exact, found = mean(state, lossless), mean(state, pasted)
        assert loses == (max(float((found[n] - t).abs().max()) for n, t in exact.items()) > 1e-5)
        return found

    plain.follow(one_round)
    return [row for row in plain.made.state.client_rows if row["client"] == 0]


def codec(simulate, name, **options):
    values = {**UNEQUAL, "wrap": (name,), "set": {name: options}}
    plain = Federation(simulate(0, extract="heterofl", aggregate="overlap", **values))
    plain.codec = {"quantize": "Quantize", "topk": "TopK", "sign": "Sign"}[name]
    return plain


@pytest.mark.parametrize(("bits", "feedback", "down"), [(8, False, False), (8, True, False), (16, False, False), (8, False, True)])
def test_quantize(simulate, bits, feedback, down):
    """Each run of 256 entries of the change in steps of its largest magnitude / (2^(bits - 1) - 1), rounded down after a uniform
    number in [0, 1) is added; with feedback, what that loses is added to the client's next change. With `down` clients train from
    what is sent in the same form, and their change counts."""
    plain = codec(simulate, "quantize", bits=bits, feedback=feedback, down=down)

    def arrive(sent, r):
        generator = plain.stream("Quantize down", r)
        return {n: coded(t, 0.0, generator)[0] if down and t.numel() > 128 else t for n, t in sent.items()}

    def coded(change, memory, generator):
        change = change + memory
        runs = change.flatten().split(256)
        drawn = torch.rand(len(runs), 256, generator=generator, dtype=torch.float64)
        steps = [float(run.abs().max()) / (2 ** (bits - 1) - 1) for run in runs]
        found = [(run / step + u[: len(run)]).floor() * step for run, step, u in zip(runs, steps, drawn, strict=True)]
        arrived = torch.cat(found).float().view(change.shape)
        return arrived, change - arrived if feedback else 0.0

    for row in follow_codec(plain, coded, loses=bits == 8, arrive=arrive):  # with 16 bits nothing is lost that counts
        assert row["bytes up"] == row["bytes down"] if down else row["bytes up"] < 0.75 * row["bytes down"]


def test_topk(simulate):
    """The largest magnitudes of each tensor's change and memory; what is not sent is the next round's memory."""
    plain = codec(simulate, "topk", share=0.2)

    def coded(change, memory, generator):
        whole = (change + memory).flatten()
        least = whole.abs().sort(descending=True).values[round(0.2 * len(whole)) - 1]
        sent = torch.where(whole.abs() >= least, whole, 0.0)
        return sent.view(change.shape), (whole - sent).view(change.shape)

    for row in follow_codec(plain, coded):
        assert row["bytes up"] < 0.75 * row["bytes down"]


def test_sign(simulate):
    """The signs of a tensor's change and memory times their mean magnitude."""
    plain = codec(simulate, "sign")

    def coded(change, memory, generator):
        whole = change + memory
        sent = torch.where(whole >= 0, 1.0, -1.0) * whole.abs().mean()
        return sent, whole - sent

    for row in follow_codec(plain, coded):
        assert row["bytes up"] < 0.75 * row["bytes down"]
