"""From a name to a model: the zoo, `package.module:factory`, and timm's, torchvision's and transformers' models."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.data.catalog import GIVEN
from hetfl.data.inputs import Inputs, default_model
from hetfl.errors import UsageError, nearest, unknown
from hetfl.models.folders import AHEAD, Logits, load_folder
from hetfl.models.state import pack_tensors, tensors
from hetfl.models.zoo import ZOO
from hetfl.rng import seed_of

ALIASES = {  # how factories call the facts about inputs that they can be given
    "classes": ("classes", "num_classes", "n_classes", "num_labels", "out_features"),
    "channels": ("channels", "in_channels", "in_chans", "num_channels", "input_channels"),
    "size": ("size", "image_size", "img_size", "input_size"),
    "vocab": ("vocab", "vocab_size", "num_embeddings"),
    "pad": ("pad",),
    "length": ("length", "max_length", "seq_len", "sequence_length"),
}

Factory = Callable[..., nn.Module]

LOCAL: dict[str, tuple[Any, Factory]] = {}  # what programs have handed over, by name: the very object, and what builds from it


def refuse_other_answers(name: str, model: nn.Module, x: Tensor, answer: tuple[int, ...]) -> None:
    """Raises UsageError where `model` does not answer a batch (N, …) with logits (N, *answer)."""
    with torch.no_grad():
        out = model.eval()(x)
    shown = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
    wanted = (len(x), *answer)
    if not isinstance(out, Tensor) or out.shape != wanted:
        raise UsageError(f"model '{name}' returns {shown} for {len(x)} examples; logits of shape {wanted} are needed")


def build_model(name: str, args: Mapping[str, Any], inputs: Inputs, seed: int) -> nn.Module:
    """Builds the model `name` for `inputs`, with weights drawn from the stream (seed, "init"); `args` are those of its factory.

    Raises UsageError for an unknown name, a factory that cannot be imported or that refuses its arguments.
    """
    factory = find_factory(name)
    given = choose_arguments(name, factory, inputs, args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "init"))
        try:
            model = factory(**given)
        except UsageError:
            raise
        except Exception as error:
            shown = ", ".join(f"{k}={v!r}" for k, v in given.items())
            raise UsageError(f"model '{name}' could not be built with {shown}: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise UsageError(f"model factory '{name}' returned {type(model).__name__}, not a torch.nn.Module")
        return model if name in ZOO else unwrap_logits(model, inputs)


def unwrap_logits(model: nn.Module, inputs: Inputs) -> nn.Module:
    """`model`, within a `Logits` where it answers with an object that has logits."""
    try:
        with torch.no_grad():
            out = [copy.deepcopy(model).train(training)(inputs.batch()) for training in (False, True)]
    except Exception:
        return model  # the error is reported when the model is traced
    return Logits(model) if any(hasattr(o, "logits") for o in out) else model


def find_factory(name: str) -> Factory:
    """The factory behind a zoo name, `package.module:factory` (looked up in the current directory too) or `library:name`.

    Raises UsageError where there is none.
    """
    if name in LOCAL:
        return LOCAL[name][1]
    if name.startswith(GIVEN):
        raise UsageError(f"the model '{name}' was given as an object, which is not here: give it again, as model=…")
    module, _, model = name.partition(":")
    if module in LIBRARIES and model:
        return LIBRARIES[module](model)
    if ":" not in name:
        if name not in ZOO:
            raise unknown("model", name, [*ZOO, "package.module:factory", *(f"{library}:name" for library in LIBRARIES)])
        return ZOO[name]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module), model, None)
    except Exception as error:
        raise UsageError(f"model module '{module}' cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"module '{module}' has no factory '{model}'{nearest(model, dir(sys.modules[module]))}")
    factory: Factory = found
    return factory


def add_local(model: nn.Module | Factory) -> str:
    """A name by which `find_factory` gives this model, or factory, in this process until `remove_local`.

    Of a model a copy is taken, with whose weights a run begins; it is named after its class and a hash of these weights.
    Raises UsageError for what is neither.
    """
    make: Any = model
    plain = f"{GIVEN}{getattr(model, '__qualname__', type(model).__name__)}"
    if isinstance(model, nn.Module):
        try:
            original = copy.deepcopy(model).cpu()
        except Exception as error:
            raise UsageError(
                f"the model {type(model).__name__} cannot be copied: {error}; give a factory that builds it"
            ) from error
        make, plain = lambda: copy.deepcopy(original), f"{plain}-{sha256(pack_tensors(tensors(original))).hexdigest()[:8]}"
    elif not callable(model):
        raise UsageError(f"the model is a {type(model).__name__}: give a name, a torch.nn.Module or a factory that returns one")
    names = (plain if i == 1 else f"{plain}-{i}" for i in range(1, len(LOCAL) + 2))
    name = next(name for name in names if name not in LOCAL or LOCAL[name][0] is model)
    LOCAL.setdefault(name, (model, make))
    return name


def remove_local(name: str) -> None:
    """Forgets what `add_local` named."""
    LOCAL.pop(name, None)


def choose_arguments(name: str, factory: Factory, inputs: Inputs, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for `factory`: those facts about `inputs` that its signature names (ALIASES), then `args`.

    Raises UsageError for one of `args` that it does not take, and for one that it needs and does not get.
    """
    parameters = inspect.signature(factory).parameters
    facts = inputs.facts
    given = {n: facts[what] for what, names in ALIASES.items() for n in names if n in parameters and what in facts}
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in args:
        if key not in parameters and not free:
            raise UsageError(f"unknown model argument '{key}'{nearest(key, parameters)} (known: {', '.join(parameters)})")
    given |= {"inputs": inputs} if "inputs" in parameters else {}
    given |= args
    asked = (p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    if lacking := [p.name for p in asked if p.default is p.empty and p.name not in given]:
        raise UsageError(f"model '{name}' needs '{lacking[0]}'{explain_missing(lacking[0], inputs)}")
    return given


def explain_missing(argument: str, inputs: Inputs) -> str:
    """The end of the sentence for an argument that `inputs` say nothing about: why, and what to do."""
    what = next((what for what, names in ALIASES.items() if argument in names), None)
    if what in ("channels", "size"):
        return ", so it takes pictures or arrays, but the inputs are text: choose another, such as --model encoder"
    if what in ("vocab", "length"):
        shape = "x".join(map(str, inputs.shape))
        return f", so it takes text, but the inputs are arrays of {shape}: choose another, such as --model {default_model(inputs)}"
    return f": give it with --model-args {argument}=…"


def import_library(name: str) -> Any:
    """The module `name`. Raises UsageError where it is not installed or cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"models of {name} need {name}: pip install {name} ({error})") from error
    except Exception as error:  # torchvision beside a torch of another build
        raise UsageError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def find_timm(model: str) -> Factory:
    """timm's `model` without pretrained weights."""
    names = import_library("timm").list_models()
    if model.partition(".")[0] not in names:
        raise UsageError(f"timm has no model '{model}'{nearest(model, names)}")
    return lambda num_classes, in_chans, **args: import_library("timm").create_model(
        model, pretrained=False, num_classes=num_classes, in_chans=in_chans, **args
    )


def find_torchvision(model: str) -> Factory:
    """torchvision's classifier `model` without pretrained weights (3 channels)."""
    models = import_library("torchvision").models
    names = models.list_models(module=models)
    if model not in names:
        raise UsageError(f"torchvision has no classifier '{model}'{nearest(model, names)}")
    return lambda num_classes, **args: models.get_model(model, weights=None, num_classes=num_classes, **args)


def find_transformers(model: str) -> Factory:
    """A classifier of transformers' model type `model` (bert, vit, …), built from its configuration, without downloads.

    Arguments are those of the configuration (hidden_size, num_hidden_layers, …).
    """
    hub = import_library("transformers")
    if model not in hub.CONFIG_MAPPING:
        raise UsageError(f"transformers has no model type '{model}'{nearest(model, list(hub.CONFIG_MAPPING))}")
    config = hub.CONFIG_MAPPING[model]
    if config in hub.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return lambda num_labels, num_channels, image_size, **args: hub.AutoModelForImageClassification.from_config(
            config(num_labels=num_labels, **select_known(config, num_channels=num_channels, image_size=image_size), **args)
        )
    return lambda num_labels, vocab_size, inputs, **args: getattr(hub, f"AutoModelFor{inputs.kind.head}").from_config(
        config(num_labels=num_labels, vocab_size=vocab_size, pad_token_id=0, **({**AHEAD, **args} if inputs.kind.tokens else args))
    )


def select_known(config: Any, **values: Any) -> dict[str, Any]:
    """Those of `values` that a configuration has."""
    return {name: value for name, value in values.items() if hasattr(config(), name)}


def find_folder(folder: str) -> Factory:
    """The model of transformers in a local folder, with its weights. Arguments go over those of its configuration."""
    return lambda inputs, **args: load_folder(folder, inputs, args)


LIBRARIES: dict[str, Callable[[str], Factory]] = {
    "hf": find_folder,
    "timm": find_timm,
    "torchvision": find_torchvision,
    "transformers": find_transformers,
}
