"""Whether the tests notice a gutted method: `python benchmarks/mutations.py [--only NAME]`.

Each mutation takes one key term out of a plugin, in a copy of the tree, and runs the tests that should notice. Exit code 1 where
more than a tenth survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROUNDS = ("tests/plugins/rounds",)


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; some of `tests` are to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ROUNDS


KLD, DAC, HETEROFL = "plugins/aggregations/kld.py", "plugins/methods/dac.py", "plugins/methods/heterofl.py"
MUTATIONS = (
    Mutation("kld without cross entropy", KLD, "return F.cross_entropy(logits, y[rows]) + self.kld *", "return self.kld *"),
    Mutation("kld without its term", KLD, "+ self.kld * self._divergence(server, now, logits, before[rows])", ""),
    Mutation("dac without entropy", DAC, " + self.entropy * entropy(gates)", ""),
    Mutation("dac without the bound", DAC, " + self.bound * hinge(gates)", ""),
    Mutation("heterofl without the scaler", HETEROFL, "if self.scaler else nullcontext()", "if False else nullcontext()"),
    Mutation("heterofl without masked loss", HETEROFL, "task.loss = mask_absent_classes(task.data.held_classes)", "pass"),
    Mutation("fedrolex that does not roll", "plugins/methods/fedrolex.py", "window(client.profile.width, start)",
             "window(client.profile.width, 0)"),
    Mutation("hermes without lasso", "plugins/methods/hermes.py", "self.lasso * group_lasso(model)", "0.0 * group_lasso(model)"),
    Mutation("hermes dropping the strongest", "plugins/methods/hermes.py", "select_largest(strength[name]",
             "select_largest(-strength[name]"),
    Mutation("lottery pruning the largest", "plugins/methods/lotteryfl.py", "prune_smallest(w,",
             "prune_smallest(1 / (w.abs() + 1e-9),"),
    Mutation("fjord without distillation", "plugins/methods/fjord.py", "self.distill:", "False:"),
    Mutation("overlap by examples always", "plugins/aggregations/overlap.py", "WEIGHTINGS[self.weighting]",
             'WEIGHTINGS["samples"]'),
    Mutation("fedavg without absentees' votes", "plugins/aggregations/fedavg.py", ", absent=True", ""),
    Mutation("fiarse's mean without its rate", "plugins/methods/fiarse.py", "self.rate * (t - old[n])", "(t - old[n])",
             ("tests/aggregation", "tests/plugins/aggregations", "tests/plugins/methods/test_fiarse.py")),
    Mutation("tailorfl's mean without n / p", "plugins/methods/tailorfl.py",
             "u.weight / ratio(server.clients[u.client].profile.width, self.step)", "u.weight",
             (*ROUNDS, "tests/plugins/methods/test_tailorfl.py")),
    Mutation("fedconv without late epochs", "plugins/methods/fedconv/options.py",
             "self.late_epochs if self.late_epochs is not None and round >= LATE else epochs", "epochs",
             ("tests/plugins/methods/fedconv",)),
)  # fmt: skip


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass on the mutated tree."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs", "*.egg-info"))
        source = (tree / mutation.file).read_text()
        if mutation.old not in source:
            raise SystemExit(f"{mutation.name}: '{mutation.old}' is not in {mutation.file}")
        (tree / mutation.file).write_text(source.replace(mutation.old, mutation.new))
        words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests]
        env = {**os.environ, "PYTHONPATH": str(tree / ".typings")}
        return subprocess.run(words, cwd=tree, env=env, capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one mutation by its name")
    only = parser.parse_args().only
    chosen, alive = [m for m in MUTATIONS if only in (None, m.name)], 0
    for mutation in chosen:
        alive += (survived := survives(mutation))
        print(f"{'SURVIVED' if survived else 'caught':9} {mutation.name}", flush=True)
    print(f"{alive} of {len(chosen)} survived ({alive / max(1, len(chosen)):.0%})")
    sys.exit(alive > 0.1 * len(chosen))


if __name__ == "__main__":
    main()
