"""A data set for language models that needs no download: sentences of four made-up languages over the same words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.cache import Stored
from hetfl.data.kinds import find_kind, next_tokens
from hetfl.data.targets import describe_targets
from hetfl.data.tokens import PAD, START
from hetfl.digest import digest_tensors
from hetfl.errors import UsageError
from hetfl.rng import stream

DIALECTS, WORDS, LENGTH = ("north", "east", "south", "west"), 24, 32

FOLLOWERS = (0.6, 0.2, 0.15, 0.05)  # how often each of a word's four followers comes after it

PROMPT = 4  # words of a sentence that are given, by which its dialect can be told


def make_dialects(options: DataOptions, progress: Callable[[str], None]) -> Stored:
    """2,400 sentences to train on and 600 to test on, always the same, as token ids (N, LENGTH); 12 to 31 words, then padding.

    In each dialect a word has four followers (FOLLOWERS). Whoever knows dialect and word expects 1.063 nats of the next: no
    model has a perplexity below 2.89, nor a token accuracy above 60 %, but for chance. The first PROMPT words are not predicted.
    """
    if options.partition == "natural":
        raise UsageError("data set 'dialects' does not say whose each sentence is: take another --partition, such as dirichlet")
    if options.task not in (None, "lm"):
        raise UsageError(f"data set 'dialects' is for --task lm, not {options.task}")
    generator = stream(0, "dialects")
    after = torch.stack([torch.randperm(WORDS, generator=generator)[:4] for _ in range(len(DIALECTS) * WORDS)]).view(-1, WORDS, 4)
    parts = {part: draw_sentences(after, count, generator) for part, count in (("", 2400), ("test.", 600))}
    targets = {part: (x, next_tokens(x, x != PAD, torch.tensor(1 + PROMPT).expand(len(x)))) for part, (x, _) in parts.items()}
    tensors, facts = describe_targets(find_kind("lm"), "data set 'dialects'", targets, labels=(list(DIALECTS), parts[""][1]))
    tensors |= {f"{part}x": x for part, (x, _) in parts.items()}
    more = {"columns": {}, "vocab": WORDS + 2, "outputs": WORDS + 2, "fingerprint": digest_tensors(dict(sorted(tensors.items())))}
    return tensors, facts | more


def draw_sentences(after: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids (count, LENGTH) and the dialect of each (count,); `after` (dialects, WORDS, 4) are the followers of each word."""
    dialect = torch.randint(len(after), (count,), generator=generator)
    words = torch.randint(WORDS, (count, 1), generator=generator)
    for _ in range(LENGTH - 2):
        which = torch.multinomial(torch.tensor(FOLLOWERS), count, replacement=True, generator=generator)
        words = torch.cat([words, after[dialect, words[:, -1], which][:, None]], dim=1)
    lengths = torch.randint(12, LENGTH, (count, 1), generator=generator)
    words = torch.where(torch.arange(LENGTH - 1) < lengths, words + 2, PAD)
    return torch.cat([torch.full((count, 1), START), words], dim=1), dialect
