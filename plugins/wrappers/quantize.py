"""Quantised uploads: what a client sends back has 16 or 8 bits an entry, and its bytes are counted so."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hetfl import Field, Plugin, Reply, Task, hookimpl


class Quantize(Plugin):
    """Sends a client's tensors up as half precision, or as int8 with one scale a tensor (round to nearest)."""

    form: Literal["fp16", "int8"] = Field("int8", description="how floating-point tensors travel up")

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        reply = yield
        reply.code = self.form
        return reply
