"""FFA-LoRA (Sun et al., ICLR 2024): the adapters' A stays as it was drawn, only B is trained, so a mean of B is a mean of B A."""

from __future__ import annotations

from collections.abc import Generator

from torch import nn

from hetfl import NotApplicable, Plugin, hookimpl


class FFA(Plugin):
    """lora_A is not trained; with --adapter it is a part of the frozen base, and is not sent either."""

    @hookimpl(wrapper=True)
    def adapt_model(self, model: nn.Module) -> Generator[None, nn.Module | None, nn.Module]:
        model = (yield) or model
        halves = [p for name, p in model.named_parameters() if ".lora_A." in name]
        if not halves:
            raise NotApplicable(
                "not applicable: ffa freezes one half of the adapters, and the model has none (--adapter lora:rank=8)"
            )
        for half in halves:
            half.requires_grad_(False)
        return model
