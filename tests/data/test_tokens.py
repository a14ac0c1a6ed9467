"""Text as hashed tokens."""

from __future__ import annotations

import zlib

import torch

from hetfl.data.tokens import hashed


def test_hashed_tokens():
    """Same word, same id, whatever else is in the text; case does not count; padding is 0, the start token 1."""
    ids = hashed(["A cat.", "the CAT sat on a mat today", ""], 5, 50)
    assert ids.dtype == torch.int32
    assert ids[:, 0].tolist() == [1, 1, 1]
    assert ids[0, 2] == ids[1, 2]
    assert ids[0, 4] == 0
    assert ids[2, 1:].tolist() == [0, 0, 0, 0]
    assert bool((ids[1, 1:] >= 2).all())
    assert int(hashed(["word"], 2, 8192)[0, 1]) == 2 + zlib.crc32(b"word") % 8190
