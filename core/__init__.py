"""Model-heterogeneous federated learning: any extraction pairs with any aggregation, on any nn.Module.

What plugin authors need is here, and so is what people need in a script or a notebook. Each name is imported when it is first used,
so that `import hetfl` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetfl.aggregation.mean import MeanAggregator, mean, mean_with_absent, running_mean
    from hetfl.aggregation.updates import Merged, Update, Updates
    from hetfl.errors import NotApplicable, RunError, UsageError
    from hetfl.hooks.base import Field, Plugin, PresetPlugin, flatten_state, unflatten_state
    from hetfl.hooks.hookspecs import hookimpl
    from hetfl.hooks.server import Server
    from hetfl.hooks.values import Client, Coverage, Exchange, ExtraSpec, ReceivedReply
    from hetfl.models.state import State
    from hetfl.profiling.node import Node, Profile
    from hetfl.runs.api import load, matrix, resume, run
    from hetfl.runs.result import Matrix, Run
    from hetfl.submodel.plan import OwnModel, Patch, Plan, Selection
    from hetfl.submodel.shrinking import Shrunk, shrink, width_groups
    from hetfl.submodel.widths import Widths, prefix, unit_count, window
    from hetfl.training.task import Reply, Task

__version__ = "0.1.0"

API = "0.1"  # of the contract (hooks, the values they are given and answer, these names): CONTRIBUTING.md says when it changes

_HOMES = {
    "aggregation.mean": ("MeanAggregator", "mean", "mean_with_absent", "running_mean"),
    "aggregation.updates": ("Merged", "Update", "Updates"),
    "errors": ("NotApplicable", "RunError", "UsageError"),
    "hooks.base": ("Field", "Plugin", "PresetPlugin", "flatten_state", "unflatten_state"),
    "hooks.hookspecs": ("hookimpl",),
    "hooks.server": ("Server",),
    "hooks.values": ("Client", "Coverage", "Exchange", "ExtraSpec", "ReceivedReply"),
    "models.state": ("State",),
    "profiling.node": ("Node", "Profile"),
    "runs.api": ("load", "matrix", "resume", "run"),
    "runs.result": ("Matrix", "Run"),
    "submodel.plan": ("OwnModel", "Patch", "Plan", "Selection"),
    "submodel.shrinking": ("Shrunk", "shrink", "width_groups"),
    "submodel.widths": ("Widths", "prefix", "unit_count", "window"),
    "training.task": ("Reply", "Task"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order in which a reader meets them)
    "run", "load", "resume", "matrix", "Run", "Matrix",
    "Plugin", "PresetPlugin", "Field", "hookimpl", "flatten_state", "unflatten_state",
    "Server", "Client", "Node", "Task", "ReceivedReply", "Update", "Updates", "Coverage", "State",
    "Profile", "Plan", "Selection", "OwnModel", "Patch", "Reply", "Exchange", "ExtraSpec", "Merged",
    "prefix", "window", "unit_count", "mean", "mean_with_absent", "running_mean", "MeanAggregator",
    "shrink", "Shrunk", "width_groups", "Widths",
    "UsageError", "NotApplicable", "RunError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hetfl' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"hetfl.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
