"""A strategy is one pydantic class: its fields are its options, its `@hookimpl` methods are its behaviour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from hetfl.core import hooks
from hetfl.core.hooks import hookimpl

if TYPE_CHECKING:
    from hetfl.core.types import Extra
    from hetfl.core.widths import State

__all__ = ["HOOKS", "Field", "Strategy", "hookimpl"]

HOOKS = tuple(name for name, value in vars(hooks).items() if hasattr(value, "hetfl_spec"))


class Strategy(BaseModel):
    """Base of every plugin, built-in or a third party's.

    `down` and `up` declare the extras that travel beside the weights; what is not declared is refused. What a plugin keeps
    from round to round goes through `state_dict` and `load_state_dict`. `norm_policy` names the policy that the plugin
    wants for normalisation statistics when the run leaves it open. `foreign`: an extraction whose clients may have
    architectures of their own, an aggregation that can do with such.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
    down: ClassVar[dict[str, Extra]] = {}
    up: ClassVar[dict[str, Extra]] = {}

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if clash := sorted(set(cls.model_fields) & set(HOOKS)):
            raise TypeError(f"{cls.__name__}.{clash[0]} is an option that bears a hook's name; rename the option")

    @property
    def norm_policy(self) -> str | None:
        return None

    @property
    def foreign(self) -> bool:
        return False

    def state_dict(self) -> State:
        """Tensors that a later round needs again."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Takes back what `state_dict` gave."""
