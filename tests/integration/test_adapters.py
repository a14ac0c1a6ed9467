"""Runs whose base is frozen: it is named by its hash, and only what is trained is sent, kept and written."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open

import hetfl
from helpers.data_files import write
from helpers.runs import AGGREGATIONS, FOUR_CLIENTS, STOPPABLE, play, tuned
from hetfl.config import resolve
from hetfl.errors import NotApplicable, RunError, UsageError
from hetfl.models.adapters import Lora
from hetfl.models.folders import Pretrained
from hetfl.models.frozen import base_hash, freeze, frozen
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.setup import build_model
from hetfl.runs import runner
from hetfl.runs.experiment import prepare
from hetfl.runs.folder import RunFolder
from hetfl.runs.peft import write_adapters
from hetfl.submodel.blocks import take
from hetfl.submodel.encoding import payload_bytes
from hetfl.submodel.widths import prefix

SMALL = {"limit": 120, "clients": 3, "rounds": 2, "epochs": 1, "pretrain_steps": 5, "control": False, "levels": "1,0.5,0.5"}
LORA = {"model": "mlp", "model_args": {"hidden": [12, 8]}, "adapter": "lora:rank=4,alpha=8"}

QUERY = "layers.0.attention.q.base_layer.weight"


def test_what_is_sent_written_and_put_together_again(tmp_path):
    said = []
    run = hetfl.run(
        extract="heterofl",
        **SMALL,
        **LORA,
        out=tmp_path / "run",
        callback=type("Said", (), {"on_fact": lambda _, t: said.append(t)})(),
    )
    assert any("alpha / rank = 2 whatever ranks a client has" in text for text in said)
    assert set(run.weights) == {*(f"{i}.lora_{half}.weight" for i in (1, 3) for half in "AB"), "5.weight", "5.bias"}
    with safe_open(tmp_path / "run" / "weights.safetensors", "pt") as file:
        base = file.metadata()["base sha256"]
    assert base == json.loads((tmp_path / "run" / "run.json").read_text())["base sha256"]
    assert len(base) == 64
    widest = run.clients[run.clients["level"] == 1].iloc[0]
    assert widest["bytes down"] == payload_bytes(run.weights), "more travelled than what is trained"
    untrained = build_model(*run._parts[:2], "mlp")
    whole = run.model.state_dict()
    assert all(torch.equal(whole[n.replace(".", ".base_layer.", 1) if n[0] in "13" else n], t) or n[0] == "5"
               for n, t in untrained.state_dict().items())  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(run.model(x), untrained(x))
    assert run.submodel(0.5)(x).shape == (2, 10)
    parts = [*(tmp_path / "run" / "checkpoints" / "objects").glob("*.safetensors")]
    assert parts
    assert max(p.stat().st_size for p in parts) < sum(t.nbytes for t in frozen(prepared(LORA).server.builder.model).values())


def prepared(values):
    made = prepare(resolve({"extract": "heterofl", **SMALL, **values}), NoCallback())
    made.close()
    return made


def test_a_stopped_run_goes_on_to_the_same_bits_unless_its_base_is_another(tmp_path, stops):
    first = hetfl.run(extract="heterofl", **{**SMALL, **LORA, "adapter": None}, out=tmp_path / "first")
    values = {**STOPPABLE, **LORA, "extract": "heterofl", "base": tmp_path / "first"}
    assert stops.changes_nothing(tmp_path, resolve(values), 1)
    whole = hetfl.load(tmp_path / "whole")
    assert torch.equal(whole.model.state_dict()["1.base_layer.weight"], first.weights["1.weight"]), "--base was not begun with"
    assert torch.equal(whole.model.state_dict()["5.weight"], whole.weights["5.weight"])
    with pytest.raises(stops.Stopped):
        runner.run(resolve(values), RunFolder(tmp_path / "other").open(), stops.Stopping(1))
    hetfl.run(extract="heterofl", **{**SMALL, **LORA, "adapter": None, "seed": 1}, out=tmp_path / "first", overwrite=True)
    with pytest.raises(RunError, match="base"):
        stops.go_on(tmp_path / "other")
    with pytest.raises(RunError, match="--base"):
        _ = hetfl.load(tmp_path / "whole").model


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [{"extract": "heterofl"}, {"extract": "loraranks", "wrap": ("fedsa",), "base_dtype": "bfloat16"}]
)
def test_processes_give_the_bits_of_threads(values):
    here, there = (play(resolve({**FOUR_CLIENTS, **LORA, **values, "engine": engine})) for engine in ("local", "processes"))
    assert all("fault" not in row for made in (here, there) for row in made.state.client_rows)
    assert all(torch.equal(t, there.server.state[name]) for name, t in here.server.state.items())


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"extract": "fedrolex"}, NotApplicable, "not applicable: the frozen base is not sent"),
        ({"extract": "heterofl", "adapter": "own"}, NotApplicable, "all of this one is trained"),
        ({"extract": "heterofl", "adapter": "lora:target=conv"}, NotApplicable, "no layer that can have an adapter is 'conv'"),
        ({"extract": "heterofl", "base": "nowhere"}, UsageError, "the weights in 'nowhere' cannot be read"),
    ],
)
def test_what_cannot_be_is_said(values, error, words):
    with pytest.raises(error, match=words):
        hetfl.run(**{**SMALL, **LORA, **values})


def test_a_base_in_bfloat16_is_named_by_its_values_and_put_together_again(tmp_path):
    said = []
    tell = type("Said", (), {"on_fact": lambda _, text: said.append(text)})()
    run = hetfl.run(extract="heterofl", **SMALL, **LORA, base_dtype="bfloat16", out=tmp_path / "run", callback=tell)
    assert any("held in bfloat16, adapters and arithmetic are float32" in text for text in said)
    assert {t.dtype for t in run.weights.values()} == {torch.float32}
    made = prepared({**LORA, "base_dtype": "bfloat16"})
    assert made.server.builder.base_hash == json.loads((tmp_path / "run" / "run.json").read_text())["base sha256"]
    assert made.server.builder.base_hash != prepared(LORA).server.builder.base_hash
    x, low = torch.randn(3, 1, 8, 8), made.server.builder
    assert torch.equal(run.model(x), low.load(run.weights).eval()(x))
    assert torch.equal(run.submodel(1.0)(x), run.model(x))
    with pytest.raises(UsageError, match="base_dtype bfloat16 is for a frozen base: give adapter too"):
        hetfl.run(extract="heterofl", **SMALL, model="mlp", base_dtype="bfloat16")


def test_a_base_of_another_model_is_refused(tmp_path):
    hetfl.run(extract="heterofl", **{**SMALL, "model": "mlp", "model_args": {"hidden": [6, 8]}, "rounds": 1}, out=tmp_path)
    with pytest.raises(UsageError, match=r"their '1.weight' is \(6, 64\), and that of the model \(12, 64\)"):
        hetfl.run(extract="heterofl", **SMALL, **LORA, base=tmp_path)


def test_a_model_with_adapters_of_its_own(tmp_path):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 8).requires_grad_(False), torch.nn.ReLU(), torch.nn.Linear(8, 10)
    )
    run = hetfl.run(extract="heterofl", model=net, adapter="own", **SMALL)
    assert set(run.weights) == {"3.weight", "3.bias"}
    assert torch.equal(run.model[1].weight, net[1].weight)


def test_peft_loads_what_was_exported(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install hetfl[peft])")
    run = hetfl.run(extract="heterofl", **SMALL, **LORA)
    run.export_peft(tmp_path)
    again = peft.PeftModel.from_pretrained(build_model(*run._parts[:2], "mlp"), tmp_path).eval()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(again(x), run.model(x))


def test_halves_that_stay_as_they_were_drawn_are_exported_too(tmp_path):
    run = hetfl.run(extract="heterofl", wrap=("ffa",), **SMALL, **LORA)
    run.export_peft(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("base_model.model.3.lora_A.weight"), run.model[3].lora_A.weight)


def test_what_is_exported_of_a_wrapped_text_model_is_named_as_the_model_itself(tmp_path):
    net = torch.nn.Sequential(torch.nn.Embedding(9, 4), Lora(torch.nn.Linear(4, 3), 2, 1.0))
    write_adapters(
        Pretrained(net, 0), ["net.1.lora_A.weight", "net.1.lora_B.weight"], resolve({**LORA, "extract": "full"}), tmp_path
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "1"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {*file.keys()} == {f"base_model.model.1.lora_{half}.weight" for half in "AB"}


@pytest.mark.parametrize("how", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_a_convolution_that_pefts_adapter_would_compute_otherwise_is_not_exported(tmp_path, how):
    net = torch.nn.Sequential(Lora(torch.nn.Conv2d(1, 2, 3, padding=1, **how), 2, 1.0))
    with pytest.raises(UsageError, match="'0' does"):
        write_adapters(net, ["0.lora_A.weight"], resolve({**LORA, "extract": "full"}), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_base_with_attention_is_cut_in_each_of_its_heads(simulate, tmp_path):
    """A node, which is told numbers of units alone, has the very entries that the server counts the client's values for."""
    texts = {"text": [f"{'good' if i % 2 else 'bad'} w{i % 7} w{i % 5}" for i in range(90)], "label": [i % 2 for i in range(90)]}
    for split in ("train", "test"):
        write(tmp_path, texts, split)
    values = {"dataset": str(tmp_path), "model": "encoder", "adapter": "lora:rank=4,target=attention", "levels": "1,0.5,0.5",
              "model_args": {"width": 8, "layers": 1, "heads": 2}, "tokens": 6, "vocab": 30}  # fmt: skip
    made = simulate(1, extract="heterofl", **values)
    plan = made.server.select(prefix(0.5))
    assert not plan.cuts[QUERY].leads, "one head alone, or nothing is cut"
    base = made.server.builder.base
    assert torch.equal(frozen(made.server.builder.module(plan.sizes))[QUERY], take(base[QUERY], plan.cuts[QUERY]))
    assert not any("fault" in row for row in made.state.client_rows)
    with pytest.raises(NotApplicable, match="leading channels alone"):
        simulate(1, extract="feddropout", **values)


def test_clients_prune_ranks_of_which_one_half_is_frozen(simulate):
    made = simulate(2, extract="loraranks", adapter="lora:rank=4", wrap=("ffa",), set={"loraranks": {"prune": 0.5, "penalty": 9.0}})
    assert not any("fault" in row for row in made.state.client_rows)


@pytest.mark.parametrize("aggregate", ["overlap", "flora"])
def test_the_base_that_threads_share_is_never_written_to(simulate, aggregate):
    made = simulate(0, extract="loraranks", aggregate=aggregate, adapter="lora:rank=4", pretrain_steps=5)
    before = {name: tensor._version for name, tensor in made.server.builder.base.items()}
    run_round(made.state, 1, made.engine)
    made.server.train(made.server.state, 12, "finetune", 1)
    assert {name: tensor._version for name, tensor in made.server.builder.base.items()} == before != {}


def test_what_flora_added_to_the_base_is_in_the_model_and_no_adapter(tmp_path):
    run = hetfl.run(extract="loraranks", aggregate="flora", **SMALL, **LORA, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["base sha256"] == base_hash(freeze(copy.deepcopy(run.model)))
    layer, x = hetfl.load(tmp_path / "run").model[1], torch.randn(3, 64)
    weight = layer.base_layer.weight + 2 * run.weights["1.change"]
    assert bool(run.weights["1.change"].any())
    assert torch.allclose(layer(x), x @ weight.T + layer.base_layer.bias, atol=1e-5)
    with pytest.raises(UsageError, match="added what it learned to the frozen base"):
        run.export_peft(tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_what_is_exported_names_the_adapted_layers(tmp_path):
    run = hetfl.run(extract="heterofl", **SMALL, **LORA)
    run.export_peft(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {config[key] for key in ("r", "lora_alpha", "target_modules")} == {4, 8.0, "1|3"}
    assert config["modules_to_save"] == ["5"]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("base_model.model.3.lora_B.weight"), run.weights["3.lora_B.weight"])
    with pytest.raises(UsageError, match="no --adapter lora"):
        hetfl.run(extract="heterofl", **{**SMALL, **LORA, "adapter": None}).export_peft(tmp_path)


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_ranks_go_with_any_aggregation(simulate, aggregate):
    made = simulate(2, adapter="lora:rank=4", **tuned("loraranks", aggregate, 2))
    assert not any("fault" in row for row in made.state.client_rows)
    assert all(bool(torch.isfinite(t).all()) for t in made.server.state.values())
    assert {name.partition(".")[2] for name in made.server.builder.base} == {"base_layer.weight", "base_layer.bias"}


@pytest.mark.parametrize(
    "values",
    [
        {"extract": "heterofl", "aggregate": "flexlora"},
        {"extract": "loraranks", "aggregate": "flexlora", "wrap": ("fedsa",)},
        {"extract": "loraranks", "aggregate": "flexlora", "wrap": ("ffa",)},
        {"extract": "loraranks", "aggregate": "hetlora", "wrap": ("ffa",)},
        {"extract": "heterofl", "aggregate": "flora"},
        {"extract": "loraranks", "aggregate": "flora", "wrap": ("fedsa",)},
        {"extract": "loraranks", "aggregate": "flora", "wrap": ("ffa",)},
        {"extract": "loraranks", "aggregate": "flora", "wrap": ("quantize",), "set": {"quantize": {"down": True}}},
        {"extract": "full", "aggregate": "flora", "adapter": None},
        {"extract": "loraranks", "wrap": ("ffa",), "set": {"loraranks": {"mode": "window"}}},
        {"extract": "loraranks", "adapter": None},
        {"extract": "heterofl", "wrap": ("fedsa",), "adapter": None},
        {"extract": "heterofl", "wrap": ("ffa",), "adapter": None},
        {"extract": "full", "aggregate": "hetlora", "adapter": None},
    ],
)
def test_what_makes_no_sense_of_adapters_is_not_applicable(simulate, values):
    with pytest.raises(NotApplicable, match="not applicable: "):
        simulate(2, **{"adapter": "lora:rank=4", **values})
