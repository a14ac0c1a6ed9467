"""Whole numbers that remember what they count, so that a reshape can follow its channels (`Tracer`)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from hetfl.submodel.tracing.tracer import Tracer

Place = tuple[str, str]  # a module's name and one of its attributes


class TracedInt(int):
    """`share` times the channels of an activation (`line`, their units) or an attribute of a module (`place`)."""

    tracer: Tracer
    line: Tensor | None
    place: Place | None
    share: Fraction

    @classmethod
    def of(
        cls, tracer: Tracer, value: int, line: Tensor | None = None, place: Place | None = None, share: Fraction = Fraction(1)
    ) -> TracedInt:
        size = cls(value)
        size.tracer, size.line, size.place, size.share = tracer, line, place, share
        return size

    def __mul__(self, other: Any) -> Any:
        product = int(self) * other
        if not isinstance(product, int) or (isinstance(other, TracedInt) and bool(self.line is None) == bool(other.line is None)):
            return product  # two counts: whichever follows its channels carries the product along
        if isinstance(other, TracedInt) and other.line is not None:
            return TracedInt.of(self.tracer, product, other.line, None, other.share * int(self))
        return TracedInt.of(self.tracer, product, self.line, self.place, self.share * int(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        quotient = int(self) // other
        if not isinstance(quotient, int) or quotient * int(other) != int(self):
            return quotient
        return TracedInt.of(self.tracer, quotient, self.line, self.place, self.share / int(other))

    def __eq__(self, other: object) -> bool:
        same = int(self) == other
        if same and isinstance(other, TracedInt):
            for one, two in ((self, other), (other, self)):
                if one.place and two.line is not None and one.share == two.share:
                    self.tracer.claims.append((one.place, two.line, one.share))
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def wrap_ints(tracer: Tracer, model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Puts a Size in place of every whole number among the attributes of `model`'s modules; returns what was there."""
    found = [(m, path, key, v) for path, m in model.named_modules() for key, v in vars(m).items() if type(v) is int and v > 1]
    for module, path, key, value in found:
        vars(module)[key] = TracedInt.of(tracer, value, place=(path, key))
    return [(module, key, value) for module, _, key, value in found]


def unwrap_ints(found: list[tuple[nn.Module, str, int]]) -> None:
    """Undoes `mark`."""
    for module, key, value in found:
        vars(module)[key] = value
