"""A client's side of a round: what its device affords, training, statistics, evaluation."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import FederatedDataset
from hetfl.hooks.manager import PluginManager
from hetfl.models.frozen import frozen
from hetfl.models.normalization import STATIC, drop_statistics, initial_statistics, measure_statistics
from hetfl.models.state import State, apply_masks, load_state, move_state, tensors
from hetfl.parallel import return_free_memory
from hetfl.profiling.fleets import find_fleet
from hetfl.profiling.meter import Meter
from hetfl.profiling.node import Node, Profile
from hetfl.rng import stream
from hetfl.rounds.messages import Answer, ClientState, Content, Instruction, Kind
from hetfl.rounds.rows import OWN_ACCURACY, OWN_LOSS, SECONDS
from hetfl.submodel import encoding
from hetfl.submodel.blocks import take_blocks
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.widths import within
from hetfl.training import stacking, vectorized
from hetfl.training.cuda_graphs import GraphPool, hand_over, on_stream, own_stream
from hetfl.training.evaluation import Score, evaluate
from hetfl.training.local import make_step
from hetfl.training.task import Reply, Task
from hetfl.training.vectorized import Member

Pack = Callable[[Reply, Mapping[str, Tensor]], Reply]


def leave_whole(reply: Reply, masks: Mapping[str, Tensor]) -> Reply:
    """The reply as it is: it leaves this process as it is, or not at all."""
    return reply


@dataclass(frozen=True, eq=False)
class ClientRuntime:
    """What every client has at hand: its data, the plugins and the means to build submodels.

    `pack(reply, masks)` makes a reply ready to leave, `masks` being the entries that exist of its tensors. All of a task lies on
    the device of the run; a reply leaves for main memory, but its tensors stay where they are with `stays`, for sums on the device.
    """

    options: RunOptions
    federation: FederatedDataset
    plugins: PluginManager
    builder: SubmodelBuilder
    meter: Meter
    pack: Pack = field(default=leave_whole)
    stays: bool = False
    graphs: GraphPool = field(default_factory=GraphPool)

    def answer(self, kind: Kind, client: int, content: Content, state: ClientState) -> Answer:
        """What `client` answers to a message; `state`, which it keeps between rounds, is replaced in place."""
        if kind == "profile":
            assert isinstance(content, int)
            return self.profile(client, content)
        assert isinstance(content, Instruction)
        if kind == "train":
            with torch.enable_grad(), on_stream(own_stream(self.device)):  # whatever a plugin has left in this thread
                return self.train(client, content, state)
        return self.statistics(client, content, state) if kind == "statistics" else self.evaluate(client, content, state)

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def profile(self, client: int, round: int) -> Profile:
        """What the client's device affords in this round."""
        data, options = self.federation.clients[client].train, self.options
        step = partial(make_step, options=options, kind=data.kind)
        cost, probe = self.meter.width_cost, partial(self.meter.step_seconds, step, data)
        clients, device = len(self.federation.clients), None
        if options.fleet is not None:
            device = find_fleet(options.fleet).device(client, clients, options.seed)
        work = options.count_work(self.federation.train_sizes[client])
        node = Node(client, clients, round, options.seed, cost, probe, *work, options.global_width, device, options.deadline)
        return self.plugins.profile(node)

    def train(self, client: int, sent: Instruction, state: ClientState) -> Reply:
        """Local training on the client's own examples."""
        started, sent = time.perf_counter(), self._decode(sent)
        task = self._task(client, sent, state)
        reply = self.plugins.fit(task)
        reply.metrics[SECONDS] = time.perf_counter() - started
        if self.federation.test_sizes[client] and reply.state:
            sizes = {**sent.sizes, **{name: len(units) for name, units in reply.kept.items()}} if sent.sizes else sent.sizes
            tested = self._as_tested(client, sent.round, reply.state, sizes, sent.model)
            model = self.builder.load(tested, sizes, sent.model)
            own = self.federation.clients[client].test
            reply.metrics |= own_metrics(evaluate(model, own, self.options.eval_batch_size))
        if sent.up is not None:
            trained = {**tensors(task.model), **reply.state}
            lasting, home = trained if sent.lasting is None else sent.lasting, state.get("home", {})
            at_home = {name: t.cpu() for name, t in trained.items() if name not in sent.up and name in lasting}
            skipped = {name: t for name, t in home.items() if name not in trained}
            keep(state, "home", {**skipped, **merge_home(at_home, home, sent.masks)})
            reply.state = {name: t for name, t in reply.state.items() if name in sent.up}
        if sent.local:
            reply.state = drop_statistics(reply.state, self.builder.module(sent.sizes, sent.model))
        existing = self._existing(sent, reply)
        reply = self._encode(task, sent, self._send_home(reply), existing)
        keep(state, "memory", task.client_state)
        if self.builder.base:  # beside which gradients, and activations that the C library keeps, would add up
            task.model.zero_grad()
            return_free_memory()
        return self.pack(reply, existing)

    def _decode(self, sent: Instruction) -> Instruction:
        """The instruction with all tensors that were sent, as they have come through."""
        if not sent.encoded:
            return sent
        own = tensors(self.builder.module(sent.sizes, sent.model))
        masks = {name: mask for name, mask in sent.masks.items() if name in own and name not in sent.state}
        like = encoding.select_existing({n: own[n] for n in encoding.list_updated(own) if n not in sent.state}, masks)
        found = self.plugins.decode_down(sent.encoded, like, sent.round)
        arrived = encoding.fill_masked(found, {name: mask for name, mask in masks.items() if name in found})
        return replace(sent, state={**sent.state, **arrived}, encoded={})

    def _encode(self, task: Task, sent: Instruction, reply: Reply, masks: Mapping[str, Tensor]) -> Reply:
        """The reply with its tensors' updates as the plugins make them travel; of tensors with a mask, the values that exist."""
        if "encode" not in self.plugins.answered:
            return reply
        names = [name for name in encoding.list_updated(sent.state) if name in reply.state]
        index = within(self.builder.widths, sent.sizes, reply.kept) if reply.kept and sent.sizes is not None else {}
        masks = {name: masks[name] for name in names if name in masks}
        before = encoding.select_existing(take_blocks({name: sent.state[name] for name in names}, index), masks)
        after = encoding.select_existing({name: reply.state[name] for name in names}, masks)
        encoded = self.plugins.encode(task, {name: after[name] - before[name] for name in names}, before) if names else {}
        return replace(reply, state={n: t for n, t in reply.state.items() if n not in before}, encoded=encoded)

    def _send_home(self, reply: Reply) -> Reply:
        """The reply in main memory; its tensors stay on the device where the sums are to be there."""
        if self.device.type == "cpu":
            return reply
        for part in ("extras", "kept", "masks") if self.stays else ("state", "extras", "kept", "masks"):
            setattr(reply, part, move_state(getattr(reply, part), "cpu"))
        hand_over(reply.state)
        return reply

    def train_group(self, clients: Sequence[int], sent: Sequence[Instruction], kept: Sequence[ClientState]) -> list[Reply]:
        """Local training of clients with submodels of one shape, as one batched model (vmap); `kept` is what each keeps."""
        started, model = time.perf_counter(), self.builder.module(sent[0].sizes)
        group = [Member(i, s.state, self.federation.clients[i].train) for i, s in zip(clients, sent, strict=True)]
        tasks = [] if self.plugins.plain_fit else [self._own_task(*each) for each in zip(clients, sent, kept, strict=True)]
        graphs = self.graphs if self.device.type == "cuda" else None

        def train() -> list[Reply]:
            trained = vectorized.train(model, group, self.options, sent[0].round, graphs, tasks)
            sizes = self.federation.train_sizes
            return [Reply(t.state, sizes[m.client], {"loss": t.loss}) for t, m in zip(trained, group, strict=True)]

        replies = vectorized.fit_together(tasks, self.plugins.fit, train) if tasks else train()
        seconds = (time.perf_counter() - started) / len(group)
        for reply in replies:
            reply.metrics[SECONDS] = seconds
        having = [k for k, i in enumerate(clients) if self.federation.test_sizes[i]]
        if having:
            states = [self._as_tested(clients[k], sent[k].round, replies[k].state, sent[k].sizes) for k in having]
            tests = [self.federation.clients[clients[k]].test for k in having]
            for k, score in zip(having, stacking.evaluate(model, states, tests, self.options.eval_batch_size), strict=True):
                replies[k].metrics |= own_metrics(score)
        replies = [self._send_home(reply) for reply in replies]
        if tasks:
            existing = [self._existing(s, r) for s, r in zip(sent, replies, strict=True)]
            replies = [self._encode(*each) for each in zip(tasks, sent, replies, existing, strict=True)]
            for state, task in zip(kept, tasks, strict=True):
                keep(state, "memory", task.client_state)
        return replies

    def _own_task(self, client: int, sent: Instruction, state: ClientState) -> Task:
        """A client's task with a module that none of its group shares."""
        task = self._task(client, sent, state)
        task.model = copy.deepcopy(task.model, {id(t): t for t in frozen(task.model).values()})
        return task

    def statistics(self, client: int, sent: Instruction, state: ClientState) -> Reply:
        """Normalisation statistics of the sent model on this client's examples (spec heterofl 2.4)."""
        return Reply(*self._measure(client, sent.round, self._model(sent, state)))

    def evaluate(self, client: int, sent: Instruction, state: ClientState) -> dict[str, float]:
        """Accuracy and loss of the sent submodel on this client's own test data; empty where it has none."""
        own, size = self.federation.clients[client], self.options.eval_batch_size
        if not self.federation.test_sizes[client]:
            return {}
        model = self._model(sent, state)
        if sent.local:
            self._measure(client, sent.round, model)
        score = evaluate(model, own.test, size, own.held_classes if sent.held else None)
        return {"accuracy": score.accuracy, "loss": score.loss, "examples": float(score.examples)}

    def _as_tested(self, client: int, round: int, state: State, sizes: Mapping[str, int] | None, name: str | None = None) -> State:
        """What a client has trained, with the statistics of its examples where those that training tracks are not used."""
        if self.options.norm_policy not in STATIC:
            return state
        return {**state, **self._measure(client, round, self.builder.load(state, sizes, name))[0]}

    def _measure(self, client: int, round: int, model: nn.Module) -> tuple[State, int]:
        """Gives `model` its normalisation statistics on this client's examples, in batches that mix them."""
        batches = self.federation.clients[client].train.batches(
            self.options.eval_batch_size, stream(self.options.seed, "statistics", round, client)
        )
        return measure_statistics(model, batches)

    def _task(self, client: int, sent: Instruction, state: ClientState) -> Task:
        full, public, options = self.builder.full, self.federation.public, self.options
        options = options.model_copy(update={"local_steps": sent.steps}) if sent.steps else options
        return Task(
            client=client, round=sent.round, model=self._model(sent, state), data=self.federation.clients[client],
            options=options, plan_sizes=full if sent.sizes is None else sent.sizes, full_sizes=full,
            extras=copies(sent.extras, self.device), client_state=move_state(recall(state, "memory"), self.device),
            builder=self.builder, masks=copies(sent.masks, self.device),
            public=None if public is None else public.tune, draws=self.builder.widths.draws,
            loss=self.federation.kind.loss,
        )  # fmt: skip

    def _model(self, sent: Instruction, state: ClientState) -> nn.Module:
        """The submodel with what was sent, and for the rest what the client has."""
        model = self.builder.module(sent.sizes, sent.model)
        given = {**initial_statistics(model), **sent.state} if sent.local else sent.state
        return load_state(model, given, partial(self._from_home, sent, state))

    def _from_home(self, sent: Instruction, state: ClientState, wanted: State) -> State:
        """The client's own tensors: as it left them if they still fit those `wanted`, else those of an untrained model."""
        home = state.get("home", {})
        found = {name: home[name] for name, t in wanted.items() if name in home and home[name].shape == t.shape}
        if len(found) < len(wanted):
            initial = self.builder.initial(sent.sizes, sent.model)
            found = {name: found.get(name, initial[name]) for name in wanted}
        return apply_masks(found, sent.masks)

    def _existing(self, sent: Instruction, reply: Reply) -> Mapping[str, Tensor]:
        """The masks of what comes back: those sent, cut as the reply was, and the client's own over them."""
        if not reply.kept or not sent.masks or sent.sizes is None:
            return {**sent.masks, **reply.masks}
        index = within(self.builder.widths, sent.sizes, reply.kept)
        return {**take_blocks(sent.masks, index), **reply.masks}


def own_metrics(score: Score) -> dict[str, float]:
    """A score on the client's own test data as metrics of its reply."""
    return {OWN_ACCURACY: score.accuracy, OWN_LOSS: score.loss}


def merge_home(trained: State, before: State, masks: Mapping[str, Tensor]) -> State:
    """What stays with the client: what it trained, entries outside the masks as they were."""

    def fits(name: str, t: Tensor) -> bool:
        return name in masks and name in before and before[name].shape == t.shape == masks[name].shape

    return {name: torch.where(masks[name], t, before[name]) if fits(name, t) else t for name, t in trained.items()}


def recall(state: ClientState, what: str) -> State:
    """Copies of what the client keeps under `what`: a client that fails has changed nothing."""
    return {name: t.clone() for name, t in state.get(what, {}).items()}


def copies(named: State, device: torch.device) -> State:
    """Tensors of the task's own: those that were sent may be the server's, or other clients' too."""
    return {name: t.to(device, copy=True) for name, t in named.items()}


def keep(state: ClientState, what: str, named: State) -> None:
    """Replaces what the client keeps under `what`, in main memory and the plain layout."""
    if named or what in state:
        state[what] = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in named.items()}
