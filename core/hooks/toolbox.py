"""The toolbox: what plugins may import beside the contract (`from hetfl import …`). A test holds every built-in plugin to it."""

from __future__ import annotations

TOOLBOX: dict[str, tuple[tuple[str, ...], str]] = {
    "aggregation.mean": (("WeightedSum",), "sums of one tensor over the patches of clients"),
    "aggregation.updates": (("WEIGHTINGS", "by_client"), "what a client counts"),
    "data.kinds": (("TaskKind",), "what targets are: losses, and distances of answers"),
    "models.adapters": (("Adapter", "add_changes", "list_adapters", "multiply"), "low-rank adapters among the tensors of a model"),
    "models.early_exit": (("add_exits", "all_exits"), "exits for a model that has none, and all of their logits"),
    "models.features": (
        ("Features", "find_head", "watching_features"),
        "the layer of any model that makes the logits, and the features before it",
    ),
    "models.normalization": (("NORMS", "list_prunable"), "norm layers, and the parameters that belong to none"),
    "models.state": (("apply_masks", "load_state", "tensors"), "the tensors of a model by name"),
    "profiling.capacity": (
        ("WidthGrid", "assign_mix", "find_largest_width", "parse_grid", "parse_mix", "parse_quantity", "parse_ratio"),
        "options that give capacities",
    ),
    "profiling.device": (("Work",), "a client's part of a round, for what a device spends on it"),
    "profiling.fleets": (("find_fleet",), "fleets of devices by name, mix or file"),
    "profiling.cost": (("count_macs", "count_parameters"), "what a model costs"),
    "profiling.meter": (("free_memory",), "the free memory of this machine"),
    "submodel.blocks": (("cells", "take"), "a block of a tensor by positions, to write and to read"),
    "submodel.encoding": (("pack_bits", "unpack_bits"), "masks as one bit an entry"),
    "submodel.ranks": (("find_rank_groups",), "the width groups that are ranks of adapters"),
    "submodel.tracing.residual": (("find_blocks",), "the residual blocks of a model"),
    "submodel.tracing.verify": (("draw_values",), "random values for a proof of what a model computes"),
    "submodel.units": (
        ("Gate", "apply_gates", "find_gates", "locate_gates", "mean_powers", "select_largest", "select_units", "sum_powers"),
        "importance of the units of width groups, and gates on them",
    ),
    "submodel.widths": (("Axis", "Group", "within"), "width groups, and where their units lie in each tensor"),
    "training.dropout": (("seeded_random",), "dropout from a random stream of its own"),
    "training.evaluation": (("evaluate",), "accuracy and loss of a model on examples"),
    "training.local": (("descend", "kl_divergence", "local_batches"), "steps, batches and losses of local training"),
    "training.stacking": (("clip_factors",), "factors that bring norms down to a bound"),
    "training.tuning": (("cycle_batches", "halve_rate"), "endless shuffled batches of row numbers, and rates by the round"),
    "training.vectorized": (("find_stacking_error", "is_worthwhile"), "whether copies of a model are to be computed as one"),
}
