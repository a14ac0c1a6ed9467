"""Which rows are the global test, the server's public data, and each client's (by flwr-datasets) to train and to test on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.lazy import import_library, mute_output
from hetfl.errors import UsageError
from hetfl.rng import seed_of, stream

_TEST_SHARE = 0.2  # of the train split, where a data set comes without a test split

_SMALLEST = 2  # examples of a Dirichlet client: one to train on and one to test on


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of every part, int64, ascending; no row of the train split is in two of them."""

    train: tuple[Tensor, ...]  # of each client
    own: tuple[Tensor, ...]  # of each client, its own test; may be empty
    tune: Tensor  # of the server, to train on
    holdout: Tensor  # of the server, to choose steps
    test: Tensor  # rows of the test split where there is one, else of the train split


def split_rows(options: DataOptions, y: Tensor, test_y: Tensor | None = None, ids: Tensor | None = None) -> Split:
    """Splits the rows of a train split with labels `y` (N,), and of its test split with labels `test_y` (M,) if it has one.

    `ids` (N,) number the owner of each row and are needed for a natural partition. Every draw belongs to a stream of
    `options.partition_seed`. Raises UsageError where the options cannot be met by these rows.
    """
    test, rows = _split_global_test(options, y, test_y)
    rows = _sample_rows(rows, options.limit, stream(options.partition_seed, "limit"))
    tune, holdout, rest = _split_public(options, y, rows)
    clients = [rest[part] for part in _partition_clients(options, y[rest], None if ids is None else ids[rest])]
    parts = [_split_own_test(options, rows, client) for client, rows in enumerate(clients)]
    return Split(tuple(train for train, _ in parts), tuple(own for _, own in parts), tune, holdout, test)


def stratified_order(y: Tensor, generator: torch.Generator) -> Tensor:
    """A random order (N,) of the rows of labels `y` (N,) in which every prefix has the classes in about their proportion.

    One row of each class comes first. Where y has the labels 0 0 0 0 1 1, they come in the order 0 1 0 0 1 0 or 1 0 0 0 1 0; which
    rows of a class come when is drawn.
    """
    order = torch.randperm(len(y), generator=generator)
    labels = y[order]
    counts = torch.bincount(labels)
    rank = torch.empty_like(labels)
    rank[labels.argsort(stable=True)] = torch.arange(len(y)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    position = torch.where(rank == 0, -1.0, (rank.double() + 0.5) / counts[labels])
    return order[position.argsort(stable=True)]


def _sorted(rows: Tensor) -> Tensor:
    return rows.sort().values


def _sample_rows(rows: Tensor, limit: int | None, generator: torch.Generator) -> Tensor:
    """At most `limit` of `rows`, drawn at random."""
    return rows if limit is None else _sorted(rows[torch.randperm(len(rows), generator=generator)[:limit]])


def _split_global_test(options: DataOptions, y: Tensor, test_y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of the global test, and the remaining rows of the train split: a stratified fifth where there is no test split."""
    if test_y is not None:
        test, rest = torch.arange(len(test_y)), torch.arange(len(y))
    else:
        order = stratified_order(y, stream(options.partition_seed, "test"))
        size = max(1, round(_TEST_SHARE * len(y)))
        test, rest = order[:size], order[size:]
    return _sorted(_sample_rows(test, options.limit, stream(options.partition_seed, "limit-test"))), _sorted(rest)


def _split_public(options: DataOptions, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The server's rows to tune on and its holdout, both stratified, and the clients' rows."""
    size = _count_public(options, len(rows))
    order = rows[stratified_order(y[rows], stream(options.partition_seed, "public"))]
    held = min(max(1, round(options.server_holdout * size)), size - 1) if size else 0
    public = order[:size][stratified_order(y[order[:size]], stream(options.partition_seed, "holdout"))]
    return _sorted(public[: size - held]), _sorted(public[size - held :]), _sorted(order[size:])


def _count_public(options: DataOptions, examples: int) -> int:
    """The server's number of examples, of so many. Raises UsageError where it, or the clients, would have too few."""
    asked = options.server_data
    size = round(asked * examples) if asked < 1 else int(asked)
    asked_for = f"--server-data {asked:g} of {examples} training examples"
    if asked and size < 2:
        raise UsageError(f"{asked_for} is {size} for the server, which needs 2 (one to tune on, one to hold out); 0 is none")
    if size and size >= examples:
        raise UsageError(f"{asked_for} leaves the clients nothing: give the server fewer (a share below 1 or a count)")
    return size


def _split_own_test(options: DataOptions, rows: Tensor, client: int) -> tuple[Tensor, Tensor]:
    """A client's rows to train on (at least one) and its own test."""
    order = rows[torch.randperm(len(rows), generator=stream(options.partition_seed, "own-test", client=client))]
    size = min(round(options.own_test * len(rows)), len(rows) - 1)
    return _sorted(order[size:]), _sorted(order[:size])


def _partition_clients(options: DataOptions, y: Tensor, ids: Tensor | None) -> list[Tensor]:
    """Positions in `y` of each client's examples."""
    _check_options(options, y)
    order = torch.randperm(len(y), generator=stream(options.partition_seed, "clients"))  # the IID parts are blocks
    columns = {"idx": order.numpy(), "label": y[order].numpy()} | ({} if ids is None else {"id": ids[order].numpy()})
    try:
        return _load_parts(_make_partitioner(options, len(y)), columns)
    except ValueError as error:
        raise UsageError(_explain_failure(options, len(y))) from error


def _load_parts(partitioner: Any, columns: dict[str, Any]) -> list[Tensor]:
    """The "idx" of each part that a partitioner of flwr-datasets makes of the columns. Raises ValueError where it cannot."""
    with mute_output():
        partitioner.dataset = import_library("datasets").Dataset.from_dict(columns).with_format("numpy")
        count = partitioner.num_partitions
        parts = [_sorted(torch.as_tensor(partitioner.load_partition(i)[:]["idx"]).long()) for i in range(count)]
    together = torch.cat(parts)
    if len(torch.unique(together)) < len(together):  # numpy's Dirichlet draws end in NaN for an absurd alpha
        raise ValueError("a row is in two parts")
    return parts


def _make_partitioner(options: DataOptions, examples: int) -> Any:
    """The partitioner of flwr-datasets that the options name."""
    module = import_library("flwr_datasets.partitioner")
    clients, k, seed = options.clients, options.classes_per_client, seed_of(options.partition_seed, "partition")
    match options.partition:
        case "iid":
            return module.IidPartitioner(clients)
        case "dirichlet":
            return module.DirichletPartitioner(clients, "label", options.alpha, _SMALLEST, shuffle=False, seed=seed)
        case "pathological":  # "first-deterministic" is the paper's, and uses every class where it can
            return module.PathologicalPartitioner(clients, "label", k, "first-deterministic", shuffle=False, seed=seed)
        case "shard":
            return module.ShardPartitioner(clients, "label", num_shards_per_partition=k, shuffle=False, seed=seed)
        case "quantity":
            return module.SizePartitioner(_draw_sizes(options, examples))
        case "natural":
            return module.NaturalIdPartitioner("id")


def _draw_sizes(options: DataOptions, examples: int) -> list[int]:
    """Sizes of clients that differ as a Dirichlet draw of concentration alpha does; each client has at least 2."""
    clients, spare = options.clients, examples - _SMALLEST * options.clients
    if spare < 0:
        raise UsageError(f"{examples} examples are too few for {clients} clients of at least {_SMALLEST}: lower --clients")
    generator = import_library("numpy.random").default_rng(seed_of(options.partition_seed, "sizes"))
    ends = (generator.dirichlet([options.alpha] * clients).cumsum() * spare).round().astype(int).tolist()
    return [_SMALLEST + end - start for start, end in pairwise([0, *ends[:-1], spare])]


def _check_options(options: DataOptions, y: Tensor) -> None:
    """Raises UsageError for options that cannot be met whatever is drawn."""
    clients, k, n = options.clients, options.classes_per_client, len(y)
    if n == 0 or (options.partition != "natural" and clients > n):
        raise UsageError(f"--clients {clients} is more than the {n} training examples there are for clients")
    if options.partition == "pathological" and k > (present := len(torch.unique(y))):
        raise UsageError(f"--classes-per-client {k} is more than the {present} classes among the clients' examples")
    if options.partition == "shard" and clients * k > n:
        raise UsageError(
            f"{clients} clients of {k} shards need {clients * k} examples, but clients have {n}: "
            "lower --clients or --classes-per-client"
        )


def _explain_failure(options: DataOptions, examples: int) -> str:
    """Why flwr-datasets could not partition so many examples, and what helps."""
    clients = options.clients
    if options.partition == "dirichlet":
        return (
            f"a Dirichlet partition with --alpha {options.alpha:g} leaves some of the {clients} clients fewer than "
            f"{_SMALLEST} of {examples} examples: raise --alpha, lower --clients or use more data"
        )
    return (
        f"{examples} examples cannot be dealt to {clients} clients of {options.classes_per_client} classes each: "
        "lower --clients or --classes-per-client, or use more data"
    )
