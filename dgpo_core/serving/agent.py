"""One model with its index, which answers questions through the pipeline's own agent loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dgpo_core.agent import prompts
from dgpo_core.agent.episode import Decode, Episode
from dgpo_core.agent.llama_cpp_engine import LlamaCppEngine
from dgpo_core.agent.loop import AgentLoop, RunningEpisodes, Task
from dgpo_core.agent.prompts import encode_prompt, encode_start
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import ProtocolConfig, Sampling
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.retrieval.ranking import Retriever
from dgpo_core.serving.events import (
    AgentRequest,
    EpisodeRecord,
    EpisodeStep,
    Event,
    RetrievedPassage,
    SearchResult,
    SourcePassage,
    retrieved,
)
from dgpo_core.serving.streaming import EventStream, TagSplitter
from dgpo_core.serving.unknown_words import unknown_words
from dgpo_core.text import normalize, stands_in


class Agent:
    """Answers with one model, which people call `name`."""

    def __init__(
        self,
        name: str,
        engine: TransformersEngine | LlamaCppEngine,
        tokenizer: Any,
        retriever: Retriever,
        protocol: ProtocolConfig,
        top_k: int,
    ) -> None:
        self.name, self.index = name, retriever.digest
        self._retriever, self._top_k = retriever, top_k
        self._engine = engine
        self._loop = AgentLoop(self._engine, tokenizer, retriever, protocol, top_k)
        self._tokenizer, self._protocol = tokenizer, protocol

    def ask(
        self, request: AgentRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]
    ) -> EpisodeRecord:
        """Run one episode; `emit` gets its events (all but QueuePosition and EpisodeEnd) as they happen.

        `cancelled` is asked at every token. Raises EpisodeCancelled when it says so, and UserError for a
        question that is empty or too long, or a limit that the protocol does not have.
        """
        asked = self.begin(request, emit, cancelled)
        (episode,) = self._loop.run([asked.task], asked.sampling)
        return self.record(asked, episode)

    def start(self) -> RunningEpisodes:
        """Return a session for the tasks that `begin` returns; they may join at any time."""
        return self._loop.start(paced=False)

    def begin(
        self, request: AgentRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]
    ) -> "Asked":
        """Return a request as a task that calls `emit` and `cancelled` as `ask` does. Raises UserError."""
        protocol = self._limited(request)
        text = self._with_history(request)
        stream = EventStream(self._tokenizer.decode, self._engine.stop_criteria.eos, emit, cancelled)
        question = Question("asked", text, ())
        task = Task(question, "asked", seed=(request.seed,), protocol=protocol, watcher=stream)
        return Asked(request, task, stream)

    def _limited(self, request: AgentRequest) -> ProtocolConfig:
        """Return the protocol with the request's limits. Raises UserError."""
        protocol = self._protocol
        request.check()
        if len(encode_start(request.question, self._tokenizer, protocol.max_context)) == protocol.max_context:
            raise UserError(
                "the question is too long: it has more tokens than protocol.max_context allows, "
                f"{protocol.max_context}"
            )
        tokens = len(encode_prompt(request.question, protocol.instruction, self._tokenizer))
        if tokens >= protocol.max_context:
            raise UserError(
                f"the question is too long: {tokens} tokens with its instruction, "
                f"and protocol.max_context is {protocol.max_context}"
            )
        searches = protocol.max_turns if request.max_searches is None else request.max_searches
        if not 0 <= searches <= protocol.max_turns:
            raise UserError(
                f"searches: between 0 and protocol.max_turns ({protocol.max_turns}), not {searches}"
            )
        new_tokens = min(protocol.max_new_tokens, request.max_new_tokens or protocol.max_new_tokens)
        return protocol.model_copy(update={"max_turns": searches, "max_new_tokens": new_tokens})

    def _with_history(self, request: AgentRequest) -> str:
        """Return the question after the latest lines of its history whose prompt fills half the context."""
        for start in range(len(request.history)):
            text = "\n".join((*request.history[start:], request.question))
            prompt = encode_prompt(text, self._protocol.instruction, self._tokenizer)
            if len(prompt) <= self._protocol.max_context // 2:
                return text
        return request.question

    def search(self, query: str, count: int | None = None) -> list[RetrievedPassage]:
        """Return the passages that the index finds, best first; without `count` as many as the model gets.

        Raises UserError for a query that cannot be searched for, and InfrastructureError.
        """
        AgentRequest(query).check()
        (hits,) = self._retriever.search([query], count or self._top_k)
        return [retrieved(hit) for hit in hits]

    def record(self, asked: "Asked", episode: Episode) -> EpisodeRecord:
        """Return what became of a request."""
        request, searches = asked.request, asked.stream.searches
        failed = episode.failure is not None
        answer = None if failed else episode.prediction
        return EpisodeRecord(
            question=request.question,
            model=self.name,
            answer=answer or None,
            sources=sources(answer, searches),
            unknown_words=[] if failed else self._unknown(request.question, searches),
            ending=episode.ending,
            failure=episode.failure,
            steps=list(_steps(episode, self._tokenizer.decode, self._engine.stop_criteria.eos)),
            searches=searches,
            response=episode.response,
            well_formed=episode.well_formed,
            invalid_actions=episode.invalid_actions,
            temperature=request.temperature,
            seed=request.seed,
            model_tokens=episode.model_tokens,
            other_tokens=len(episode.token_ids) - episode.model_tokens,
        )

    def _unknown(self, question: str, searches: list[SearchResult]) -> list[str]:
        """Return the question's unknown words; none of an episode that did not search."""
        found = [f"{passage.title} {passage.text}" for search in searches for passage in search.passages]
        return unknown_words(question, found, self._retriever, self._top_k) if searches else []


@dataclass(frozen=True)
class Asked:
    """A request on its way through the loop."""

    request: AgentRequest
    task: Task
    stream: EventStream

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.request.temperature)


def sources(answer: str | None, searches: list[SearchResult]) -> list[SourcePassage]:
    """Return the retrieved passages in which the answer stands, each once, in the order of retrieval.

    Whole words after SQuAD's normalisation: "Ann" does not stand in "annual" (text.py, `stands_in`).
    """
    wanted = normalize(answer or "")
    found = {passage.id: passage for search in searches for passage in search.passages}
    holding = [
        passage
        for passage in found.values()
        if wanted and stands_in(wanted, normalize(f"{passage.title} {passage.text}"))
    ]
    return [
        SourcePassage(number=n, id=passage.id, title=passage.title) for n, passage in enumerate(holding, 1)
    ]


def _steps(episode: Episode, decode: Decode, eos: set[int]) -> Iterator[EpisodeStep]:
    """Yield what model and environment wrote, in order."""
    for number, turn in enumerate(episode.turns):
        ids = episode.token_ids[turn.start : turn.end]
        splitter = TagSplitter()
        text = decode(ids[:-1] if ids[-1] in eos else ids)
        for kind, piece in [*splitter.feed(text), *splitter.close()]:
            if piece.strip():
                yield EpisodeStep(kind=kind, turn=number, text=piece.strip())
        if turn.end < turn.reply_end:
            yield _reply(decode(episode.token_ids[turn.end : turn.reply_end]), number)


def _reply(text: str, turn: int) -> EpisodeStep:
    if text.startswith(prompts.INFORMATION_PREFIX):
        inside = text.removeprefix(prompts.INFORMATION_PREFIX).removesuffix(prompts.INFORMATION_SUFFIX)
        return EpisodeStep(kind="information", turn=turn, text=inside.strip())
    return EpisodeStep(kind="notice", turn=turn, text=text.strip())
