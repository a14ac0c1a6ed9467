"""Whole numbers that know which channels they count, so that sizes written in a forward pass follow a cut.

`x.reshape(b, n, self.heads * q.shape[-1])` runs in the smaller module too only if every attribute that counts channels is set to
the number that remains. While the tracer runs, attributes and shapes are `TracedInt`s; ops that are given one claim its channels.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor, nn

from hetfl.submodel.widths import Attribute


class Claim(NamedTuple):
    """`share` times `attribute` is the number of the channels `ids`, so the attribute must follow when they are cut."""

    attribute: Attribute
    ids: Tensor
    share: Fraction


class TracedInt(int):
    """`share` times a number of channels: those of one dim of an activation (`ids`), or whatever `attribute` of a module counts.

    Either `ids` or `attribute` is set. `claims` is the tracer's list, to which a comparison adds what it teaches: where the code
    asserts `x.shape[1] == self.width`, the attribute counts those channels.
    """

    claims: list[Claim]
    ids: Tensor | None
    attribute: Attribute | None
    share: Fraction

    @classmethod
    def of(
        cls, claims: list[Claim], value: int, ids: Tensor | None = None, attribute: Attribute | None = None,
        share: Fraction = Fraction(1),
    ) -> TracedInt:  # fmt: skip
        size = cls(value)
        size.claims, size.ids, size.attribute, size.share = claims, ids, attribute, share
        return size

    def __mul__(self, other: Any) -> Any:
        """The product, which follows the channels of one factor with the other as its share.

        Example: `h = self.heads` (attribute, 4) and `d = q.shape[-1]` (the 16 channels of a head's width). `h * d` is 64, share
        4 of these 16 channels: `reshape(b, n, h * d)` gives the 16 channels four times over, and cutting them to 8 leaves 32.

        A product of two attributes, or of two sizes of activations, is a plain int: it has no one factor to follow, and needs none,
        for the smaller module computes it anew from factors that each follow their own channels.
        """
        product = int(self) * other
        if not isinstance(product, int) or (isinstance(other, TracedInt) and bool(self.ids is None) == bool(other.ids is None)):
            return product
        if isinstance(other, TracedInt) and other.ids is not None:
            return TracedInt.of(self.claims, product, other.ids, None, other.share * int(self))
        return TracedInt.of(self.claims, product, self.ids, self.attribute, self.share * int(other))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return self._sum(other, 1)

    def __sub__(self, other: Any) -> Any:
        return self._sum(other, -1)

    def _sum(self, other: Any, sign: int) -> Any:
        """self + sign * other, which follows the channels that both count."""
        total = int(self) + sign * other
        same = isinstance(other, TracedInt) and self.attribute == other.attribute and self.ids is other.ids
        return TracedInt.of(self.claims, total, self.ids, self.attribute, self.share + sign * other.share) if same else total

    def __floordiv__(self, other: Any) -> Any:
        quotient = int(self) // other
        if not isinstance(quotient, int) or quotient * int(other) != int(self):
            return quotient
        return TracedInt.of(self.claims, quotient, self.ids, self.attribute, self.share / int(other))

    def __eq__(self, other: object) -> bool:
        same = int(self) == other
        if same and isinstance(other, TracedInt):
            for one, two in ((self, other), (other, self)):
                if one.attribute and two.ids is not None and one.share == two.share:
                    self.claims.append(Claim(one.attribute, two.ids, one.share))
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def wrap_ints(claims: list[Claim], model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Puts a TracedInt in place of every int above 1 among the attributes of `model`'s modules; returns what was there."""
    found = [(m, path, key, v) for path, m in model.named_modules() for key, v in vars(m).items() if type(v) is int and v > 1]
    for module, path, key, value in found:
        vars(module)[key] = TracedInt.of(claims, value, attribute=(path, key))
    return [(module, key, value) for module, _, key, value in found]


def unwrap_ints(wrapped: list[tuple[nn.Module, str, int]]) -> None:
    """Undoes `wrap_ints`, given what it returned."""
    for module, key, value in wrapped:
        vars(module)[key] = value
