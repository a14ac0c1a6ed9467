"""A strategy is one pydantic class: its fields are its options, its `@hookimpl` methods are its behaviour."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hetfl.errors import nearest
from hetfl.hooks import hookspecs
from hetfl.hooks.hookspecs import hookimpl

if TYPE_CHECKING:
    from hetfl.hooks.values import ExtraSpec
    from hetfl.models.state import State

__all__ = ["HOOKS", "Field", "Plugin", "PresetPlugin", "flatten_state", "hookimpl", "unflatten_state"]

HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, "hetfl_spec"))

Kept = Mapping[Any, "State"]  # for each client or width: named tensors


def flatten_state(**kinds: Kept) -> State:
    """What a plugin keeps as one `state_dict`: kind/owner/name."""
    return {f"{k}/{owner!r}/{name}": t for k, kept in kinds.items() for owner, state in kept.items() for name, t in state.items()}


def unflatten_state(state: State, kind: str, owner: Callable[[str], Any]) -> dict[Any, State]:
    """One kind of what `flatten_state` joined; `owner` reads a client's number or a width."""
    found: dict[Any, State] = {}
    for key, tensor in state.items():
        of, whose, name = key.split("/", 2)
        if of == kind:
            found.setdefault(owner(whose), {})[name] = tensor
    return found


class Plugin(BaseModel):
    """Base of every plugin, built-in or a third party's.

    `extras_down` and `extras_up` declare what travels beside the weights; what is not declared is refused. What a plugin keeps
    from round to round goes through `state_dict` and `load_state_dict`. `norm_policy` names the policy that the plugin
    wants for normalisation statistics when the run leaves it open. `takes_own_models`: an extraction whose clients may have
    architectures of their own, an aggregation that can do with such. `mean`: an aggregation that is a mean, one vote a client where
    all have equally many examples, over the clients that cover an entry ("covering") or over all, of whom one that lacks an entry
    votes for its old value ("all"). `trains_global`: whether its rounds make a global model; where they do not, accuracies
    of the global model are not applicable. `expected_failures`: checks of `hfl check` that the plugin
    cannot pass, each with the reason. `uniform`: a selection that gives every client the same chance. `plans_by_width`:
    an extraction whose plan depends on the width and the round alone, whoever the client is, and which keeps nothing of it: levels
    that nobody had in a round are tested too. `stackable`: clients of one
    shape may train as one model although the plugin has a `fit`, which changes no more of a task than its `forward` and
    `penalties`, and the modules of its `model` by forward hooks: all by the shape and the round alone, but for the client's own
    tensors, which it puts into `task.constants` and reads there.
    `tasks`: the kinds of task (--task) that the plugin is for, all where there is none; `tasks_why` it is for no other.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
    mean: ClassVar[Literal["covering", "all"] | None] = None
    uniform: ClassVar[bool] = False
    plans_by_width: ClassVar[bool] = False
    stackable: ClassVar[bool] = False
    tasks: ClassVar[Collection[str]] = ()
    tasks_why: ClassVar[str] = ""
    trains_global: ClassVar[bool] = True
    extras_down: ClassVar[dict[str, ExtraSpec]] = {}
    extras_up: ClassVar[dict[str, ExtraSpec]] = {}
    expected_failures: ClassVar[dict[str, str]] = {}

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
    def inactive_hooks(self) -> Collection[str]:
        """Names of this plugin's hooks that do nothing under its options: without `fit` clients train as vmap groups, say."""
        return ()

    @property
    def declared_widths(self) -> Collection[float] | None:
        """Of a profile: the widths that a device may answer, for whoever claims another is left out; None: any."""
        return None

    @property
    def takes_own_models(self) -> bool:
        return False

    def state_dict(self) -> State:
        """Tensors that a later round needs again."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Takes back what `state_dict` gave."""


class PresetPlugin(Plugin):
    """Base of a plugin with presets: the option `preset` names the values that its other options start from.

    `PRESETS`: option values by preset name; `default` has none. `DEVIATES`: where the default is not what the paper or its code
    does, as rows (piece, default, paper or code, why), which `hfl show` prints.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    DEVIATES: ClassVar[tuple[tuple[str, str, str, str], ...]] = ()

    preset: str = Field("default", description="what the other options start from")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, options: Any) -> Any:
        """The preset's values under the options that were given."""
        name = options.get("preset", "default") if isinstance(options, dict) else None
        return {**cls.PRESETS[name], **options} if isinstance(name, str) and name in cls.PRESETS else options

    @field_validator("preset")
    @classmethod
    def _refuse_unknown(cls, preset: str) -> str:
        if preset not in cls.PRESETS:
            raise ValueError(f"no preset '{preset}'{nearest(preset, cls.PRESETS)} (presets: {', '.join(cls.PRESETS)})")
        return preset
