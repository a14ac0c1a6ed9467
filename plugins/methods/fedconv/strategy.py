"""FedConv (Shen et al., MobiSys 2024): convolutional compression learned on the model, transposed-convolution dilation.

The default is the combination that trains stably with a small server set (docs/strategies/fedconv.md); the presets `paper` and
`reference` are the literal readings of spec fedconv 7. The learned weights of the aggregation are a plugin of their own, kld.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import PrivateAttr

from hetfl import Client, Patch, Plan, ReceivedReply, Selection, Server, State, Update, hookimpl, prefix
from hetfl.plugins.methods.fedconv.compression import CompressedPlan
from hetfl.plugins.methods.fedconv.dilation import dilate, dilate_coverage
from hetfl.plugins.methods.fedconv.filters import Filters
from hetfl.plugins.methods.fedconv.options import FedConvOptions
from hetfl.plugins.methods.fedconv.tiling import tile_parameters
from hetfl.plugins.methods.fedconv.tuning import Goals, Upload, group_uploads, make_global_goals, train_compressor, train_dilators

TUNED = 1e-4  # Adam's learning rate of fine-tuning models on server data (spec 3)


class FedConv(FedConvOptions):
    """One set of filters a size class compresses the global model; one a client grows what comes back."""

    _compressors: dict[str, Filters] = PrivateAttr(default_factory=dict)
    _dilators: dict[int, Filters] = PrivateAttr(default_factory=dict)
    _saved: State = PrivateAttr(default_factory=dict)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        """Tunes the filters of every size class of the round, the classes side by side, after `server_epochs` (spec 1, 2.5)."""
        if self.server_epochs:
            server.state = server.train(server.state, self._steps_of(server, self.server_epochs), "server", round, lr=TUNED)
        widths = sorted({c.profile.width for c in clients}, reverse=True)
        goals = make_global_goals(self, server) if self.count_compressor_steps(server, round) and min(widths) < 1 else None
        plans = server.pool.map(lambda width: self._plan(server, width, goals, round), widths)
        by_width = dict(zip(widths, plans, strict=True))
        return [by_width[c.profile.width] for c in clients]

    def _plan(self, server: Server, width: float, goals: Goals | None, round: int) -> Plan:
        """The plan of a size class, its compressor trained where there are goals; the whole model is not compressed."""
        selection = server.select(prefix(width))
        if selection.sizes == server.builder.full:
            return selection
        level = f"{width:g}"
        filters = self._compressors.get(level) or self._make_filters(server, selection, f"compressor {level}")
        self._compressors[level] = filters
        if goals is not None:
            train_compressor(self, server, filters, goals, level, round)
        return CompressedPlan(selection, filters.copy(), self.mlr, self.residual)

    def _make_filters(self, server: Server, selection: Selection, purpose: str) -> Filters:
        """Filters of every trained parameter, at their start or as a checkpoint had them; frozen ones are sliced (spec 2.2)."""
        names = [n for n, p in server.builder.model.named_parameters() if n in server.state and p.ndim and p.requires_grad]
        filters = Filters(selection, tile_parameters(selection, server.state, names))
        if self.start == "random":
            filters.randomise(server.stream(purpose))
        saved = {key.split("/", 1)[1]: self._saved.pop(key) for key in list(self._saved) if key.startswith(f"{purpose}/")}
        if {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in filters.state_dict().items()}:
            filters.load_state_dict(saved)  # else they were of another width
        return filters

    @hookimpl
    def recover(self, server: Server, replies: Iterable[ReceivedReply], round: int) -> Iterable[Update]:
        """Grows every reply to the global model's size with the client's own dilator (spec 2.2, findings 6.5)."""
        replies = list(replies)
        trained = server.pool.map(lambda r: self._finetune(server, r, round), replies)
        uploads = [self._upload(server, r, state) for r, state in zip(replies, trained, strict=True)]
        to_dilate = [u for u in uploads if u is not None]
        if steps := self.count_dilator_steps(server, round):
            groups = group_uploads(self, server, to_dilate)
            server.pool.map(lambda group: train_dilators(self, server, group, steps, round), groups)
        pairs = list(zip(replies, trained, uploads, strict=True))
        return server.pool.map(lambda pair: self._grow(server, *pair), pairs)

    def _finetune(self, server: Server, returned: ReceivedReply, round: int) -> State:
        """What a client trained, after `upload_epochs` of fine-tuning on server data (spec 1)."""
        state, sizes = {**returned.sent, **returned.reply.state}, returned.plan.sizes
        steps = self._steps_of(server, self.upload_epochs)
        return server.train(state, steps, "upload", round, sizes=sizes, lr=TUNED, client=returned.client.id)

    def _steps_of(self, server: Server, epochs: int) -> int:
        """Steps of fine-tuning that are `epochs` over the server's tune examples."""
        return epochs * math.ceil(len(server.public.tune) / server.options.server_batch_size) if epochs else 0

    def _upload(self, server: Server, returned: ReceivedReply, trained: State) -> Upload | None:
        """A reply with its client's dilator, a new one where it has none or its capacity has changed; None: nothing to dilate."""
        plan, client = returned.plan, returned.client.id
        if not (isinstance(plan, CompressedPlan) and returned.reply.state):
            return None
        dilator = self._dilators.get(client)
        if dilator is None or dilator.selection.sizes != plan.selection.sizes:
            dilator = self._make_filters(server, plan.selection, f"dilator {client}")
            self._dilators[client] = dilator
        return Upload(client, plan.selection, dilator, trained, returned.sent if self.dilate == "update" else None)

    def _grow(self, server: Server, returned: ReceivedReply, trained: State, upload: Upload | None) -> Update:
        """A reply in global coordinates: dilated; placed where its dilator is still the start, or where nothing was compressed."""
        reply, plan = returned.reply, returned.plan
        patches: Mapping[str, Patch] = plan.put(trained)
        if upload is not None and isinstance(plan, CompressedPlan):
            if upload.dilator.active:
                patches = {**patches, **self._dilate(server.state, upload)}
            elif self.dilate == "update" and plan.filters.active:
                base = plan.selection.take(server.state)
                patches = plan.put({n: base[n] + t if t.is_floating_point() else t for n, t in upload.change.items()})
        return Update(returned.client.id, {name: patches[name] for name in reply.state}, float(reply.examples), reply.extras)

    def _dilate(self, state: State, upload: Upload) -> Mapping[str, Patch]:
        """Dilated tensors and how far each entry is covered: the weights, or G + U / M with the dilated update U and coverage M."""
        with torch.no_grad():
            if self.dilate == "weights":
                large = dilate(upload.dilator, upload.change, state, self.mlr, self.residual)
                return {n: Patch(t) for n, t in large.items()}
            cover, grown = dilate_coverage(upload.dilator, state), dilate(upload.dilator, upload.change, state)
            updates = {n: torch.where(cover[n] > 0, u / cover[n].clamp(min=1e-12), 0.0) for n, u in grown.items()}
            return {n: Patch(state[n] + update, {}, cover[n]) for n, update in updates.items()}

    def state_dict(self) -> State:
        filters = {f"compressor {level}": f for level, f in self._compressors.items()}
        filters |= {f"dilator {client}": f for client, f in self._dilators.items()}
        unused = {key: w for key, w in self._saved.items() if key.split("/", 1)[0] not in filters}
        return unused | {f"{purpose}/{key}": w for purpose, f in filters.items() if f.active for key, w in f.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        self._saved, self._compressors, self._dilators = dict(state), {}, {}
