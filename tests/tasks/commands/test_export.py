"""Folders for other programs: each form is read by the library that it is for."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo_core.config.params import load_params
from dgpo_core.config.training import LoraConfig
from dgpo_core.errors import UserError
from dgpo_core.models import add_adapters, load_model, load_tokenizer, save_model
from tasks.commands.export import export
from tasks.tracking.evaluations import register_trained
from tests.conftest import ROOT
from tests.tasks.trained import make_trained, write_lock

IDS = torch.arange(30)[None] * 11


@pytest.fixture
def project(own_store: Path) -> Path:
    """Recipes kd and dgpo with real weights: the embedded student's."""
    make_trained(own_store)
    for recipe in ("kd", "dgpo"):
        folder = shutil.copytree(ROOT / "models/student", own_store / "models" / recipe, dirs_exist_ok=True)
        (folder / "note").write_text(recipe)  # no two versions have the same bytes
    write_lock(own_store)
    return own_store


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def test_transformers_takes_the_folder_and_the_card_has_the_results(project: Path) -> None:
    export("dgpo", "hf", Path("out"), "f16")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("out")), logits(load_model("models/dgpo")))
    assert AutoTokenizer.from_pretrained("out").get_vocab() == load_tokenizer("models/dgpo").get_vocab()
    card = Path("out/README.md").read_text()
    assert "| average | 0.7" in card and "| onehop | 0." in card
    assert load_params(Path("out/params.yaml")) == load_params()
    export("dgpo", "hf", Path("out"), "f16")  # again, in its place
    (project / "evaluation/dgpo/questions.parquet").write_bytes(b"of another model")
    export("dgpo", "hf", Path("out"), "f16")
    assert "was not evaluated" in Path("out/README.md").read_text()


def test_a_registered_models_card_tells_of_its_own_training(project: Path) -> None:
    register_trained()
    with pytest.raises(UserError, match="search-agent has no version 9"):
        export("models:/search-agent/9", "hf", Path("out"), "f16")
    shutil.rmtree(project / "evaluation")
    export("models:/search-agent/2", "hf", Path("out"), "f16")
    card = Path("out/README.md").read_text()
    assert card.count("# version 2 (dgpo)\n") == 1 and "| average | 0.7" in card


def test_gguf_has_all_that_llama_cpp_and_ollama_need(project: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    export("teacher", "gguf", Path("out"), "f32")
    assert {path.name for path in Path("out").iterdir()} >= {"model.gguf", "Modelfile", "tokenizer.json"}
    assert not list(Path("out").glob("*.safetensors"))


def test_peft_takes_the_adapter_of_a_training_with_lora(project: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs the extra gpu")
    tokenizer, student = load_tokenizer("models/student"), load_model("models/student")
    add_adapters(student, LoraConfig(rank=2), 0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(student, tokenizer, Path("models/kd"))
    export("kd", "adapter", Path("out"), "f16")
    assert {path.name for path in Path("out").iterdir()} == {
        "README.md", "params.yaml", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    start = load_model("models/student")
    untrained = logits(start)
    loaded = peft.PeftModel.from_pretrained(start, "out")
    torch.testing.assert_close(logits(loaded), logits(load_model("models/kd")), rtol=0, atol=1e-4)
    assert (logits(loaded) - untrained).abs().max() > 0.1


def test_what_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match=r"models/dgpo has no adapter: .*--to hf"):
        export("dgpo", "adapter", Path("out"), "f16")
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    with pytest.raises(UserError, match="something else in it"):
        export("dgpo", "hf", Path("mine"), "f16")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    assert not Path("out").exists()
