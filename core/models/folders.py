"""Models of transformers in a folder (config.json, model.safetensors, tokenizer files), a local one or the Hugging Face hub's:
`--model hf:FOLDER` without network, `--model hf:NAME` or `hf:NAME@REVISION` with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.inputs import Inputs
from hetfl.data.lazy import import_library
from hetfl.data.tokens import TOKENIZERS, has_tokenizer
from hetfl.errors import UsageError

PREFIX = "hf:"

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

FETCHED = (*WEIGHTS, "model-*.safetensors", "*config.json", "*tokens.json", "merges.txt", *TOKENIZERS)  # of a model of the hub

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w.-]+)?")

AHEAD = {"is_decoder": True}  # of a configuration: a language model whose folder is of an encoder is not to see what it predicts

NEW = ("pooler",)  # parts of a model's body that a folder may lack: they belong to a task, as heads do


class Pretrained(nn.Module):
    """`net` of transformers as a model of token ids (N, T), of which those that are `pad` are not seen: answers with its logits."""

    def __init__(self, net: nn.Module, pad: int) -> None:
        super().__init__()
        self.net, self.pad = net, pad

    def forward(self, ids: Tensor) -> Any:
        return self.net(input_ids=ids, attention_mask=(ids != self.pad).long()).logits


def find_folder(name: str) -> Path:
    """The folder `name`, or that of a copy of the Hugging Face hub's model. Raises UsageError where there is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(name):
        raise UsageError(f"--model {PREFIX}{name}: there is no such folder")
    return fetch_model(name)


@lru_cache
def fetch_model(name: str) -> Path:
    """The folder of the Hugging Face hub's model NAME or NAME@REVISION, which its library fetches once and keeps.

    Raises UsageError where it is neither kept nor can be fetched.
    """
    model, _, revision = name.partition("@")
    with explaining(f"--model {PREFIX}{name}: there is no such folder, and the Hugging Face hub gives no such model"):
        hub = import_library("huggingface_hub")
        return Path(hub.snapshot_download(model, revision=revision or None, allow_patterns=[*FETCHED]))


def read_config(folder: str) -> dict[str, Any]:
    """What config.json of a model's folder says. Raises UsageError where it is no such folder."""
    path = find_folder(folder)
    try:
        found: dict[str, Any] = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UsageError(f"--model {PREFIX}{folder}: the folder holds no config.json, so it is no model of transformers") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {PREFIX}{folder}: its config.json cannot be read: {error}") from error
    if not any((path / name).exists() for name in WEIGHTS):
        raise UsageError(f"--model {PREFIX}{folder}: the folder holds no model.safetensors: save_pretrained writes one")
    return found


def follow_model(options: RunOptions) -> RunOptions:
    """`options` of a run with a model from a folder: its tokenizer, where it has one, and its vocabulary are the data's too, unless
    they are given."""
    if options.model is None or not options.model.startswith(PREFIX):
        return options
    folder = options.model.removeprefix(PREFIX)
    config, path, found = read_config(folder), find_folder(folder), dict[str, Any]()
    if options.tokenizer is None and has_tokenizer(path):
        found["tokenizer"] = path
    if "vocab" not in options.model_fields_set and "vocab_size" in config:
        found["vocab"] = config["vocab_size"]
    return options.model_copy(update=found)


def load_folder(folder: str, inputs: Inputs, args: dict[str, Any]) -> nn.Module:
    """The model in `folder` with its weights, and a new head where the task needs another; `args` go over its configuration.

    Raises UsageError where transformers is not installed, and where the weights are not those of the model.
    """
    read_config(folder)
    name, path = f"--model {PREFIX}{folder}", str(find_folder(folder))
    try:
        hub = import_library("transformers")
    except ImportError as error:
        raise UsageError(f"{name} needs transformers: pip install 'hetfl[transformers]' ({error})") from error
    with explaining(name):
        config = hub.AutoConfig.from_pretrained(path, local_files_only=True)
    text, head = inputs.vocab is not None, inputs.kind.head
    if not text:
        head = head.replace("Sequence", "Image")
    refuse_unfit(folder, config, inputs)
    how = AHEAD if inputs.kind.tokens else {"num_labels": inputs.classes}
    config.update({**how, **({"pad_token_id": inputs.pad} if text else {}), **args})
    auto = getattr(hub, f"AutoModelFor{head}")
    with explaining(f"{name}: no model for {head}"), only_errors(hub):  # it warns of new heads and others' heads, which are meant
        net, said = auto.from_pretrained(
            path, config=config, local_files_only=True, dtype=torch.float32, ignore_mismatched_sizes=True,
            output_loading_info=True, use_safetensors=True,
        )  # fmt: skip
    refuse_other_weights(folder, net, said)
    return Pretrained(net, inputs.pad) if text else Logits(net)


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Raises UsageError, `what` first, for whatever transformers raises within: that may be anything."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"{what}: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def only_errors(hub: Any) -> Iterator[None]:
    """Within, transformers logs errors alone."""
    kept = hub.logging.get_verbosity()
    try:
        hub.logging.set_verbosity_error()
        yield
    finally:
        hub.logging.set_verbosity(kept)


class Logits(nn.Module):
    """`net`, which answers with an object, answering with the object's `logits` alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        out = self.net(x)
        return getattr(out, "logits", out)


def refuse_unfit(folder: str, config: Any, inputs: Inputs) -> None:
    """Raises UsageError where the model does not know as many tokens or positions as the data have."""
    known, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if inputs.vocab is not None and known is not None and inputs.vocab > known:
        raise UsageError(f"--model {PREFIX}{folder} knows {known} tokens and the data have {inputs.vocab}: give --vocab {known}")
    if inputs.vocab is not None and longest is not None and inputs.shape[0] > longest:
        raise UsageError(f"--model {PREFIX}{folder} reads {longest} tokens at most: give --tokens {longest}, not {inputs.shape[0]}")


def refuse_other_weights(folder: str, net: Any, said: dict[str, Any]) -> None:
    """Raises UsageError where tensors of the model's body, which no task brings anew, were not in the folder or do not fit."""
    body = f"{net.base_model_prefix}."
    lost = [str(name) for name in said["missing_keys"]] + [str(entry[0]) for entry in said["mismatched_keys"]]
    lost = sorted(n for n in lost if n.startswith(body) and not n.removeprefix(body).startswith(NEW))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UsageError(
            f"--model {PREFIX}{folder}: its weights do not fit its config.json: '{lost[0]}'{more} is missing or of another shape"
        )
