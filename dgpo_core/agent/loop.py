"""The agent loop: generate, act, append (docs/method.md, "The protocol"); and collections of many episodes.

The loop knows token ids, an engine and a retriever. Token-in, token-out: sampled ids are kept as they are,
and each text of the environment is tokenised once, when it is appended. No episode waits for another: each
goes on as soon as its own turn is written or its own search answered (`RunningEpisodes`).
"""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
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
from dgpo_core.threads import side_by_side

STOP = (prompts.SEARCH_END, prompts.ANSWER_END)
PAUSE = 0.05  # seconds after which others may join episodes that all wait for a search
SHORTEST_LANE = 8  # episodes: fewer together take as long as these
Deal = Callable[[int], list[Passage]]  # the number of earlier searches -> passages, whatever is asked


class Watcher(Protocol):
    """Is told of an episode as it happens. What it raises ends the episode, and no other."""

    def begin_turn(self) -> None: ...

    def token(self, token: int) -> None: ...

    def end_turn(self) -> None: ...

    def search(self, query: str, hits: list[Hit]) -> None: ...


@dataclass(frozen=True)
class Task:
    """One episode to run.

    `opening` is text of the environment between the prompt and the first generation (ARCap's given context);
    with `single_turn` that generation is the only one. `seed` with the turn's number seeds the sampling.
    `protocol` has limits of its own for this episode. `deal` takes the retriever's place.
    """

    question: Question
    dataset: str
    sample: int = 0
    seed: tuple[int, ...] = (0,)
    opening: str = ""
    single_turn: bool = False
    protocol: ProtocolConfig | None = None
    watcher: Watcher | None = None
    deal: Deal | None = None


@dataclass(eq=False)
class _State:
    """What is known so far of an episode that runs."""

    task: Task
    sampling: Sampling
    limits: ProtocolConfig
    ids: list[int]
    owners: list[int]
    logprobs: list[float]
    turn: int = -1
    turn_texts: list[str] = field(default_factory=list)  # what the model wrote, turn by turn
    searches: list[Search] = field(default_factory=list)
    invalid_actions: int = 0
    cut_turns: int = 0
    query: str | None = None  # the search that is to be answered
    ending: Ending | None = None
    failure: str | None = None
    error: Exception | None = None  # of its watcher
    cache: EpisodeCache = field(default_factory=EpisodeCache)

    @property
    def is_last(self) -> bool:
        """Return whether the turn is the last that the protocol allows."""
        return self.turn == self.limits.max_turns or self.task.single_turn

    def fail(self, reason: str) -> None:
        self.ending, self.failure, self.query = Ending.FAILURE, reason, None

    def tell(self, *told: Callable[[Watcher], None]) -> None:
        """Tell the watcher; what it raises is the episode's end."""
        if self.task.watcher is None or self.error is not None:
            return
        try:
            for one in told:
                one(self.task.watcher)
        except Exception as error:
            self.error = error

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
        self.engine, self._tokenizer, self._retriever = engine, tokenizer, retriever
        self._config, self._top_k = config, top_k

    def run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        """Run one episode a task; return them in order. A failing retriever makes one `failed`, never wrong.

        On a processor lanes of episodes run side by side; what is in a lane does not depend on the number of
        threads. Raises NotFinite for a model that gives no numbers.
        """
        lanes = self._lanes(len(tasks))

        def run(lane: int) -> list[Episode]:
            return self._run(tasks[lane::lanes], sampling)

        if self.engine.lane is None:
            return run(0)
        parts = list(side_by_side(run, range(lanes), torch.device("cpu")))
        return [parts[i % lanes][i // lanes] for i in range(len(tasks))]

    def _lanes(self, episodes: int) -> int:
        """Return into how many lanes episodes are dealt: evenly, so that two threads have equally many."""
        lane = self.engine.lane
        if lane is None or episodes < 2 * SHORTEST_LANE:
            return 1
        return 2 * math.ceil(episodes / (2 * lane))

    def _run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        done: dict[int, Episode] = {}
        with self.start() as running:
            running.add(tasks, sampling)
            while running.count:
                for task, result in running.advance():
                    if isinstance(result, Exception):
                        raise result
                    done[id(task)] = result
        return [done[id(task)] for task in tasks]

    def start(self, paced: bool = True) -> "RunningEpisodes":
        """Return a session without episodes, which may be added at any time (`RunningEpisodes`)."""
        return RunningEpisodes(self, paced)

    def begin(self, task: Task, sampling: Sampling) -> _State:
        """Return an episode before its first turn."""
        limits = task.protocol or self._config
        ids = encode_prompt(task.question.question, limits.instruction, self._tokenizer)
        episode = _State(task, sampling, limits, ids, [Owner.PROMPT] * len(ids), [0.0] * len(ids))
        if task.opening:
            episode.append(self._encode(task.opening), Owner.ENVIRONMENT)
        return episode

    def request(self, episode: _State) -> Request | None:
        """Begin the next turn; return None, and end the episode, where its context is full."""
        limits = episode.limits
        if len(episode.ids) >= limits.max_context:
            episode.ending = Ending.LENGTH
            return None
        episode.tell(lambda watcher: watcher.begin_turn())
        episode.turn += 1
        episode.cache.renew = not episode.is_last
        watcher = episode.task.watcher
        return Request(
            list(episode.ids),
            min(limits.max_new_tokens, limits.max_context - len(episode.ids)),
            (*episode.task.seed, episode.turn),
            episode.cache,
            None if watcher is None else watcher.token,
        )

    def take(self, episode: _State, generation: Generation) -> None:
        """Append what the model wrote, and note the search or the answer that it holds.

        What no engine may give fails the episode. Raises NotFinite for a log-probability that is no number.
        """
        limits, tokens, logprobs = episode.limits, len(generation.token_ids), len(generation.logprobs)
        room = min(limits.max_new_tokens, limits.max_context - len(episode.ids))
        if tokens != logprobs or tokens > room:
            episode.fail(
                f"the engine gave {tokens} tokens and {logprobs} log-probabilities, of at most {room}"
            )
            return
        for value in generation.logprobs:
            if not math.isfinite(value):
                raise NotFinite("log-probability of a sampled token", value)
        episode.tell(lambda watcher: watcher.end_turn())
        self._act(episode, generation)
        if episode.ending is None and episode.is_last:
            episode.ending, episode.query = Ending.BUDGET, None

    def _act(self, episode: _State, generation: Generation) -> None:
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
            if not episode.is_last:
                episode.append(self._encode(prompts.INVALID_ACTION), Owner.ENVIRONMENT)

    def search(self, episodes: list[_State]) -> list[list[Hit]]:
        """Return what each episode's search finds. Raises InfrastructureError."""
        asking = [episode.query or "" for episode in episodes if episode.task.deal is None]
        found = iter(self._retrieve(asking) if asking else [])
        return [
            next(found) if (deal := episode.task.deal) is None else _dealt(deal(len(episode.searches)))
            for episode in episodes
        ]

    def _retrieve(self, queries: list[str]) -> list[list[Hit]]:
        """Search; failures of the infrastructure are tried again. Raises InfrastructureError."""
        retrying = Retrying(
            retry=retry_if_exception_type(InfrastructureError),
            stop=stop_after_attempt(3),
            wait=wait_exponential(multiplier=0.5),
            reraise=True,
        )
        return retrying(self._retriever.search, queries, self._top_k)

    def inform(self, episode: _State, hits: list[Hit]) -> None:
        """Append what the episode's search has found."""
        query = episode.query or ""
        episode.append(self._information(hits, episode.limits), Owner.ENVIRONMENT)
        answers = episode.task.question.golden_answers
        hit = any(_holds_answer(found.passage, answers) for found in hits)
        episode.searches.append(Search(query, [h.passage.id for h in hits], [h.score for h in hits], hit))
        episode.query = None
        episode.tell(lambda watcher: watcher.search(query, hits))

    def _information(self, hits: list[Hit], limits: ProtocolConfig) -> list[int]:
        """Return retrieved passages as ids; cut inside a passage's text, so that the closing tag stays."""
        if limits.documents == "release":
            return self._release_information(hits, limits)
        ids: list[int] = []
        room = limits.max_information
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

    def _release_information(self, hits: list[Hit], limits: ProtocolConfig) -> list[int]:
        """Return them as the release has them: tokens of one text, cut anywhere; the closing tag stays."""
        passages = [(hit.passage.title, hit.passage.text) for hit in hits]
        closing = self._encode(prompts.INFORMATION_SUFFIX)
        room = len(self._encode(prompts.INFORMATION_PREFIX)) + limits.max_information
        text = prompts.information(passages, "release")
        ids = encode_start(text, self._tokenizer, room + len(closing) + 1)
        return ids if len(ids) <= room + len(closing) else [*ids[:room], *closing]

    def _encode(self, text: str) -> list[int]:
        return encode_text(text, self._tokenizer)

    def record(self, episode: _State) -> Episode:
        """Return a finished episode."""
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
        if episode.limits.answer_scope == "prompt_and_response":  # the release's: the prompt's example is one
            return last_answer(self._tokenizer.decode(episode.ids))
        opened = _open_tag(episode.task.opening)
        texts = [opened + text if i == 0 else text for i, text in enumerate(episode.turn_texts)]
        return next((answer for answer in map(last_answer, reversed(texts)) if answer is not None), None)


class RunningEpisodes:
    """Episodes under way together, in one session of the engine; new ones may join at any time.

    Searches run beside generation, those of a moment as one batch. With `paced`, in a session that is it too,
    a batch is waited for at the next `advance`: its episodes go on at the same place whenever it was done.
    """

    def __init__(self, loop: AgentLoop, paced: bool) -> None:
        self._loop = loop
        self._session = loop.engine.session(STOP)
        self._paced = paced and self._session.paced
        self._generating: dict[int, _State] = {}  # by the identity of the request
        self._asking: list[_State] = []  # their searches have not begun
        self._search: tuple[list[_State], Future[list[list[Hit]]]] | None = None
        self._ready: list[_State] = []  # their next turn may begin
        self._ended: list[_State] = []
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="search")

    @property
    def count(self) -> int:
        """Return the number of episodes that have not been returned."""
        searching = len(self._search[0]) if self._search else 0
        waiting = len(self._asking) + len(self._ready) + len(self._ended)
        return len(self._generating) + searching + waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()
        self._searcher.shutdown(wait=True, cancel_futures=True)

    def add(self, tasks: list[Task], sampling: Sampling) -> None:
        """Let episodes join."""
        self._ready += [self._loop.begin(task, sampling) for task in tasks]
        self._begin_turns()

    def advance(self) -> list[tuple[Task, Episode | Exception]]:
        """Go on for a while and return the episodes that have ended, or the errors that ended them."""
        finished = self._session.advance() if self._generating else []
        self._take_hits()
        for request, result in finished:
            self._take(self._generating.pop(id(request)), result)
        self._begin_search()
        self._begin_turns()
        ended, self._ended = self._ended, []
        for episode in ended:
            episode.cache.clear()
        return [(episode.task, episode.error or self._loop.record(episode)) for episode in ended]

    def _take(self, episode: _State, result: Generation | Exception) -> None:
        """Act on what the engine has done for an episode."""
        if isinstance(result, Generation):
            self._loop.take(episode, result)
        else:
            self._lose(episode, result)
        self._sort(episode)

    @staticmethod
    def _lose(episode: _State, error: Exception) -> None:
        """End an episode: `failed` when something was down, else with the error."""
        if isinstance(error, InfrastructureError):
            episode.fail(str(error))
        else:
            episode.error = error

    def _sort(self, episode: _State) -> None:
        """Put an episode where it goes on."""
        if episode.ending is not None or episode.error is not None:
            self._ended.append(episode)
        elif episode.query is not None:
            self._asking.append(episode)
        else:
            self._ready.append(episode)

    def _begin_search(self) -> None:
        if self._asking and self._search is None:
            self._search = self._asking, self._searcher.submit(self._loop.search, self._asking)
            self._asking = []

    def _take_hits(self) -> None:
        """Append what was found, if it was; wait for it a while where nothing else is to be done."""
        if self._search is None:
            return
        episodes, found = self._search
        if not self._paced:
            wait([found], 0 if self._generating else PAUSE)
            if not found.done():
                return
        self._search = None
        try:
            results = found.result()
        except Exception as error:
            for episode in episodes:
                self._lose(episode, error)
        else:
            for episode, hits in zip(episodes, results, strict=True):
                self._loop.inform(episode, hits)
        for episode in episodes:
            self._sort(episode)

    def _begin_turns(self) -> None:
        """Ask the engine for the next turns; episodes whose context is full end."""
        ready, self._ready = self._ready, []
        for episode in ready:
            request = self._loop.request(episode)
            if request is None or episode.error is not None:
                self._ended.append(episode)
                continue
            self._generating[id(request)] = episode
            self._session.add([request], episode.sampling)


@lru_cache(maxsize=1000)
def _holds_answer(passage: Passage, answers: tuple[str, ...]) -> bool:
    """Cache `contains_answer`: the episodes of a question find the same passages."""
    return contains_answer(passage.contents, answers)


def _dealt(passages: list[Passage]) -> list[Hit]:
    """Return passages that nobody ranked, with reciprocal ranks as scores."""
    return [Hit(passage, 1 / rank) for rank, passage in enumerate(passages, 1)]


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
