"""Examples, batches, and what is known of each client."""

from __future__ import annotations

import torch

from hetfl.config import DataOptions
from hetfl.data.loading import load


def test_counts_and_labels_say_who_holds_what():
    federation = load(DataOptions(clients=6, partition="pathological", classes_per_client=3))
    assert federation.counts.shape == (6, 10)
    for client, counts in zip(federation.clients, federation.counts, strict=True):
        assert client.train.all()[1].bincount(minlength=10).tolist() == counts.tolist()
        assert client.labels.dtype == torch.bool
        assert client.labels.nonzero().flatten().tolist() == sorted(set(client.train.all()[1].tolist()))
        assert int(client.labels.sum()) <= 3
        assert set(client.test.all()[1].tolist()) <= set(torch.cat([client.train.all()[1], client.test.all()[1]]).tolist())


def test_batches_cover_every_example_once(numbered):
    part = load(DataOptions(dataset=str(numbered), clients=1, partition="iid")).clients[0].train
    plain = list(part.batches(100, None))
    assert [len(y) for _, y in plain] == [100, 100, 57]
    assert torch.equal(torch.cat([x for x, _ in plain]), part.all()[0])
    first, again, other = (torch.cat([x[:, 0] for x, _ in part.batches(7, torch.Generator().manual_seed(s))]) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort().values, part.all()[0][:, 0].sort().values)
    x, y = next(part.batches(50, torch.Generator().manual_seed(0)))
    std = torch.arange(300.0).std(correction=0)
    assert torch.equal((x[:, 0] * std + 149.5).round().long().remainder(4), y)
