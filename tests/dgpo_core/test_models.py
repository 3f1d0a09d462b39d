"""Model folders."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.config.data import ModelShape
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.models import (
    broken_weight,
    build_model,
    cut_depth,
    kept_layers,
    load_model,
    load_tokenizer,
    save_model,
)
from dgpo_core.training.batches import Critic
from tests.dgpo_core.making import tiny_model


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_round_trip_and_plain_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(model, tokenizer, tmp_path / "m")
    loaded, plain = load_model(str(tmp_path / "m")), AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not loaded.training
    assert same_weights(loaded, model) and same_weights(plain, model)
    assert load_tokenizer(str(tmp_path / "m")).get_vocab() == tokenizer.get_vocab()
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    assert any(tmp_path.glob("m/*.safetensors"))


def test_whoever_may_read_the_folder_may_read_all_of_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(model, tokenizer, tmp_path / "m")
    (tmp_path / "other").touch()
    usual = (tmp_path / "other").stat().st_mode
    assert [path.name for path in (tmp_path / "m").iterdir() if path.stat().st_mode != usual] == []


def test_a_machine_without_a_network_saves_the_same(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(model, tokenizer, tmp_path / "made")
    names = ["online", "offline"]
    for name in names:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", name == "offline")
        save_model(model, load_tokenizer(str(tmp_path / "made")), tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in names]
    assert files[0] == files[1]


def test_same_seed_same_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, other = (tiny_model(tokenizer, seed) for seed in (1, 1, 2))
    assert same_weights(first, second) and not same_weights(first, other)


def test_saving_replaces_the_whole_folder_or_nothing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "deep" / "m"
    folder.mkdir(parents=True)
    (folder / "of-another-model").touch()
    save_model(model, tokenizer, folder)
    assert not (folder / "of-another-model").exists()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        save_model(tiny_model(tokenizer, 5), tokenizer, folder)
    assert same_weights(load_model(str(folder)), model)
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_folders_without_their_parts(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="this model folder has no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load a model") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("source", ["here/absent", "some/folder/absent", "./absent", "/absent"])
def test_missing_folder_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="there is no such model folder"):
            load(source)


def broken(tokenizer: PreTrainedTokenizerFast, value: float) -> PreTrainedModel:
    model = tiny_model(tokenizer, 5)
    with torch.no_grad():
        next(model.parameters())[3, 4] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_not_saved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, value: float
) -> None:
    save_model(model, tokenizer, tmp_path / "m")
    with pytest.raises(NotFinite, match=r"the weight model\.embed_tokens\.weight .*; the model is not saved"):
        save_model(broken(tokenizer, value), tokenizer, tmp_path / "m")
    assert same_weights(load_model(str(tmp_path / "m")), model), "the folder is as it was"


def test_weights_that_are_no_numbers_are_not_loaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    broken(tokenizer, math.nan).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"embed_tokens\.weight has entries that are nan or infinite"):
        load_model(str(tmp_path))


def test_every_embedding_is_trained_whatever_is_called_padding(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """SmolLM2's config.json, and those of many fine-tuned models, name the EOS as padding."""
    model = tiny_model(tokenizer)
    config = model.config
    config.tie_word_embeddings = False  # of a tied one, the output would learn the row
    config.pad_token_id = config.eos_token_id
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    assert loaded.config.pad_token_id == tokenizer.eos_token_id
    for trained in (loaded, Critic(loaded), model):
        eos = tokenizer.eos_token_id
        trained.zero_grad()
        embedding = next(m for m in trained.modules() if isinstance(m, torch.nn.Embedding))
        embedding(torch.tensor([[5, eos, 7]])).sum().backward()
        assert embedding.weight.grad is not None
        assert embedding.weight.grad[eos].abs().sum() > 0
        assert embedding.padding_idx is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_broken_entry_is_found(value: float, dtype: torch.dtype) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)).to(dtype)
    module.register_parameter("empty", torch.nn.Parameter(torch.empty(0, 4, dtype=dtype)))
    assert broken_weight(module) is None
    with torch.no_grad():
        dict(module.named_parameters())["1.weight"][1, 3] = value
    assert broken_weight(module) == "1.weight"


def test_which_layers_a_cut_keeps() -> None:
    assert kept_layers(12, 3) == [0, 6, 11]  # as the published students have them
    assert kept_layers(12, 12) == list(range(12))
    assert kept_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    for count in (1, 13):
        with pytest.raises(UserError, match=f"layers: {count}: the model has 12 layers"):
            kept_layers(12, count)


def test_a_cut_model_is_the_model_whose_other_layers_do_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shape = ModelShape(hidden_size=32, layers=5, heads=2, intermediate_size=48)
    torch.manual_seed(3)
    model = build_model(shape, tokenizer).eval()
    cut = cut_depth(model, 3)
    for layer in (1, 3):  # a block whose outputs are zero adds nothing to the stream
        block = model.get_submodule(f"model.layers.{layer}")
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            torch.nn.init.zeros_(block.get_submodule(name).weight)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        assert torch.allclose(cut(ids).logits, model(ids).logits, atol=1e-6)
    assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
    save_model(cut, tokenizer, tmp_path / "cut")
    loaded = load_model(str(tmp_path / "cut"))
    assert loaded.config.num_hidden_layers == 3 and same_weights(loaded, cut)
    generate: Any = loaded.generate
    written = generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    again = generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(written, again), "each layer has a place of its own in the cache"


class Runs:
    """Writes a file when it is read by pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_no_code_of_a_model_folder_is_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Neither of pickled weights nor of a module beside them."""
    folder, mark = tmp_path / "m", tmp_path / "mark"
    save_model(model, tokenizer, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Runs(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load a model"):
        load_model(str(folder))

    save_model(model, tokenizer, folder)
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("AutoConfig", "AutoModelForCausalLM"):
        config |= {"model_type": "own", "auto_map": {**config.get("auto_map", {}), kind: "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load a model"):
        load_model(str(folder))
    assert not mark.exists()
