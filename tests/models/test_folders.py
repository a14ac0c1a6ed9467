"""Models of transformers in local folders: tiny random ones where transformers is installed; what needs none of it anywhere."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

import hetfl
from hetfl.config import resolve
from hetfl.data.inputs import Inputs
from hetfl.data.kinds import KINDS
from hetfl.errors import UsageError
from hetfl.models.factory import build_model
from hetfl.models.folders import fetch_model, follow_model
from hetfl.submodel.tracing.groups import trace

TEXTS = [f"the {noun} is {word}" for word in ("red", "blue", "round", "old") for noun in ("cat", "dog", "house", "tree", "sea")] * 4

DATA = {"text": TEXTS, "label": [i // 5 % 4 for i in range(80)]}

FEW = {
    "clients": 2,
    "rounds": 1,
    "epochs": 1,
    "levels": "1,0.5",
    "partition": "iid",
    "pretrain_steps": 2,
    "workers": 1,
    "tokens": 8,
}


def empty(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_what_is_no_models_folder_is_refused_in_a_sentence(tmp_path):
    for folder, said in (
        ("none", "there is no such folder"),
        ("bare", "holds no config.json"),
        ("half", "holds no model.safetensors"),
    ):
        if folder != "none":
            empty(tmp_path / folder)
            (tmp_path / folder / {"bare": "config.json", "half": "model.safetensors"}[folder]).unlink()
        with pytest.raises(UsageError, match=said):
            follow_model(resolve({"model": f"hf:{tmp_path / folder}"}))
    (empty(tmp_path / "odd") / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        follow_model(resolve({"model": f"hf:{tmp_path / 'odd'}"}))


def test_what_is_no_folder_is_a_model_of_the_hub(tmp_path, monkeypatch):
    """Fetched once; a local folder of the name comes first."""
    asked = []

    def fetch(model, revision, allow_patterns):
        asked.append((model, revision))
        if model == "no/such":
            raise OSError("404 Client Error")
        return str(empty(tmp_path / "kept", vocab_size=77))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    fetch_model.cache_clear()
    assert [follow_model(resolve({"model": "hf:some-org/tiny@v1"})).vocab for _ in range(2)] == [77, 77]
    assert asked == [("some-org/tiny", "v1")]
    with pytest.raises(UsageError, match=r"no such folder, and the Hugging Face hub gives no such model: 404 Client Error$"):
        follow_model(resolve({"model": "hf:no/such"}))
    monkeypatch.chdir(tmp_path)
    empty(tmp_path / "mine", vocab_size=5)
    assert follow_model(resolve({"model": "hf:mine"})).vocab == 5
    assert len(asked) == 2


def test_data_follow_the_model_unless_they_are_told_otherwise(tmp_path):
    name = f"hf:{empty(tmp_path, vocab_size=77)}"
    assert (follow_model(resolve({"model": name})).vocab, follow_model(resolve({"model": name})).tokenizer) == (77, None)
    assert follow_model(resolve({"model": name, "vocab": 50})).vocab == 50
    (tmp_path / "tokenizer.json").write_text("{}")
    assert follow_model(resolve({"model": name})).tokenizer == tmp_path
    assert follow_model(resolve({"model": "encoder"})).vocab == 8192


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name, *_: refuse(name))
    with pytest.raises(UsageError, match=r"needs transformers: pip install 'hetfl\[transformers\]'"):
        build_model(f"hf:{empty(tmp_path, vocab_size=77)}", {}, Inputs((8,), 2, 77), 0)


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install 'hetfl[transformers]')")


BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def bert(hub, tmp_path_factory):
    """A random BERT of a folder with a tokenizer: the words of TEXTS."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
    (folder / "vocab.txt").write_text("\n".join(words))
    hub.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    hub.BertForMaskedLM(hub.BertConfig(vocab_size=len(words), **BODY)).save_pretrained(folder)
    return folder, len(words)


@pytest.fixture(scope="module")
def gpt(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(0)
    hub.GPT2LMHeadModel(hub.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(folder)
    return folder


def test_the_weights_of_the_folder_are_the_models(bert, hub):
    folder, vocab = bert
    model = build_model(f"hf:{folder}", {}, Inputs((8,), 4, vocab), 0)
    body, plain = model.net.bert, hub.BertModel.from_pretrained(folder, local_files_only=True)
    ids = torch.randint(5, vocab, (3, 8))
    ids[0, 5:] = 0
    wanted = plain.eval()(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert torch.equal(body.eval()(ids, attention_mask=(ids != 0).long()).last_hidden_state, wanted)
    with torch.no_grad():
        out = model.eval()(ids)
        assert torch.allclose(out[0], model(ids[:1, :5])[0], atol=1e-6), "padding is not seen"
    again = build_model(f"hf:{folder}", {}, Inputs((8,), 4, vocab), 0).eval()
    assert torch.equal(again(ids), out), "the new head follows from the seed"


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.tokens], ids=lambda kind: kind.name)
def test_a_bert_is_cut_along_its_widths_for_any_head(bert, kind):
    folder, vocab = bert
    inputs = Inputs((8,), 3, vocab, kind)
    widths = trace(build_model(f"hf:{folder}", {}, inputs, 0), inputs.batch())
    assert len(widths.groups) == 6
    assert widths.elastic() == pytest.approx(1.0, abs=0.01)


def test_a_gpt_is_cut_along_its_widths(gpt):
    inputs = Inputs((8,), 60, 60, KINDS["lm"])
    model = build_model(f"hf:{gpt}", {}, inputs, 0)
    assert model(inputs.batch()).shape == (2, 8, 60)
    assert trace(model, inputs.batch()).elastic() == pytest.approx(1.0, abs=0.01)


def test_a_language_model_sees_no_token_that_it_predicts_whatever_it_is_made_of(bert, gpt):
    sizes = {name: size for name, size in BODY.items() if name != "max_position_embeddings"}
    for name, args, vocab in ((f"hf:{bert[0]}", {}, bert[1]), (f"hf:{gpt}", {}, 60), ("transformers:bert", sizes, 60)):
        inputs = Inputs((8,), vocab, vocab, KINDS["lm"])
        model, ids = build_model(name, args, inputs, 0).eval(), inputs.batch().clamp(min=5)
        other = ids.index_fill(1, torch.tensor([7]), 5)
        with torch.no_grad():
            assert torch.allclose(model(ids)[:, :7], model(other)[:, :7], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"adapter": "lora:rank=4,target=attention", "extract": "loraranks"}])
def test_a_bert_learns_to_classify(bert, options):
    import datasets

    folder, vocab = bert
    run = hetfl.run(data=datasets.Dataset.from_dict(DATA), model=f"hf:{folder}", **{"extract": "heterofl", **FEW, **options})
    assert run.options.tokenizer == folder
    assert run.options.vocab == vocab
    assert run.metrics.iloc[-1]["left out"] == 0
    ids = torch.randint(5, vocab, (2, 8))
    assert run.model(ids).shape == run.submodel(0.5)(ids).shape == (2, 4)


def test_a_gpt_learns_the_next_words_by_hashing_where_there_is_no_tokenizer(gpt):
    import datasets

    run = hetfl.run(
        data=datasets.Dataset.from_dict({"text": TEXTS}), task="lm", model=f"hf:{gpt}", extract="heterofl", **{**FEW, "rounds": 2}
    )
    assert (run.options.vocab, run.options.tokenizer) == (60, None)
    losses = run.metrics["global@test loss"].tolist()
    assert losses[-1] < losses[0] < 4.2
    assert run.submodel(0.5)(torch.ones(2, 8, dtype=torch.int64)).shape == (2, 8, 60)


def test_what_does_not_fit_is_refused_in_a_sentence(bert, gpt, hub, tmp_path):
    folder, vocab = bert
    with pytest.raises(UsageError, match=rf"knows {vocab} tokens and the data have 99: give --vocab {vocab}"):
        build_model(f"hf:{folder}", {}, Inputs((8,), 4, 99), 0)
    with pytest.raises(UsageError, match="reads 16 tokens at most: give --tokens 16"):
        build_model(f"hf:{folder}", {}, Inputs((20,), 4, vocab), 0)
    with pytest.raises(UsageError, match=r"weights do not fit its config.json: 'bert\..+ is missing or of another shape"):
        build_model(f"hf:{folder}", {"hidden_size": 32}, Inputs((8,), 4, vocab), 0)
    hub.AutoConfig.from_pretrained(gpt).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no model for CausalLM"):
        build_model(f"hf:{tmp_path}", {}, Inputs((8,), 60, 60, KINDS["lm"]), 0)
