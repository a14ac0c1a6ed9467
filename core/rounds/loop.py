"""The rounds of a run, and a round from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from hetfl.aggregation.updates import Merged, Update
from hetfl.hooks.values import Coverage, ReceivedReply
from hetfl.profiling.cost import Cost
from hetfl.rounds.alarms import find_alarms
from hetfl.rounds.assignment import assign_submodels, profile_clients, sample_clients
from hetfl.rounds.evaluation import evaluate_round
from hetfl.rounds.messages import Assignment, Engine
from hetfl.rounds.norm_statistics import renew_statistics
from hetfl.rounds.receiving import receive_replies
from hetfl.rounds.rows import MACS, MEMORY, OWN_ACCURACY, PARAMETERS
from hetfl.rounds.state import RoundState, RunState
from hetfl.rounds.validation import is_finite


class TooFewReplies(Exception):  # noqa: N818 (not an error: the round keeps its model)
    """A round has fewer valid replies than --min-clients."""

    def __init__(self, count: int) -> None:
        self.count = count


def run_rounds(run: RunState, engine: Engine) -> None:
    """All rounds that are not done yet; the global model is `run.server.state` afterwards."""
    for number in range(len(run.rows) + 1, run.options.rounds + 1):
        run_round(run, number, engine)


def run_round(run: RunState, number: int, engine: Engine) -> RoundState:
    """Does round `number`, with the clients on `engine`; its rows are added to those of `run`."""
    server, now = run.server, RoundState(run, number, engine)

    # 1. Sample clients, and ask each what its device affords.
    with now.phase("profile"):
        clients = profile_clients(now, sample_clients(now))

    # 2. Extract a submodel for each.
    with now.phase("extract"):
        now.assignments = assign_submodels(now, clients)

    # 3. The clients train. Nothing waits for all of them: replies are checked as they come, in client order, and
    # 4. recovered, each to an update in global coordinates, while
    # 5. the aggregation takes the updates one by one, or gathers them first.
    run.callback.phase(number, "fit")
    replies = count_replies(now, receive_replies(now))
    updates = recover_updates(now, replies)
    with now.timed("aggregate"):
        merged = aggregate_updates(now, updates)
    if merged is not None:
        server.state, server.branches, now.row.facts = merged.state, dict(merged.branches), dict(merged.facts)

    # 6. Batch norm's statistics, where the policy is not to average them.
    renew_statistics(now)
    now.aggregated = server.state

    # 7. Fine-tune on the server's own data, where the run asks for it.
    with now.phase("finetune"):
        server.state = server.train(server.state, run.options.server_finetune_steps, "finetune", number)
    now.count_steps()

    # 8. Test the global model, the levels' submodels, the clients' own models and the server-only control.
    with now.phase("evaluate"):
        evaluate_round(now)

    # 9. Report.
    report_round(now)
    return now


def count_replies(now: RoundState, replies: Iterable[ReceivedReply]) -> Iterator[ReceivedReply]:
    """The replies; after the last, raises TooFewReplies where they were fewer than --min-clients: whoever gathers them stops."""
    count = 0
    for reply in replies:
        count += 1
        yield reply
    now.run.callback.phase(now.number, "aggregate")
    if count < now.run.options.min_clients:
        raise TooFewReplies(count)


def recover_updates(now: RoundState, replies: Iterable[ReceivedReply]) -> Iterator[Update]:
    """An update in global coordinates for each reply, in client order; where it lies is noted for plugins with a last word."""
    run = now.run
    received: dict[int, bool] = {}

    def seen() -> Iterator[ReceivedReply]:
        for r in replies:
            received[r.client.id] = bool(r.reply.extras or r.reply.kept or r.reply.masks)
            yield r

    with now.timed("recover"):
        updates = iter(run.plugins.recover(run.server, seen(), now.number))
    while True:
        with now.timed("recover"):
            update = next(updates, None)
        if update is None:
            return
        if run.plugins.finalizes:
            patches = {name: replace(patch, values=torch.empty(0)) for name, patch in update.patches.items()}
            now.coverage.append(Coverage(update.client, patches, received.get(update.client, False)))
        yield update


def aggregate_updates(now: RoundState, updates: Iterable[Update]) -> Merged | None:
    """The next global model; None, with the reason said, where it stays as it was."""
    run = now.run
    try:
        merged = run.plugins.aggregate(run.server, updates, now.number)
        for _ in updates:
            pass
        merged = run.plugins.finalize(run.server, merged, now.coverage, now.number)
    except TooFewReplies as few:
        if now.assignments:
            wanted = f"{few.count} of the {run.options.min_clients} valid replies that a round needs (--min-clients)"
            now.alarm(f"{wanted}; the global model stays as it was")
        return None
    if is_finite(merged):
        return merged
    now.alarm("what was merged holds NaN or infinity; the global model stays as it was")
    return None


def report_round(now: RoundState) -> None:
    """Ends the round: what each client's submodel cost, the rows of both tables, and the alarms."""
    run, row = now.run, now.row
    costs: dict[int, dict[str, int]] = {}  # by plan: clients of a level share theirs
    for client, assignment in ((i, a) for i, a in now.assignments.items() if i in row.clients):
        plan = assignment.plan
        if id(plan) not in costs:
            costs[id(plan)] = device_costs(run.meter.cost(plan.sizes, plan.model), assignment)
        row.clients[client].costs = costs[id(plan)]
    accuracies = [c.metrics[OWN_ACCURACY] for c in row.clients.values() if OWN_ACCURACY in c.metrics]
    row.add_mean_and_decile("client@own", accuracies)
    now.close()
    run.rows.append(row.columns())
    run.client_rows += [c.columns() for c in row.clients.values()]
    for text in [*dict.fromkeys(run.server.alarms), *find_alarms(run.rows, run.client_rows, run.server.classes)]:
        now.alarm(text)
    run.server.alarms.clear()
    run.rows[-1] = row.columns()
    run.callback.done(run.rows[-1])


def device_costs(cost: Cost, assignment: Assignment) -> dict[str, int]:
    """What a device spends on its submodel: parameters that exist, and dense compute and memory even where entries are masked."""
    masked = sum(int((~mask).sum()) for mask in assignment.plan.masks.values())
    return {PARAMETERS: cost.parameters - masked, MACS: cost.macs, MEMORY: cost.memory}
