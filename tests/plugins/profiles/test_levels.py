"""Levels and how they are dealt."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hetfl.plugins.profiles.levels import Levels, expand_letters
from hetfl.profiling import capacity


def test_fixed_levels():
    """spec heterofl 6.8"""

    def numbers(mix, clients):
        parts = capacity.parse_mix(expand_letters(mix), capacity.parse_ratio)
        dealt = capacity.assign_shares(parts, clients)
        return [dealt.count(r) for r, _ in parts]

    assert numbers("1:2,0.5:8", 100) == [20, 80]
    assert numbers("1,0.5,0.25", 100) == [33, 33, 34]
    assert numbers("1:3,0.5:3,0.25:3", 10) == [3, 3, 4]
    assert numbers("1:0.5,0.25:0.5", 10) == [5, 5]
    assert capacity.parse_mix("1:4,0.5:8", float) == [(1.0, Fraction(4)), (0.5, Fraction(8))]
    assert numbers("a2-b8", 100) == [20, 80]
    assert numbers("a1-b1-c1", 100) == [33, 33, 34]
    assert numbers("a3-b3-c3", 10) == [3, 3, 4]
    assert numbers("a6-b10-c11-d18-e55", 100) == [6, 10, 11, 18, 55]
    halves = capacity.parse_mix(expand_letters("a1-b1-c1-d1-e1"), capacity.parse_ratio)
    assert [r for r, _ in halves] == [
        1,
        1 / 2,
        1 / 4,
        1 / 8,
        1 / 16,
    ]
    assert numbers("0.75^k", 10) == [2, 4, 4]
    assert [r for r, _ in capacity.parse_mix("0.75^0:2,0.75^1:4,0.75^2:4", capacity.parse_ratio)] == [1, 0.75, 0.5625]


def test_redrawn_levels_change_and_repeat():
    from hetfl.profiling.node import Node

    levels = Levels(mix="1,0.5", redraw=True)
    drawn = [[levels.profile(Node(c, 8, r, 0)).width for c in range(8)] for r in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_client_draws_among_the_levels_near_its_own():
    """NeFL's setting: five sizes, a client of tier x has one of x - 2 to x + 2 each round, all with the same chance."""
    from hetfl.profiling.node import Node

    levels = Levels(mix="1,0.8^1/2,0.6^0.5,0.4^0.5,0.2^0.5", tiers=1)
    widths = levels.declared_widths
    assert [round(width**2, 9) for width in widths] == [1, 0.8, 0.6, 0.4, 0.2]
    drawn = [[widths.index(levels.profile(Node(c, 5, r, 0)).width) for r in range(300)] for c in range(5)]
    assert [sorted(set(tiers)) for tiers in drawn] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    assert all(abs(drawn[2].count(tier) - 100) < 30 for tier in (1, 2, 3))  # 3.7 standard deviations
    with pytest.raises(ValueError, match="give one of the two"):
        Levels(redraw=True, tiers=2)


@pytest.mark.parametrize("mix", ["0:1", "1.5", "0.5^x", "a:1", "1:0", "1:-2", "", "nan"])
def test_levels_outside_their_range_are_refused(mix):
    with pytest.raises(ValueError, match=r"ratio|share"):
        Levels(mix=mix)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 7, 10, 13])
def test_the_widest_level_is_held_by_somebody(clients):
    """4 clients with the default mix have one of each level, where nobody had the widest"""
    from hetfl.profiling.node import Node

    def widths(**options):
        return [Levels(**options).profile(Node(i, clients, 1, 0)).width for i in range(clients)]

    assert max(widths()) == 1
    assert max(widths(mix="0.25:99,0.5:1")) == 0.5
    assert max(widths(mix="1:0.1,0.5:0.9")) == 1
    assert len(widths(mix="1:0.1,0.5:0.9")) == clients
    if clients == 4:
        assert widths() == [1, 0.75, 0.5, 0.25]
    if clients == 10:
        assert widths() == [1] * 2 + [0.75] * 3 + [0.5] * 3 + [0.25] * 2


def test_redrawn_levels_keep_to_their_shares():
    from hetfl.profiling.node import Node

    levels = Levels(mix="1:0.1,0.25:0.9", redraw=True)
    wide = sum(levels.profile(Node(c, 20, r, 0)).width == 1 for c in range(20) for r in range(20))
    assert 0.05 < wide / 400 < 0.15


def test_levels_are_shares_of_the_whole_model_where_the_global_one_is_narrower():
    """spec heterofl 1: the global network has the first letter's width"""
    from hetfl.profiling.node import Node

    levels = Levels(mix="1:1,0.5:1,0.25:1,0.125:1")
    assert [levels.profile(Node(c, 4, 1, 0, global_width=0.5)).width for c in range(4)] == [1, 1, 0.5, 0.25]
