from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Owner
from dgpo_core.evaluation.diagnosis import answer_attempts, model_turns
from tests.dgpo_core.evaluation.episodes import TWO_HOP, episode, search
from tests.dgpo_core.making import random_episode


@given(st.integers(0, 10_000))
def test_turns_are_the_generations_and_hold_every_token_of_the_model(seed: int) -> None:
    made = random_episode(seed)
    turns = model_turns(made, lambda ids: " ".join(map(str, ids)))
    assert len(turns) == made.generations
    own = [i for i, owner in zip(made.token_ids, made.owners, strict=True) if owner == Owner.MODEL]
    assert [int(i) for turn in turns for i in turn.split()] == own


def test_text_of_the_environment_is_none_of_the_models(tokenizer: PreTrainedTokenizerFast) -> None:
    made = episode(tokenizer, TWO_HOP, [search("Silent Harbour", "1")], "<answer> Tarn </answer>")
    turns = model_turns(made, tokenizer.decode)
    assert turns == [
        "<think> hm </think><search> Silent Harbour </search>",
        "<answer> Tarn </answer>",
    ]
    assert answer_attempts(turns) == ["Tarn"]


def test_attempts_are_answers_in_any_shape() -> None:
    assert answer_attempts(["<answer> a <answer> b </answer>", "<answer></answer>", "<answer> c"]) == [
        "a", "b", "", "c"
    ]  # fmt: skip
    assert answer_attempts(["<think> d </think>", "e </answer>", "<answer> f<search> g </search>"]) == ["f"]
    assert answer_attempts([]) == []
