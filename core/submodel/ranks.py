"""The ranks of adapters as width groups."""

from __future__ import annotations

from hetfl.errors import NotApplicable
from hetfl.models.adapters import Adapter, list_adapters
from hetfl.submodel.widths import Widths


def find_rank_groups(widths: Widths) -> dict[str, Adapter]:
    """The width groups that are the ranks of one adapter and of nothing else: group -> the adapter.

    Raises NotApplicable where there is none.
    """
    ours = {(f"{adapter.a}[0]", f"{adapter.b}[1]"): adapter for adapter in list_adapters(list(widths.axes))}
    found = {group: ours[pair] for group, cuts in widths.members().items() if (pair := tuple(sorted(cuts))) in ours}
    if not found:
        raise NotApplicable(
            "not applicable: the model has no adapters whose ranks could be cut; --adapter lora:rank=8 gives it some"
        )
    return found
