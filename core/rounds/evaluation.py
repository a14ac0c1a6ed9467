"""Every score of a round: the global model, the levels' submodels, the clients' own models, the server-only control."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from hetfl.hooks.values import Client
from hetfl.models.state import State
from hetfl.rounds.assignment import renew_assignments
from hetfl.rounds.evaluator import EvalJob
from hetfl.rounds.messages import Assignment, Instruction, exchange
from hetfl.rounds.norm_statistics import needs_own_statistics, own_statistics
from hetfl.rounds.state import RoundState
from hetfl.submodel.plan import Plan

NOBODY = -1  # the id of a client that there is not

SCORES = {"accuracy", "loss", "examples"}  # what a client may say of an evaluation


def evaluate_round(now: RoundState) -> None:
    """One round of the server-only control, and where the round is to be evaluated beside it, accuracies by (model, split)."""
    run, sent = now.run, now.assignments
    last = now.number == run.options.rounds
    if not last and now.number % run.options.eval_every:
        train_control(now)
        return
    renew_assignments(now)
    kind = run.server.kind
    for name, score in run.evaluator.score(list_jobs(now, sent), now.take, partial(train_control, now)).items():
        now.row.results |= {name: score.accuracy, f"{name} loss": score.loss}
        if kind.detail:
            now.row.results[f"{name} {kind.detail}"] = kind.find_detail(score.loss)
    run.own_statistics = {key: known for key, known in run.own_statistics.items() if known[1] is now.aggregated}
    now.row.add_levels()
    evaluate_on_clients(now)
    if last and kind.by_class:
        evaluate_masked(now)


def list_jobs(now: RoundState, sent: Mapping[int, Assignment]) -> dict[str, EvalJob]:
    """What is tested on the test split after a round, whole models first, then levels from the widest.

    `sent` is what clients were sent at its start; `now.assignments` what they would be sent now.
    """
    run = now.run
    found = {"global@test": EvalJob(now.aggregated)}
    if run.options.server_finetune_steps:
        found["sent@test"] = EvalJob(run.server.state)

    def part(source: State, plan: Plan, personal: bool = False, number: int = now.number) -> EvalJob:
        apart = run.static_norms and needs_own_statistics(plan, personal)
        return EvalJob(own_statistics(now, plan, source, number) if apart else source, plan)

    for level, fresh in {a.client.profile.level: a for a in reversed(now.assignments.values())}.items():
        plan, before = fresh.plan, sent[fresh.client.id]
        if plan.model is None:
            found[f"level-{level}@test"] = part(now.aggregated, plan)
        if fresh.source is not run.server.state:
            found[f"personal-{level}@test"] = part(fresh.source, plan, personal=True)
        elif not before.personal:
            found[f"sent-{level}@test"] = part(before.source, plan, number=now.number - 1)
    for level, plan in plan_absent_levels(now).items():
        found[f"level-{level}@test"] = part(now.aggregated, plan)
    return dict(sorted(found.items(), key=lambda item: order_of(item[0])))


def plan_absent_levels(now: RoundState) -> dict[str, Plan]:
    """Plans of the levels that devices of this run may have and nobody had in this round, where they depend on the width alone."""
    run = now.run
    extraction = next(plugin for key, plugin in run.plugins.plugins.items() if key.startswith("extract."))
    if not (now.assignments and extraction.plans_by_width):
        return {}
    had = {a.client.profile.level for a in now.assignments.values()}
    absent = {level: Client(NOBODY, profile) for level, profile in run.levels.items() if level not in had}
    plans = run.plugins.extract(run.server, list(absent.values()), now.number) if absent else []
    return {level: plan for level, plan in zip(absent, plans, strict=True) if plan is not None and plan.model is None}


def order_of(name: str) -> tuple[bool, float]:
    """A sorting key: whole models first, then levels from the widest."""
    level = name.split("@")[0].partition("-")[2]
    return bool(level), -float(level or 0)


def train_control(now: RoundState) -> dict[str, EvalJob]:
    """Trains the control for as many steps as the server has taken in this round, of as many examples each; it is then to be
    tested, if the run has one."""
    run = now.run
    if not (run.options.control and run.server.has_public):
        return {}
    for batch, steps in sorted(now.row.server_steps.items()):
        run.control = run.server.train(run.control, steps, "control", now.number, batch=batch)
    return {"control@test": EvalJob(run.control)}


def evaluate_on_clients(now: RoundState) -> None:
    """Each client of the round tests its plan's part of the new global model, or its own model, on its own test data.

    Where that part needs statistics of its own, they are those of the client's examples.
    """
    run, asked = now.run, dict[int, Instruction]()
    for i, a in now.assignments.items():
        local = run.local_norms or (run.static_norms and needs_own_statistics(a.plan, a.personal))
        asked[i] = a.instruction("evaluate", now.number, local, run.state_versions.get(i, 0))
    found: dict[str, list[float]] = {}
    for i, answer in exchange(now.engine, "evaluate", asked):
        if scores := check_scores(answer, run.server.kind.least):
            found.setdefault("personal@own" if now.assignments[i].personal else "submodel@own", []).append(scores["accuracy"])
    for name, accuracies in found.items():
        now.row.add_mean_and_decile(name, accuracies)


def evaluate_masked(now: RoundState) -> None:
    """The global model on each client's own test data, logits of classes it does not hold put to 0 (spec heterofl 5.2)."""
    run = now.run
    state = {name: t for name, t in now.aggregated.items() if name not in run.at_home}
    everything = Instruction(now.number, state, None, local=run.local_norms, held=True)
    asked = {i: replace(everything, state_version=run.state_versions.get(i, 0)) for i in now.assignments}
    scores = [check_scores(answer) for _, answer in exchange(now.engine, "evaluate", asked)]
    now.row.add_mean_and_decile("global@own masked", [s["accuracy"] for s in scores if s])


def check_scores(answer: Any, least: float = 0.0) -> dict[str, float]:
    """What a client measured; empty where it did not or cannot be believed, as where its score is below `least`."""
    if not isinstance(answer, dict) or not {"accuracy"} <= answer.keys() <= SCORES:
        return {}
    bounds = {name: (least, 1.0) if name == "accuracy" else (0.0, math.inf) for name in answer}
    believed = all(isinstance(v, int | float) and math.isfinite(v) and bounds[k][0] <= v <= bounds[k][1] for k, v in answer.items())
    return dict(answer) if believed else {}
