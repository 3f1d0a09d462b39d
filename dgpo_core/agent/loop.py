"""The agent loop: generate, act, append (docs/method.md, "The protocol"); and collections of many episodes.

The loop knows token ids, an engine and a retriever. Token-in, token-out: sampled ids are kept as they are,
and each text of the environment is tokenised once, when it is appended.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from dgpo_core.agent import prompts
from dgpo_core.agent.actions import ActionKind, is_well_formed, last_answer, parse_action
from dgpo_core.agent.answers import contains_answer, exact_match
from dgpo_core.agent.engine import Engine, EpisodeCache, FinishReason, Generation, Request
from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner, Search, read_episodes, write_episodes
from dgpo_core.agent.prompts import encode_prompt, encode_start, encode_text
from dgpo_core.config.agent import ProtocolConfig, Sampling
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.errors import InfrastructureError, NotFinite
from dgpo_core.files import replacement
from dgpo_core.retrieval.ranking import Hit, Retriever

STOP = (prompts.SEARCH_END, prompts.ANSWER_END)


@dataclass(frozen=True)
class Task:
    """One episode to run.

    `opening` is text of the environment between the prompt and the first generation (ARCap's given context);
    with `single_turn` that generation is the only one. `seed` with the turn's number seeds the sampling.
    """

    question: Question
    dataset: str
    sample: int = 0
    seed: tuple[int, ...] = (0,)
    opening: str = ""
    single_turn: bool = False


@dataclass
class _State:
    """What is known so far of an episode that runs."""

    task: Task
    ids: list[int]
    owners: list[int]
    logprobs: list[float]
    turn_texts: list[str] = field(default_factory=list)  # what the model wrote, turn by turn
    searches: list[Search] = field(default_factory=list)
    invalid_actions: int = 0
    cut_turns: int = 0
    query: str | None = None  # the search that is to be answered
    ending: Ending | None = None
    failure: str | None = None
    cache: EpisodeCache = field(default_factory=EpisodeCache)

    def append(self, ids: list[int], owner: Owner, logprobs: list[float] | None = None) -> None:
        self.ids += ids
        self.owners += [owner] * len(ids)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(ids)


class EpisodeRunner(Protocol):
    def run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        """Run one episode a task, and return them in the tasks' order."""
        ...


class AgentLoop:
    """Runs episodes of one policy against one retriever."""

    def __init__(
        self, engine: Engine, tokenizer: Any, retriever: Retriever, config: ProtocolConfig, top_k: int
    ) -> None:
        self._engine, self._tokenizer, self._retriever = engine, tokenizer, retriever
        self._config, self._top_k = config, top_k

    def run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        """Run one episode a task; return them in order. A failing retriever makes one `failed`, never wrong.

        Raises NotFinite for a model that gives no numbers.
        """
        running = [self._start(task) for task in tasks]
        for turn in range(self._config.max_turns + 1):
            active = self._with_room(running)
            if not active:
                break
            for episode in running:
                if episode.ending is not None:
                    episode.cache.clear()
            self._generate(active, turn, sampling)
            for episode in active:
                if episode.ending is None and self._is_last(episode, turn):
                    episode.ending = Ending.BUDGET
            going = [episode for episode in active if episode.ending is None]
            self._answer_searches([episode for episode in going if episode.query is not None])
        return [self._record(episode) for episode in running]

    def _is_last(self, episode: _State, turn: int) -> bool:
        return turn == self._config.max_turns or episode.task.single_turn

    def _start(self, task: Task) -> _State:
        ids = encode_prompt(task.question.question, self._config.instruction, self._tokenizer)
        episode = _State(task, ids, [Owner.PROMPT] * len(ids), [0.0] * len(ids))
        if task.opening:
            episode.append(self._encode(task.opening), Owner.ENVIRONMENT)
        return episode

    def _with_room(self, running: list[_State]) -> list[_State]:
        """Return the episodes that go on, and end those whose context is full."""
        active = [episode for episode in running if episode.ending is None]
        for episode in active:
            if len(episode.ids) >= self._config.max_context:
                episode.ending = Ending.LENGTH
        return [episode for episode in active if episode.ending is None]

    def _generate(self, active: list[_State], turn: int, sampling: Sampling) -> None:
        """Let the model write a turn of each episode."""
        for episode in active:
            episode.cache.renew = not self._is_last(episode, turn)
        requests = [
            Request(
                list(episode.ids),
                min(self._config.max_new_tokens, self._config.max_context - len(episode.ids)),
                (*episode.task.seed, turn),
                episode.cache,
            )
            for episode in active
        ]
        try:
            generations = self._engine.generate(requests, sampling, STOP)
        except InfrastructureError as error:
            for episode in active:
                episode.ending, episode.failure = Ending.FAILURE, str(error)
            return
        for episode, generation in zip(active, generations, strict=True):
            for value in generation.logprobs:
                if not math.isfinite(value):
                    raise NotFinite("log-probability of a sampled token", value)
            self._act(episode, generation, last=self._is_last(episode, turn))

    def _act(self, episode: _State, generation: Generation, last: bool) -> None:
        """Append what the model wrote, and note the search or the answer that it holds."""
        written = self._tokenizer.decode(generation.token_ids)
        first = not episode.turn_texts
        episode.turn_texts.append(written)
        episode.append(generation.token_ids, Owner.MODEL, generation.logprobs)
        episode.cut_turns += generation.finish is FinishReason.LENGTH
        # an opening may end inside a tag that the model is to complete
        action = parse_action(_open_tag(episode.task.opening) + written if first else written)
        if action.kind is ActionKind.ANSWER:
            episode.ending = Ending.ANSWERED
        elif action.kind is ActionKind.SEARCH:
            episode.query = action.content
        else:
            episode.invalid_actions += 1
            if not last:
                episode.append(self._encode(prompts.INVALID_ACTION), Owner.ENVIRONMENT)

    def _answer_searches(self, waiting: list[_State]) -> None:
        """Search for all queries at once, and append what was found."""
        if not waiting:
            return
        queries = [episode.query or "" for episode in waiting]
        try:
            results = self._search(queries)
        except InfrastructureError as error:
            for episode in waiting:
                episode.ending, episode.failure = Ending.FAILURE, str(error)
            return
        for episode, query, hits in zip(waiting, queries, results, strict=True):
            episode.append(self._information(hits), Owner.ENVIRONMENT)
            answers = episode.task.question.golden_answers
            hit = any(_holds_answer(found.passage, answers) for found in hits)
            episode.searches.append(Search(query, [h.passage.id for h in hits], [h.score for h in hits], hit))
            episode.query = None

    def _search(self, queries: list[str]) -> list[list[Hit]]:
        retrying = Retrying(
            retry=retry_if_exception_type(InfrastructureError),
            stop=stop_after_attempt(3),
            wait=wait_exponential(multiplier=0.5),
            reraise=True,
        )
        return retrying(self._retriever.search, queries, self._top_k)

    def _information(self, hits: list[Hit]) -> list[int]:
        """Return retrieved passages as ids; cut inside a passage's text, so that the closing tag stays."""
        if self._config.documents == "release":
            return self._release_information(hits)
        ids: list[int] = []
        room = self._config.max_information
        for number, hit in enumerate(hits, 1):
            text = prompts.document(number, hit.passage.title, hit.passage.text)
            document = encode_start(text, self._tokenizer, room + 1)
            if len(document) > room:
                text = prompts.document(number, hit.passage.title, "").rstrip("\n")
                head = encode_start(text, self._tokenizer, room)
                newline = self._encode("\n")
                if room > len(head) + len(newline):
                    ids += document[: room - len(newline)] + newline
                break
            ids += document
            room -= len(document)
        return [*self._encode(prompts.INFORMATION_PREFIX), *ids, *self._encode(prompts.INFORMATION_SUFFIX)]

    def _release_information(self, hits: list[Hit]) -> list[int]:
        """Return them as the release has them: tokens of one text, cut anywhere; the closing tag stays."""
        passages = [(hit.passage.title, hit.passage.text) for hit in hits]
        closing = self._encode(prompts.INFORMATION_SUFFIX)
        room = len(self._encode(prompts.INFORMATION_PREFIX)) + self._config.max_information
        text = prompts.information(passages, "release")
        ids = encode_start(text, self._tokenizer, room + len(closing) + 1)
        return ids if len(ids) <= room + len(closing) else [*ids[:room], *closing]

    def _encode(self, text: str) -> list[int]:
        return encode_text(text, self._tokenizer)

    def _record(self, episode: _State) -> Episode:
        question = episode.task.question
        prompt_length = sum(owner == Owner.PROMPT for owner in episode.owners)
        response = self._tokenizer.decode(episode.ids[prompt_length:])
        prediction = self._prediction(episode)
        outcome = Outcome.CORRECT if exact_match(prediction, question.golden_answers) else Outcome.WRONG
        if episode.failure is not None:
            outcome = Outcome.FAILED
        return Episode(
            question_id=question.id,
            dataset=episode.task.dataset,
            question=question.question,
            golden_answers=list(question.golden_answers),
            sample=episode.task.sample,
            token_ids=episode.ids,
            owners=episode.owners,
            logprobs=episode.logprobs,
            response=response,
            prediction=prediction,
            outcome=outcome,
            ending=episode.ending or Ending.BUDGET,
            well_formed=is_well_formed(episode.turn_texts),
            hit=any(search.hit for search in episode.searches),
            generations=len(episode.turn_texts),
            invalid_actions=episode.invalid_actions,
            cut_turns=episode.cut_turns,
            searches=episode.searches,
            failure=episode.failure,
        )

    def _prediction(self, episode: _State) -> str | None:
        """Return the model's last complete answer: tags left open never reach into its next turn."""
        if self._config.answer_scope == "prompt_and_response":  # the release's: the prompt's example is one
            return last_answer(self._tokenizer.decode(episode.ids))
        opened = _open_tag(episode.task.opening)
        texts = [opened + text if i == 0 else text for i, text in enumerate(episode.turn_texts)]
        return next((answer for answer in map(last_answer, reversed(texts)) if answer is not None), None)


@lru_cache(maxsize=1000)
def _holds_answer(passage: Passage, answers: tuple[str, ...]) -> bool:
    """Cache `contains_answer`: the episodes of a question find the same passages."""
    return contains_answer(passage.contents, answers)


def _open_tag(opening: str) -> str:
    """Return `<answer>` when the opening leaves that tag open, else nothing."""
    return "<answer>" if opening.endswith("<answer>") else ""


def collect(
    loop: AgentLoop,
    tasks: list[Task],
    sampling: Sampling,
    chunk: int,
    state: Path,
    progress: Callable[[int, int, float], None],
) -> list[Episode]:
    """Run all tasks and return their episodes in order. `progress` gets done, total and the EM so far.

    Each chunk is kept in `state` when it is done, and chunks are cut the same way every time: a killed
    collection continues where it was, and gives the same episodes. Raises InfrastructureError when every
    episode of a chunk failed: something is down, and what is done is kept.
    """
    state.mkdir(parents=True, exist_ok=True)
    episodes: list[Episode] = []
    for start in range(0, len(tasks), chunk):
        part = tasks[start : start + chunk]
        path = state / f"{start:08d}.parquet"
        if path.exists():
            episodes += read_episodes(path)
        else:
            new = loop.run(part, sampling)
            if all(episode.outcome is Outcome.FAILED for episode in new):
                raise InfrastructureError(f"all {len(new)} episodes of a chunk failed: {new[0].failure}")
            if not any(episode.outcome is Outcome.FAILED for episode in new):  # else: tried again next time
                with replacement(path) as unfinished:
                    write_episodes(unfinished, new)
            episodes += new
        progress(len(episodes), len(tasks), em_of(episodes))
    return episodes


def em_of(episodes: list[Episode]) -> float:
    """Return the share of correct among the episodes that did not fail; nan when there is none."""
    counted = [episode for episode in episodes if episode.outcome is not Outcome.FAILED]
    return sum(episode.correct for episode in counted) / len(counted) if counted else float("nan")


def stable_seed(*parts: object) -> int:
    """Return a 32-bit seed from names and numbers, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
