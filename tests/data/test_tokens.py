"""Text as hashed tokens."""

from __future__ import annotations

import zlib

import pytest
import torch

from hetfl.data.tokens import hash_tokens, identify_tokenizer
from hetfl.errors import UsageError


def test_hashed_tokens():
    """Same word, same id, whatever else is in the text; case does not count; padding is 0, the start token 1."""
    ids = hash_tokens(["A cat.", "the CAT sat on a mat today", ""], 5, 50)
    assert ids.dtype == torch.int32
    assert ids[:, 0].tolist() == [1, 1, 1]
    assert ids[0, 2] == ids[1, 2]
    assert ids[0, 4] == 0
    assert ids[2, 1:].tolist() == [0, 0, 0, 0]
    assert bool((ids[1, 1:] >= 2).all())
    assert int(hash_tokens(["word"], 2, 8192)[0, 1]) == 2 + zlib.crc32(b"word") % 8190


def test_a_folder_without_a_tokenizer_is_refused_though_its_data_were_read_before(tmp_path):
    """Its name would otherwise be that of hashed words, which may be in the cache."""
    assert identify_tokenizer(None) == []
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="holds no tokenizer"):
            identify_tokenizer(folder)
    (tmp_path / "vocab.txt").write_text("a")
    assert len(identify_tokenizer(tmp_path)) == 1
