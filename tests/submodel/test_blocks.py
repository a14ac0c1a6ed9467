"""Blocks of tensors: read, written, added to."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import quick
from hetfl.submodel.blocks import Index


@quick
@given(st.data())
def test_a_block_is_added_to_where_its_index_says(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    index = {}
    for dim in data.draw(st.sets(st.integers(0, len(shape) - 1))):
        units = data.draw(st.permutations(range(shape[dim])))
        index[dim] = torch.tensor(units[: data.draw(st.integers(1, shape[dim]))])
    total = torch.randn(shape)
    wanted = total.clone()
    values = torch.randn([len(index[d]) if d in index else n for d, n in enumerate(shape)])
    cells = torch.meshgrid(*(index.get(d, torch.arange(n)) for d, n in enumerate(shape)), indexing="ij")
    wanted[cells] += 0.5 * values
    block = Index(index)
    block.add(total, values, 0.5)
    assert torch.allclose(total, wanted)
    wanted[cells] += 2.0
    block.add(total, 1.0, 2.0)
    assert torch.allclose(total, wanted)
