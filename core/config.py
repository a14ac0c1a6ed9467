"""Every option of a run, once: the command line, run files and `hfl run --help` are all made from these fields; torch-free."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hetfl.errors import UsageError, nearest

PASSES = 3  # a training step's multiply-accumulates by those of its forward pass: backward takes about two


class Options(BaseModel):
    """Options that know no others, cannot be changed and take no infinite number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataOptions(Options):
    """What the data are and who holds them."""

    dataset: str = Field(
        "digits", description="a short name (digits, mnist, ag_news, …), a Hub id, a folder or a file (docs/data.md)"
    )
    limit: int | None = Field(
        None, ge=1, description="use only the first N training examples of a seeded shuffle, and as many test examples"
    )
    input_column: str | None = Field(None, description="column with the inputs (found from the features if left out)")
    label_column: str | None = Field(None, description="column with the class label (found from the features if left out)")
    task: Literal["classify", "lm", "regress", "multilabel"] | None = Field(
        None,
        description="to learn: a class, next tokens, numbers, any of several labels (default: by the data, docs/tasks.md)",
    )
    mean: tuple[float, ...] = Field((), description="mean of each channel's raw values (default: the data set's)")
    std: tuple[float, ...] = Field((), description="standard deviation of each channel's raw values (default: the data set's)")
    target_mean: tuple[float, ...] = Field((), description="regress: mean of each target (default: of those trained on)")
    target_std: tuple[float, ...] = Field((), description="regress: standard deviation of each target (default: likewise)")
    tokens: int = Field(64, ge=2, description="text: tokens an example keeps, the start token included")
    vocab: int = Field(8192, ge=3, description="text: number of token ids that words are hashed to")
    tokenizer: Path | None = Field(
        None,
        description="text: folder of a tokenizer, in place of hashed words (default: that of --model hf:FOLDER)",
    )
    clients: int = Field(10, ge=1, description="number of clients")
    partition: Literal["iid", "dirichlet", "pathological", "shard", "quantity", "natural"] = Field(
        "dirichlet", description="how training examples are divided among clients"
    )
    alpha: float = Field(
        0.3, gt=0, description="Dirichlet concentration (of classes, or sizes: quantity); small is skewed, 10000 nearly IID"
    )
    classes_per_client: int = Field(2, ge=1, description="classes (pathological) or shards (shard) a client holds")
    id_column: str | None = Field(None, description="column whose values are the clients of a natural partition")
    partition_seed: int = Field(0, ge=0, description="seed of the split and partition, apart from the run's seed")
    own_test: float = Field(0.1, ge=0, lt=1, description="share of a client's examples held out as its own test")
    server_data: float = Field(0.05, ge=0, description="public examples of the server: a share (< 1) or a count; 0 = none")
    server_holdout: float = Field(0.25, gt=0, lt=1, description="share of the server's examples that only choose steps")


class TrainOptions(Options):
    """How a client trains."""

    epochs: int = Field(2, ge=1, description="local epochs a round")
    local_steps: int = Field(
        0, ge=0, description="steps of a client a round, in place of epochs: passes are begun anew or broken off; 0 = whole epochs"
    )
    batch_size: int = Field(32, ge=1, le=1 << 31, description="local batch size")
    augment: tuple[Literal["crop", "flip", "usual"], ...] = Field(
        (),
        description="random crops and mirror images of a client's pictures; usual: what is usual for the data set (docs/data.md)",
    )
    crop_padding: int = Field(4, ge=1, description="pixels that a random crop moves a picture at most")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="local optimiser, fresh each round")
    lr: float = Field(0.05, gt=0, description="local learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    clip: float = Field(2.0, ge=0, description="largest gradient norm; 0 = no clipping")
    lr_milestones: tuple[int, ...] = Field((), description="rounds after which lr is multiplied by --lr-decay")
    lr_decay: float = Field(0.1, gt=0, le=1, description="factor at each milestone")
    lr_round_decay: float = Field(1.0, gt=0, le=1, description="factor after every round")

    def count_work(self, examples: int) -> tuple[int, int]:
        """(examples, steps) that a client with so many examples trains on in a round, before any batch is left out."""
        each = -(-examples // self.batch_size)
        if not self.local_steps or not examples:
            return self.epochs * examples, self.epochs * each
        passes, rest = divmod(self.local_steps, each)
        return passes * examples + rest * self.batch_size, self.local_steps


class ServerOptions(Options):
    """What the server does with its public data, whatever the strategy."""

    pretrain_steps: int = Field(300, ge=0, description="steps on server data before round 1 (every method alike)")
    server_finetune_steps: int = Field(0, ge=0, description="steps on server data after each aggregation (every method alike)")
    server_lr: float = Field(1e-3, gt=0, description="Adam learning rate of pre-training and fine-tuning")
    server_batch_size: int = Field(32, ge=1, le=1 << 31, description="batch size of pre-training and fine-tuning")
    norm_policy: Literal[
        "auto", "aggregate", "local", "static", "static-slices", "recalibrate", "none", "instance", "layer", "group"
    ] = Field("auto", description="batch norm: where its statistics come from, or what stands in its place (docs/norms.md)")
    control: bool = Field(True, description="also train the server-only control, where the run uses server data")


class RunOptions(DataOptions, TrainOptions, ServerOptions):
    """A whole run. Same options and seed, same bits."""

    preset: str | None = Field(
        None, description="a paper's experiment to start from (hfl presets lists them); other options go over it"
    )
    extract: str = Field("fedconv", description="how a client's submodel is taken")
    aggregate: str | None = Field(None, description="how updates are merged (default: the extraction's natural partner)")
    profile: str = Field("levels", description="how a device's capacity is found")
    select: str = Field("uniform", description="who takes part in a round")
    wrap: tuple[str, ...] = Field((), description="plugins around local training, from the outside in")
    model: str | None = Field(None, description="model of the zoo or package.module:factory (default: the data set's)")
    model_args: dict[str, Any] = Field({}, description="arguments of the model factory, name=value")
    adapter: str | None = Field(
        None,
        description="train low-rank adapters and the head alone: "
        "lora:rank=8,alpha=16,target=attention|linear|conv|REGEX,heads=trained|frozen, or "
        "own: those that the model brings (docs/ranks.md)",
    )
    base: Path | None = Field(None, description="weights that the model begins with: a .safetensors file or the folder of a run")
    base_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="how the frozen base is held in memory (with --adapter); what is trained and all arithmetic stay float32",
    )
    global_width: float = Field(
        1.0,
        gt=0,
        le=1,
        description="width of the run's own model: the leading channels of each layer; levels are shares of the whole",
    )
    levels: str | None = Field(None, description="short for --set levels.mix, e.g. 1:4,0.5:8,0.25:8")
    rounds: int = Field(10, ge=1, description="communication rounds")
    fraction: float = Field(1.0, gt=0, le=1, description="share of clients sampled each round")
    fleet: str | None = Field(
        None,
        description="devices that the clients are, for simulated time and energy: a name (hfl fleets), a mix of classes, a file",
    )
    deadline: float | None = Field(
        None, gt=0, description="simulated seconds that a round may take (with --fleet); --schedule semi on a federation: real ones"
    )
    over_select: float = Field(1.0, ge=1, description="sample so many times the clients of a round and take the first to end")
    on_deadline: Literal["drop", "partial"] = Field(
        "drop", description="a client that would be late: leave it out, or have it do the steps that it can"
    )
    schedule: Literal["sync", "semi", "fedbuff"] = Field(
        "sync",
        description="when updates are merged: all of a round's clients together; every --deadline those that have arrived; or the "
        "first --buffer to arrive (in simulated time with --fleet, else really, on a federation: docs/devices.md)",
    )
    buffer: int | None = Field(
        None, ge=1, description="fedbuff: arrivals that make a merge (default: half a round's clients, --min-clients at least)"
    )
    staleness: float = Field(
        0.5, ge=0, description="semi, fedbuff: an update that is n merges late counts (1 + n)^-x of what it changed"
    )
    seed: int = Field(0, ge=0, description="seed of everything but the data split")
    eval_every: int = Field(1, ge=1, description="evaluate every N rounds (and after the last)")
    eval_batch_size: int = Field(128, ge=1, le=1 << 31, description="batch size of evaluation")
    workers: int | None = Field(
        None, ge=1, le=4096, description="clients trained at once (default: the cores); never changes results"
    )
    engine: Literal["local", "processes", "ray", "flower-sim", "flower"] = Field(
        "local",
        description="where clients run: on threads of this process, in processes of their own, on all nodes of a Ray cluster "
        "(docs/cluster.md), on Flower's simulation, on a Flower federation: hfl federate or an exported app (docs/federation.md)",
    )
    ray_address: str | None = Field(
        None, description="of the Ray cluster: auto or HOST:PORT (default: RAY_ADDRESS, else a Ray of its own on this machine)"
    )
    client_gpus: float | None = Field(
        None, gt=0, description="GPUs of a client on Ray, such as 0.25 (default: 1 where --device is cuda)"
    )
    wait: float = Field(
        120.0,
        gt=0,
        description="seconds to wait: on Flower for all clients to join before round 1, and for one where none is left, on Ray in "
        "any round for a node that takes a client (local and processes wait for nobody)",
    )
    timeout: float | None = Field(None, gt=0, description="seconds that a client may take for an answer (default: any time)")
    on_client_error: Literal["skip", "retry", "fail"] = Field(
        "skip", description="a client that fails or answers nonsense: leave it out of the round, ask it once more, or end the run"
    )
    max_change: float | None = Field(
        None,
        ge=0,
        description="most that a client may change, as a multiple of its weights' norm (0: any; none: learned)",
    )
    min_clients: int = Field(1, ge=1, description="valid replies that a round needs; with fewer the global model stays as it was")
    checkpoint_every: int = Field(1, ge=0, description="write a checkpoint every N rounds (0: never), for hfl resume")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints that stay")
    vmap: Literal["off", "on", "auto"] = Field(
        "auto", description="clients of one submodel shape train as one stacked model; auto: where a fixed rule says that it pays"
    )
    device: str = Field("cpu", description="where clients train and models are evaluated: cpu, cuda, cuda:0 …")
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="arithmetic of local training's forward passes; weights stay float32"
    )
    out: Path | None = Field(None, description="run folder (default: runs/<time>-<extract>-<aggregate>)")
    overwrite: bool = Field(False, description="replace an --out that is not empty")
    heads: Literal["width", "whole"] = Field("width", description="what is cut of attention: every head's width, or whole heads")
    set: dict[str, Any] = Field({}, description="options of the chosen plugins, plugin.option=value")

    @property
    def merges_real_arrivals(self) -> bool:
        """Whether, on a federation, replies are merged as they really arrive: without a fleet there is no simulated time."""
        return self.schedule != "sync" and self.fleet is None

    @field_validator("out", mode="before")
    @classmethod
    def _no_empty_path(cls, out: Any) -> Any:
        if out == "":
            raise ValueError("the run folder needs a name")
        return out

    @field_validator("set")
    @classmethod
    def _only_plugins(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, value in settings.items():
            if not isinstance(value, Mapping):
                field = name.replace("-", "_")
                instead = f"; {format_flag(field)} {value} is an option of the run" if field in cls.model_fields else ""
                raise ValueError(f"'{name}={value}' names no plugin: options of plugins are given as plugin.option=value{instead}")
        return settings

    @model_validator(mode="after")
    def _whole_public_count(self) -> RunOptions:
        if self.server_data >= 1 and self.server_data != int(self.server_data):
            raise ValueError("server_data is a share below 1 or a whole count")
        return self

    @model_validator(mode="after")
    def _low_base_has_adapters(self) -> RunOptions:
        if self.base_dtype != "float32" and self.adapter is None:
            raise ValueError(f"--base-dtype {self.base_dtype} is for a frozen base: give --adapter too")
        return self


FOR_RAY = ("ray_address", "client_gpus")  # options that nothing but Ray has a use for


def refuse_for_ray(options: RunOptions, where: str = "--engine ray") -> None:
    """Raises UsageError for options of Ray in a run that is elsewhere; `where` says what they are for."""
    for name in FOR_RAY:
        if options.engine != "ray" and getattr(options, name) is not None:
            raise UsageError(f"{format_flag(name)} is for {where}, not {options.engine}")


def format_flag(field: str) -> str:
    """The flag of a field: --batch-size of batch_size."""
    return "--" + field.replace("_", "-")


def merge_options(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `more` over it, table by table; neither is changed.

    {"set": {"a": {"x": 1, "y": 2}}} and {"set": {"a": {"x": 3}}} give {"set": {"a": {"x": 3, "y": 2}}}. Where one of two values is
    no table, that of `more` counts.
    """
    both = {k: merge_options(base[k], v) for k, v in more.items() if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)}
    return {**base, **more, **both}


def explain_validation_error(error: ValidationError, options: type[BaseModel], prefix: str = "") -> str:
    """One sentence for the first thing that pydantic refused; `prefix` ("fjord.") names the plugin whose options they are."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][:1])
    shown = f"{prefix}{name}" if prefix else format_flag(name) if name else ""
    if first["type"] == "extra_forbidden":
        known = sorted(options.model_fields)
        return f"unknown option '{prefix}{name}'{nearest(name, known)} (known: {', '.join(known)})"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{shown}: {message} (got {first['input']!r})" if name else message


def check_option(name: str) -> None:
    """Raises UsageError, with the nearest known name, where no option of a run has that name."""
    if name not in RunOptions.model_fields:
        known = nearest(name, RunOptions.model_fields)
        raise UsageError(f"unknown option '{name}'{known}; plugin options are given as plugin.option")


def resolve(values: Mapping[str, Any]) -> RunOptions:
    """The options of a run from plain values. Raises UsageError, which says what is wrong and what is allowed."""
    try:
        return RunOptions.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain_validation_error(error, RunOptions)) from error


def read_run_file(path: Path) -> dict[str, Any]:
    """The values of a run file: TOML, keys as the command line's flags with _ for -. Raises UsageError."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"no run file '{path}'") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"run file '{path}' cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"run file '{path}' is not TOML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"run file '{path}' cannot be read: its values are nested too deeply") from error


def format_run_file(options: RunOptions, plugins: dict[str, dict[str, Any]] | None = None) -> str:
    """The text of a run file of `options`; `plugins` are those in use with all their options, by "role.name"."""
    values = options.model_dump(mode="json", exclude_none=True, exclude={"overwrite"})
    if plugins is not None:
        values["set"] = {}
        for key, given in plugins.items():
            role, name = key.split(".", 1)
            values["set"].setdefault(role, {})[name] = {k: v for k, v in given.items() if v is not None}
    return tomli_w.dumps(values)
