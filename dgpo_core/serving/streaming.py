"""The parts around the agent loop that tell what happens in it: an engine, a retriever, and a narrator.

The loop itself (dgpo_core/rollout) knows nothing of this: an episode that is watched is the same episode.
"""

from collections.abc import Callable
from typing import Protocol

from dgpo_core.agent.engine import Generation, Request
from dgpo_core.agent.prompts import INVALID_ACTION
from dgpo_core.agent.transformers_engine import TransformersEngine, _Row
from dgpo_core.config.agent import Sampling
from dgpo_core.retrieval.ranking import Hit, Retriever
from dgpo_core.serving.events import Delta, Event, Found, Information, Notice, Piece, Stopped, TagSplitter

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a character decodes of which bytes are still to come


class Listener(Protocol):
    """What hears of a turn; whatever it raises ends the generation."""

    def begin(self) -> None: ...

    def token(self, token: int) -> None: ...

    def end(self) -> None: ...


class StreamingEngine(TransformersEngine):
    """The default engine for one episode at a time; tells `listener` of each token as it is sampled.

    The end-of-text token is not told of. Set `listener` before generating.
    """

    listener: Listener

    @property
    def end_tokens(self) -> set[int]:
        return self.endings.eos

    def generate(
        self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
    ) -> list[Generation]:
        """Raises ValueError for more than one request: whose tokens would they be?"""
        if len(requests) != 1:
            raise ValueError(f"one request at a time, not {len(requests)}")
        self.listener.begin()
        generations = super().generate(requests, sampling, stop)
        self.listener.end()
        return generations

    def _append(
        self, batch: list[_Row], tokens: list[int], logprobs: list[float], stop: tuple[str, ...]
    ) -> None:
        super()._append(batch, tokens, logprobs, stop)
        if tokens[0] not in self.endings.eos:
            self.listener.token(tokens[0])


class ReportingRetriever:
    """Passes searches on, and reports each query with its hits."""

    def __init__(self, retriever: Retriever, report: Callable[[str, list[Hit]], None]) -> None:
        self.digest = retriever.digest
        self._retriever, self._report = retriever, report

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Raises InfrastructureError as the retriever does; then nothing is reported."""
        results = self._retriever.search(queries, top_k)
        for query, hits in zip(queries, results, strict=True):
            self._report(query, hits)
        return results


class Narrator:
    """Turns the tokens and hits of one episode into events; raises Stopped when told to.

    Tokens are decoded with the turn's earlier ones, so that a character of several tokens is told whole.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], emit: Callable[[Event], None], stop: Callable[[], bool]
    ) -> None:
        self.searches: list[Information] = []
        self._decode, self._emit, self._stop = decode, emit, stop
        self._turn = -1
        self._ids: list[int] = []  # of the turn, and how many characters of them are told
        self._told = 0
        self._splitter = TagSplitter()

    def begin(self) -> None:
        self._check()
        if self._turn >= 0 and not (self.searches and self.searches[-1].turn == self._turn):
            self._emit(Notice(turn=self._turn, text=INVALID_ACTION.strip()))
        self._turn += 1
        self._ids, self._told, self._splitter = [], 0, TagSplitter()

    def token(self, token: int) -> None:
        self._check()
        self._ids.append(token)
        self._tell(self._decode(self._ids).rstrip(UNFINISHED))

    def end(self) -> None:
        self._tell(self._decode(self._ids))
        self._emit_pieces(self._splitter.close())

    def found(self, query: str, hits: list[Hit]) -> None:
        passages = [
            Found(id=hit.passage.id, title=hit.passage.title, text=hit.passage.text, score=hit.score)
            for hit in hits
        ]
        self.searches.append(Information(turn=self._turn, query=query, passages=passages))
        self._emit(self.searches[-1])

    def _tell(self, text: str) -> None:
        if len(text) > self._told:
            pieces = self._splitter.feed(text[self._told :])
            self._told = len(text)
            self._emit_pieces(pieces)

    def _emit_pieces(self, pieces: list[Piece]) -> None:
        for kind, text in pieces:
            self._emit(Delta(kind=kind, turn=self._turn, text=text))

    def _check(self) -> None:
        if self._stop():
            raise Stopped
