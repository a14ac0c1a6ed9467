"""Client-level differential privacy: updates are clipped and noise is added on the server (McMahan et al., ICLR 2018).

What is released. Let x be the global model, S the m clients that were sampled, and d_i the update of client i in the global
model's coordinates: 0 where its plan does not reach, 0 everywhere if it was left out. `receive` makes every norm |d_i| <= C,
whatever arrives, and `finalize` releases

    x + (sum over S of d_i + z C N(0, I)) / m.

Neighbours. One client is replaced by any other: its data, its device, its plan, whether it fails. Only its own d_j changes then,
for m is an option of the run; so the sum moves by at most |d_j - d_j'| <= 2 C. The release is the Gaussian mechanism with noise
z C on a sensitivity of 2 C, and the accountant (Google's dp-accounting, REPLACE_ONE) is given z / 2.

Why not the mean over the clients that cover an entry. Its denominator c changes with a client's plan, so replacing one client
moves (sum of d) / c by what the OTHERS sent as well, and noise on covered entries alone shows who covers them. What such an
aggregation merged is turned back into the sum, and every entry of a tensor that travelled gets noise, but those that no plan of the
run can ever take (`Server.reachable`, fixed before any client takes part: nothing of a client is to be hidden there).

Not covered: metrics and losses in the run folder, and which tensors (by name) travel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import model_validator
from torch import Tensor

from hetfl import Coverage, Field, Merged, Plugin, ReceivedReply, Server, hookimpl
from hetfl.aggregation.mean import WeightedSum
from hetfl.plugins.wrappers.clip import clip_update

CONCEALED = ("aggregate", "local", "recalibrate")  # policies under which no statistics of clients are published without noise


class DP(Plugin):
    """Clips every client's update and adds Gaussian noise to their sum over the number of sampled clients, whoever covers what.

    All clients count alike. Epsilon is for one client replaced by any other; clients are sampled without replacement, and both
    the sample and the noise come from the server's secret.
    """

    norm: float = Field(1.0, gt=0, description="largest L2 norm of a client's update")
    noise: float = Field(1.0, ge=0, le=1e4, description="noise multiplier: the noise of the sum over the norm")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the reported epsilon")
    seed: int | None = Field(None, description="noise from this seed, to repeat a run: who knows it can take the noise off")

    @model_validator(mode="after")
    def _accountant(self) -> DP:
        if importlib.util.find_spec("dp_accounting") is None:
            raise ValueError("dp needs the accountant: pip install 'hetfl[dp]'")
        return self

    @hookimpl
    def prepare(self, server: Server) -> None:
        server.hides_sample = True
        if self.seed is not None:
            server.key = hashlib.sha256(f"dp/{self.seed}".encode()).digest()
            server.notes.append(f"dp: the noise comes from dp.seed {self.seed}, so whoever knows that can take it off")

    @hookimpl
    def receive(self, received: ReceivedReply) -> ReceivedReply:
        """The update within the norm; its client counts once, however many examples it says that it has."""
        state = clip_update(received.reply.state, received.sent, self.norm)
        return replace(received, reply=replace(received.reply, state=state, examples=1))

    @hookimpl
    def finalize(self, server: Server, merged: Merged, covered: Sequence[Coverage], round: int) -> Merged:
        shares, state = find_shares(server, covered), {**merged.state, **server.state}  # counters too stay as they were
        state |= {name: self._release(server, name, merged.state[name], share, round) for name, share in shares.items()}
        return replace(merged, state=state, facts={**merged.facts, **self._report_epsilon(server, covered, round)})

    def _release(self, server: Server, name: str, mean: Tensor, share: Tensor | float, round: int) -> Tensor:
        """old + (sum of updates + noise) / sampled, of a tensor whose `mean` is the old one and the sum over (sampled x share)."""
        old, deviation = server.state[name], self.noise * self.norm / server.sampled
        noise = server.secret_normal(f"dp {name}", round, old.shape) * deviation
        noise = noise * server.reachable[name] if name in server.reachable else noise
        released = old + (mean - old) * share + noise.to(old.dtype)
        return released.clamp(min=0) if name.endswith("running_var") else released

    def _report_epsilon(self, server: Server, covered: Sequence[Coverage], round: int) -> dict[str, float]:
        """Epsilon after this round, where the mechanism is the one that the accountant knows."""
        if why := explain_unaccounted(server, covered):
            server.notes.append(f"dp: no epsilon can be given, for {why}")
            return {}
        epsilon = compute_epsilon(self.noise, self.delta, server.sampled, server.population, round)
        if round == server.options.rounds:
            server.notes.append(f"dp: epsilon {epsilon:.3g} at delta {self.delta:g} after {round} rounds, for one client replaced")
        return {"epsilon": epsilon}


def explain_unaccounted(server: Server, covered: Sequence[Coverage]) -> str | None:
    """Why what was released is not the Gaussian mechanism on the clients' sum, or None."""
    if server.options.schedule != "sync":
        return f"under --schedule {server.options.schedule} whose updates are merged depends on other clients' devices"
    if not server.averages:
        return "the aggregation or the recovery is no mean of what clients send"
    if any(c.more for c in covered):
        return "clients send more than their clipped tensors (extras, or what they cut)"
    policy, tracks = server.options.norm_policy, any(name.endswith("running_mean") for name in server.state)
    if tracks and policy not in CONCEALED:
        return f"--norm-policy {policy} publishes the clients' statistics without noise (aggregate and recalibrate do not)"
    return None


def find_shares(server: Server, covered: Sequence[Coverage]) -> dict[str, Tensor | float]:
    """For each entry of each floating-point tensor that travelled: how many clients its mean is over, as a share of the sampled."""
    names = {name for client in covered for name in client.patches}
    sums = {name: WeightedSum(t) for name, t in server.state.items() if t.is_floating_point() and name in names}
    if server.averages != "covering":
        return dict.fromkeys(sums, len(covered) / server.sampled if server.averages else 1.0)
    for client in covered:
        for name, patch in client.patches.items():
            if name in sums:
                sums[name].cover(patch.index, patch.coverage, 1.0)
    return {name: total.count / server.sampled for name, total in sums.items()}


def compute_epsilon(noise: float, delta: float, sampled: int, clients: int, rounds: int) -> float:
    """Epsilon of `rounds` rounds, `sampled` of `clients` clients in each, where the noise of the sum is `noise` times the norm.

    One client replaced moves the sum by up to twice the norm. Without sampling, Gaussians compose to one of noise / sqrt(rounds),
    whose epsilon is exact; with it, the smaller of that and of the RDP accountant's.
    """
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    multiplier = noise / 2
    if not multiplier:
        return math.inf
    exact = float(dp.get_epsilon_gaussian(multiplier / math.sqrt(rounds), delta))
    if sampled == clients:
        return exact
    accountant: Any = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    sample: Any = dp.SampledWithoutReplacementDpEvent(clients, sampled, dp.GaussianDpEvent(multiplier))
    return min(exact, float(accountant.compose(sample, rounds).get_epsilon(delta)))
