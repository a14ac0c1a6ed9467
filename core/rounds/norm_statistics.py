"""The global model's normalisation statistics after aggregation, where the policy is not to average them (spec heterofl 2.4)."""

from __future__ import annotations

from hetfl.aggregation.mean import mean
from hetfl.aggregation.updates import Updates
from hetfl.errors import UsageError
from hetfl.hooks.values import ReceivedReply
from hetfl.models.normalization import measure_statistics, running_names
from hetfl.models.state import State
from hetfl.rounds.assignment import passing
from hetfl.rounds.messages import exchange
from hetfl.rounds.state import RoundState
from hetfl.rounds.validation import check_statistics


def choose_norm_policy(given: str, wanted: str | None, public: bool) -> str:
    """The policy for normalisation statistics: as given, else what a plugin asks for, else averaging.

    Raises UsageError where it needs public data that the server lacks.
    """
    chosen = (wanted or "aggregate") if given == "auto" else given
    if chosen in ("recalibrate", "local") and not public:
        raise UsageError(
            f"--norm-policy {chosen} needs public data on the server, for the global model's own statistics; "
            "give it some with --server-data 0.05"
        )
    return chosen


def renew_statistics(now: RoundState) -> None:
    """Gives the new global model its normalisation statistics; nothing under the policy "aggregate", which averages them."""
    run = now.run
    names = running_names(run.server.builder.module())
    if not names or run.norm_policy == "aggregate":
        return
    with now.phase("statistics"):
        found = average_passes(now) if run.norm_policy == "static" else measure_on_server(now)
    run.server.state = {**run.server.state, **{name: found[name] for name in names if name in found}}


def average_passes(now: RoundState) -> State:
    """The mean over clients of the statistics that each measures with its part of the new global model on its own examples."""
    run = now.run
    asked = {i: passing(now, a) for i, a in now.assignments.items() if a.plan.model is None}
    instructions = {i: a.instruction(now.number, run.local_norms, run.state_versions.get(i, 0)) for i, a in asked.items()}
    received = []
    for client, answer in exchange(now.engine, "statistics", instructions):
        reply = check_statistics(asked[client].travels, answer)
        if reply is not None and reply.examples:
            received.append(ReceivedReply(asked[client].client, asked[client].plan, {}, reply))
    updates = Updates([r.update() for r in received], run.server.state)
    return mean(updates, updates.weights) if received else run.server.state


def measure_on_server(now: RoundState) -> State:
    """The statistics of the global model on the server's own examples."""
    server = now.run.server
    model = server.builder.load(server.state)
    return measure_statistics(model, server.public.tune.batches(server.options.eval_batch_size, None))[0]
