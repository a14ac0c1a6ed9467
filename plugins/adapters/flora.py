"""FLoRA (Wang et al., NeurIPS 2024): the clients' adapters, stacked, are added to the base, and new adapters begin on it."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from hetfl import Exchange, Field, Merged, NotApplicable, Plugin, Server, State, Update, Updates, hookimpl, mean
from hetfl.models.adapters import Adapter, add_changes, list_adapters, multiply
from hetfl.plugins.adapters.flexlora import read_halves

Stack = tuple[Tensor, Tensor]  # A (ranks, in, *kernel) and B (out, ranks)


class Flora(Plugin):
    """Stacked A of p_k A_k and B of B_k have the product sum p_k B_k A_k, whatever ranks the clients have: nothing is lost in it.

    The frozen base is not written to: what is added to it is a part of the model's state, its change, which goes down to every
    client and never up. It travels as all stacks so far, or whole, whichever is fewer numbers.
    """

    expected_failures: ClassVar[dict[str, str]] = {
        "keeps_uncovered_entries": "what clients learned is added to the base, which they do not send, and adapters are drawn anew"
    }

    weighting: Literal["uniform", "samples"] = Field("samples", description="one vote a client, or one an example")
    _stacks: dict[str, Stack] = PrivateAttr(default_factory=dict)

    @hookimpl(wrapper=True)
    def adapt_model(self, model: nn.Module) -> Generator[None, nn.Module | None, nn.Module]:
        return add_changes((yield) or model)

    @hookimpl
    def exchange(self, server: Server, names: Collection[str]) -> Exchange:
        others = frozenset(names) - {adapter.change for adapter in list_adapters(list(server.state))}
        return Exchange(up=others, lasting=others)

    @hookimpl
    def encode_down(self, state: State) -> State:
        """`state` with stacks in place of changes, and without what is 0, the fresh B among it."""
        encoded = {name: t for name, t in state.items() if not name.endswith((".change", ".lora_B.weight")) or bool(t.any())}
        for name in [name for name in encoded if name.endswith(".change")]:
            if (stack := self._find_stack(name, state[name])) is not None:
                del encoded[name]
                encoded |= {f"{name}/A": stack[0], f"{name}/B": stack[1]}
        return encoded

    @hookimpl
    def decode_down(self, encoded: State, like: State) -> State:
        found = {name: encoded.get(name, torch.zeros_like(t)) for name, t in like.items()}
        for name, t in like.items():
            if f"{name}/A" in encoded:
                found[name] = multiply(encoded[f"{name}/A"], encoded[f"{name}/B"]).reshape(t.shape)
        return found

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        updates, adapters = Updates(updates, server.state), list_adapters(list(server.state))
        if not adapters:
            raise NotApplicable("not applicable: flora stacks both halves of the adapters, and one of them is not trained")
        weights = updates.votes(self.weighting)
        state = mean(updates, weights)
        for adapter in adapters:
            state[adapter.change] = self._add(adapter, server.state[adapter.change], stack_adapters(updates, adapter, weights))
            draws = server.stream(f"flora {adapter.a}", round)
            state[adapter.a] = draw_half(server.state[adapter.a], draws)
            state[adapter.b] = torch.zeros_like(server.state[adapter.b])
        return Merged(state)

    def _add(self, adapter: Adapter, change: Tensor, new: Stack) -> Tensor:
        """The change of the base with the product of a new stack added; the stack is kept as long as it is smaller than that."""
        name, old = adapter.change, self._find_stack(adapter.change, change)
        if old is not None:
            both = torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]], 1)
            if both[0].numel() + both[1].numel() < change.numel():
                self._stacks = {**self._stacks, name: both}
                return multiply(*both).reshape(change.shape)
        self._stacks = {other: stack for other, stack in self._stacks.items() if other != name}
        return change + multiply(*new).reshape(change.shape)

    def _find_stack(self, name: str, change: Tensor) -> Stack | None:
        """The stack whose product `change` is, if there is one: of no ranks where it is 0."""
        if not bool(change.any()):
            return change.new_zeros(0, *change.shape[1:]), change.new_zeros(len(change), 0)
        stack = self._stacks.get(name)
        return stack if stack is not None and torch.equal(multiply(*stack).reshape(change.shape), change) else None

    def state_dict(self) -> State:
        return {f"{name}/{half}": t for name, stack in self._stacks.items() for half, t in zip("AB", stack, strict=True)}

    def load_state_dict(self, state: State) -> None:
        names = dict.fromkeys(key.rpartition("/")[0] for key in state)
        self._stacks = {name: (state[f"{name}/A"], state[f"{name}/B"]) for name in names}


def stack_adapters(updates: Updates, adapter: Adapter, weights: Sequence[float]) -> Stack:
    """All clients' p_k A_k below and B_k beside each other; a rank that a client lacks is as it was, one with B = 0 left out."""
    a, b, _ = read_halves(updates, adapter)
    shares = torch.tensor(list(weights)) / sum(weights)
    a, b = (a * shares.reshape(-1, *[1] * (a.ndim - 1))).flatten(0, 1), torch.cat([half.flatten(1) for half in b], 1)
    counts = (b != 0).any(0)
    return a[counts], b[:, counts]


def draw_half(a: Tensor, generator: torch.Generator) -> Tensor:
    """A new A in the shape of `a`, (ranks, in, *kernel), drawn as torch draws a linear layer's or a convolution's weights."""
    return (2 * torch.rand(a.shape, generator=generator) - 1) / math.sqrt(a[0].numel())
