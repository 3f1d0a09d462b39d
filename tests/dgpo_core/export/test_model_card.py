"""What stands beside exported weights: the prompt that the pipeline itself gives, and no invented results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent import prompts
from dgpo_core.config.params import load_params
from dgpo_core.export.model_card import ExportedModel, model_card, modelfile

ROOT = Path(__file__).resolve().parents[3]
FILES = {"model.gguf": "weights"}


@pytest.fixture(scope="module")
def exported() -> ExportedModel:
    table = "| EM | 95 % interval |\n| --- | --- |\n| average | 0.306 (0.28-0.33) |"
    return ExportedModel("dgpo", "dgpo", load_params(ROOT / "params.yaml"), "c0ffee", table)


def test_a_program_can_do_what_the_card_says(
    exported: ExportedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Prompt, information and error texts are the environment's own, but for their indentation."""
    card = model_card(exported, "gguf", FILES, tokenizer, "q8_0")
    lines = [line.strip() for line in card.splitlines()]
    instruction, documents = exported.params.protocol.instruction, exported.params.protocol.documents
    for text in (
        prompts.prompt_text("QUESTION", instruction, tokenizer),
        prompts.information([("Title", "text of the passage")], documents),
        prompts.INVALID_ACTION,
    ):
        for line in filter(None, map(str.strip, text.splitlines())):
            assert line in lines
    assert "- `dgpo`: start kd, guidance selective, reference teacher" in lines
    assert "commit c0ffee" in card and "not with this file's q8_0 weights" in card
    assert "| average | 0.306 (0.28-0.33) |" in lines
    assert "library_name: gguf" in lines


def test_without_an_evaluation_nothing_is_claimed(exported: ExportedModel, tokenizer: Any) -> None:
    card = model_card(replace(exported, recipe="", results=""), "hf", FILES, tokenizer)
    assert "This model was not evaluated." in card and "bootstrap" not in card


def test_given_models_of_others_have_licences_of_their_own(exported: ExportedModel, tokenizer: Any) -> None:
    models = exported.params.models.model_copy(update={"student": "Qwen/Qwen2.5-0.5B-Instruct"})
    other = replace(exported, params=exported.params.model_copy(update={"models": models}))
    card = model_card(other, "hf", FILES, tokenizer)
    assert "- The student, `Qwen/Qwen2.5-0.5B-Instruct`: under its own licence" in card
    assert "- The teacher, `models/teacher`: Apache-2.0" in card


def test_ollama_puts_the_question_where_it_belongs(
    exported: ExportedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = modelfile(exported.params, tokenizer)
    template = text.split('"""')[1]
    filled = template.replace("{{ .Prompt }}", "Who?")
    assert filled == prompts.prompt_text("Who?", exported.params.protocol.instruction, tokenizer)
    assert 'PARAMETER stop "</search>"\nPARAMETER stop "</answer>"\n' in text
