"""Which plugin a hook is asked of, and in what order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import hetfl
from hetfl.errors import RunError, UsageError
from hetfl.hooks.base import Plugin
from hetfl.hooks.hookspecs import hookimpl
from hetfl.hooks.manager import PluginManager
from hetfl.training.task import Reply


class Misspelt(Plugin):
    @hookimpl
    def aggregate(self, server, updatez):
        return None


def test_a_misspelt_hook_argument_is_refused():
    with pytest.raises(UsageError, match="updatez"):
        PluginManager({"aggregate.misspelt": Misspelt()})


class Outer(Plugin):
    log: list[str] = []

    @hookimpl(wrapper=True)
    def fit(self, task):
        task.log.append(type(self).__name__)
        return (yield)


class Core(Outer):
    pass


class Inner(Outer):
    pass


def test_wraps_stand_outside_in_and_the_extraction_innermost(monkeypatch):
    from hetfl.training import local as train

    task = SimpleNamespace(log=[], round=1, client=0, train=None)
    monkeypatch.setattr(train, "fit", lambda task: Reply({}, 1))
    roles = PluginManager({"extract.core": Core(), "wrap.outer": Outer(), "wrap.inner": Inner()})
    roles.fit(task)
    assert task.log == ["Outer", "Inner", "Core"]


SMALL = {
    "model": "mlp", "model_args": {"hidden": [8, 6]}, "rounds": 2, "epochs": 1, "pretrain_steps": 0, "clients": 3, "limit": 120,
    "levels": "1,0.5,0.5", "partition": "iid", "progress": False, "control": False,
}  # fmt: skip


def made(hook, answer):
    """A plugin whose `hook` answers what `answer(whole, arguments)` gives, `whole` being what another would have answered."""

    def extract(self, server, clients, round):
        return answer([server.select(hetfl.prefix(c.profile.width)) for c in clients], round)

    def aggregate(self, server, updates, round):
        return answer(list(updates), round)

    def recover(self, server, replies, round):
        for reply in replies:
            yield answer(reply, round)

    def fit(self, task):
        return answer((yield), task.client)

    bodies = {"extract": extract, "aggregate": aggregate, "recover": recover, "fit": fit}
    body = bodies.get(hook) or (lambda self: answer(None, None))
    mark = hookimpl(wrapper=True) if hook == "fit" else hookimpl
    return type("Odd", (Plugin,), {hook: mark(body), "__module__": __name__})


def units(numbers):
    """An extraction whose second client keeps these units of the group of 8."""

    def answer(plans, round):
        groups = {name: torch.arange(size) for name, size in plans[0].sizes.items()}
        first = next(iter(groups))
        kept = {**groups, first: torch.as_tensor(numbers) if isinstance(numbers, list) else numbers}
        return [plans[0], type(plans[0])(plans[0].widths, kept), plans[2]]

    return answer


def fail(*_):
    raise ZeroDivisionError("boom")


REFUSED = {
    "twice": ("extract", units([0, 1, 1]), "extract plugin 'Odd' gave client 1 a plan that keeps unit 1 of group '.+' more than"),
    "outside": ("extract", units([7, 8]), "gave client 1 a plan that keeps unit 8 of group '.+', whose units are 0 to 7"),
    "negative": ("extract", units([-1, 3]), "gave client 1 a plan that keeps unit -1 of group"),
    "none": ("extract", units(torch.arange(0)), "gave client 1 a plan that does not keep units of group '.+' as a vector of int64"),
    "bits": ("extract", units(torch.ones(8, dtype=torch.bool)), "does not keep units of group '.+' as a vector of int64 numbers"),
    "a plan of another kind": ("extract", lambda plans, _: [plans[0], 3, plans[2]],
                               "gave client 1 a int, which is no plan: it has no 'sizes' .extract, round 1."),
    "one for all": ("extract", lambda plans, _: plans[0], "extract plugin 'Odd' answered Selection, not a list of plans"),
    "too few": ("extract", lambda plans, _: plans[:2], "extract plugin 'Odd' gave 2 plans for 3 clients"),
    "raising": ("extract", fail, "extract plugin 'Odd' failed in extract, round 1: ZeroDivisionError: boom"),
    "no merge": ("aggregate", lambda *_: None, "aggregate plugin 'Odd' answered NoneType, not Merged"),
    "another merge": ("aggregate", lambda updates, _: {}, "aggregate plugin 'Odd' answered dict, not Merged"),
    "half a merge": ("aggregate", lambda updates, _: hetfl.Merged({}), "a Merged with tensor '1.weight' as NoneType, not"),
    "raising merge": ("aggregate", fail, "aggregate plugin 'Odd' failed in aggregate, round 1: ZeroDivisionError: boom"),
    "no update": ("recover", lambda reply, _: 5, "extract plugin 'Odd' answered int, not Update .recover, round 1."),
    "prepare": ("prepare", fail, "wrap plugin 'Odd' failed in prepare: ZeroDivisionError: boom"),
    "no reply": ("fit", lambda *_: 5, "every client failed .* 0: wrap plugin 'Odd' answered int, not Reply .fit, round 1, client"),
    "raising fit": ("fit", fail, "client 0: wrap plugin 'Odd' failed in fit, round 1, client 0: ZeroDivisionError: boom"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_plugin_does_wrong_names_plugin_hook_round_and_client(what):
    hook, answer, sentence = REFUSED[what]
    role = {"extract": "extract", "recover": "extract", "aggregate": "aggregate"}.get(hook, "wrap")
    chosen = {"extract": "heterofl", "aggregate": "overlap", role: made(hook, answer)}
    with pytest.raises(RunError, match=sentence):
        hetfl.run(**SMALL, **chosen)


def test_a_client_that_fails_beside_others_is_named_in_a_note():
    odd = made("fit", lambda reply, client: fail() if client == 1 else reply)
    run = hetfl.run(extract="heterofl", aggregate="overlap", wrap=odd, **SMALL)
    wanted = "round 1: client 1 left out: wrap plugin 'Odd' failed in fit, round 1, client 1: ZeroDivisionError: boom"
    assert wanted in run.summary["notes"]
    assert run.metrics["taken"].tolist() == [1, 1]


def test_what_the_core_raises_within_a_plugin_is_not_laid_at_its_door(monkeypatch):
    from hetfl.training import local

    monkeypatch.setattr(local, "fit", fail)
    with pytest.raises(RunError, match="client 0: ZeroDivisionError: boom"):
        hetfl.run(extract="heterofl", aggregate="overlap", wrap=made("fit", lambda reply, client: reply), **SMALL)


class Unmarked(Plugin):
    def extract(self, server, clients):
        return [server.select(torch.arange) for _ in clients]


def test_a_method_that_bears_a_hooks_name_is_marked_as_one():
    with pytest.raises(UsageError, match="extract plugin 'Unmarked' has a method 'extract' that is not marked as a hook: put"):
        hetfl.run(extract=Unmarked, **SMALL)


def test_units_in_any_order_are_a_plan():
    chosen = made("extract", units([5, 0, 7]))
    assert hetfl.run(extract=chosen, aggregate="overlap", **SMALL).metrics["left out"].tolist() == [0, 0]


def test_a_run_in_which_no_round_is_taken_has_failed(tmp_path):
    fit = made("fit", lambda reply, client: fail() if client == 1 else reply)
    with pytest.raises(RunError, match=r"no round's replies became the global model.*2 of the 3 valid replies that a round needs"):
        hetfl.run(extract="heterofl", aggregate="overlap", wrap=fit, min_clients=3, out=tmp_path / "r", **SMALL)
    assert hetfl.load(tmp_path / "r").metrics["taken"].tolist() == [0, 0]
