"""Bronze: pairs run, bits repeat, and a plugin keeps to what it may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hetfl import registry
from hetfl.errors import NotApplicable, RunError, UsageError
from hetfl.models.state import State
from hetfl.profiling.node import Node, Profile
from hetfl.rounds.loop import run_round
from hetfl.runs.experiment import Experiment
from hetfl.submodel.plan import Plan, Selection, grow
from hetfl.testing.checks import Tier, check
from hetfl.testing.probes import Backwards, Spoil, Witness, global_seeds, watched_clock
from hetfl.testing.subject import NotChecked, Outcome, Subject, differing

FAULTS = ("failure", "nan", "shape", "missing", "undeclared", "oversized")

MOST_KEPT = 16  # times the model's bytes that a client may keep, and the server for each client


@check(Tier.BRONZE)
def runs_with_every_partner(subject: Subject) -> str:
    """Every built-in partner runs with it: numbers stay finite, nobody is left out."""
    wanted = "aggregate" if subject.role == "extract" else "extract"
    partners = [entry.name for entry in registry.builtins() if entry.role == wanted]
    failed, refused = [], 0
    for partner in partners:
        try:
            found = subject.play(2, None, **{wanted: partner})
        except NotApplicable:
            refused += 1
            continue
        except (RunError, UsageError) as error:
            failed.append(f"{partner}: {error}")
            continue
        wrong = found.left_out or ["NaN or infinity" for t in found.state.values() if not bool(torch.isfinite(t).all())]
        failed += [f"{partner}: {wrong[0]}"] if wrong else []
    assert not failed, f"{len(failed)} of {len(partners)} fail: {'; '.join(failed[:3])}"
    return f"{len(partners) - refused} partners" + (f", {refused} not applicable" if refused else "")


@check(Tier.BRONZE)
def repeats(subject: Subject) -> None:
    """The same run twice is the same to the bit."""
    expect_same(subject.baseline, subject.play(), "run twice")


@check(Tier.BRONZE)
def workers_change_nothing(subject: Subject) -> None:
    """Two workers or one: the same bits."""
    expect_same(subject.baseline, subject.play(workers=1), "with 2 workers and 1")


@check(Tier.BRONZE)
def order_changes_nothing(subject: Subject) -> None:
    """Clients that train in the opposite order: the same bits."""
    expect_same(subject.baseline, subject.play(around=lambda made: Backwards(made.engine)), "with the clients in opposite order")


@check(Tier.BRONZE)
def draws_no_global_randomness(subject: Subject) -> None:
    """Whatever the generators of Python, numpy and torch were seeded with: the same bits."""
    with global_seeds(1):
        one = subject.play()
    with global_seeds(2):
        two = subject.play()
    expect_same(one, two, "under other seeds of the global generators (draw from server.stream, task.stream or node.stream)")


@check(Tier.BRONZE)
def reads_no_wall_clock(subject: Subject) -> None:
    """No code of the plugin's package reads a clock."""
    module = subject.kind.__module__
    with watched_clock(module.rpartition(".")[0] or module) as found:
        subject.play(2)
    assert not found, f"{found[0]}: what it answers depends on more than the seed"


@check(Tier.BRONZE, "extract", "aggregate", "wrap")
def keeps_uncovered_entries(subject: Subject) -> str:
    """What no client's update covers stays as it was, to the bit."""
    witness = Witness()
    for levels in ("1,0.5,0.25", "0.5,0.5,0.25"):
        subject.play(levels=levels, wrap=[witness])
    assert not witness._moved, f"uncovered entries changed in {witness._moved[0]}"
    if not any(witness._rounds):
        raise NotChecked("no client's update covers anything")
    return f"{len(witness._rounds)} rounds"


@check(Tier.BRONZE)
def sends_declared_extras_only(subject: Subject) -> None:
    """What travels beside the weights is declared in extras_down and extras_up, within its bounds."""
    try:
        found = subject.baseline
    except RunError as error:
        raise AssertionError(str(error)) from error
    odd = [text for text in found.left_out if "extra" in text]
    assert not odd, odd[0]


@check(Tier.BRONZE)
def survives_bad_replies(subject: Subject) -> str:
    """A client that fails, or answers what cannot be, is left out, and the run goes on."""
    tried = 0
    for fault in FAULTS:
        spoil = Spoil(fault=fault)  # type: ignore[arg-type]
        with subject.start(wrap=[spoil]) as made:
            for number in (1, 2, 3):
                run_round(made.state, number, made.engine)
            mine = [row for row in made.state.client_rows if (row["round"], row["client"]) == (2, 0)]
            finite = all(bool(torch.isfinite(t).all()) for t in made.server.state.values())
            has_what = fault in ("failure", "undeclared") or (bool(spoil._done) if fault == "oversized" else sends_tensors(made))
        assert finite, f"after a reply with the fault '{fault}' the model holds NaN or infinity"
        if mine and has_what:
            tried += 1
            assert "fault" in mine[0], f"a reply with the fault '{fault}' was taken in"
    if not tried:
        raise NotChecked("no client takes part")
    return f"{tried} kinds"


def sends_tensors(made: Experiment) -> bool:
    """Whether client 0's tensors travel to the server."""
    names = tuple(made.server.state)
    up = made.plugins.exchange(made.server, made.server.clients[0], names).up
    return up is None or bool(up)


@check(Tier.BRONZE)
def bounds_what_a_client_costs(subject: Subject) -> str:
    """A client's round takes seconds, and what client and server keep does not grow from round to round."""
    with subject.start(rounds=6) as made:
        whole = bytes_of(made.server.state)
        kept = []
        for number in range(1, 7):
            run_round(made.state, number, made.engine)
            clients = [sum(bytes_of(s) for s in state.values()) for state in made.engine.client_states().values()]
            server = sum(bytes_of(plugin.state_dict()) for plugin in made.plugins.plugins.values())
            kept.append((max(clients, default=0), server // len(clients)))
        slowest = max((row.get("seconds", 0.0) for row in made.state.client_rows), default=0.0)
    for who, before, after in zip(("a client keeps", "the server keeps for each client"), kept[2], kept[5], strict=True):
        assert after <= MOST_KEPT * whole, f"{who} {after:,} bytes, of a model of {whole:,}"
        assert after <= 1.1 * before + 256, f"{who} {before:,} bytes after round 3 and {after:,} after round 6"
    assert slowest <= subject.seconds, f"a client's round took {slowest:.1f} s of {subject.seconds:g}"
    return f"{slowest:.2f} s, {kept[5][0]:,} bytes"


def bytes_of(state: State) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in state.values())


@check(Tier.BRONZE, "extract")
def full_width_is_the_whole_model(subject: Subject) -> None:
    """A client of width 1 gets every entry of the model, in place."""
    with subject.plans((1.0,)) as (made, plans):
        plan, whole = plans[1.0], made.server.state
        taken = plan.take(whole)
        state, coverage = grow(plan.put({name: tensor + 1 for name, tensor in taken.items()}), whole)
        missing = [name for name in whole if not bool((coverage[name] > 0).all())]
        assert not missing, f"at width 1 the plan leaves out entries of {missing[0]}"
        assert sum(t.numel() for t in taken.values()) == sum(t.numel() for t in whole.values()), "at width 1 entries are sent twice"
        assert not differing(state, {n: t + 1 for n, t in whole.items()}), "at width 1 what is put back is not what was taken"


@check(Tier.BRONZE, "extract")
def puts_back_what_it_takes(subject: Subject) -> str:
    """put(take(s)) is s, and a change of what was taken comes back where it was taken from."""
    with subject.plans() as (made, plans):
        for width, plan in plans.items():
            state = random_like(made.server.state)
            taken = plan.take(state)
            same, _ = grow(plan.put(taken), state)
            assert not (name := differing(same, state)), f"at width {width:g} put(take(s)) is not s in {name}"
            changed, coverage = grow(plan.put({name: tensor + 1 for name, tensor in taken.items()}), state)
            expected = {name: torch.where(coverage[name] > 0, tensor + 1, tensor) for name, tensor in state.items()}
            assert not (name := differing(changed, expected)), f"at width {width:g} a change of {name} comes back elsewhere"
            assert any(bool((c > 0).any()) for c in coverage.values()), f"at width {width:g} nothing is taken"
    return f"widths {', '.join(f'{w:g}' for w in plans)}"


def random_like(state: State) -> State:
    """Numbers of the standard normal distribution in the shapes of `state`; whole numbers as they are."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t for n, t in state.items()}


@check(Tier.BRONZE, "extract")
def respects_the_budget(subject: Subject) -> str:
    """A client of width r gets no more entries than the first ceil(r n) units of every layer have."""
    told = []
    with subject.plans() as (made, plans):
        for width, plan in plans.items():
            budget = Selection(made.server.widths, made.server.widths.prefix(width))
            got, allowed = count_existing(plan, made.server.state), count_existing(budget, made.server.state)
            assert got <= allowed, f"at width {width:g} a client gets {got:,} entries, of which {allowed:,} are its budget"
            told.append(f"{got:,} of {allowed:,}")
    return ", ".join(told)


def count_existing(plan: Plan, state: State) -> int:
    """Entries of a plan's submodel that are not masked."""
    taken = plan.take(state)
    return sum(int(plan.masks[name].sum()) if name in plan.masks else tensor.numel() for name, tensor in taken.items())


@check(Tier.BRONZE, "profile")
def answers_a_width(subject: Subject) -> None:
    """Every node of every round is told a width in (0, 1], and the same when asked again."""
    with subject.start() as made:
        ask: Callable[[Node], Profile] = made.plugins.profile
        cost, probe = made.state.meter.width_cost, lambda ratio: ratio / 1000
        for number in (1, 2, 3):
            for client in (2, 0, 1):
                node = Node(client, 3, number, made.options.seed, cost, probe, 40, 2)
                one, two = ask(node), ask(replace(node))
                assert 0 < one.width <= 1, f"client {client} is told a width of {one.width:g}, which is not in (0, 1]"
                assert one == two, f"client {client} of round {number} is told {one} and, asked again, {two}"


def expect_same(one: Outcome, two: Outcome, how: str) -> None:
    """Raises AssertionError where two outcomes differ."""
    assert not (difference := one.difference(two)), f"{how}: {difference}"
