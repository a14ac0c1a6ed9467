"""Every accuracy of a round: the global model, the levels' submodels, the clients' own models, the server-only control."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hetfl.rounds.assignment import renew_assignments
from hetfl.rounds.evaluator import EvalJob
from hetfl.rounds.messages import Instruction, exchange
from hetfl.rounds.norm_statistics import needs_own_statistics, own_statistics
from hetfl.rounds.state import RoundState
from hetfl.rounds.validation import check_scores


def evaluate_round(now: RoundState) -> None:
    """Test accuracies by their (model, split) names, and one round of the server-only control beside them."""
    run, results = now.run, now.row.results
    last = now.number == run.options.rounds
    wanted = last or now.number % run.options.eval_every == 0
    scores = run.evaluator.score(list_jobs(now) if wanted else {}, now.take, partial(train_control, now))
    if wanted and has_control(now):
        scores["control@test"] = run.server.score(run.control, run.test)
    for name, score in scores.items():
        results |= {name: score.accuracy, f"{name} loss": score.loss}
    if wanted:
        now.row.add_levels()
        evaluate_on_clients(now)
    if last:
        evaluate_masked(now)


def list_jobs(now: RoundState) -> dict[str, EvalJob]:
    """What is tested on the test split after a round, whole models first, then levels from the widest."""
    run = now.run
    found = {"global@test": EvalJob(now.aggregated)}
    if run.options.server_finetune_steps:
        found["sent@test"] = EvalJob(run.server.state)
    for level, sent in {a.client.profile.level: a for a in reversed(now.assignments.values())}.items():
        source = run.plugins.base_state(run.server, sent.client)
        if sent.plan.model is None:
            found[f"level-{level}@test"] = EvalJob(own_statistics(now, sent.plan, now.aggregated), sent.plan)
        if source is not run.server.state:
            found[f"personal-{level}@test"] = EvalJob(source, sent.plan)
        elif not sent.personal:
            found[f"sent-{level}@test"] = EvalJob(own_statistics(now, sent.plan, sent.source), sent.plan)
    return dict(sorted(found.items(), key=lambda item: order_of(item[0])))


def order_of(name: str) -> tuple[bool, float]:
    """A sorting key: whole models first, then levels from the widest."""
    level = name.split("@")[0].partition("-")[2]
    return bool(level), -float(level or 0)


def has_control(now: RoundState) -> bool:
    return now.run.options.control and now.run.server.has_public


def train_control(now: RoundState) -> None:
    """Trains the control for as many steps as the server has taken in this round, of as many examples each."""
    if has_control(now):
        run = now.run
        for batch, steps in sorted(now.row.server_steps.items()):
            run.control = run.server.train(run.control, steps, "control", now.number, batch=batch)


def evaluate_on_clients(now: RoundState) -> None:
    """Each client of the round tests its plan's part of the new global model, or its own model, on its own test data.

    Where that part needs statistics of its own, they are those of the client's examples.
    """
    run = now.run
    renew_assignments(now)
    local = {i: run.local_norms or (not a.personal and needs_own_statistics(now, a.plan)) for i, a in now.assignments.items()}
    asked = {i: a.instruction(now.number, local[i], run.state_versions.get(i, 0)) for i, a in now.assignments.items()}
    answers = [(now.assignments[i].personal, check_scores(answer)) for i, answer in exchange(now.engine, "evaluate", asked)]
    for personal, name in ((False, "submodel@own"), (True, "personal@own")):
        now.row.add_mean_and_decile(name, [s["accuracy"] for own, s in answers if s and own == personal])


def evaluate_masked(now: RoundState) -> None:
    """The global model on each client's own test data, logits of classes it does not hold put to 0 (spec heterofl 5.2)."""
    run = now.run
    everything = Instruction(now.number, run.travelling(now.aggregated), None, local=run.local_norms, held=True)
    asked = {i: replace(everything, state_version=run.state_versions.get(i, 0)) for i in now.assignments}
    scores = [check_scores(answer) for _, answer in exchange(now.engine, "evaluate", asked)]
    now.row.add_mean_and_decile("global@own masked", [s["accuracy"] for s in scores if s])
