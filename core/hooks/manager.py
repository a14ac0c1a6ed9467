"""The chosen plugins of a run, and one typed caller for each hook."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar, cast

import pluggy
from torch import Tensor, nn

from hetfl.aggregation.updates import Merged, Update
from hetfl.errors import RunError, UsageError
from hetfl.hooks import answers, hookspecs
from hetfl.hooks.base import HOOKS, Plugin
from hetfl.hooks.defaults import Defaults
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client, Coverage, Exchange, ExtraSpec, ReceivedReply
from hetfl.models.state import State
from hetfl.profiling.node import Node, Profile
from hetfl.submodel.plan import Plan
from hetfl.training.task import Reply, Task

Answer = TypeVar("Answer")


class MarkedHooks(pluggy.PluginManager):
    """Looks at a plugin's class first: pluggy looks up every attribute of a plugin twice, statically, in five times the time."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """The options of the hook `name` of `plugin`; None for what is no hook."""
        marked = not name.startswith("_") and hasattr(getattr(type(plugin), name, None), f"{self.project_name}_impl")
        return super().parse_hookimpl_opts(plugin, name) if marked else None


class PluginManager:
    """`plugins` maps "role.name" to the instances; wraps stand from the outside in, aggregation and extraction inside them."""

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        self.plugins = dict(plugins)
        self._manager = MarkedHooks("hetfl")
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(Defaults(), "core")
        order = ("extract", "aggregate", "profile", "select", "wrap")
        for key in sorted(reversed(self.plugins), key=lambda k: order.index(k.split(".")[0])):  # noqa: C414 (the sort is stable)
            self._register(key)
        self._callers: dict[tuple[str, ...], Any] = {}
        self._single: dict[tuple[str, tuple[str, ...]], list[Any]] = {}

    def _register(self, key: str) -> None:
        try:
            self._manager.register(self.plugins[key], key)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise UsageError(f"plugin '{key}' does not fit the hooks: {' '.join(str(error).split())}") from error

    def _ask(self, hook: str, *roles: str) -> Any:
        """The caller of `hook` for the plugins of `roles` (none: all) that have something to do in it."""
        if (hook, *roles) not in self._callers:
            out: list[object] = [
                p for key, p in self.plugins.items() if hook in p.inactive_hooks or (roles and key.split(".")[0] not in roles)
            ]
            self._callers[hook, *roles] = self._manager.subset_hook_caller(hook, remove_plugins=out)
        return self._callers[hook, *roles]

    def _answers(self, hook: str, *roles: str) -> bool:
        """Whether a plugin, and not just the core, answers `hook`."""
        return any(impl.plugin_name != "core" for impl in self._ask(hook, *roles).get_hookimpls())

    @cached_property
    def answered(self) -> frozenset[str]:
        """The hooks that a plugin, and not just the core, answers: what nobody answers, the round need not ask."""
        return frozenset(hook for hook in HOOKS if self._answers(hook))

    def explain(self, error: BaseException, hook: str, round: int = 0, client: int | None = None) -> str | None:
        """The sentence for what a plugin raised, with its role, the hook, round and client; None where no plugin raised it."""
        raised = self._find_raiser(error)
        where = f"{hook}{f', round {round}' if round else ''}{'' if client is None else f', client {client}'}"
        return raised and f"{answers.say_key(raised)} failed in {where}: {type(error).__name__}: {error}"

    def _find_raiser(self, error: BaseException) -> str | None:
        """The key of the plugin in whose code an error was raised: the innermost that the traceback has."""
        found, step = None, error.__traceback__
        while step is not None:
            holder = step.tb_frame.f_locals.get("self")
            found = None if isinstance(holder, Defaults) else next((k for k, p in self.plugins.items() if p is holder), found)
            step = step.tb_next
        return found

    @contextmanager
    def _naming(self, hook: str, round: int = 0, client: int | None = None) -> Iterator[None]:
        """Raises RunError, which names the plugin, for what a plugin raises within; sentences of its own stay as they are."""
        try:
            yield
        except (UsageError, RunError):
            raise
        except (Exception, SystemExit) as error:
            if sentence := self.explain(error, hook, round, client):
                raise RunError(sentence) from error
            raise

    def refuse(self, fault: str | None, hook: str, role: str | None = None, round: int = 0, client: int | None = None) -> None:
        """Raises RunError where the answer to a hook has a fault, with the plugins that answer it."""
        if fault is None:
            return
        impls = self._ask(hook, *([role] if role else [])).get_hookimpls()
        bearers = [impl.plugin_name for impl in impls if impl.plugin_name != "core"]
        where = f"{hook}{f', round {round}' if round else ''}{'' if client is None else f', client {client}'}"
        raise RunError(f"{' or '.join(map(answers.say_key, bearers)) or 'hetfl'} {fault} ({where})")

    def _expect(
        self, kind: type[Answer], answer: Any, hook: str, role: str | None = None, round: int = 0, client: int | None = None
    ) -> Answer:
        """`answer`, which is to be a `kind`. Raises RunError as `refuse` does where it is none."""
        if not isinstance(answer, kind):
            self.refuse(f"answered {type(answer).__name__}, not {kind.__name__}", hook, role, round, client)
        return cast(Answer, answer)

    def prepare(self, server: Server) -> None:
        with self._naming("prepare"):
            self._manager.hook.prepare(server=server)

    def sample(self, server: Server, clients: Sequence[Client], round: int) -> list[int]:
        """The ids of the round's clients, in ascending order. Raises RunError where the answer is something else."""
        with self._naming("sample", round):
            chosen = self._ask("sample", "select")(server=server, clients=clients, round=round)
            self.refuse(answers.find_sample_fault(chosen, clients, server.wanted), "sample", "select", round)
        return sorted(chosen)

    @cached_property
    def samples_uniformly(self) -> bool:
        """Whether every client has the same chance to take part."""
        return all(plugin.uniform for key, plugin in self.plugins.items() if key.startswith("select."))

    def profile(self, node: Node) -> Profile:
        try:
            answer = self._ask("profile", "profile")(node=node)
        except ValueError:
            raise  # the profile's own sentence
        except Exception as error:
            raise RunError(self.explain(error, "profile", node.round, node.client) or repr(error)) from error
        return self._expect(Profile, answer, "profile", "profile", node.round, node.client)

    def allot(self, server: Server, clients: Sequence[Client], round: int) -> list[float]:
        """The width of each client. Raises RunError where the answer is something else, or more than a device affords."""
        own: object = [client.profile.width for client in clients]
        with self._naming("allot", round):
            widths = self._pass_through("allot", "widths", own, self._outwards, server=server, clients=clients, round=round)
        self.refuse(None if widths is own else answers.find_allotment_fault(widths, clients), "allot", None, round)
        return list(cast(Sequence[float], widths))

    def adapt_model(self, model: nn.Module, x: Tensor, classes: int) -> nn.Module:
        with self._naming("adapt_model"):
            adapted = self._manager.hook.adapt_model(model=model, x=x, classes=classes)
        if adapted is None:
            return model
        return self._expect(nn.Module, adapted, "adapt_model")

    def base_state(self, server: Server, client: Client) -> State:
        with self._naming("base_state", client=client.id):
            answer = self._ask("base_state", "aggregate")(server=server, client=client)
        return self._expect(dict, answer, "base_state", "aggregate", client=client.id)

    def exchange(self, server: Server, client: Client, names: Collection[str]) -> Exchange:
        """What travels under all chosen plugins."""
        found = Exchange()
        with self._naming("exchange", client=client.id):
            for said in self._manager.hook.exchange(server=server, client=client, names=names):
                found &= self._expect(Exchange, said, "exchange", client=client.id)
        return found

    def client_extras(self, server: Server, client: Client, plan: Plan, round: int) -> State:
        with self._naming("client_extras", round, client.id):
            said = self._manager.hook.client_extras(server=server, client=client, plan=plan, round=round)
        found: State = {}
        for extras in reversed(said):
            found |= self._expect(dict, extras, "client_extras", None, round, client.id)
        if fault := answers.find_extras_fault(found, self.extras_down):
            self.refuse(f"sends what it did not declare: {fault}", "client_extras", None, round, client.id)
        return found

    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan | None]:
        """A plan for each client, None for one that sits out. Raises RunError where the answer is something else."""
        with self._naming("extract", round):
            plans = self._ask("extract", "extract")(server=server, clients=clients, round=round)
            self.refuse(answers.find_plan_fault(plans, clients), "extract", "extract", round)
        return list(plans)

    def fit(self, task: Task) -> Reply:
        with self._naming("fit", task.round, task.client):
            reply = self._ask("fit")(task=task)
        return self._expect(Reply, reply, "fit", None, task.round, task.client)

    @cached_property
    def plain_fit(self) -> bool:
        """Whether local training is the core's own, with nothing around it, and what it gives travels as it is."""
        return self.answered.isdisjoint(("fit", "encode", "encode_down"))

    def encode(self, task: Task, update: State, sent: State) -> State:
        """`update` as it is to travel."""
        return self._pass_through("encode", "update", update, self._outwards, task=task, sent=sent)

    def decode(self, server: Server, client: Client, encoded: State, sent: State, round: int) -> State:
        """The update that was encoded, as far as it came through."""
        given = {"server": server, "client": client, "sent": sent, "round": round}
        return self._pass_through("decode", "encoded", encoded, self._outwards[::-1], **given)

    def encode_down(self, server: Server, state: State, round: int) -> State:
        """`state` as it is to travel to clients."""
        return self._pass_through("encode_down", "state", state, self._outwards, server=server, round=round)

    def decode_down(self, encoded: State, like: State, round: int) -> State:
        """What a client has of it."""
        return self._pass_through("decode_down", "encoded", encoded, self._outwards[::-1], like=like, round=round)

    def receive(self, server: Server, received: ReceivedReply, round: int) -> ReceivedReply:
        """The reply as it is to count."""
        return self._pass_through("receive", "received", received, list(self.plugins), server=server, round=round)

    @cached_property
    def _outwards(self) -> list[str]:
        """The plugins from the inside out."""
        wraps = [key for key in self.plugins if key.startswith("wrap.")]
        return [*(key for key in self.plugins if key not in wraps), *reversed(wraps)]

    def _pass_through(self, hook: str, what: str, value: Answer, keys: Sequence[str], **given: object) -> Answer:
        """`value` after the plugins `keys` that answer `hook`, each getting as `what` that which the one before made."""
        for caller in self._each(hook, tuple(keys)):
            for changed in caller(**{what: value}, **given):
                value = changed
        return value

    def _each(self, hook: str, keys: tuple[str, ...]) -> list[Any]:
        """A caller of `hook` for each of the plugins `keys` that have something to do in it."""
        if (hook, keys) not in self._single:
            able = {impl.plugin_name for impl in self._ask(hook).get_hookimpls()}
            everyone = list(self.plugins.values())
            self._single[hook, keys] = [
                self._manager.subset_hook_caller(hook, [p for p in everyone if p is not self.plugins[key]])
                for key in keys
                if key in able
            ]
        return self._single[hook, keys]

    def recover(self, server: Server, replies: Iterable[ReceivedReply], round: int) -> Iterator[Update]:
        for update in self._ask("recover", "extract", "wrap")(server=server, replies=replies, round=round):
            yield self._expect(Update, update, "recover", "extract", round)

    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        """The next global model. Raises RunError where the aggregation gives none."""
        caller = self._ask("aggregate", "aggregate")
        if self._answers("aggregate", "aggregate"):
            others = [p for key, p in self._manager.list_name_plugin() if not key.startswith("aggregate.")]
            caller = self._manager.subset_hook_caller("aggregate", remove_plugins=others)
        with self._naming("aggregate", round):
            merged = caller(server=server, updates=updates, round=round)
        self.refuse(answers.find_merge_fault(merged, server.state), "aggregate", "aggregate", round)
        return cast(Merged, merged)

    @cached_property
    def averages(self) -> str | None:
        """Over whom the aggregation takes a mean (`Plugin.mean`); None where it is none, or the recovery not the core's own."""
        if self._answers("recover", "extract", "wrap"):
            return None
        return next((p.mean for key, p in self.plugins.items() if key.startswith("aggregate.")), None)

    @property
    def trains_global(self) -> bool:
        """Whether the rounds make a global model."""
        return all(plugin.trains_global for plugin in self.plugins.values())

    def finalize(self, server: Server, merged: Merged, covered: Sequence[Coverage], round: int) -> Merged:
        """What the plugins make of `merged`, each getting what the one before made."""
        with self._naming("finalize", round):
            given = {"server": server, "covered": covered, "round": round}
            found = self._pass_through("finalize", "merged", merged, list(self.plugins), **given)
        self.refuse(answers.find_merge_fault(found, server.state), "finalize", None, round)
        return found

    @cached_property
    def extras_up(self) -> dict[str, ExtraSpec]:
        """The extras that replies may carry."""
        return {name: extra for plugin in self.plugins.values() for name, extra in plugin.extras_up.items()}

    @cached_property
    def extras_down(self) -> dict[str, ExtraSpec]:
        """The extras that plans may carry."""
        return {name: extra for plugin in self.plugins.values() for name, extra in plugin.extras_down.items()}

    @property
    def norm_policy(self) -> str | None:
        """The policy that the chosen plugins ask for, if any."""
        return next((p.norm_policy for p in self.plugins.values() if p.norm_policy), None)

    @cached_property
    def declared_widths(self) -> Collection[float] | None:
        """The widths that a device may answer; None: any."""
        return next((p.declared_widths for key, p in self.plugins.items() if key.startswith("profile.")), None)

    def options(self) -> dict[str, dict[str, Any]]:
        """All options of the chosen plugins, resolved."""
        return {key: plugin.model_dump(mode="json") for key, plugin in self.plugins.items()}
