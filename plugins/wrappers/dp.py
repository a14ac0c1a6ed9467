"""Client-level differential privacy: updates are clipped at the client, and the server adds Gaussian noise.

Where `c` clients cover an entry, its mean is made of c updates and one client moves it by at most norm / c: so the noise of an
entry has the standard deviation noise x norm / c. That is the Gaussian mechanism on the clients' sum (McMahan et al., ICLR 2018),
for plans that do not depend on the clients' data. The accountant is Google's dp-accounting.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from hetfl import Coverage, Field, Merged, Plugin, Reply, Server, Task, hookimpl
from hetfl.aggregation.mean import WeightedSum
from hetfl.models.state import copy_state
from hetfl.plugins.wrappers.clip import clip_update, cut_as_reply


class DP(Plugin):
    """Clips every client's update and adds noise to the mean of each entry by the number of clients that cover it.

    All clients count alike, whatever the number of their examples. Epsilon is for one client replaced by another, clients
    sampled without replacement; what clients report beside their tensors (metrics, extras) is not covered.
    """

    norm: float = Field(1.0, gt=0, description="largest L2 norm of a client's update")
    noise: float = Field(1.0, ge=0, description="noise multiplier: the noise of the sum over the norm")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the reported epsilon")

    @model_validator(mode="after")
    def _accountant(self) -> DP:
        if importlib.util.find_spec("dp_accounting") is None:
            raise ValueError("dp needs the accountant: pip install 'hetfl[dp]'")
        return self

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        before, sizes = copy_state(task.model), dict(task.plan_sizes)
        reply = yield
        reply.state, reply.examples = clip_update(reply.state, cut_as_reply(task, reply, before, sizes), self.norm), 1
        return reply

    @hookimpl
    def finalize(self, server: Server, merged: Merged, covered: Sequence[Coverage], round: int) -> Merged:
        counts = count_coverage(server, covered)
        generator = server.stream("dp noise", round)
        state = {n: self._add_noise(t, counts[n], generator) if n in counts else t for n, t in merged.state.items()}
        state |= {n: t.clamp(min=0) for n, t in state.items() if n.endswith("running_var")}
        return replace(merged, state=state, facts={**merged.facts, **self._report_epsilon(server, covered, round)})

    def _add_noise(self, tensor: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
        """A mean with noise of standard deviation noise x norm / `count`; none where no client covers an entry."""
        noise = torch.randn(tensor.shape, generator=generator) * (self.noise * self.norm)
        return tensor + torch.where(count > 0, noise / count.clamp(min=1), 0.0).to(tensor.dtype)

    def _report_epsilon(self, server: Server, covered: Sequence[Coverage], round: int) -> dict[str, float]:
        """Epsilon after this round, where the mechanism is the one that the accountant knows."""
        if why := explain_unaccounted(server, covered):
            server.notes.append(f"dp: no epsilon can be given, for {why}")
            return {}
        if not self.noise:
            return {"epsilon": float("inf")}
        epsilon = compute_epsilon(self.noise, self.delta, server.sampled, server.population, round)
        if round == server.options.rounds:
            server.notes.append(f"dp: epsilon {epsilon:.3g} at delta {self.delta:g} after {round} rounds, for one client replaced")
        return {"epsilon": epsilon}


def explain_unaccounted(server: Server, covered: Sequence[Coverage]) -> str | None:
    """Why the Gaussian mechanism on the mean is not what was done, or None."""
    if not server.averages:
        return "the aggregation or the recovery is no mean over the clients that cover an entry"
    if any(c.more for c in covered):
        return "clients send more than their clipped tensors (extras, or what they cut)"
    return None


def count_coverage(server: Server, covered: Sequence[Coverage]) -> dict[str, Tensor]:
    """How many clients cover each entry of the global model's floating-point tensors, each broadcastable to the tensor's shape."""
    sums = {name: WeightedSum(t) for name, t in server.state.items() if t.is_floating_point()}
    for client in covered:
        for name, patch in client.patches.items():
            if name in sums:
                covers = None if patch.coverage is None else (patch.coverage > 0).float()
                sums[name].cover(patch.index, covers, 1.0)
    return {name: total.count for name, total in sums.items()}


def compute_epsilon(noise: float, delta: float, sampled: int, clients: int, rounds: int) -> float:
    """Epsilon of `rounds` rounds of the Gaussian mechanism, `sampled` of `clients` clients a round without replacement."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    accountant: Any = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event: Any = dp.GaussianDpEvent(noise)
    if sampled < clients:
        event = dp.SampledWithoutReplacementDpEvent(clients, sampled, event)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))
