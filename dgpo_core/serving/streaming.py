"""Events of a running episode: the agent loop tells an `EventStream` what happens, which tells a client.

An episode that is watched is the same episode.
"""

import re
from collections.abc import Callable, Collection

from dgpo_core.agent.episode import Decode
from dgpo_core.agent.prompts import INVALID_ACTION
from dgpo_core.retrieval.ranking import Hit
from dgpo_core.serving.events import (
    Delta,
    EpisodeCancelled,
    Event,
    Notice,
    SearchResult,
    TextKind,
    retrieved,
)

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how a character decodes of which bytes are still to come


class EventStream:
    """Turns the tokens and hits of one episode into events; raises EpisodeCancelled when `cancelled` says so.

    Tokens are decoded with the turn's earlier ones, so that a character of several tokens is sent whole;
    those that end a generation (`eos`) are not sent.
    """

    def __init__(
        self,
        decode: Decode,
        eos: Collection[int],
        emit: Callable[[Event], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.searches: list[SearchResult] = []
        self._decode, self._eos, self._emit, self._cancelled = decode, eos, emit, cancelled
        self._turn = -1
        self._ids: list[int] = []  # of the turn, and how many characters of them are sent
        self._sent = 0
        self._splitter = TagSplitter()

    def begin_turn(self) -> None:
        """Begin a turn, and tell of the last one where it neither searched nor answered."""
        self._check()
        if self._turn >= 0 and not (self.searches and self.searches[-1].turn == self._turn):
            self._emit(Notice(turn=self._turn, text=INVALID_ACTION.strip()))
        self._turn += 1
        self._ids, self._sent, self._splitter = [], 0, TagSplitter()

    def token(self, token: int) -> None:
        """Tell what is certain of the text with this token."""
        self._check()
        if token in self._eos:
            return
        self._ids.append(token)
        self._send(self._decode(self._ids).rstrip(INCOMPLETE))

    def end_turn(self) -> None:
        """Tell the rest of the turn."""
        self._send(self._decode(self._ids))
        self._emit_pieces(self._splitter.close())

    def search(self, query: str, hits: list[Hit]) -> None:
        """Keep a search, and tell of it."""
        passages = [retrieved(hit) for hit in hits]
        self.searches.append(SearchResult(turn=self._turn, query=query, passages=passages))
        self._emit(self.searches[-1])

    def _send(self, text: str) -> None:
        """Emit what `text`, the turn so far, has beyond what was sent."""
        if len(text) > self._sent:
            pieces = self._splitter.feed(text[self._sent :])
            self._sent = len(text)
            self._emit_pieces(pieces)

    def _emit_pieces(self, pieces: list["Piece"]) -> None:
        for kind, text in pieces:
            self._emit(Delta(kind=kind, turn=self._turn, text=text))

    def _check(self) -> None:
        if self._cancelled():
            raise EpisodeCancelled


Piece = tuple[TextKind, str]

_KINDS: dict[str, TextKind] = {
    "think": "think",
    "search": "search",
    "answer": "answer",
    "information": "forged",  # the environment's blocks never pass through here
}
_TAG = re.compile(f"<(/?)({'|'.join(_KINDS)})>")
_LONGEST = max(len(f"</{name}>") for name in _KINDS)


class TagSplitter:
    """Cuts the text of one turn at its tags, however the text is cut into chunks.

    Every tag is a boundary and belongs to no piece: an opening one begins its kind, a closing one ends
    whatever was open. So the kinds are known without the text that follows. What may be the beginning of a
    tag is held back until it is one or is not.
    """

    def __init__(self) -> None:
        self._kind: TextKind = "text"
        self._held = ""

    def feed(self, chunk: str) -> list[Piece]:
        """Return the pieces that are certain now, without empty ones."""
        text = self._held + chunk
        pieces: list[Piece] = []
        end = 0
        for match in _TAG.finditer(text):
            pieces.append((self._kind, text[end : match.start()]))
            self._kind = "text" if match[1] else _KINDS[match[2]]
            end = match.end()
        cut = max(end, _unfinished_tag(text))
        pieces.append((self._kind, text[end:cut]))
        self._held = text[cut:]
        return [piece for piece in pieces if piece[1]]

    def close(self) -> list[Piece]:
        """Return what was held back: the turn ended inside it, so it is no tag."""
        held, self._held = self._held, ""
        return [(self._kind, held)] if held else []


def _unfinished_tag(text: str) -> int:
    """Return where an unfinished tag at the end of `text` begins; its length when there is none."""
    start = text.rfind("<", max(0, len(text) - _LONGEST + 1))
    begun = text[start:]
    tags = (f"<{slash}{name}>" for slash in ("", "/") for name in _KINDS)
    return start if start >= 0 and any(tag.startswith(begun) for tag in tags) else len(text)
