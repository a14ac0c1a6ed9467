"""The rounds of a run, and a round from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from hetfl.aggregation.updates import Merged, Update
from hetfl.errors import RunError, UsageError
from hetfl.hooks.answers import find_type_fault
from hetfl.hooks.values import Coverage, ReceivedReply
from hetfl.models.state import State
from hetfl.profiling.cost import Cost
from hetfl.rounds.alarms import find_alarms
from hetfl.rounds.assignment import assign_submodels, profile_clients, sample_clients, sample_size
from hetfl.rounds.evaluation import evaluate_round
from hetfl.rounds.limits import has_finite_outputs
from hetfl.rounds.messages import Assignment, Engine
from hetfl.rounds.norm_statistics import renew_statistics
from hetfl.rounds.receiving import leave_out, receive_replies
from hetfl.rounds.rows import MACS, MEMORY, OWN_ACCURACY, PARAMETERS
from hetfl.rounds.state import RoundState, RunState
from hetfl.rounds.timing import keep_in_time, settle
from hetfl.rounds.validation import is_finite
from hetfl.submodel.plan import Patches


class TooFewReplies(RunError):  # noqa: N818 (not an error: the round keeps its model)
    """A round has fewer valid replies than --min-clients."""

    def __init__(self, count: int) -> None:
        self.count = count


def run_rounds(run: RunState, engine: Engine) -> None:
    """All rounds that are not done yet; the global model is `run.server.state` afterwards."""
    for number in range(len(run.rows) + 1, run.options.rounds + 1):
        run_round(run, number, engine)


def run_round(run: RunState, number: int, engine: Engine) -> RoundState:
    """Does round `number`, with the clients on `engine`; its rows are added to those of `run`."""
    server, now, before = run.server, RoundState(run, number, engine), (run.server.state, run.server.branches)
    began = run.clock.now if run.clock else 0.0

    # 1. Sample clients, and ask each what its device affords.
    with now.phase("profile"):
        clients = profile_clients(now, sample_clients(now))

    # 2. Extract a submodel for each.
    with now.phase("extract"):
        now.assignments = assign_submodels(now, clients)
        keep_in_time(now, sample_size(run.clients, run.options.fraction))

    # 3. The clients train. Nothing waits for all of them: replies are checked as they come, in client order, and
    # 4. recovered, each to an update in global coordinates, while
    # 5. the aggregation takes the updates one by one, or gathers them first.
    run.callback.phase(number, "fit")
    replies = count_replies(now, receive_replies(now))
    updates = recover_updates(now, replies)
    with now.timed("aggregate"):
        merged = aggregate_updates(now, updates)
    if now.assignments:
        now.row.taken = merged is not None
    if merged is not None:
        server.state, server.branches, now.row.facts = merged.state, dict(merged.branches), dict(merged.facts)

    # 6. Batch norm's statistics, where the policy is not to average them.
    renew_statistics(now)
    now.aggregated = server.state

    # 7. Fine-tune on the server's own data, where the run asks for it.
    with now.phase("finetune"):
        server.state = server.train(server.state, run.options.server_finetune_steps, "finetune", number)
    now.count_steps()
    keep_last_good(now, before)

    # 8. Test the global model, the levels' submodels, the clients' own models and the server-only control.
    with now.phase("evaluate"):
        evaluate_round(now)

    # 9. Report.
    settle(now, began)
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
    """An update in global coordinates for each reply, in client order; where it lies is noted for plugins with a last word.

    A client whose reply the plugin cannot recover is left out, where the plugin takes replies one by one.
    """
    run, arriving, pending = now.run, iter(replies), list[ReceivedReply]()

    def pull() -> Iterator[ReceivedReply]:
        for reply in arriving:
            pending.append(reply)
            yield reply

    while True:
        try:
            with now.timed("recover"):
                updates: Iterator[Update] = iter(run.plugins.recover(run.server, pull(), now.number))
            while (update := next_update(now, updates)) is not None:
                note_coverage(now, update, pending)
                yield update
            return
        except (RunError, UsageError):
            raise
        except Exception as error:
            client = pending[0].client.id if len(pending) == 1 else None
            why = run.plugins.explain(error, "recover", now.number, client) or f"{type(error).__name__}: {error}"
            if client is None:
                raise RunError(f"the replies of round {now.number} could not be recovered: {why}") from error
            pending.clear()
            run.extras.pop(client, None)
            leave_out(now, client, f"its reply could not be recovered: {why}")


def next_update(now: RoundState, updates: Iterator[Update]) -> Update | None:
    """The next update; waiting for its reply is not counted as recovery."""
    with now.timed("recover"):
        update = next(updates, None)
    if update is not None:
        now.run.plugins.refuse(find_type_fault(update, Update), "recover", "extract", now.number)
    return update


def note_coverage(now: RoundState, update: Update, pending: list[ReceivedReply]) -> None:
    """Notes where an update lies, without its values, and that its reply is dealt with."""
    of_client = next((r for r in pending if r.client.id == update.client), None)
    if now.run.plugins.finalizes:
        reply = of_client.reply if of_client else None
        more = reply is not None and bool(reply.extras or reply.kept or reply.masks)
        patches = {name: replace(patch, values=torch.empty(0)) for name, patch in update.patches.items()}
        now.coverage.append(Coverage(update.client, patches, more))
    if of_client is not None:
        pending.remove(of_client)


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
    if not is_finite(merged):
        now.alarm("what was merged holds NaN or infinity; the global model stays as it was")
        return None
    if not has_finite_outputs(run.server, merged.state):
        now.alarm("the merged model's outputs are NaN or infinite; the global model stays as it was")
        return None
    return merged


def keep_last_good(now: RoundState, before: tuple[State, Mapping[str, Patches]]) -> None:
    """Goes back to the state and branches `before` the round where the global model computes no numbers any more."""
    server = now.run.server
    if has_finite_outputs(server, server.state) or not has_finite_outputs(server, before[0]):
        return
    server.state, server.branches, now.aggregated = before[0], dict(before[1]), before[0]
    now.alarm("the global model's outputs are NaN or infinite; it is again that of before the round")


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
    lines = {client: c.columns() for client, c in row.clients.items()}
    run.client_rows += lines.values()
    run.latest |= lines
    for text in [
        *dict.fromkeys([*now.engine.notices, *run.server.alarms]),
        *find_alarms(run.rows, run.client_rows, run.server.classes),
    ]:
        now.alarm(text)
    run.server.alarms.clear()
    now.engine.notices.clear()
    run.rows[-1] = row.columns()
    run.callback.done(run.rows[-1])


def device_costs(cost: Cost, assignment: Assignment) -> dict[str, int]:
    """What a device spends on its submodel: parameters that exist, and dense compute and memory even where entries are masked."""
    masked = sum(int((~mask).sum()) for mask in assignment.plan.masks.values())
    return {PARAMETERS: cost.parameters - masked, MACS: cost.macs, MEMORY: cost.memory}
