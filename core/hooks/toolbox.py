"""The toolbox: what plugins may import beside the contract (`from hetfl import …`). tests/test_contract.py holds them to it."""

from __future__ import annotations

TOOLBOX: dict[str, tuple[tuple[str, ...], str]] = {
    "aggregation.mean": (("Fold", "MeanAggregator"), "means over the clients that cover an entry, one update at a time"),
    "aggregation.updates": (("WEIGHTINGS", "WeightedSum", "by_client"), "what a client counts; sums over its patches"),
    "errors": (("nearest",), "the nearest known name, for an error's text"),
    "hooks.values": (("put_back",), "a reply as an update, put back where its plan took it"),
    "models.early_exit": (("every", "with_exits"), "exits for a model that has none, and all of their logits"),
    "models.normalization": (("NORMS", "plain_norms"), "norm layers, and the parameters that belong to none"),
    "models.state": (("copy_state", "load_state", "tensors"), "the tensors of a model by name"),
    "profiling.capacity": (("Grid", "dealt", "largest", "mix", "quantity", "ratio", "widths"), "options that give capacities"),
    "profiling.cost": (("macs", "parameters"), "what a model costs"),
    "profiling.meter": (("free",), "the free memory of this machine"),
    "submodel.blocks": (("take",), "a block of a tensor by positions"),
    "submodel.encoding": (("pack_bits", "unpack_bits"), "masks as one bit an entry"),
    "submodel.units": (
        ("Gate", "consumers", "fitting", "gated", "means", "readers", "scores", "strongest"),
        "importance of the units of width groups, and gates on them",
    ),
    "submodel.widths": (("Axis", "Widths", "within"), "width groups, and where their units lie in each tensor"),
    "training.clipping": (("clip_factors",), "factors that bring norms down to a bound"),
    "training.dropout": (("seeded_random",), "dropout from a random stream of its own"),
    "training.evaluation": (("evaluate",), "accuracy and loss of a model on examples"),
    "training.local": (("descend", "kl_divergence", "local_batches"), "steps, batches and losses of local training"),
    "training.tuning": (("rows_of",), "endless shuffled batches of row numbers"),
    "training.vectorized": (("is_worthwhile", "stackable"), "whether copies of a model are to be computed as one"),
}
