"""The adapters of a run in peft's format, which needs no peft to be written."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from hetfl.config import RunOptions
from hetfl.errors import UsageError
from hetfl.files import reason
from hetfl.models.adapters import Lora, parse_adapter
from hetfl.models.folders import Logits, Pretrained
from hetfl.models.state import tensors
from hetfl.runs.summary import to_contiguous

PREFIX = "base_model.model."


def write_adapters(whole_model: nn.Module, names: Collection[str], options: RunOptions, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for peft's PeftModel.from_pretrained(the untrained model, folder).

    `whole_model` is that of a run, `names` are its tensors that the run trained. Layers that were trained whole, and batch norms
    for their statistics, are among `modules_to_save`. Raises UsageError where there are no adapters of hetfl's own.
    """
    spec = parse_adapter(options.adapter) if options.adapter else None
    if spec is None:
        raise UsageError("the run has no adapters of hetfl's own to be exported: it had no --adapter lora")
    model, before = (whole_model.net, "net.") if isinstance(whole_model, Logits | Pretrained) else (whole_model, "")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Lora)}
    if any(layer.change is not None and bool(layer.change.any()) for layer in layers.values()):
        raise UsageError(
            "this run added what it learned to the frozen base, so its adapters alone are not its model; hetfl.load(RUN).model is"
        )
    if unlike := next((name for name, layer in layers.items() if is_unlike_peft(layer.lora_A)), None):
        raise UsageError(f"peft's adapter of a convolution neither dilates nor pads but with zeros, as '{unlike}' does")
    adapted = list(layers)
    trained = {name for name in tensors(model) if before + name in names}
    changes = {f"{name}.change" for name in layers}
    whole = sorted({name.rpartition(".")[0] for name in trained - changes if ".lora_" not in name})
    halves = tuple(f"{name}.lora_" for name in adapted)  # one of which may be frozen
    state = {n: t for n, t in tensors(model).items() if n in trained or n.startswith(halves) or n.rpartition(".")[0] in whole}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": options.model, "inference_mode": True,
        "r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": "|".join(map(re.escape, adapted)), "modules_to_save": whole or None,
    }  # fmt: skip
    named = to_contiguous({f"{PREFIX}{name}": tensor for name, tensor in state.items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written: {reason(error)}") from error


def is_unlike_peft(half: nn.Module) -> bool:
    """Whether peft's A of such a layer would compute something else: it has the kernel, stride and padding alone."""
    return getattr(half, "padding_mode", "zeros") != "zeros" or any(step != 1 for step in getattr(half, "dilation", ()))
