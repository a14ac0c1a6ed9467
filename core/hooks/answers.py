"""What is wrong with a plugin's answer to a hook, in the words that follow its name; None: nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hetfl.aggregation.updates import Merged
from hetfl.hooks.values import Client, ExtraSpec
from hetfl.models.state import State
from hetfl.submodel.plan import Patch, Selection
from hetfl.submodel.widths import Widths

PLAN = ("sizes", "masks", "take", "put", "narrow")  # what a plan has


def say_key(key: str) -> str:
    """ "role.name" in words: extract plugin 'heterofl'."""
    role, _, name = key.partition(".")
    return f"{role} plugin '{name}'"


def find_plan_fault(plans: Any, clients: Sequence[Client]) -> str | None:
    """That an extraction's answer is not a plan, or None, for each client; or that a plan keeps units that cannot be."""
    if not isinstance(plans, Sequence) or isinstance(plans, str):
        return f"answered {type(plans).__name__}, not a list of plans"
    if len(plans) != len(clients):
        return f"gave {len(plans)} plans for {len(clients)} clients"
    seen: dict[int, str | None] = {}
    for client, plan in zip(clients, plans, strict=True):
        if plan is not None and id(plan) not in seen:
            seen[id(plan)] = next(plan_faults(plan), None)
        if plan is not None and (fault := seen[id(plan)]):
            return f"gave client {client.id} {fault}"
    return None


def find_sample_fault(chosen: Any, clients: Sequence[Client], wanted: int) -> str | None:
    """That a selection's answer is not the ids of some of `clients`, none twice and at most `wanted`."""
    if not isinstance(chosen, Sequence) or isinstance(chosen, str) or not all(type(client) is int for client in chosen):
        return "did not answer with a list of clients' ids"
    strangers = set(chosen) - {client.id for client in clients}
    if strangers:
        return f"chose client {min(strangers)}, which is not among those that are there"
    if len(set(chosen)) < len(chosen) or not 0 < len(chosen) <= wanted:
        return f"chose {len(chosen)} clients, {len(set(chosen))} different ones, where 1 to {wanted} are wanted"
    return None


def find_allotment_fault(widths: Any, clients: Sequence[Client]) -> str | None:
    """That an answer to `allot` is not a width for each of `clients`, above 0 and at most what its device affords."""
    if not isinstance(widths, Sequence) or isinstance(widths, str) or len(widths) != len(clients):
        return f"did not answer with {len(clients)} widths"
    for client, width in zip(clients, widths, strict=True):
        if not isinstance(width, int | float) or not 0 < width <= client.profile.width:
            return f"gave client {client.id} the width {width!s:.20}, where it affords {client.profile.width:g}"
    return None


def plan_faults(plan: Any) -> Iterator[str]:
    """What is wrong with one plan."""
    if lacking := [name for name in PLAN if not hasattr(plan, name)]:
        yield f"a {type(plan).__name__}, which is no plan: it has no '{lacking[0]}'"
    elif isinstance(plan, Selection):
        yield from (f"a plan that {fault}" for fault in unit_faults(plan.widths, plan.kept))


def unit_faults(widths: Widths, kept: Any) -> Iterator[str]:
    """What is wrong with the kept units by group: int64 vectors of numbers below the group's size, none of them twice.

    Of a group that attention has in each of several heads also (kept, heads), with numbers below heads * size.
    """
    if not isinstance(kept, Mapping):
        yield f"keeps {type(kept).__name__}, not units by group"
        return
    groups = {group.name: group for group in widths.groups}
    yield from (f"names a group '{name}' that the model does not have" for name in kept if name not in groups)
    for name, group in groups.items():
        units = kept.get(name)
        by_head = isinstance(units, Tensor) and units.ndim == 2 and units.shape[1] == group.heads > 1
        size = group.size * (group.heads if by_head else 1)
        if not isinstance(units, Tensor) or units.dtype != torch.int64 or not (units.ndim == 1 or by_head) or not len(units):
            yield f"does not keep units of group '{name}' as a vector of int64 numbers"
        elif outside := units[(units < 0) | (units >= size)].tolist():
            yield f"keeps unit {outside[0]} of group '{name}', whose units are 0 to {size - 1}"
        elif repeated := (units.flatten().bincount() > 1).nonzero().flatten().tolist():
            yield f"keeps unit {repeated[0]} of group '{name}' more than once"


def find_merge_fault(merged: Any, state: State) -> str | None:
    """That an aggregation's answer is no Merged, or has not the tensors of `state` in their shapes and types, or no patches."""
    if not isinstance(merged, Merged):
        return f"answered {type(merged).__name__}, not Merged"
    for name, tensor in state.items():
        found = merged.state.get(name) if isinstance(merged.state, Mapping) else None
        if not isinstance(found, Tensor) or describe_tensor(found) != describe_tensor(tensor):
            shown = describe_tensor(found) if isinstance(found, Tensor) else type(found).__name__
            return f"answered a Merged with tensor '{name}' as {shown}, not {describe_tensor(tensor)}"
    if more := [name for name in merged.state if name not in state]:
        return f"answered a Merged with a tensor '{more[0]}', which the model does not have"
    if not isinstance(merged.branches, Mapping) or not all(map(are_patches, merged.branches.values())):
        return "answered a Merged whose branches are not patches by name"
    return None


def describe_tensor(tensor: Tensor) -> str:
    """Shape and type of a tensor that holds its entries; else why it does not."""
    odd = "on no device, " if tensor.is_meta else "sparse, " if tensor.layout != torch.strided else ""
    return f"{odd}{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def are_patches(branch: Any) -> bool:
    """Whether a branch has a patch for each of its names."""
    return isinstance(branch, Mapping) and all(isinstance(patch, Patch) for patch in branch.values())


def find_extras_fault(extras: State, allowed: Mapping[str, ExtraSpec]) -> str | None:
    """What is wrong with the extras of a plan or a reply."""
    for name, extra in extras.items():
        if name not in allowed or not allowed[name].admits(extra):
            return f"extra '{name}' is undeclared or not as declared"
    return None
