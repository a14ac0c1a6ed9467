"""Positions of width groups."""

from __future__ import annotations

import torch

from hetfl.submodel.widths import make_axis


def test_positions_of_kept_units_are_in_the_order_of_the_smaller_tensor():
    """The example of Axis.index: queries and keys of 4 units, of which 3 and 1 are kept; and a fixed position among them."""
    axis = make_axis(("heads",), [(0, unit) for unit in (0, 1, 2, 3, 0, 1, 2, 3)])
    assert axis.index({"heads": torch.tensor([3, 1])}).tolist() == [3, 1, 7, 5]
    mixed = make_axis(("a", "b"), [(0, 0), (-1, -1), (1, 0), (1, 1), (0, 1)])
    assert mixed.index({"a": torch.tensor([1]), "b": torch.tensor([0, 1])}).tolist() == [4, 1, 2, 3]
