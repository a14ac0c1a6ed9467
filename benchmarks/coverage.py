"""Shrinkability: traces a wide list of architectures and writes docs/coverage.md: python benchmarks/coverage.py [--only timm]

Each is built with random weights (no downloads), traced, and cut at random twice; the cut model is compared with the full one
whose other entries are zero. Needs timm, torchvision and transformers beside hetfl's test extra (pip install timm transformers;
pip install --no-deps torchvision). Rows that are already in the --rows file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from hetfl.data.inputs import Inputs
from hetfl.models import factory
from hetfl.models.zoo import ZOO
from hetfl.profiling.inspection import choose_inputs
from hetfl.rng import stream
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.verify import compare_cut

ROOT = Path(__file__).parents[1]

LARGEST = 130_000_000  # parameters

SECONDS = 600

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}

GROUPED = {"num_key_value_heads": 4}

PLAIN_TEXT = (
    "albert bert big_bird bloom camembert convbert ctrl data2vec-text deberta deberta-v2 distilbert electra ernie falcon "
    "flaubert gpt2 gpt_neox mobilebert modernbert mpnet nystromformer openai-gpt opt phi roberta roformer xlm xlm-roberta yoso"
).split()

OTHER_TEXT = {
    "fnet": {k: v for k, v in SMALL.items() if "attention" not in k},
    "funnel": {},
    "gemma": SMALL | GROUPED | {"head_dim": 16},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "llama": SMALL | GROUPED,
    "mistral": SMALL | GROUPED,
    "qwen2": SMALL | GROUPED,
    "squeezebert": SMALL | {"embedding_size": 64},
    "stablelm": SMALL | GROUPED,
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
}

TEXT: dict[str, Any] = dict.fromkeys(PLAIN_TEXT, SMALL) | OTHER_TEXT

PLAIN_PICTURES = "beit data2vec-vision dinov2 ijepa vit vit_msn".split()

OTHER_PICTURES = (
    "bit convnext convnextv2 cvt efficientnet focalnet levit mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt "
    "pvt_v2 regnet resnet segformer swiftformer swin swinv2"
).split()

PICTURES: dict[str, Any] = dict.fromkeys(PLAIN_PICTURES, SMALL) | {name: {} for name in OTHER_PICTURES}

TIMM = (  # of every module of timm the architecture with the fewest parameters
    "beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext "
    "cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 "
    "dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvim_m1 "
    "efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny "
    "ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto "
    "inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout maxvit_pico_rw_256 "
    "poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny "
    "naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 "
    "rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 "
    "legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 "
    "swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 "
    "visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 "
    "ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224"
).split()

LEFT_OUT = (
    "Left out: timm's deepseek_vit, gemma4_vit and qwen3_vit (built for 546 pixels and more), hieradet_sam2 (896 pixels), and "
    "transformers' encoder-decoders (bart, t5), which refuse examples without an end token."
)


def prepare() -> None:
    """Lets torchvision be imported beside a torch built without its compiled operators."""
    warnings.simplefilter("ignore")
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARIES.append(library)
    torch.set_num_threads(1)


LIBRARIES: list[Any] = []


def jobs(only: str | None) -> Iterator[tuple[str, str]]:
    """(source, name) of every architecture."""
    import torchvision

    listed = torchvision.models.list_models(module=torchvision.models)
    everything = {"zoo": list(ZOO), "transformers": [*TEXT, *PICTURES], "timm": TIMM, "torchvision": listed}
    return ((source, name) for source, names in everything.items() for name in names if only in (None, source))


def made(source: str, name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model and an example batch."""
    if source == "zoo":
        inputs, args, full = choose_inputs(name, None, None, None, None), {}, name
    else:
        inputs, args, full = Inputs((3, side(source, name), side(source, name)), 10), arguments(source, name), f"{source}:{name}"
    if name in TEXT:
        inputs = Inputs((16,), 10, 200)
    return factory.build_model(full, args, inputs, 0), inputs.batch()


def side(source: str, name: str) -> int:
    if source == "timm":
        import timm

        return int(timm.get_pretrained_cfg(name).input_size[1]) if timm.get_pretrained_cfg(name) else 224
    return 299 if name == "inception_v3" else 224


def arguments(source: str, name: str) -> dict[str, Any]:
    if source == "torchvision":
        return {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return {**TEXT, **PICTURES}.get(name, {}) if source == "transformers" else {}


def measure(job: tuple[str, str]) -> dict[str, Any]:
    """One row."""
    signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    row: dict[str, Any] = {"source": job[0], "name": job[1]}
    try:
        model, x = made(*job)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if row["parameters"] > LARGEST:
            return {**row, "skipped": f"more than {LARGEST // 10**6} million parameters"}
        started = time.perf_counter()
        widths = trace(model, x)
        row |= {"seconds": time.perf_counter() - started, "groups": len(widths.groups), "elastic": widths.elastic()}
        row["frozen"] = Counter(why.split(" in ")[0] for why in widths.frozen.values())
        row["error"] = max(cut(widths, model, x, seed) for seed in (1, 2)) if widths.groups else None
    except BaseException as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        signal.alarm(0)
    return row


class Expired(BaseException):
    """Not an Exception, so that no proof takes it for a failed cut."""


def expire(*_: object) -> None:
    raise Expired(f"more than {SECONDS} s")


def cut(widths: Any, model: nn.Module, x: torch.Tensor, seed: int) -> float:
    """The error of one random cut, each group to between 1 and all of its units."""
    draw = stream(seed, "coverage")
    kept = {
        g.name: torch.randperm(g.size, generator=draw)[: int(torch.randint(1, g.size + 1, (1,), generator=draw))]
        for g in widths.groups
    }
    return compare_cut(widths, model, [x], kept, draw)[1]


def exact(row: dict[str, Any]) -> bool:
    return row.get("groups", 0) > 0 and row.get("error") is not None and row["error"] <= 1e-4


def report(rows: list[dict[str, Any]]) -> str:
    """docs/coverage.md."""
    tried = [row for row in rows if "skipped" not in row]
    good = [row for row in tried if exact(row)]
    lines = [
        "# Shrinkability: which architectures are traced, and how much of them can be cut", "",
        "Written by `python benchmarks/coverage.py`. Every architecture is built with random weights and no line written for it, "
        "traced, and cut at random twice, each width group to between 1 and all of its units; *error* is the largest difference "
        "between the outputs of the cut model and of the full one with the other entries zero, relative to 1 + the largest output. "
        "The full model reduces over the channels that remain (normalisation, means) and is given the cut one's numbers (the "
        "1 / sqrt(width) of attention), which rightly differ. *Elastic* "
        "is the share of parameters and buffers' entries that some cut can remove. Traced and exact: at least one width group, and "
        "an error of at most 1e-4.", "",
        f"**{len(good)} of {len(tried)} architectures ({len(good) / len(tried):.1%}) are traced and exact.** "
        f"Median elastic share of these {median(r['elastic'] for r in good):.1%}, at least half of the entries in "
        f"{sum(r['elastic'] >= 0.5 for r in good)}; median time {median(r['seconds'] for r in good):.1f} s (other jobs beside). "
        "Torch-Pruning reports 81 of 85 torchvision models as prunable.", "", LEFT_OUT, "",
        "| from | traced and exact | of | median elastic | largest error |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for source in dict.fromkeys(row["source"] for row in rows):
        ours = [row for row in good if row["source"] == source]
        of = sum(row["source"] == source for row in tried)
        lines.append(
            f"| {source} | {len(ours)} | {of} | {median(r['elastic'] for r in ours):.1%} | {max(r['error'] for r in ours):.0e} |"
        )
    lines += ["", "## Not traced and exact", "", "| architecture | why |", "|---|---|"]
    lines += [f"| {row['source']}:{row['name']} | {why(row)} |" for row in tried if not exact(row)]
    lines += [f"| {row['source']}:{row['name']} | not run: {row['skipped']} |" for row in rows if "skipped" in row]
    lines += [
        "",
        "## All",
        "",
        "| architecture | parameters | groups | elastic | error | seconds | frozen (layers) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in good:
        cells = [f"{row['source']}:{row['name']}", f"{row['parameters']:,}", str(row["groups"]), f"{row['elastic']:.1%}"]
        lines.append("| " + " | ".join([*cells, f"{row['error']:.0e}", f"{row['seconds']:.1f}", frozen(row)]) + " |")
    return "\n".join(lines) + "\n"


def why(row: dict[str, Any]) -> str:
    return str(row.get("failed") or ("no width can be cut: " + frozen(row) if not row["groups"] else f"error {row['error']:.1e}"))


def frozen(row: dict[str, Any]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in row["frozen"].items() if reason != "the model's output")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="zoo, transformers, timm or torchvision")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--rows", type=Path, default=ROOT / "build" / "coverage.jsonl", help="what was measured, a JSON object a line"
    )
    given = parser.parse_args()
    given.rows.parent.mkdir(exist_ok=True)
    prepare()
    found = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    had = {(row["source"], row["name"]) for row in found}
    wanted = list(jobs(given.only))
    with get_context("fork").Pool(given.workers, maxtasksperchild=8) as pool, given.rows.open("a") as file:
        for row in pool.imap_unordered(measure, [job for job in wanted if job not in had]):
            found.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                row["source"],
                row["name"],
                row.get("groups"),
                f"{row.get('elastic', 0):.2f}",
                row.get("error"),
                row.get("failed", ""),
            )
    order = {job: place for place, job in enumerate(jobs(None))}
    rows = sorted((r for r in found if (r["source"], r["name"]) in order), key=lambda r: order[r["source"], r["name"]])
    (ROOT / "docs" / "coverage.md").write_text(report(rows))


if __name__ == "__main__":
    main()
