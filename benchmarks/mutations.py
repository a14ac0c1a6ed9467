"""Which faults in plugins do the tests notice: `python benchmarks/mutations.py [--only NAME] [--list]`.

Each named mutation is put into a temporary copy of the tree, one at a time, and the tests that should notice are run there. Prints
caught or SURVIVED for each and the share that survived; the exit code is 1 where that is above 10 %, 2 where a mutation's text is
not in its file (exactly once) any more or its tests fail without it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST = 0.1  # share of mutations that may survive
UNMUTATED = ("hetfl.runs.runner", "torch._dynamo", "datasets", "flwr_datasets", "hypothesis", "scipy.stats", "dp_accounting.rdp")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "xdist.plugin", "-n", "0")
LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", "build", "*.egg-info")


@dataclass(frozen=True)
class Mutation:
    """In `path`, `old` becomes `new`; `tests` is what pytest is to run."""

    name: str
    path: str
    old: str
    new: str
    tests: str


def of(path: str, tests: str, *found: tuple[str, str, str]) -> list[Mutation]:
    """The mutations (name, old, new) of one file, which the same tests notice."""
    return [Mutation(name, f"plugins/{path}.py", old, new, tests) for name, old, new in found]


ROUNDS = "tests/plugins/rounds"

MUTATIONS = [
    *of("aggregations/kld", f"{ROUNDS}/test_public.py -k kld",
        ("kld without cross entropy", "return self._level_loss(server, logits, y[rows]) + drift", "return drift"),
        ("kld without its divergence", "        if not self.kld:", "        if True:"),
        ("kld of parameters is that of outputs", 'if self.kld_on == "outputs":', "if True:"),
        ("kld ignores n_k", "share = torch.tensor(updates.weights)", "share = torch.ones(len(updates))"),
        ("kld's plain mean ignores n_k", "plain = mean(updates, updates.weights)", "plain = mean(updates, [1.0] * len(updates))"),
        ("kld forgets its weights", 'rows.append(self._w.get(f"{u.client}/{name}", fresh))', "rows.append(fresh)"),
        ("kld without guard", "if self.guard and judge()", "if False and judge()"),
        ("kld guards always", "if self.guard and judge() > judge(", "if judge() > judge("),
        ("kld chooses by the tune split", "level.take(now), hx, level.sizes) for level in levels], hy)",
         "level.take(now), x, level.sizes) for level in levels], y)"),
        ("kld's weights by client alone", "tuple(tensor.shape[:1]) if self.shape", "(1,) if self.shape"),
    ),
    *of("methods/dac", f"{ROUNDS}/test_public.py tests/plugins/methods/test_dac.py -k 'test_dac and not nest and not removes'",
        ("dac without entropy", " + self.entropy * entropy(gates)", ""),
        ("dac without bound", " + self.bound * hinge(gates)", ""),
        ("dac without folding", "net = net.scaled(server.widths, places, net.gates)", "pass"),
        ("dac with the sign of eq. 2", "(F.relu(w - 1) + F.relu(-w)).sum()", "-(F.relu(w - 1) + F.relu(-w)).sum()"),
        ("dac's gates start alike", "gates = {name: 1 - (1 - lowest) *", "gates = {name: 1 - 0 *"),
        ("dac's gates start in the wrong order", "squares.argsort(stable=True).argsort()", "(-squares).argsort().argsort()"),
        ("dac's gates change the model where they start", "{name: 1 / gate for name, gate in gates.items()})", "{})"),
        ("dac's gates do not learn", "                        optimizer.step()", "                        optimizers[0].step()"),
        ("dac ignores its threshold", "number = count_low(net.gates, self.threshold)", "number = count_low(net.gates, -9.0)"),
        ("dac removes the strongest", "values.argsort(stable=True)[:number]", "values.nan_to_num(posinf=-9).argsort()[-number:]"),
        ("dac removes all low gates at once", "bisect_left(range(number), True, key=suffices)", "number"),
        ("dac waits twice as long for a low gate", "if idle == self.patience:", "if idle == 2 * self.patience:"),
        ("dac gates all that it can", 'if hidden and where == "blocks" else found', "if False else found"),
        ("dac tests parameters alone", "cost[0] < budget[0] and cost[1] < budget[1]", "cost[1] < budget[1]"),
        ("dac without training after the search", "server.train(net.state, self.tune,", "server.train(net.state, 0,"),
        ("dac starts from the global model", 'if self.start == "searched" and width < 1:', "if False:"),
        ("dac searches every level from the whole", "min((w for w in self._kept if w > width), default=None)", "None"),
    ),
    *of("aggregations/cluster", f"{ROUNDS}/test_slices.py -k clusters",
        ("one cluster for all", 'return f"level {client.profile.level}"', 'return "level"'),
        ("clusters start from the global model", "return server.branch(name_branch(client))", "return None"),
        ("clusters count clients", "members.votes(self.weighting)", 'members.votes("uniform")'),
    ),
    *of("aggregations/robust", f"{ROUNDS}/test_slices.py -k median",
        ("trimmed mean trims nothing", "(trim * number).floor()", "(0 * number).floor()"),
        ("robust means count the uncovered", "(coverage > 0).sum(0)", "(coverage >= 0).sum(0)"),
    ),
    *of("aggregations/overlap", f"{ROUNDS}/test_slices.py -k overlap",
        ("overlap ignores its weighting", "WEIGHTINGS[self.weighting]", 'WEIGHTINGS["uniform"]'),
        ("overlap counts absentees", "WEIGHTINGS[self.weighting])", "WEIGHTINGS[self.weighting], absent=True)"),
    ),
    *of("aggregations/fedavg", f"{ROUNDS}/test_slices.py -k fedavg",
        ("fedavg without absentees", "running_mean(server.state, updates, absent=True)", "running_mean(server.state, updates)"),
    ),
    *of("methods/heterofl", f"{ROUNDS}/test_slices.py -k heterofl",
        ("heterofl sends everything", "prefix(client.profile.width)", "prefix(1.0)"),
    ),
    *of("wrappers/scaler", f"{ROUNDS}/test_slices.py tests/plugins/wrappers/test_scaler.py -k 'scaler or published or norm'",
        ("the scaler is never installed", "with scale_activations(task.model, width_ratio(task)):", "if True:"),
        ("the scaler multiplies", "out / s if m.training", "out * s if m.training"),
        ("the scaler's share is squared", "sum(task.full_sizes.values()) if", "sum(task.full_sizes.values()) ** 2 * kept if"),
        ("the scaler does not reach norms", "m.eps = scaled if m.training else eps", "m.eps = eps"),
        ("the scaler acts in evaluation", "m.eps = scaled if m.training else eps", "m.eps = scaled"),
        ("the scaler stays", "norm.eps = eps", "pass"),
    ),
    *of("wrappers/maskloss", f"{ROUNDS}/test_slices.py tests/plugins/wrappers/test_maskloss.py -k 'mask or published or exits'",
        ("the masked loss is not applied", "mask_logits(forward(model, x), held)", "forward(model, x)"),
        ("the masked loss masks the classes that are held", "absent = ~held", "absent = held"),
        ("masked logits are minus infinity", "masked_fill(absent, 0.0)", "masked_fill(absent, -1e9)"),
        ("the head's rows are not masked", "p.rows(held) if n in head else p", "p"),
        ("the head's bias is not masked", 'for kind in ("weight", "bias")', 'for kind in ("weight",)'),
    ),
    *of("methods/fedrolex", f"{ROUNDS}/test_slices.py -k fedrolex",
        ("fedrolex forgets its width", "window(group, width, start)", "window(group, 1.0, start)"),
        ("fedrolex never rolls", "start = (round - 1) *", "start = 0 *"),
        ("fedrolex rolls one round early", "start = (round - 1) *", "start = round *"),
        ("fedrolex always rolls forward", 'if self.direction == "forward" else -self.step', "if True else 0"),
    ),
    *of("methods/feddropout", f"{ROUNDS}/test_slices.py -k dropout",
        ("federated dropout draws once for all", "-1 if self.shared else client.id", "-1"),
        ("federated dropout draws the same every round", '"dropout", round,', '"dropout", 1,'),
    ),
    *of("methods/lgfedavg", f"{ROUNDS}/test_slices.py -k lg",
        ("lg sends its local layers too", "up=shared)", "up=None)"),
        ("lg shares one layer less", "heavy[-min(layers, len(heavy))]", "heavy[-min(max(layers - 1, 1), len(heavy))]"),
        ("lg sends everything down again", "down=shared if client.last_round else None", "down=None"),
    ),
    *of("methods/fjord", f"{ROUNDS}/test_slices.py -k fjord",
        ("fjord always at its widest", "runs[int(torch.randint(len(runs), (1,), generator=generator))](x)", "runs[-1](x)"),
        ("fjord never at its widest", "return [*fitting, task.plan_sizes]", "return fitting or [task.plan_sizes]"),
        ("fjord without distillation", " + diverge(narrow, wide.detach())", ""),
        ("fjord teaches the teacher", "wide.detach()", "wide"),
        ("fjord's widest is not trained", "supervise(wide, y) + supervise(narrow, y)", "supervise(narrow, y)"),
    ),
    *of("methods/fiarse", f"{ROUNDS}/test_pruning.py -k fiarse",
        ("fiarse's thresholds are reversed by layer",
         'zip(names, task.extras["thresholds"], strict=True)', 'zip(names, task.extras["thresholds"].flip(0), strict=True)'),
        ("fiarse has one threshold by layer", 'name.split(".")[0] if each_stage else ""', '""'),
        ("fiarse without its biased gradient", "(1 + torch.nan_to_num(2 * s", "(1 + 0 * torch.nan_to_num(2 * s"),
        ("fiarse keeps the smallest", "place = len(magnitudes) - k", "place = k"),
        ("fiarse's global rate is lost", "old[n] + self.rate * (t", "old[n] + (t"),
        ("fiarse's server rate is 1", "if self.rate == 1:", "if True:"),
        ("fiarse's masks do not shrink", "return w * (w.abs() >= theta)", "return w * 1.0"),
    ),
    *of("methods/lotteryfl", f"{ROUNDS}/test_pruning.py -k lottery",
        ("lottery prunes the largest", "weight.abs().double() >= least", "weight.abs().double() <= least"),
        ("lottery does not rewind", "first = {name: task.client_state[INITIAL + name] for name in state}", "first = dict(state)"),
        ("lottery prunes whoever it is", "if accuracy > self.threshold and after", "if after"),
        ("lottery forgets what remains", "        note_remaining(task, after)", "        pass"),
        ("lottery returns no masks", "reply.masks = dict(task.masks)", "pass"),
    ),
    *of("methods/pruning", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_lotteryfl.py -k lottery",
        ("pruning holds nothing back", "task.data = replace(task.data, train=train)", "pass"),
        ("pruning decides by what it trains on", "evaluate(task.model, held,", "evaluate(task.model, train,"),
        ("pruning never clamps", "max(now * (1 - rate), target) if clamp else", "now * (1 - rate) if clamp else"),
        ("pruning removes what should remain", "if clamp else now * (1 - rate)", "if clamp else now * rate"),
        ("pruning remembers its share in float32", "torch.tensor(share, dtype=torch.float64)", "torch.tensor(share)"),
        ("pruning takes rounding for a rest", "target * (1 + TOLERANCE)", "target"),
        ("pruning sends the budget in float32", "parameters, dtype=torch.float64)", "parameters).double()"),
        ("pruning ignores the budget", "return float(budget) if target", "return 0.0 if target"),
    ),
    *of("methods/hermes", f"{ROUNDS}/test_pruning.py -k hermes",
        ("hermes drops the strongest", "select_largest(strength[name][:", "select_largest(-strength[name][:"),
        ("hermes without lasso", "        if self.lasso:", "        if False:"),
        ("hermes without branches", 'return server.branch(f"client {client.id}")', "return None"),
        ("hermes ignores overlap all", "least = len(updates) if", "least = 2 if"),
        ("hermes's branches get no mean", "torch.where(among, average, patch.values)", "patch.values"),
        ("hermes's share is one of units", "choose_strongest(task, after**0.5)", "choose_strongest(task, after)"),
        ("hermes's lasso is one of rows", "for rows in ways]).sum()", "for rows in ways[:1]]).sum()"),
    ),
    *of("methods/tailorfl", f"{ROUNDS}/test_pruning.py -k tailor",
        ("tailor learns no importance", "                optimizer.step()\n".replace(" " * 16, " " * 12), ""),
        ("tailor without regulariser", " + self.regularise * mean_square(u)", ""),
        ("tailor without tuning", "if not self.tune or len(after) < 2", "if True or len(after) < 2"),
        ("tailor without scaling down", "{name: t / self.p if t.ndim > 1 else t", "{name: t"),
        ("tailor without scaling up", "{name: t * self.p if t.ndim > 1 else t", "{name: t"),
        ("tailor scales biases too", "{name: t / self.p if t.ndim > 1 else t", "{name: t / self.p"),
        ("tailor shares every group", "int(len(server.widths.groups) * (1 - self.personal))", "len(server.widths.groups)"),
        ("tailor's mean ignores p", "return u.weight / float(", "return u.weight + 0 * float("),
        ("tailor does not say p", "if isinstance(r.plan, ScaledSelection) else {}", "if False else {}"),
        ("tailor swaps for the worse", "wish[into] <= wish[out]:", "wish[into] > wish[out]:"),
    ),
    *of("methods/fedmd", f"{ROUNDS}/test_public.py -k fedmd",
        ("fedmd without digest", 'if "consensus" in task.extras:', "if False:"),
        ("fedmd without public training", 'if task.client_state.get("started") != size:', "if False:"),
        ("fedmd trains on public data every round", 'task.client_state["started"] = size', "pass"),
        ("fedmd's digest is always mae", "distance(task.model(a), b)", 'DISTANCES["mae"](task.model(a), b)'),
        ("fedmd digests with a new Adam every round", "task.client_state |= list_moments(task.model, optimizer)", "pass"),
        ("fedmd scores the same rows every round", 'server.stream("align", round))', 'server.stream("align", 1))'),
        ("fedmd scores the whole public set", 'in x[task.extras["rows"]].split(512)', "in x.split(512)"),
        ("fedmd's server learns nothing", "        if not self.distill_steps:", "        if True:"),
        ("fedmd sums scores", "/ (there * c).sum(0).clamp", "/ (1 + 0 * (there * c)).sum(0).mean().clamp(max=1).clamp"),
    ),
    *of("methods/scalefl", f"{ROUNDS}/test_exits.py tests/plugins/methods/test_scalefl.py",
        ("scalefl without distillation", "weight = self.distill if", "weight = 0.0 if"),
        ("scalefl distils from the start", "if task.round > self.warm * task.options.rounds else 0.0", ""),
        ("scalefl takes the widest split of a depth", "min(max(h / exits, narrowest[h]), widest[h])", "widest[h]"),
        ("scalefl's split is only below the budget", "budget * (1 + slack))", "budget)"),
        ("scalefl distils at T = 1", "diverge(z, teacher, t)", "diverge(z, teacher)"),
        ("scalefl without t squared", "weight * t * t * scale", "weight * scale"),
        ("scalefl with the deepest exit alone", "    for i, z in enumerate(exits, 1):", "    for i, z in [(deepest, last)]:"),
        ("scalefl's exits count alike", "total = total + i * (", "total = total + ("),
        ("scalefl teaches the teacher", "last.detach() if detach else last", "last"),
        ("scalefl is never shallow", "= server.select(prefix(ratio), exits=depth)", "= server.select(prefix(ratio))"),
        ("scalefl is never narrow", "= server.select(prefix(ratio), exits=depth)", "= server.select(prefix(1), exits=depth)"),
    ),
    *of("methods/fedconv/options", f"{ROUNDS}/test_fedconv.py",
        ("fedconv distils at T = 1", "t = self.temperature\n", "t = 1.0\n"),
        ("fedconv ignores late_epochs", "if self.late_epochs is not None and round >= LATE else epochs", "if False else epochs"),
        ("fedconv ignores first_steps", "self.steps if round > 1 or self.first_steps is None", "self.steps if True"),
        ("fedconv always fits labels", 'if self.objective == "ce":', "if True:"),
    ),
    *of("methods/fedconv/tuning", f"{ROUNDS}/test_fedconv.py",
        ("fedconv never halves its rate", "lr=halve_rate(options.lr, round, options.halve_every)", "lr=options.lr"),
        ("fedconv never halves its dilators' rate",
         "halve_rate(options.dilator_lr, round, options.halve_every)", "options.dilator_lr"),
    ),
    *of("methods/fedconv/strategy", f"{ROUNDS}/test_fedconv.py",
        ("fedconv ignores upload_epochs", "server.train(state, steps, \"upload\"", "server.train(state, 0, \"upload\""),
        ("fedconv trains no dilator", "if steps := self.count_dilator_steps(server, round):", "if (steps := 0):"),
        ("fedconv dilates without coverage", "Patch(state[n] + update, {}, cover[n])", "Patch(state[n] + update)"),
        ("fedconv forgets its dilators", "self._dilators[client] = dilator", "pass"),
        ("fedconv forgets its compressors", "self._compressors[level] = filters", "pass"),
    ),
    *of("methods/fedconv/compression", f"{ROUNDS}/test_fedconv.py",
        ("fedconv's compressor without MLR", "[mlr(y, self.times) for y", "[y for y"),
    ),
    *of("methods/fedconv/filters", f"{ROUNDS}/test_fedconv.py",
        ("fedconv always keeps the image", 'return float(residual == "all" or', "return float(True or"),
        ("fedconv without weight norm", "g / v.flatten(1).norm(dim=1).clamp(min=1e-12)", "g"),
    ),
    *of("wrappers/clip", f"{ROUNDS}/test_wrappers.py -k clip",
        ("clip and dp clip nothing", "    if scale == 1.0:", "    if True:"),
        ("clip clips everything", "if changes else 1.0", "if changes else 1.0; scale *= 0.9"),
    ),
    *of("wrappers/clip", "tests/plugins/wrappers/test_clip.py",
        ("clip is left to the clients", "state = clip_update(received.reply.state, received.sent, self.norm)", "return received"),
    ),
    *of("wrappers/dp", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_dp.py -k dp",
        ("dp counts by examples", "state=state, examples=1)", "state=state)"),
        ("dp clips nothing", "clip_update(received.reply.state, received.sent, self.norm)", "received.reply.state"),
        ("dp without noise", "* deviation", "* 0.0"),
        ("dp's noise ignores the norm", "self.noise * self.norm / server.sampled", "self.noise / server.sampled"),
        ("dp's mean is over the covering clients", "(mean - old) * share", "(mean - old)"),
        ("dp's accountant takes the norm for the sensitivity", "multiplier = noise / 2", "multiplier = noise"),
        ("dp publishes counters", "{**merged.state, **server.state}", "{**server.state, **merged.state}"),
        ("dp's sample can be foreseen", "server.hides_sample = True", "pass"),
        ("dp overlooks statistics", "if tracks and policy not in CONCEALED:", "if False:"),
    ),
    *of("wrappers/codec", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_codecs.py -k 'not flower and not changes'",
        ("codecs do nothing", "encoded |= {join(name, part): t for part, t in parts.items()}", "pass"),
        ("codecs forget what they lost", "values = values + lost[name]", "pass"),
        ("codecs make up for other plans", "if before is not None and torch.equal(before, places) else {}", ""),
    ),
    *of("wrappers/quantize", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_codecs.py -k 'quanti or drown'",
        ("quantize rounds to nearest", "+ drawn).floor()", "+ 0.5).floor()"),
        ("quantize is always 8 bits fine", "2 ** (self.bits - 1) - 1, values", "127, values"),
        ("quantize sends down as it is", "() if self.down else", "() if False else"),
        ("quantize has steps that are too small", "/ most).float()", "/ most / 2).float()"),
    ),
    *of("wrappers/topk", f"{ROUNDS}/test_wrappers.py -k topk",
        ("topk sends the smallest", "flat.abs().topk(", "(-flat.abs()).topk("),
        ("topk forgets", 'Field(True, description="what is not sent', 'Field(False, description="what is not sent'),
    ),
    *of("wrappers/sign", f"{ROUNDS}/test_wrappers.py -k sign",
        ("sign has magnitude 1", '"size": flat.abs().mean()', '"size": torch.tensor(1.0)'),
        ("sign is turned round", "flat >= 0", "flat < 0"),
    ),
    *of("controls/standalone", f"{ROUNDS}/test_public.py -k standalone",
        ("standalone's models travel", "down=None if first else (), up=()", "down=None, up=None"),
        ("standalone never starts from the server", 'first = self.start == "server" and', "first = False and"),
    ),
    *of("controls/exclusive", f"{ROUNDS}/test_public.py -k exclusive",
        ("exclusive lets everybody in", "client.profile.width >= self.width", "client.profile.width >= 0"),
    ),
    *of("controls/serveralone", f"{ROUNDS}/test_public.py -k serveralone",
        ("serveralone does not train", "server.state = server.train(", "server.train("),
    ),
    # Second thoughts: faults that no list named.
    *of("aggregations/krum", f"{ROUNDS}/test_slices.py tests/plugins/aggregations/test_robust.py -k krum",
        ("krum sums over one neighbour more", "max(1, number - attackers - 2)", "max(1, number - attackers - 1)"),
        ("krum's distances grow with what both cover",
         "return total.clamp(min=0) / shared", "return total.clamp(min=0) + 0 * shared"),
        ("krum takes what attackers alone cover", "* len(updates)) > most for n", "* len(updates)) >= most for n"),
        ("krum keeps the farthest", "scores.sort(stable=True)", "scores.sort(stable=True, descending=True)"),
    ),
    *of("aggregations/geomedian", f"{ROUNDS}/test_slices.py tests/plugins/aggregations/test_robust.py -k 'geom or resist'",
        ("geomedian's distances grow with what is covered", "squares / max(1, number)", "squares"),
        ("geomedian moves what few cover", "torch.where(share > 0.5,", "torch.where(share > 0,"),
        ("geomedian takes one step", "for _ in range(self.steps):", "for _ in range(1):"),
    ),
    *of("aggregations/cluster", f"{ROUNDS}/test_slices.py tests/plugins/aggregations -k cluster",
        ("clusters are forgotten while they sit out", "branches = dict(server.branches)", "branches = {}"),
    ),
    *of("aggregations/kld", f"{ROUNDS}/test_public.py tests/plugins/aggregations/test_kld.py "
        "tests/plugins/methods/fedconv/test_strategy.py -k 'kld or weigh or frozen or steps'",
        ("kld's normal start is one for all clients",
         'server.stream(f"kld {name}", 0, u.client)', 'server.stream(f"kld {name}", 0)'),
        ("kld weighs frozen parameters", "if n in server.state and p.requires_grad]", "if n in server.state]"),
        ("kld takes many steps on few examples", "20 if len(server.public.tune) < FEW else 60", "60"),
        ("kld's epochs are steps",
         "return self.epochs * math.ceil(len(server.public.tune) / self.batch_size)", "return self.epochs"),
    ),
    *of("methods/dac", f"{ROUNDS}/test_public.py tests/plugins/methods/test_dac.py -k 'dac and not removes'",
        ("dac's search is not counted for the control",
         "        server.count_steps(steps, server.options.server_batch_size)\n", ""),
        ("dac gates what two layers read", "and len(final[name]) == 1}", "}"),
        ("dac's gates start at equal steps from zero", "(len(r) - 1 - r) / max(1, len(r) - 1)", "(len(r) - r) / max(1, len(r))"),
    ),
    *of("methods/fedmd", f"{ROUNDS}/test_public.py tests/plugins/methods/test_fedmd.py -k 'fedmd or digest'",
        ("fedmd draws without strata", "order = order[y[order].argsort(stable=True)]", "order = order[:]"),
        ("fedmd keeps the moments of a model that is gone", "if not name.startswith(MOMENTS)}", "if True}"),
        ("fedmd teaches the server by its tune labels' loss",
         'server.kind.divergence(server.logits(state', 'DISTANCES["mse"](server.logits(state'),
    ),
    *of("methods/fiarse", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_fiarse.py -k fiarse",
        ("fiarse keeps one entry more",
         "k = max(1, int(gamma * len(magnitudes) + 1e-9))", "k = 1 + int(gamma * len(magnitudes) + 1e-9) % len(magnitudes)"),
        ("fiarse takes its submodels once", "self._thresholds = {gamma:", "self._thresholds = self._thresholds or {gamma:"),
        ("fiarse's mean counts examples", "running_mean(server.state, updates, by_client)", "running_mean(server.state, updates)"),
    ),
    *of("methods/fjord", f"{ROUNDS}/test_slices.py tests/plugins/methods/test_fjord.py -k fjord",
        ("fjord's narrow runs are in evaluation mode", "small.train()", "small.eval()"),
        ("fjord's statistics stay where they were",
         "{**dict(task.model.named_buffers()), **dict(", "{**dict(task.builder.build(task.plan_sizes).named_buffers()), **dict("),
    ),
    *of("methods/hermes", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_hermes.py -k hermes",
        ("hermes's lasso leaves convolutions out", "layers = (nn.modules.conv._ConvNd, nn.Linear)", "layers = (nn.Linear,)"),
        ("hermes forgets who sits out", "{**server.branches, **own}", "own"),
        ("hermes averages what it does not share", "torch.where(among, average, patch.values)", "average"),
    ),
    *of("methods/lotteryfl", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_lotteryfl.py -k 'lottery or late'",
        ("lottery's latecomers rewind to what they are sent", "late = not client.last_round and round > 1", "late = False"),
        ("lottery's latecomers get the present model as the first",
         "self._first = self._first or server.state", "self._first = server.state"),
        ("lottery prunes biases", "if state[name].ndim > 1}", "}"),
    ),
    *of("methods/pruning", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_lotteryfl.py tests/plugins/methods/test_hermes.py",
        ("pruning trains on what it decides by",
         "train, held = task.data.train.split()", "train, held = task.data.train, task.data.train.split()[1]"),
    ),
    *of("methods/tailorfl", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_tailorfl.py -k tailor",
        ("tailor's importance may exceed 1", "values.clamp_(0, 1)", "values.clamp_(0)"),
        ("tailor learns importance in training mode",
         "task.builder.widths, task.model.eval()", "task.builder.widths, task.model.train()"),
        ("tailor sums its regulariser", ".square().mean()", ".square().sum()"),
        ("tailor tunes one list after the other",
         "swap_filters(i, before,", "swap_filters(i, [own[group.name] for own in after.values()],"),
    ),
    *of("methods/scalefl", f"{ROUNDS}/test_exits.py tests/plugins/methods/test_scalefl.py",
        ("scalefl's depth counts nothing", "abs(split[0] / exits - split[1])", "-split[1]"),
        ("scalefl's distillation never ends its warm-up", "self.warm * task.options.rounds", "task.options.rounds"),
    ),
    *of("methods/feddropout", f"{ROUNDS}/test_slices.py -k dropout",
        ("federated dropout keeps the leading channels", "torch.randperm(size, generator=generator)", "torch.arange(size)"),
    ),
    *of("wrappers/dp", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_dp.py -k 'dp and not outlasts'",
        ("dp publishes negative variances", 'released.clamp(min=0) if name.endswith("running_var") else released', "released"),
        ("dp reports one round's epsilon", "server.sampled, server.population, round)", "server.sampled, server.population, 1)"),
        ("dp reports an epsilon though extras travel", "if any(c.more for c in covered):", "if False:"),
        ("dp's share forgets who failed", "len(covered) / server.sampled if server.averages else 1.0", "1.0"),
        ("dp's noise is that of round 1",
         'server.secret_normal(f"dp {name}", round, old.shape)', 'server.secret_normal(f"dp {name}", 1, old.shape)'),
        ("dp's tensors share their noise", 'server.secret_normal(f"dp {name}"', 'server.secret_normal("dp"'),
    ),
    *of("wrappers/codec", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_codecs.py -k 'not flower and not changes'",
        ("codecs take masked plans for one", 'digest.update(b"" if patch.coverage is None else', 'digest.update(b"" if True else'),
        ("codecs take rolled plans for one", "positions.numpy().tobytes())", "bytes(len(positions)))"),
        ("codecs keep what they sent", "values - arrives", "arrives"),
    ),
    *of("wrappers/quantize", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_codecs.py -k 'quanti or drown or lost'",
        ("quantize's largest entry may be 128 steps",
         "torch.nextafter((blocks.abs().amax(1) / most).float(), torch.tensor(torch.inf))",
         "(blocks.abs().amax(1) / most).float()"),
        ("quantize has one step a tensor", "blocks.abs().amax(1) / most", "blocks.abs().amax().expand(len(blocks)) / most"),
    ),
    *of("wrappers/topk", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_codecs.py -k topk",
        ("topk's places are always 16 bits", "torch.int16 if len(flat) <= 2**15 else torch.int32", "torch.int16"),
    ),
    *of("wrappers/maskloss", f"{ROUNDS}/test_slices.py tests/plugins/wrappers/test_maskloss.py -k 'mask or published'",
        ("the masked loss lies outside what an extraction does",
         "@hookimpl(wrapper=True, trylast=True)\n    def fit", "@hookimpl(wrapper=True)\n    def fit"),
        ("the head is the first layer of as many rows", "for name in weights[-1:]]", "for name in weights[:1]]"),
    ),
    *of("wrappers/scaler", f"{ROUNDS}/test_slices.py tests/plugins/wrappers/test_scaler.py",
        ("the scaler leaves the last layer's outputs larger", "if isinstance(m, WEIGHTED)][:-1]", "if isinstance(m, WEIGHTED)]"),
        ("the scaler leaves a model of its own size alone",
         "return kept / sum(task.full_sizes.values()) if kept else 1.0", "return 1.0"),
    ),
    *of("selections/oort", "tests/plugins/selections -k 'oort or chance'",
        ("oort draws from all that it knows", "if value >= bar]", "if True]"),
        ("oort's cutoff is that of the first one wanted", "list(utility.values())[wanted - 1]", "list(utility.values())[0]"),
        ("oort explores ever as much", "self.explore * self.decay ** (round - 1)", "self.explore"),
        ("oort does not mark slow clients down", "bound / max(seconds[c.id], 1e-9)", "1.0"),
        ("oort draws the same every round", "server.sample_stream(round)", "server.sample_stream(1)"),
    ),
    *of("selections/availability", "tests/plugins/selections -k 'avail or chance'",
        ("availability's ties go to the first",
         "torch.randperm(len(clients), generator=server.sample_stream(round)).tolist()", "range(len(clients))"),
        ("availability forgets", "self._seen.update(client.id for client in clients)", "pass"),
    ),
    *of("selections/uniform", "tests/plugins/selections -k 'uniform or chance'",
        ("uniform draws the same every round", "server.sample_stream(round)", "server.sample_stream(1)"),
    ),
    *of("profiles/levels", "tests/plugins/profiles",
        ("redrawn levels ignore their shares",
         "draw([float(share) for _, share in levels], node)", "draw([1.0] * len(levels), node)"),
        ("tiers reach as far as there are levels", "levels[max(0, own - self.tiers) : own + self.tiers + 1]", "levels"),
        ("tiers only go down", "levels[max(0, own - self.tiers) :", "levels[own :"),
        ("levels forget the width of the global model", "min(1.0, share / node.global_width)", "share"),
        ("nobody needs to hold the widest level", "parse_ratio, node.clients, max)", "parse_ratio, node.clients)"),
    ),
    *of("profiles/measure", "tests/plugins/profiles",
        ("measure takes all the memory that is free", "self.share * free_memory()", "free_memory()"),
        ("measure times one step", "node.probe(ratio) * node.steps", "node.probe(ratio)"),
    ),
    *of("profiles/schedule", "tests/plugins/profiles",
        ("a trace ignores the load", '(1 - row.get("load", 0.0))', "1"),
        ("a trace looks ahead", "if r <= node.round)", ")"),
    ),
    *of("profiles/budget", "tests/plugins/profiles",
        ("budgets count one transfer", "2 * cost.bytes / bandwidth", "cost.bytes / bandwidth"),
    ),
    *of("profiles/devices", "tests/plugins/profiles",
        ("devices' compute is linear in the width", "ratio**2 > device.tflops", "ratio > device.tflops"),
    ),
    *of("methods/fedconv/tuning", f"{ROUNDS}/test_fedconv.py tests/plugins/methods/fedconv",
        ("fedconv's compressors never stop early",
         "lr=halve_rate(options.lr, round, options.halve_every), batch=options.batch_size, patience=options.patience",
         "lr=halve_rate(options.lr, round, options.halve_every), batch=options.batch_size, patience=0"),
        ("fedconv judges compressors by what they are tuned on", "float(loss(held_x, held_goal))", "float(loss(x, goal))"),
    ),
    *of("methods/fedconv/strategy", f"{ROUNDS}/test_fedconv.py tests/plugins/methods/fedconv",
        ("fedconv filters frozen parameters",
         "if n in server.state and p.ndim and p.requires_grad]", "if n in server.state and p.ndim]"),
        ("fedconv keeps a dilator of another width",
         "if dilator is None or dilator.selection.sizes != plan.selection.sizes:", "if dilator is None:"),
        ("fedconv ignores server_epochs", "self._steps_of(server, self.server_epochs), \"server\"", "0, \"server\""),
    ),
    *of("methods/fedconv/filters", f"{ROUNDS}/test_fedconv.py tests/plugins/methods/fedconv",
        ("fedconv's MLR is applied once", "for _ in range(times):", "for _ in range(min(times, 1)):"),
        ("fedconv's random filters have another norm",
         "uniform(block.taps), v.flatten(1).norm(dim=1), v", "uniform(block.taps), torch.ones(block.taps), v"),
    ),
    *of("controls/standalone", "tests/runs/test_summary.py -k ranked",
        ("standalone has a global model", "trains_global: ClassVar[bool] = False", "trains_global: ClassVar[bool] = True"),
    ),
    *of("controls/exclusive", f"{ROUNDS}/test_public.py tests/plugins/controls -k exclusive",
        ("exclusive trains the whole model", "server.select(prefix(self.width)) if fits", "server.select(prefix(1)) if fits"),
    ),
    *of("controls/serveralone", f"{ROUNDS}/test_public.py tests/plugins/controls -k serveralone",
        ("serveralone has the run's rate", '"serveralone", round, lr=self.lr)', '"serveralone", round)'),
    ),
    # Third thoughts.
    *of("methods/fiarse", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_fiarse.py -k fiarse",
        ("fiarse keeps large positive weights alone", "{name: tensor.abs() >= theta[name]", "{name: tensor >= theta[name]"),
    ),
    *of("methods/tailorfl", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_tailorfl.py -k 'tailor or length'",
        ("tailor's similarity is no correlation", "torch.corrcoef(theta)", "torch.cov(theta)"),
        ("tailor keeps the least important", "select_largest(own[g.name] ** 2,", "select_largest(-(own[g.name] ** 2),"),
        ("tailor takes importance of any length", ' and r.reply.extras["importance"].numel() == sum(sizes)', ""),
    ),
    *of("methods/scalefl", f"{ROUNDS}/test_exits.py tests/plugins/methods/test_scalefl.py -k 'scale or heads'",
        ("scalefl's exits count in the reverse order", "total = total + i * (", "total = total + (deepest + 1 - i) * ("),
        ("scalefl's heads have no convolutions", "classes, self.exits, self.convs)", "classes, self.exits, 0)"),
    ),
    *of("methods/fedmd", f"{ROUNDS}/test_public.py tests/plugins/methods/test_fedmd.py -k 'fedmd or scores'",
        ("fedmd averages scores of any shape", "if s.shape == (len(rows), server.classes)]", "]"),
        ("fedmd's consensus counts the missing", "(there * c).sum(0).clamp", "(1 + 0 * there).sum(0).mul(c.mean()).clamp"),
    ),
    *of("methods/hermes", f"{ROUNDS}/test_pruning.py tests/plugins/methods/test_hermes.py -k hermes",
        ("hermes prunes at the threshold itself", "accuracy > self.threshold and", "accuracy >= self.threshold and"),
        ("hermes ranks by L1", "list_prunable(task.model), 2)", "list_prunable(task.model), 1)"),
    ),
    *of("methods/lgfedavg", f"{ROUNDS}/test_slices.py tests/plugins/methods/test_lgfedavg.py -k 'lg or local'",
        ("lg's shared layers end before the classifier", 'if layers else []', 'if layers > 1 else []'),
    ),
    *of("methods/fedconv/tiling", f"{ROUNDS}/test_fedconv.py tests/plugins/methods/fedconv",
        ("fedconv has filters for axes of many runs", "if len(runs) > MOST_PARTS:", "if False:"),
        ("fedconv filters over the borders of groups", "breaks = (axis.group[1:] != axis.group[:-1]) |", "breaks ="),
    ),
    *of("methods/fedconv/tuning", f"{ROUNDS}/test_fedconv.py tests/plugins/methods/fedconv",
        ("fedconv tunes dilators without a floor on coverage", "cover[n].clamp(min=1)", "cover[n].clamp(min=1e-12)"),
    ),
    *of("aggregations/geomedian", f"{ROUNDS}/test_slices.py tests/plugins/aggregations/test_robust.py -k geom",
        ("geomedian divides by no distance", "1 / max(self.floor, measure_distance(u, middle))", "1 / measure_distance(u, middle)"),
    ),
    *of("aggregations/krum", f"{ROUNDS}/test_slices.py tests/plugins/aggregations/test_robust.py -k krum",
        ("krum leaves out who shares nothing", "torch.where(known, nearest, 0.0).sum(1)", "nearest.sum(1)"),
    ),
    *of("selections/uniform", "tests/plugins/selections -k 'uniform or ids'",
        ("uniform answers places, not ids", "[clients[place].id for place", "[place for place"),
    ),
    *of("wrappers/dp", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_dp.py -k 'dp and not outlasts'",
        ("dp takes masked entries for covered", "cover(patch.index, patch.coverage, 1.0)", "cover(patch.index, None, 1.0)"),
        ("dp clips at twice the norm", "clip_update(received.reply.state, received.sent, self.norm)",
         "clip_update(received.reply.state, received.sent, 2 * self.norm)"),
        ("dp's epsilon is the larger of two bounds", "return min(exact,", "return max(exact,"),
        ("dp's seed is everybody's", 'f"dp/{self.seed}".encode()', 'b"dp"'),
    ),
    *of("wrappers/topk", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_codecs.py -k topk",
        ("topk sends the largest alone, not the most negative", "flat.abs().topk(", "flat.topk("),
    ),
    *of("wrappers/codec", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_codecs.py -k 'not flower and not changes'",
        ("codecs code every tensor", "update[name].numel() <= SMALL", "update[name].numel() <= 0"),
    ),
    *of("wrappers/clip", f"{ROUNDS}/test_wrappers.py tests/plugins/wrappers/test_clip.py -k clip",
        ("clip bounds the change of each tensor by itself", "{n: before[n] + scale * changes[n] if n in changes",
         "{n: before[n] + float(clip_factors([changes[n].double()[None]], most)) * changes[n] if n in changes"),
    ),
    *of("controls/full", f"{ROUNDS}/test_slices.py -k fedavg",
        ("full sends slices",
         "server.select(prefix(1)) for _ in clients", "server.select(prefix(c.profile.width)) for c in clients"),
    ),
    *of("profiles/devices", "tests/plugins/profiles",
        ("devices forget their deadline", "if node.device is None or node.deadline is None:", "if True:"),
        ("devices have memory enough", "if cost.memory > device.memory:", "if False:"),
    ),
    *of("profiles/budget", "tests/plugins/profiles",
        ("budgets forget the memory", '{"memory": cost.memory, "macs"', '{"macs"'),
    ),
    # Adapters.
    *of("adapters/loraranks", f"{ROUNDS}/test_adapters.py",
        ("ranks roll one by one", "self.step * (round - 1)", "round - 1"),
        ("ranks are drawn once",
         'server.stream(f"ranks {group.name}", round, client.id)', 'server.stream(f"ranks {group.name}", 1, client.id)'),
        ("who pruned gets its ranks back",
         "count = min(count, self._ranks.get(client.id, {}).get(group.name, count))", "count = max(1, count)"),
        ("the last ranks are not held down", "return penalty * torch", "return 0 * torch"),
        ("ranks are pruned where they grew", "if after[g] < before[g]}", "if after[g] > before[g]}"),
        ("the norm of the last ranks is that of A",
         "torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)", "torch.linalg.vector_norm(a)"),
    ),
    *of("methods/prototypes", f"{ROUNDS}/test_prototypes.py",
        ("prototypes pull nobody", "loss(out, y) + self.weight * measure_distance(", "loss(out, y) + 0 * measure_distance("),
        ("prototypes pull by a sum", "known[:, None]).mean()", "known[:, None]).sum()"),
        ("classes without a prototype are pulled to 0", ".square() * known[:, None]", ".square()"),
        ("features are cut, not averaged", "features @ F.adaptive_avg_pool1d(torch.eye(d).to(features), dim)",
         "F.pad(features, (0, dim))[:, :dim]"),
        ("class means are sums", "sums[held] / counts[held, None]", "sums[held]"),
        ("prototypes of any classes are taken", "if prototypes.shape != (int((counts > 0).sum()), self.length(server)):",
         "if False:"),
        ("counts of nothing are taken", "or int(counts.sum()) != reply.examples", ""),
        ("the furthest prototype decides", "masked_fill(~known, torch.inf).argmin(1)", "masked_fill(~known, 0).argmax(1)"),
        ("architectures are not looked at", "if isinstance(plan, OwnModel):", "if False:"),
        ("prototypes come with parameters", "return Exchange(down=(), up=())", "return Exchange()"),
    ),
    *of("methods/fedproto", f"{ROUNDS}/test_prototypes.py",
        ("fedproto always counts examples", 'if self.weighting == "samples" else', "if True else"),
        ("fedproto forgets who is not there", "torch.where(seen[:, None], mean, self._prototypes)", "mean"),
    ),
    *of("methods/fedtgp", f"{ROUNDS}/test_prototypes.py tests/plugins/methods/test_state.py -k 'fedtgp or margin or diverge'",
        ("fedtgp begins anew every round", "net = self._net or draw_net", "net = draw_net"),
        ("fedtgp has no margin", "apart + margin *", "apart + 0 *"),
        ("fedtgp's margin has no bound", "min(find_margin(prototypes, counts > 0), self.margin)",
         "find_margin(prototypes, counts > 0)"),
        ("fedtgp's margin is the smallest", "amin(1).amax()", "amin(1).amin()"),
        ("fedtgp draws to the furthest", "F.cross_entropy(-(apart", "F.cross_entropy((apart"),
        ("fedtgp takes what diverged", "if not all(bool(t.isfinite().all()) for t in trained.values()):", "if False:"),
        ("fedtgp's net is not kept", '**{f"net/{name}": t for name, t in self._net.items()}', ""),
    ),
    *of("adapters/flexlora", f"{ROUNDS}/test_adapters.py",
        ("flexlora's mean is over those that have a rank", "if by_rank else votes / sum(weights)", "if True else votes"),
        ("flexlora keeps the smallest directions", "v[:count], u[:, :count] * s[:count]", "v[-count:], u[:, -count:] * s[-count:]"),
        ("flexlora loses the ranks that nobody has",
         "lost = (~held.any(0)).to(product) * by_rank", "lost = (~held.any(0)).to(product) * 0"),
        ("flexlora ignores examples", "updates.votes(self.weighting), list", 'updates.votes("uniform"), list'),
    ),
    *of("adapters/hetlora", f"{ROUNDS}/test_adapters.py",
        ("hetlora counts examples", "weights = norms if sum(norms) > 0 else updates.weights", "weights = updates.weights"),
        ("hetlora's missing ranks do not count", "(updates.cover(name, weights) / sum(weights))", "1.0"),
    ),
    *of("adapters/fedsa", f"{ROUNDS}/test_adapters.py",
        ("fedsa shares B", "own = {adapter.b for", "own = {adapter.a for"),
    ),
    *of("adapters/ffa", f"{ROUNDS}/test_adapters.py",
        ("ffa trains A", "half.requires_grad_(False)", "pass"),
    ),
    *of("wrappers/grow", "tests/plugins/wrappers/test_widths.py",
        ("widths grow one round late", "int((round - 1) * self.stages", "int((round - 2) * self.stages"),
        ("widths are whole a stage early",
         "self.start + (1 - self.start) * stage / last", "self.start + (1 - self.start) * (stage + 1) / last"),
        ("widths grow to the end of the run", "(self.until * rounds)", "rounds"),
    ),
    *of("wrappers/ration", "tests/plugins/wrappers/test_widths.py",
        ("rations are of widths, not of compute", "width**2 - least**2 <= left", "width - least <= left"),
        ("who needs least is served first",
         "(-find_need(clients[place]), clients[place].id)", "(find_need(clients[place]), clients[place].id)"),
        ("rations exceed what a client affords", "for width in grid if width <= widths[place] and", "for width in grid if"),
    ),
]  # fmt: skip


def copy_tree(to: Path) -> Path:
    """The tree without what it has made, links as links. The folder of runs is left out, the package `runs` is not."""

    def leave_out(folder: str, names: list[str]) -> set[str]:
        return LEFT_OUT(folder, names) | ({"runs"} if Path(folder) == ROOT else set())

    return Path(shutil.copytree(ROOT, to / "tree", symlinks=True, ignore=leave_out))


def import_unmutated(tree: Path) -> None:
    """Imports what no mutation changes, the core from `tree` among it, for the forks that run tests."""
    sys.dont_write_bytecode = True  # a mutated file may be as long as the whole one, and as old
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest warns of a plugin, hypothesis's, that is imported already
    sys.path[:0] = [str(tree / ".typings"), str(tree / "tests")]
    for module in UNMUTATED:
        importlib.import_module(module)
    loaded = [name for name in sys.modules if name.startswith("hetfl.plugins.")]
    assert not loaded, f"mutations of {loaded} would not be seen"


def passes(tree: Path, tests: str) -> bool:
    """Whether the tests pass there, run in a fork of this process. Raises RuntimeError where pytest finds none to run."""
    with tempfile.TemporaryFile() as said:
        if not (child := os.fork()):
            code = pytest.ExitCode.INTERNAL_ERROR
            try:
                os.chdir(tree)
                for descriptor in (1, 2):
                    os.dup2(said.fileno(), descriptor)
                code = pytest.main([*OPTIONS, *shlex.split(tests)])
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, 1):
            said.seek(0)
            raise RuntimeError(f"pytest {tests}: {said.read().decode()}")
    return code == 0


def survives(tree: Path, mutation: Mutation) -> bool:
    """Whether the tests pass with the mutation."""
    path = tree / mutation.path
    whole = path.read_text()
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        return passes(tree, mutation.tests)
    finally:
        path.write_text(whole)


def refuse_stale(mutations: list[Mutation]) -> None:
    """Ends the run where a mutation cannot be made, or its name is not its own."""
    stale = [m.name for m in mutations if (ROOT / m.path).read_text().count(m.old) != 1]
    names = [m.name for m in MUTATIONS]
    stale += sorted({name for name in names if names.count(name) > 1})
    if stale:
        print("not exactly once in their file, or named twice: " + "; ".join(stale), file=sys.stderr)
        raise SystemExit(2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="the mutations whose name holds this")
    parser.add_argument("--list", action="store_true", help="print their names")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.only or any(part in m.name for part in options.only)]
    if options.list or not chosen:
        print("\n".join(m.name for m in MUTATIONS))
        return 0 if options.list else 2
    refuse_stale(chosen)
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        import_unmutated(tree)
        if broken := [tests for tests in dict.fromkeys(m.tests for m in chosen) if not passes(tree, tests)]:
            print("these fail without any mutation: " + "; ".join(broken), file=sys.stderr)
            return 2
        for mutation in chosen:
            survived += [mutation.name] if survives(tree, mutation) else []
            print(f"{'SURVIVED' if mutation.name in survived[-1:] else 'caught  '}  {mutation.name}", flush=True)
    print(f"{len(survived)} of {len(chosen)} mutations survived ({len(survived) / len(chosen):.1%})")
    return int(len(survived) > MOST * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
