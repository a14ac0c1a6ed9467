"""Text as token ids: by a tokenizer from a local folder, or words are hashed; nothing is downloaded or learned from clients."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.lazy import import_library
from hetfl.errors import UsageError

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


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")  # a folder with one has a tokenizer


def tokenize(texts: Sequence[str], options: DataOptions) -> Tensor:
    """Token ids (N, options.tokens): of the tokenizer in the folder that `options` name, else of hashed words; padding last.

    Raises UsageError where there is no such tokenizer, or it has more tokens than --vocab.
    """
    if options.tokenizer is None:
        return hash_tokens(texts, options.tokens, options.vocab)
    read = load_tokenizer(options.tokenizer)
    found = read(list(texts), truncation=True, max_length=options.tokens)["input_ids"]
    ids = torch.full((len(texts), options.tokens), pad_of(options), dtype=torch.int32)
    for row, each in zip(ids, found, strict=True):
        row[: len(each)] = torch.tensor(each, dtype=torch.int32)
    if len(texts) and int(ids.max()) >= options.vocab:
        raise UsageError(f"the tokenizer in '{options.tokenizer}' has the token {int(ids.max())}, beyond --vocab {options.vocab}")
    return ids


def pad_of(options: DataOptions) -> int:
    """The id that stands where there is no token: of a tokenizer that has none, that of the end of a text."""
    if options.tokenizer is None:
        return PAD
    known = load_tokenizer(options.tokenizer)
    return int(next((i for i in (known.pad_token_id, known.eos_token_id) if i is not None), PAD))


def identify_tokenizer(folder: Path | None) -> list[tuple[str, int, int]]:
    """The files of a tokenizer's folder: names, sizes and times of change. Raises UsageError where it holds no tokenizer."""
    if folder is None:
        return []
    refuse_no_tokenizer(folder)
    files = sorted(path for path in folder.expanduser().glob("*") if path.name.startswith(STEMS))
    return [(str(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in files]


STEMS = ("tokenizer", "vocab", "merges", "spiece", "special_tokens", "added_tokens", "config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a file that only tokenizers have."""
    return any((folder.expanduser() / name).exists() for name in TOKENIZERS)


def refuse_no_tokenizer(folder: Path) -> None:
    """Raises UsageError where `folder` holds no tokenizer."""
    if not has_tokenizer(folder):
        raise UsageError(f"--tokenizer: the folder '{folder}' holds no tokenizer ({', '.join(TOKENIZERS)})")


@lru_cache(maxsize=4)
def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in a local folder. Raises UsageError where there is none, or transformers is not installed."""
    refuse_no_tokenizer(folder)
    try:
        return import_library("transformers").AutoTokenizer.from_pretrained(str(folder.expanduser()), local_files_only=True)
    except ImportError as error:
        raise UsageError(f"the tokenizer in '{folder}' needs transformers: pip install 'hetfl[transformers]' ({error})") from error
    except Exception as error:  # transformers raises anything for files that it cannot read
        raise UsageError(f"the tokenizer in '{folder}' cannot be read: {' '.join(str(error).split())[:200]}") from error
