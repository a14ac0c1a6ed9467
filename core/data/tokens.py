"""Text as token ids without a vocabulary: words are hashed, so nothing is downloaded and nothing learned from clients."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

PAD, START = 0, 1

WORD = re.compile(r"\w+|[^\w\s]")


def hash_tokens(texts: Sequence[str], tokens: int, vocab: int) -> Tensor:
    """Token ids (N, tokens), int32: the start token, then one id in [2, vocab) for each word or mark, then padding.

    Words are lower-cased and hashed by CRC-32; two words may share an id.
    """
    known: dict[str, int] = {}
    ids = torch.full((len(texts), tokens), PAD, dtype=torch.int32)
    for row, text in zip(ids, texts, strict=True):
        words = WORD.findall(text.lower())[: tokens - 1]
        for word in words:
            if word not in known:
                known[word] = 2 + zlib.crc32(word.encode()) % (vocab - 2)
        row[: len(words) + 1] = torch.tensor([START, *(known[word] for word in words)], dtype=torch.int32)
    return ids
