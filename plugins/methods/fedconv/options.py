"""FedConv's options: presets, where the default deviates from the paper, and what follows from the options alone."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from torch import Tensor

from hetfl import Field, PresetPlugin, Server
from hetfl.data.kinds import TaskKind

LATE = 6  # the round from which `late_epochs` holds


class FedConvOptions(PresetPlugin):
    """The options of FedConv; the numbers of steps and the loss follow from them alone."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "paper": {"start": "random", "objective": "ce", "residual": "conv", "mlr": 1, "epochs": 20, "late_epochs": 10,
                  "lr": 1e-3, "batch_size": 32, "patience": 0, "dilate": "weights", "dilator_epochs": 20, "dilator_lr": 1e-3},
        "reference": {"start": "random", "objective": "ce", "residual": "conv", "mlr": 2, "epochs": 20, "late_epochs": 10,
                      "lr": 1e-3, "batch_size": 32, "patience": 0, "halve_every": 25, "dilate": "weights",
                      "dilator_epochs": 20, "dilator_lr": 1e-3, "server_epochs": 10, "upload_epochs": 10},
    }  # fmt: skip

    DEVIATES: ClassVar[tuple[tuple[str, str, str, str], ...]] = (
        (
            "filter start",
            "the leading slice (one weight 1)",
            "random",
            "random filters are a constant function; few steps on few images do not get out of it",
        ),
        (
            "activation on weights",
            "none",
            "modified leaky ReLU, twice in the code",
            "a positive mix of non-negative tensors can never be negative",
        ),
        (
            "compressor objective",
            "distillation from the global model, T = 2",
            "cross entropy",
            "54 labelled images are overfitted; distillation needs no labels",
        ),
        (
            "what is dilated",
            "the client's change, with coverage",
            "the weights",
            "refitting weights to the server set overwrites what clients learned",
        ),
        (
            "dilators",
            "placement (`fedconv.dilator_steps=0`); trainable, best step by hold-out, step 0 included",
            "trained every round",
            "no gain was seen, and it is the largest server cost",
        ),
        (
            "selection",
            "lowest hold-out loss of every 10th step",
            "test accuracy in the code",
            "the test split never chooses anything",
        ),
        (
            "end of tuning",
            "after 5 looks at the hold-out without gain (`fedconv.patience=0`: never)",
            "a fixed number of epochs",
            "the best step by the hold-out is kept either way; the summary says what was saved",
        ),
        (
            "fine-tuning on server data",
            "none beyond the run's (`--pretrain-steps`, `--server-finetune-steps`)",
            "10 epochs of the global model each round and of every upload in the code",
            "every method of a comparison gets the same; it repairs the aggregate without helping the small submodels",
        ),
    )

    start: Literal["slice", "random"] = Field("slice", description="filters start as the leading slice, or at random")
    objective: Literal["distill", "ce"] = Field("distill", description="distil the global model, or fit the labels")
    temperature: float = Field(2.0, gt=0, description="temperature of distillation")
    residual: Literal["all", "conv"] = Field("all", description="keep the image beside its projection: always, or for convolutions")
    mlr: int = Field(0, ge=0, le=2, description="times the modified leaky ReLU is put on the result")
    steps: int = Field(20, ge=0, description="compressor steps a round")
    first_steps: int | None = Field(60, ge=0, description="compressor steps in round 1 (none: as in every round)")
    epochs: int | None = Field(None, ge=0, description="compressor epochs a round over the server's data, in place of steps")
    late_epochs: int | None = Field(None, ge=0, description="epochs of compressor and dilator from round 6 on")
    lr: float = Field(1e-2, gt=0, description="Adam learning rate of the compressor")
    batch_size: int = Field(64, ge=1, description="server examples in a tuning step")
    patience: int = Field(5, ge=0, description="end tuning after so many looks at the hold-out without gain (0: never)")
    halve_every: int = Field(0, ge=0, description="halve both learning rates every N rounds while above 1e-4 (0: never)")
    dilate: Literal["update", "weights"] = Field("update", description="grow what the client changed, or its weights")
    dilator_steps: int = Field(0, ge=0, description="dilator steps a round for each client (0: placement)")
    dilator_epochs: int | None = Field(None, ge=0, description="dilator epochs a round, in place of steps")
    dilator_lr: float = Field(2e-3, gt=0, description="Adam learning rate of the dilators")
    server_epochs: int = Field(0, ge=0, description="epochs of fine-tuning the global model at the start of a round, Adam 1e-4")
    upload_epochs: int = Field(0, ge=0, description="epochs of fine-tuning each upload on server data, Adam 1e-4")

    def count_compressor_steps(self, server: Server, round: int) -> int:
        """Compressor steps of a round."""
        steps = self.steps if round > 1 or self.first_steps is None else self.first_steps
        return self._count_steps(server, self.epochs, steps, round)

    def count_dilator_steps(self, server: Server, round: int) -> int:
        """Dilator steps of a round for each client."""
        return self._count_steps(server, self.dilator_epochs, self.dilator_steps, round)

    def _count_steps(self, server: Server, epochs: int | None, steps: int, round: int) -> int:
        """`steps`, or those of `epochs` over the server's tune examples where epochs are given."""
        if epochs is None:
            return steps
        epochs = self.late_epochs if self.late_epochs is not None and round >= LATE else epochs
        return epochs * math.ceil(len(server.public.tune) / self.batch_size)

    def loss(self, kind: TaskKind, logits: Tensor, goal: Tensor) -> Tensor:
        """The mean over a batch of the loss of logits (N, …) with targets `goal` (of classes the cross entropy, spec 2.5), or of
        T^2 times their divergence from the teacher's logits `goal` (N, …) (KL of classes at temperature T, findings 6.3)."""
        if self.objective == "ce":
            return kind.loss(logits, goal)
        t = self.temperature
        return kind.divergence(logits, goal, t) * t * t
