"""Episodes as rows of metrics."""

from dataclasses import replace

from dgpo_core.agent.episode import Search
from tasks.stages.evaluate import question_table
from tests.dgpo_core.making import random_episode


def test_one_row_an_episode_in_order() -> None:
    right = replace(
        random_episode(1, correct=True),
        golden_answers=["Paris"],
        prediction="in Paris",
        searches=[Search("q", ["1"], [1.0], hit=True)],
    )
    wrong = replace(random_episode(2, correct=False), cut_turns=2)
    first, second = question_table([right, wrong]).to_pylist()
    assert (first["question_id"], first["em"], first["sub_em"], first["searches"]) == ("q1", True, True, 1)
    assert first["f1"] == 2 / 3
    assert (second["question_id"], second["em"], second["f1"], second["sub_em"]) == ("q2", False, 0.0, False)
    assert (second["outcome"], second["cut_turns"]) == ("wrong", 2)
    assert second["model_tokens"] == wrong.model_tokens
