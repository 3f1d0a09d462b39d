"""Answers and thumbs reach whoever keeps them; without anybody there is nothing to rate."""

import time
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.datasets.records import Question
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.recording import AnsweredQuestion, Rating
from tests.browser import CHROMIUM, browse
from tests.dgpo_core.serving.service import serving


class Kept:
    def __init__(self) -> None:
        self.answers: list[AnsweredQuestion] = []
        self.ratings: list[Rating] = []

    def keep(self, answered: AnsweredQuestion) -> None:
        self.answers.append(answered)

    def rate(self, rating: Rating) -> bool:
        self.ratings.append(rating)
        return rating.id in {answered.id for answered in self.answers}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_kept_with_its_times_and_can_be_rated(
    agent: Agent, questions: list[Question], stream: bool
) -> None:
    kept, begun = Kept(), time.time()
    with serving(agent, recorder=kept) as client:
        assert client.get("/health").json()["recorded"] is True
        message: dict[str, Any] = {"role": "user", "content": questions[1].question}
        body = {"model": "teacher", "messages": [message], "stream": stream}
        response = client.post("/v1/chat/completions", json=body)
        [answered] = kept.answers
        assert answered.id.startswith("chatcmpl-") and answered.id in response.text
        assert answered.episode.question == questions[1].question
        start, end = answered.asked
        assert begun <= start < end <= time.time()
        assert answered.searches.keys() == {search.turn for search in answered.episode.searches} != set()
        for turn, period in answered.searches.items():
            assert (
                start <= answered.turns[turn][0] <= answered.turns[turn][1] <= period[0] <= period[1] <= end
            )
        rated = client.post("/v1/feedback", json={"id": answered.id, "thumb": "down", "comment": "no"})
        assert (rated.status_code, kept.ratings) == (
            202,
            [Rating(id=answered.id, thumb="down", comment="no")],
        )
        unknown = client.post("/v1/feedback", json={"id": "chatcmpl-0", "thumb": "up"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_answer")
        assert client.post("/v1/feedback", json={"id": answered.id, "thumb": "sideways"}).status_code == 400


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_offers_thumbs(agent: Agent, questions: list[Question], tmp_path: Path) -> None:
    kept = Kept()
    proposed = serving(agent, examples=(questions[0].question,), recorder=kept)
    with proposed as client, browse(tmp_path) as page:
        page.open(str(client.base_url))
        page.wait_for("document.querySelector('#state').textContent === 'teacher is ready'")
        page.wait_for("document.querySelector('#examples button')")
        page.evaluate("document.querySelector('#examples button').click()")
        page.wait_for("document.querySelectorAll('.thumbs button').length === 2")
        page.evaluate("document.querySelectorAll('.thumbs button')[1].click()")
        page.wait_for("document.querySelectorAll('.thumbs button')[1].ariaPressed === 'true'")
        assert page.evaluate("document.querySelector('.thumbs button').ariaPressed") == "false"
        assert kept.ratings == [Rating(id=kept.answers[0].id, thumb="down")]
        assert page.errors == []


def test_without_a_recorder_there_is_nothing_to_rate(agent: Agent) -> None:
    with serving(agent) as client:
        assert "recorded" not in client.get("/health").json()
        assert client.post("/v1/feedback", json={"id": "chatcmpl-0", "thumb": "up"}).status_code == 404
