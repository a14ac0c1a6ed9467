"""The rounds of a run, and a round from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch

from hetfl.aggregation.updates import Merged, Update
from hetfl.hooks.server import Server
from hetfl.models.state import State
from hetfl.parallel import return_free_memory
from hetfl.profiling.cost import Cost
from hetfl.rounds.arrivals import take_answers
from hetfl.rounds.assignment import assign_submodels, profile_clients, sample_clients
from hetfl.rounds.evaluation import evaluate_round
from hetfl.rounds.messages import Assignment, Engine
from hetfl.rounds.norm_statistics import renew_statistics
from hetfl.rounds.receiving import TooFewReplies, receive_replies, recover_updates
from hetfl.rounds.rows import MACS, MEMORY, OWN_ACCURACY, PARAMETERS, find_facts_fault
from hetfl.rounds.schedule import take_arrivals
from hetfl.rounds.state import RoundState, RunState
from hetfl.rounds.timing import keep_in_time, settle
from hetfl.rounds.validation import is_finite
from hetfl.submodel.plan import Patches

MOST_NOTES = 200  # of a run


def run_rounds(run: RunState, engine: Engine) -> None:
    """All rounds that are not done yet; the global model is `run.server.state` afterwards."""
    for number in range(run.history.rounds + 1, run.options.rounds + 1):
        if run.server.builder.base:  # beside which what the C library keeps of tests and checkpoints would add up
            return_free_memory()
        run_round(run, number, engine)


def run_round(run: RunState, number: int, engine: Engine) -> RoundState:
    """Does round `number`, with the clients on `engine`; its rows are added to those of `run`."""
    server, now, before = run.server, RoundState(run, number, engine), (run.server.state, run.server.branches)
    taken, saved = server.taken.copy(), server.steps_saved

    # 1. Sample clients, and ask each what its device affords.
    with now.phase("profile"):
        clients = profile_clients(now, sample_clients(now))

    # 2. Extract a submodel for each; in simulated time, of those alone that will be in time.
    with now.phase("extract"):
        now.assignments = assign_submodels(now, clients)
        if run.clock:
            keep_in_time(now, run.clock)

    # 3. The clients train. Nothing waits for all of them: replies are checked as they come, in client order, and
    # 4. recovered, each to an update in global coordinates, while
    # 5. the aggregation takes those that the schedule gives it one by one, or gathers them first.
    if run.options.schedule == "sync" or run.clock:
        updates = recover_updates(now, receive_replies(now))
        updates = take_arrivals(now, updates) if run.options.schedule != "sync" else updates
    else:
        updates = take_answers(now)
    with now.timed("aggregate"):
        merged = aggregate_updates(now, updates)
    if now.assignments or now.row.clients or merged is not None:
        now.row.taken = merged is not None
    if merged is not None:
        server.state, server.branches, now.row.facts = merged.state, dict(merged.branches), dict(merged.facts)

    # 6. Batch norm's statistics, where the policy is not to average them; what averaging does is said once.
    if run.running_names and (run.norm_policy != "aggregate" or number == 1):
        renew_statistics(now)
    now.aggregated = server.state

    # 7. Fine-tune on the server's own data, where the run asks for it.
    if run.options.server_finetune_steps:
        with now.phase("finetune"):
            server.state = server.train(server.state, run.options.server_finetune_steps, "finetune", number)
    now.row.server_steps, now.row.steps_saved = server.taken - taken, server.steps_saved - saved
    if server.state is not before[0] and (merged is None or server.state is not merged.state):
        keep_last_good(now, before)

    # 8. Test the global model, the levels' submodels, the clients' own models and the server-only control.
    with now.phase("evaluate"):
        evaluate_round(now)

    # 9. Report.
    if run.clock:
        settle(now, run.clock)
    report_round(now)
    return now


def aggregate_updates(now: RoundState, updates: Iterable[Update]) -> Merged | None:
    """The next global model; None, with the reason said, where it stays as it was."""
    run = now.run
    try:
        merged = run.plugins.aggregate(run.server, updates, now.number)
        for _ in updates:
            pass
        if "finalize" in run.plugins.answered:
            merged = run.plugins.finalize(run.server, merged, now.coverage, now.number)
        if merged.facts != {}:
            run.plugins.refuse(find_facts_fault(merged.facts), "aggregate", "aggregate", now.number)
    except TooFewReplies as few:
        if now.assignments or few.count:
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
    now.passes = []  # they were through the model that is given up
    now.alarm("the global model's outputs are NaN or infinite; it is again that of before the round")


def report_round(now: RoundState) -> None:
    """Ends the round: what each client's submodel cost, the rows of both tables, and the alarms."""
    run, row = now.run, now.row
    costs: dict[int, dict[str, int]] = {}  # by plan: clients of a level share theirs
    lines = now.lines() if run.underway else row.clients
    for client, assignment in ((i, a) for i, a in now.assignments.items() if i in lines):
        plan = assignment.plan
        if id(plan) not in costs:
            costs[id(plan)] = device_costs(run.meter.cost(plan.sizes, plan.model), assignment)
        lines[client].costs = costs[id(plan)]
    accuracies = [c.metrics[OWN_ACCURACY] for c in row.clients.values() if OWN_ACCURACY in c.metrics]
    row.add_mean_and_decile("client@own", accuracies)
    row.seconds = time.perf_counter() - now.began[0]
    columns, people = row.columns(), [c.columns() for c in row.clients.values()]
    notices = [now.engine.notices.pop(0) for _ in range(len(now.engine.notices))]
    for text in [*dict.fromkeys(map(str, [*notices, *run.server.alarms])), *run.watch.look(columns, people)]:
        now.alarm(text)
    run.server.alarms.clear()
    keep_notes(run)
    run.rows.append(row.columns() if row.alarms else columns)
    run.client_rows += people
    run.history.add(run.rows[-1], people)
    run.callback.done(run.rows[-1])


def keep_notes(run: RunState) -> None:
    """Leaves out notes that repeat, and of more than MOST_NOTES those in the middle, which are counted: tables have them too."""
    notes = run.server.notes = [*dict.fromkeys(map(str, run.server.notes))]
    if len(notes) > MOST_NOTES:
        middle = slice(MOST_NOTES // 2, -MOST_NOTES // 2)
        run.unsaid += len(notes[middle])
        del notes[middle]


def has_finite_outputs(server: Server, state: State) -> bool:
    """Whether the global model with the tensors `state` still computes numbers, on two random examples."""
    if server.example is None:
        return True
    whole = {name: state[name] for name in server.state}
    return bool(torch.isfinite(server.predict(whole, server.example)).all())


def device_costs(cost: Cost, assignment: Assignment) -> dict[str, int]:
    """What a device spends on its submodel: parameters that exist, and dense compute and memory even where entries are masked."""
    masked = sum(int((~mask).sum()) for mask in assignment.plan.masks.values())
    return {PARAMETERS: cost.parameters - masked, MACS: cost.macs, MEMORY: cost.memory}
