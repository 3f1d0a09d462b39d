"""One model with its index, which answers one question at a time through the pipeline's own agent loop."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel

from dgpo_core.agent import prompts
from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.prompts import encode_prompt, encode_start
from dgpo_core.config.agent import ProtocolConfig, RolloutConfig, Sampling
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.retrieval.ranking import Retriever
from dgpo_core.serving.events import Ask, Event, Information, Record, Source, Step, TagSplitter
from dgpo_core.serving.streaming import Narrator, ReportingRetriever, StreamingEngine
from dgpo_core.text import normalize, stands_in


class Agent:
    """`name` is what people call the model. Not to be used by two threads at once."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: Any,
        retriever: Retriever,
        protocol: ProtocolConfig,
        rollout: RolloutConfig,
        top_k: int,
    ) -> None:
        self.name, self.index = name, retriever.digest
        self._engine = StreamingEngine(model, tokenizer, rollout)
        self._tokenizer, self._retriever = tokenizer, retriever
        self._protocol, self._top_k = protocol, top_k

    def ask(self, ask: Ask, emit: Callable[[Event], None], stop: Callable[[], bool]) -> Record:
        """Run one episode; `emit` gets its events (all but waiting and finished) as they happen.

        `stop` is asked at every token. Raises Stopped when it says so, and UserError for a question that is
        empty or too long, or a limit that the protocol does not have.
        """
        protocol = self._limited(ask)
        narrator = Narrator(self._tokenizer.decode, emit, stop)
        self._engine.listener = narrator
        retriever = ReportingRetriever(self._retriever, narrator.found)
        loop = AgentLoop(self._engine, self._tokenizer, retriever, protocol, self._top_k)
        task = Task(Question("asked", ask.question, ()), "asked", seed=(ask.seed,))
        (episode,) = loop.run([task], Sampling(temperature=ask.temperature))
        return self._record(ask, episode, narrator.searches)

    def _limited(self, ask: Ask) -> ProtocolConfig:
        protocol = self._protocol
        ask.check()
        if len(encode_start(ask.question, self._tokenizer, protocol.max_context)) == protocol.max_context:
            raise UserError(
                "the question is too long: it has more tokens than protocol.max_context allows, "
                f"{protocol.max_context}"
            )
        tokens = len(encode_prompt(ask.question, protocol.instruction, self._tokenizer))
        if tokens >= protocol.max_context:
            raise UserError(
                f"the question is too long: {tokens} tokens with its instruction, "
                f"and protocol.max_context is {protocol.max_context}"
            )
        searches = protocol.max_turns if ask.max_searches is None else ask.max_searches
        if not 0 <= searches <= protocol.max_turns:
            raise UserError(
                f"searches: between 0 and protocol.max_turns ({protocol.max_turns}), not {searches}"
            )
        new_tokens = min(protocol.max_new_tokens, ask.max_new_tokens or protocol.max_new_tokens)
        return protocol.model_copy(update={"max_turns": searches, "max_new_tokens": new_tokens})

    def _record(self, ask: Ask, episode: Episode, searches: list[Information]) -> Record:
        answer = episode.prediction if episode.failure is None else None  # a failed episode has no answer
        return Record(
            question=ask.question,
            model=self.name,
            answer=answer or None,
            sources=sources(answer, searches),
            ending=episode.ending,
            failure=episode.failure,
            steps=list(_steps(episode, self._tokenizer.decode, self._engine.end_tokens)),
            searches=searches,
            response=episode.response,
            well_formed=episode.well_formed,
            invalid_actions=episode.invalid_actions,
            temperature=ask.temperature,
            seed=ask.seed,
            model_tokens=episode.model_tokens,
            other_tokens=len(episode.token_ids) - episode.model_tokens,
        )


def sources(answer: str | None, searches: list[Information]) -> list[Source]:
    """The retrieved passages in which the answer stands, each once, in the order in which they were found.

    Whole words after SQuAD's normalisation: "Ann" does not stand in "annual" (text.py, `stands_in`).
    """
    wanted = normalize(answer or "")
    found = {passage.id: passage for search in searches for passage in search.passages}
    holding = [
        passage
        for passage in found.values()
        if wanted and stands_in(wanted, normalize(f"{passage.title} {passage.text}"))
    ]
    return [Source(number=n, id=passage.id, title=passage.title) for n, passage in enumerate(holding, 1)]


def _steps(episode: Episode, decode: Callable[[list[int]], str], ends: set[int]) -> Iterator[Step]:
    """What model and environment wrote, in order, from the episode's tokens and their owners."""
    turn = 0
    tokens = zip(episode.token_ids, episode.owners, strict=True)
    for owner, group in groupby(tokens, key=lambda token: token[1]):
        ids = [token for token, _ in group]
        if owner == Owner.MODEL:
            splitter = TagSplitter()
            text = decode(ids[:-1] if ids[-1] in ends else ids)
            for kind, piece in [*splitter.feed(text), *splitter.close()]:
                if piece.strip():
                    yield Step(kind=kind, turn=turn, text=piece.strip())
        elif owner == Owner.ENVIRONMENT:
            yield _environment(decode(ids), turn)
            turn += 1


def _environment(text: str, turn: int) -> Step:
    if text.startswith(prompts.INFORMATION_PREFIX):
        inside = text.removeprefix(prompts.INFORMATION_PREFIX).removesuffix(prompts.INFORMATION_SUFFIX)
        return Step(kind="information", turn=turn, text=inside.strip())
    return Step(kind="notice", turn=turn, text=text.strip())
