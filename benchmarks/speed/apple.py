"""Apple's pfl: two processes under torchrun (one on a GPU), its own FederatedAveraging over the same clients and batches."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.bridge import FrameworkBridgeFactory
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.stats import MappedVectorStatistics
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.work import Work, asked, cut, norm, plain, report, wait

POPULATION = 100_000

COUNT = "count/"  # before a tensor's name


class Watch(TrainingProcessCallback):
    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.first = time.time()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Any]:
        wait()
        self.times.append(time.perf_counter())
        return False, Metrics()


def build(work: Work, ratio: float = 1.0) -> PyTorchModel:
    """pfl's model of a width."""
    net: Any = work.module(ratio).to(memory_format=torch.contiguous_format if plain() else torch.channels_last)
    net.loss = lambda x, y, **_: F.cross_entropy(net.train()(x), y)
    net.metrics = lambda x, y, **_: {}
    return PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))


class MixedWidths(FederatedAveraging):  # type: ignore[misc]
    """FederatedAveraging whose users train the leading block of the model, averaged over those that have an entry: beside each
    tensor's change travels how many have it (pfl's backend cannot sum its ElementWeightedMappedVectorStatistics)."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work
        self._narrow = {ratio: build(work, ratio) for ratio in {*work.ratios}}

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> tuple[Any, Any]:
        small = self._narrow[self._work.ratio(int(user_dataset.user_id) % POPULATION)]
        with torch.no_grad():
            for name, tensor in small.variable_map.items():
                tensor.copy_(cut(initial_model_state[name], tensor))
        FrameworkBridgeFactory.sgd_bridge().do_sgd(small, user_dataset, central_context.model_train_params)
        change, counts = ({n: torch.zeros_like(t) for n, t in initial_model_state.items()} for _ in range(2))
        for name, tensor in small.variable_map.items():
            cut(change[name], tensor).copy_(tensor.detach() - cut(initial_model_state[name], tensor))
            cut(counts[name], tensor).fill_(1.0)
        return MappedVectorStatistics({**change, **{COUNT + name: t for name, t in counts.items()}}), Metrics()

    def process_aggregated_statistics(self, central_context: Any, aggregate_metrics: Any, model: Any, statistics: Any) -> Any:
        mean = {name: statistics[name] / statistics[COUNT + name] for name in model.variable_map}
        return model.apply_model_update(MappedVectorStatistics(mean))


def main() -> None:
    torch.set_num_threads(1)
    work = asked()
    model = build(work)
    turns = iter([round * POPULATION + client for round in range(1, work.rounds + 2) for client in work.chosen(round)])

    def user(code: int) -> Dataset:
        round, client = divmod(int(code), POPULATION)
        rows, train = work.rows(round, client), work.federation.clients[client].train
        return Dataset([train.x[rows.to(train.x.device)], train.y[rows.to(train.y.device)]], user_id=str(code))

    people = FederatedDataset(user, lambda: next(turns))
    watch = Watch()
    rounds = work.rounds + 1
    every = NNAlgorithmParams(rounds, evaluation_frequency=10_000, train_cohort_size=work.sampled, val_cohort_size=0)
    (MixedWidths(work) if work.mixed else FederatedAveraging()).run(
        every,
        SimulatedBackend(training_data=people, val_data=people),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=work.options.lr, local_batch_size=work.batch),
        NNEvalHyperParams(local_batch_size=work.batch),
        callbacks=[watch],
    )
    seconds: list[float] = np.diff(watch.times).tolist()
    parameters: list[Tensor] = [p.detach() for p in model.pytorch_model.parameters()]
    if pytorch_ops.distributed.global_rank == 0:
        report(seconds=seconds[1:], first=watch.first, norm=norm(parameters))


if __name__ == "__main__":
    main()
