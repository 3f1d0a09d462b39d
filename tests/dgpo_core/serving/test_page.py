"""The page in a real browser, asking a real agent about a real index, with a hostile document in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.retrieval.index import index_passages
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.app import PAGE
from dgpo_core.serving.events import AgentRequest, EpisodeRecord
from dgpo_core.world.questions import Article
from tests.browser import CHROMIUM, Page, browse
from tests.dgpo_core.serving.conftest import Gate, MakeAgent
from tests.dgpo_core.serving.service import serving

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def retriever(articles: list[Article], questions: list[Question]) -> Gate:
    """With a document that is found for the first question."""
    passages = [passage for article in articles for passage in article.passages]
    golden = questions[0].metadata["golden_passages"][0]
    hostile = Passage("evil", f"{golden['title']} {HOSTILE}", f"{golden['text']} {HOSTILE}")
    gate = Gate(index_passages([*passages, hostile], EncoderConfig(kind="bm25")))
    gate.opened.set()
    return gate


@pytest.fixture(scope="module")
def agent(make_agent: MakeAgent, retriever: Gate) -> Agent:
    return make_agent(retriever)


@pytest.fixture(scope="module")
def sourced(agent: Agent, questions: list[Question]) -> EpisodeRecord:
    """Of the first question whose answer stands in a passage that was found."""
    asked = (AgentRequest(question.question) for question in questions)
    records = (agent.ask(request, lambda event: None, lambda: False) for request in asked)
    return next(record for record in records if record.sources)


@pytest.fixture(scope="module")
def browser(agent: Agent, sourced: EpisodeRecord, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    proposed = serving(agent, examples=(sourced.question,))
    with proposed as client, browse(tmp_path_factory.mktemp("chromium")) as page:
        page.open(str(client.base_url))
        page.wait_for("document.querySelector('#state').textContent === 'teacher is ready'")
        yield page


def ask(page: Page, question: str) -> None:
    page.evaluate(f"document.querySelector('#question').value = {json.dumps(question)}")
    page.evaluate("document.querySelector('#ask').click()")


def text(page: Page, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"
    )
    return found


def finish(page: Page) -> None:
    page.wait_for("!document.querySelector('#result').hidden && document.querySelector('#stop').disabled")


def test_the_episode_is_shown_as_it_was(browser: Page, agent: Agent, questions: list[Question]) -> None:
    question = questions[1].question
    record = agent.ask(AgentRequest(question), lambda event: None, lambda: False)
    ask(browser, question)
    finish(browser)
    assert text(browser, "#asked") == question
    assert text(browser, "#result .final") == record.answer
    assert texts(browser, "#result li") == [f"[{s.number}] {s.title}" for s in record.sources]
    shown = browser.evaluate("[...document.querySelectorAll('.step')].map((e) => e.className)")
    assert shown == [f"step {step.kind}" for step in record.steps]
    written = [step.text for step in record.steps if step.kind != "information"]
    assert texts(browser, ".step > p") == written
    titles = [passage.title for search in record.searches for passage in search.passages]
    assert texts(browser, "details summary") == titles
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 0
    assert browser.errors == []


def test_an_example_is_asked_by_a_click_and_the_answer_leads_to_its_passage(
    browser: Page, sourced: EpisodeRecord
) -> None:
    assert sourced.answer
    browser.evaluate("document.querySelector('#examples button').click()")
    finish(browser)
    assert text(browser, "#asked") == sourced.question and browser.evaluate("location.search").startswith(
        "?q="
    )
    assert browser.evaluate("document.querySelector('#examples').hidden") is True
    assert {mark.lower() for mark in texts(browser, "#steps mark")} == {sourced.answer.lower()}
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 0
    browser.evaluate("document.querySelector('#result a').click()")
    assert texts(browser, "details[open] summary") == [sourced.sources[0].title]
    assert browser.evaluate("document.activeElement.textContent") == sourced.sources[0].title


def test_earlier_questions_stay_and_unknown_words_are_said(browser: Page, sourced: EpisodeRecord) -> None:
    before = text(browser, "#asked"), text(browser, "#result .final")
    ask(browser, "Where was Marie Curie born?")
    finish(browser)
    assert texts(browser, ".past > summary")[0] == " ".join(before)
    assert text(browser, "#result .unknown") == "But no passage that was found has Marie, Curie."
    assert texts(browser, "#examples button") == [sourced.question], "what it does know"
    assert browser.evaluate("document.querySelector('#examples').hidden") is False


def test_hostile_text_stays_text(browser: Page, questions: list[Question]) -> None:
    ask(browser, HOSTILE)
    finish(browser)
    assert text(browser, "#asked") == HOSTILE
    assert browser.evaluate("document.querySelectorAll('#episode img, #episode script').length") == 0
    ask(browser, questions[0].question)
    finish(browser)
    assert any(HOSTILE in title for title in texts(browser, "details summary")), "the document was retrieved"
    assert any(HOSTILE in passage for passage in texts(browser, "details p"))
    assert browser.evaluate("document.querySelectorAll('#episode img, #episode script').length") == 0
    assert browser.evaluate("document.title") == "Ask the agent"


def test_stop_ends_the_episode(browser: Page, retriever: Gate, questions: list[Question]) -> None:
    retriever.opened.clear()
    ask(browser, questions[0].question)
    browser.wait_for("document.querySelector('.step.search')")
    assert browser.evaluate("document.querySelector('#ask').disabled") is True
    browser.evaluate("document.querySelector('#stop').click()")
    finish(browser)
    assert text(browser, "#result") == "Stopped."
    retriever.opened.set()
    ask(browser, questions[0].question)
    finish(browser)
    assert text(browser, "#result .final"), "the next one is answered"


def test_errors_are_shown(browser: Page) -> None:
    ask(browser, "Who " * 2000)
    finish(browser)
    assert "the question is too long" in text(browser, "#result .bad")


def test_a_foreign_script_would_not_run(browser: Page) -> None:
    """Were markup ever inserted, the content security policy would still refuse it."""
    markup = '<img src=x onerror="document.title=1">'
    browser.evaluate(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(markup)})")
    browser.wait_for("document.querySelector('body > img')?.complete")
    assert browser.evaluate("document.title") == "Ask the agent"
    assert any("Content Security Policy" in error for error in browser.errors)


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_light_and_dark(
    browser: Page, questions: list[Question], dark: bool, tmp_path: Path
) -> None:
    browser.resize(360, 740, dark=dark)
    ask(browser, questions[1].question)
    finish(browser)
    browser.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(17, 21, 27)" if dark else "rgb(246, 247, 249)")


def test_the_page_is_self_contained_and_writes_no_markup() -> None:
    html = PAGE.read_text(encoding="utf-8")
    markup = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "http://",
        "https://",
    )
    assert not any(way in html for way in markup)
    assert html.count("src=") == 0 and html.count("<script>") == 1
