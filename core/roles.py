"""The chosen plugins of a run, and one typed caller for each hook."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import pluggy
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hetfl.core import hooks, registry, train
from hetfl.core.config import RunOptions, sentence
from hetfl.core.errors import NotApplicable, UsageError, nearest
from hetfl.core.merge import Fold, Mean, Merged, Update, Updates, gather, uniform
from hetfl.core.plans import Plan
from hetfl.core.server import Server
from hetfl.core.strategy import Strategy, hookimpl
from hetfl.core.types import Client, Covered, Extra, Node, Profile, Reply, Returned, Shares, Task
from hetfl.core.widths import State


class Defaults:
    """What the core does where no plugin answers."""

    @hookimpl
    def profile(self, node: Node) -> Profile:
        return Profile()

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(torch.arange) for _ in clients]

    @hookimpl
    def source(self, server: Server) -> State:
        return server.state

    @hookimpl
    def fit(self, task: Task) -> Reply:
        return train.fit(task)

    @hookimpl
    def recover(self, replies: Sequence[Returned]) -> Iterable[Update]:
        return [put(r) for r in replies]

    @hookimpl
    def fold(self, server: Server) -> Fold:
        return Mean(server.state, uniform)


def both(a: Collection[str] | None, b: Collection[str] | None) -> Collection[str] | None:
    """The names in both; None stands for all."""
    if a is None or b is None:
        return b if a is None else a
    return frozenset(a) & frozenset(b)


def put(returned: Returned) -> Update:
    """A reply put back where its plan took it."""
    reply = returned.reply
    return Update(returned.client.id, returned.plan.put(reply.state), float(reply.examples), reply.extras)


class Roles:
    """`plugins` maps "role.name" to the instances; wraps stand from the outside in, aggregation and extraction inside them."""

    def __init__(self, plugins: Mapping[str, Strategy]) -> None:
        self.plugins = dict(plugins)
        self._manager = pluggy.PluginManager("hetfl")
        self._manager.add_hookspecs(hooks)
        self._manager.register(Defaults(), "core")
        order = ("extract", "aggregate", "profile", "wrap")
        for key in sorted(reversed(self.plugins), key=lambda k: order.index(k.split(".")[0])):  # noqa: C414 (the sort is stable)
            self._register(key)
        self._callers: dict[tuple[str, str | None], Any] = {}
        self._answered: dict[tuple[str, str | None], bool] = {}

    def _register(self, key: str) -> None:
        try:
            self._manager.register(self.plugins[key], key)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise UsageError(f"plugin '{key}' does not fit the hooks: {' '.join(str(error).split())}") from error

    def _ask(self, hook: str, role: str | None = None) -> Any:
        """The caller of `hook` for the plugins of `role` (None: all) that have something to do in it."""
        if (hook, role) not in self._callers:
            out = [p for key, p in self.plugins.items() if hook in p.idle or role not in (None, key.split(".")[0])]
            self._callers[hook, role] = self._manager.subset_hook_caller(hook, remove_plugins=out)
        return self._callers[hook, role]

    def _answers(self, hook: str, role: str | None = None) -> bool:
        """Whether a plugin, and not just the core, answers `hook`."""
        if (hook, role) not in self._answered:
            impls = self._ask(hook, role).get_hookimpls()
            self._answered[hook, role] = any(impl.plugin_name != "core" for impl in impls)
        return self._answered[hook, role]

    def prepare(self, server: Server) -> None:
        self._manager.hook.prepare(server=server)

    def profile(self, node: Node) -> Profile:
        return cast(Profile, self._ask("profile", "profile")(node=node))

    def adapt(self, model: nn.Module, x: Tensor, classes: int) -> nn.Module:
        adapted = self._manager.hook.adapt(model=model, x=x, classes=classes)
        return model if adapted is None else cast(nn.Module, adapted)

    @property
    def adapts(self) -> bool:
        """Whether a plugin changes the model before the run."""
        return self._answers("adapt")

    def source(self, server: Server, client: Client) -> State:
        if not self._answers("source", "aggregate"):
            return server.state
        return cast(State, self._ask("source", "aggregate")(server=server, client=client))

    def shares(self, server: Server, client: Client, names: Collection[str]) -> Shares:
        """What travels under all chosen plugins."""
        if not self._answers("shares"):
            return Shares()
        down, up = None, None
        for said in self._manager.hook.shares(server=server, client=client, names=names):
            down, up = both(down, said.down), both(up, said.up)
        return Shares(down, up)

    def brief(self, server: Server, client: Client, plan: Plan, round: int) -> State:
        if not self._answers("brief"):
            return {}
        said = self._manager.hook.brief(server=server, client=client, plan=plan, round=round)
        return {name: tensor for extras in reversed(said) for name, tensor in extras.items()}

    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan | None]:
        return list(self._ask("extract", "extract")(server=server, clients=clients, round=round))

    def fit(self, task: Task) -> Reply:
        return cast(Reply, self._ask("fit")(task=task))

    @property
    def plain_fit(self) -> bool:
        """Whether local training is the core's own, with nothing around it."""
        return not self._answers("fit")

    def recover(self, server: Server, replies: Sequence[Returned], round: int) -> list[Update]:
        return list(self._ask("recover", "extract")(server=server, replies=replies, round=round))

    def aggregate(self, server: Server, updates: Updates, round: int) -> Merged:
        if self._answers("aggregate", "aggregate"):
            return cast(Merged, self._ask("aggregate", "aggregate")(server=server, updates=updates, round=round))
        return gather(self._fold(server, round), updates)

    @property
    def averages(self) -> bool:
        """Whether the aggregation is a mean over the clients that cover an entry, and the recovery the core's own."""
        aggregations = [p for key, p in self.plugins.items() if key.startswith("aggregate.")]
        return not self._answers("recover", "extract") and all(p.mean for p in aggregations)

    @property
    def concludes(self) -> bool:
        """Whether a plugin has a last word on what was merged."""
        return self._answers("conclude")

    def conclude(self, server: Server, merged: Merged, covered: Sequence[Covered], round: int) -> Merged:
        for plugin in self.plugins.values():
            others = [p for p in self.plugins.values() if p is not plugin]
            for changed in self._manager.subset_hook_caller("conclude", remove_plugins=others)(
                server=server, merged=merged, covered=covered, round=round
            ):
                merged = changed
        return merged

    def stream(self, server: Server, round: int) -> Fold | None:
        """A Fold for replies one by one as they come; None where the aggregation, or the recovery, has to see all of them."""
        together = self._answers("aggregate", "aggregate") or self._answers("recover", "extract")
        return None if together else self._fold(server, round)

    def _fold(self, server: Server, round: int) -> Fold:
        return cast(Fold, self._ask("fold", "aggregate")(server=server, round=round))

    @property
    def up(self) -> dict[str, Extra]:
        """The extras that replies may carry."""
        return {name: extra for plugin in self.plugins.values() for name, extra in plugin.up.items()}

    @property
    def down(self) -> dict[str, Extra]:
        """The extras that plans may carry."""
        return {name: extra for plugin in self.plugins.values() for name, extra in plugin.down.items()}

    @property
    def norm_policy(self) -> str | None:
        """The policy that the chosen plugins ask for, if any."""
        return next((p.norm_policy for p in self.plugins.values() if p.norm_policy), None)

    def options(self) -> dict[str, dict[str, Any]]:
        """All options of the chosen plugins, resolved."""
        return {key: plugin.model_dump(mode="json") for key, plugin in self.plugins.items()}


def chosen(options: RunOptions) -> list[registry.Entry]:
    """The registry entries of a run's plugins, found without importing them."""
    extract = registry.find("extract", options.extract)
    aggregate = registry.find("aggregate", options.aggregate or extract.aggregate or "overlap")
    return [extract, aggregate, registry.find("profile", options.profile), *(registry.find("wrap", w) for w in options.wrap)]


def settings(options: RunOptions, entries: Sequence[registry.Entry]) -> dict[str, dict[str, Any]]:
    """The plugin options given with --set and --levels, by "role.name". Raises UsageError for a name that is not chosen."""
    found: dict[str, dict[str, Any]] = {f"{e.role}.{e.name}": {} for e in entries}
    given = dict(options.set)
    if options.levels is not None:
        given = {**given, "levels": {**given.get("levels", {}), "mix": options.levels}}
    for name, values in given.items():
        for key, value in values.items() if isinstance(values, dict) else [(name, values)]:
            place, option = address(name, key, value, entries)
            found[place].update(option)
    return found


def address(name: str, key: str, value: Any, entries: Sequence[registry.Entry]) -> tuple[str, dict[str, Any]]:
    """Where `name.key = value` belongs; `name` is a plugin's name, or a role and `key` the name."""
    if name in registry.ROLES and isinstance(value, dict):
        if any((e.role, e.name) == (name, key) for e in entries):
            return f"{name}.{key}", value
        name = f"{name}.{key}"
    bearers = [e for e in entries if e.name == name]
    if len(bearers) > 1:
        bearers = [e for e in bearers if key in e.load().model_fields] or bearers
    if len(bearers) > 1:
        places = " or ".join(f"{e.role}.{name}.{key}" for e in bearers)
        raise UsageError(f"option '{name}.{key}' could belong to two chosen plugins; say {places}")
    if not bearers:
        names = [e.name for e in entries]
        raise UsageError(
            f"option '{name}.{key}': no chosen plugin is named '{name}'{nearest(name, names)} (chosen: {', '.join(names)})"
        )
    return f"{bearers[0].role}.{name}", {key: value}


def load(options: RunOptions) -> Roles:
    """Imports and configures a run's plugins. Raises UsageError for a bad option or a plugin that cannot be used."""
    entries = chosen(options)
    given = settings(options, entries)
    made = {f"{e.role}.{e.name}": configure(e, given[f"{e.role}.{e.name}"]) for e in entries}
    refuse_foreign(made, entries)
    return Roles(made)


def refuse_foreign(made: Mapping[str, Strategy], entries: Sequence[registry.Entry]) -> None:
    """Architectures that share no coordinates cannot be averaged entry by entry."""
    extract, aggregate = entries[:2]
    if made[f"extract.{extract.name}"].foreign and not made[f"aggregate.{aggregate.name}"].foreign:
        raise NotApplicable(
            f"not applicable: the clients of '{extract.name}' have architectures of their own here, which share no coordinates, "
            f"and '{aggregate.name}' averages parameters; take an aggregation of scores or of clusters"
        )


def configure(entry: registry.Entry, given: Mapping[str, Any]) -> Strategy:
    """One plugin with its options."""
    strategy = entry.load()
    try:
        return strategy(**given)
    except ValidationError as error:
        raise UsageError(sentence(error, strategy, f"{entry.name}.")) from error
