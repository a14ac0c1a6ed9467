"""The chosen plugins of a run, and one typed caller for each hook."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import pluggy
from torch import Tensor, nn

from hetfl.aggregation.updates import Merged, Update
from hetfl.errors import RunError, UsageError
from hetfl.hooks import hookspecs
from hetfl.hooks.base import Plugin
from hetfl.hooks.defaults import Defaults
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client, Coverage, Exchange, ExtraSpec, ReceivedReply
from hetfl.models.state import State
from hetfl.profiling.node import Node, Profile
from hetfl.submodel.plan import Plan
from hetfl.training.task import Reply, Task


def intersect(a: Collection[str] | None, b: Collection[str] | None) -> Collection[str] | None:
    """The names in both; None stands for all."""
    if a is None or b is None:
        return b if a is None else a
    return frozenset(a) & frozenset(b)


class PluginManager:
    """`plugins` maps "role.name" to the instances; wraps stand from the outside in, aggregation and extraction inside them."""

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        self.plugins = dict(plugins)
        self._manager = pluggy.PluginManager("hetfl")
        self._manager.add_hookspecs(hookspecs)
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
            out: list[object] = [
                p for key, p in self.plugins.items() if hook in p.inactive_hooks or role not in (None, key.split(".")[0])
            ]
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

    def adapt_model(self, model: nn.Module, x: Tensor, classes: int) -> nn.Module:
        adapted = self._manager.hook.adapt_model(model=model, x=x, classes=classes)
        return model if adapted is None else cast(nn.Module, adapted)

    @cached_property
    def adapts_model(self) -> bool:
        """Whether a plugin changes the model before the run."""
        return self._answers("adapt_model")

    def base_state(self, server: Server, client: Client) -> State:
        if not self._answers("base_state", "aggregate"):
            return server.state
        return cast(State, self._ask("base_state", "aggregate")(server=server, client=client))

    def exchange(self, server: Server, client: Client, names: Collection[str]) -> Exchange:
        """What travels under all chosen plugins."""
        if not self._answers("exchange"):
            return Exchange()
        down, up = None, None
        for said in self._manager.hook.exchange(server=server, client=client, names=names):
            down, up = intersect(down, said.down), intersect(up, said.up)
        return Exchange(down, up)

    def client_extras(self, server: Server, client: Client, plan: Plan, round: int) -> State:
        if not self._answers("client_extras"):
            return {}
        said = self._manager.hook.client_extras(server=server, client=client, plan=plan, round=round)
        return {name: tensor for extras in reversed(said) for name, tensor in extras.items()}

    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan | None]:
        return list(self._ask("extract", "extract")(server=server, clients=clients, round=round))

    def fit(self, task: Task) -> Reply:
        return cast(Reply, self._ask("fit")(task=task))

    @cached_property
    def plain_fit(self) -> bool:
        """Whether local training is the core's own, with nothing around it."""
        return not self._answers("fit")

    def recover(self, server: Server, replies: Iterable[ReceivedReply], round: int) -> Iterable[Update]:
        return cast(Iterable[Update], self._ask("recover", "extract")(server=server, replies=replies, round=round))

    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        """The next global model. Raises RunError where the aggregation gives none."""
        caller = self._ask("aggregate", "aggregate")
        if self._answers("aggregate", "aggregate"):
            others = [p for key, p in self._manager.list_name_plugin() if not key.startswith("aggregate.")]
            caller = self._manager.subset_hook_caller("aggregate", remove_plugins=others)
        merged = caller(server=server, updates=updates, round=round)
        if not isinstance(merged, Merged):
            names = [key for key in self.plugins if key.startswith("aggregate.")]
            raise RunError(
                f"the aggregation {', '.join(names)} answered {type(merged).__name__} in round {round}, not Merged(state)"
            )
        return merged

    @cached_property
    def averages(self) -> bool:
        """Whether the aggregation is a mean over the clients that cover an entry, and the recovery the core's own."""
        aggregations = [p for key, p in self.plugins.items() if key.startswith("aggregate.")]
        return not self._answers("recover", "extract") and all(p.mean for p in aggregations)

    @property
    def trains_global(self) -> bool:
        """Whether the rounds make a global model."""
        return all(plugin.trains_global for plugin in self.plugins.values())

    @cached_property
    def finalizes(self) -> bool:
        """Whether a plugin has a last word on what was merged."""
        return self._answers("finalize")

    def finalize(self, server: Server, merged: Merged, covered: Sequence[Coverage], round: int) -> Merged:
        """What the plugins' last words make of `merged`, each getting what the one before made."""
        for plugin in self.plugins.values():
            others = [p for p in self.plugins.values() if p is not plugin]
            for changed in self._manager.subset_hook_caller("finalize", remove_plugins=others)(
                server=server, merged=merged, covered=covered, round=round
            ):
                merged = changed
        return merged

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

    def options(self) -> dict[str, dict[str, Any]]:
        """All options of the chosen plugins, resolved."""
        return {key: plugin.model_dump(mode="json") for key, plugin in self.plugins.items()}
