"""What kind each piece of a model's text is, told while the text arrives."""

import re
from typing import Literal

Kind = Literal["think", "search", "answer", "forged", "text"]
Piece = tuple[Kind, str]

# `forged`: an information block that the model wrote itself; the environment's never passes through here
_KINDS: dict[str, Kind] = {"think": "think", "search": "search", "answer": "answer", "information": "forged"}
_TAG = re.compile(f"<(/?)({'|'.join(_KINDS)})>")
_LONGEST = max(len(f"</{name}>") for name in _KINDS)


class TagSplitter:
    """Cuts the text of one turn at its tags, however the text is cut into chunks.

    Every tag is a boundary and belongs to no piece: an opening one begins its kind, a closing one ends
    whatever was open. So the kinds are known without the text that follows. What may be the beginning of a
    tag is held back until it is one or is not.
    """

    def __init__(self) -> None:
        self._kind: Kind = "text"
        self._held = ""

    def feed(self, chunk: str) -> list[Piece]:
        """The pieces that are certain now, without empty ones."""
        text = self._held + chunk
        pieces: list[Piece] = []
        end = 0
        for match in _TAG.finditer(text):
            pieces.append((self._kind, text[end : match.start()]))
            self._kind = "text" if match[1] else _KINDS[match[2]]
            end = match.end()
        cut = max(end, _open_end(text))
        pieces.append((self._kind, text[end:cut]))
        self._held = text[cut:]
        return [piece for piece in pieces if piece[1]]

    def close(self) -> list[Piece]:
        """What was held back: the turn ended inside it, so it is no tag."""
        held, self._held = self._held, ""
        return [(self._kind, held)] if held else []


def _open_end(text: str) -> int:
    """Where an unfinished tag at the end of `text` begins; its length when there is none."""
    start = text.rfind("<", max(0, len(text) - _LONGEST + 1))
    begun = text[start:]
    tags = (f"<{slash}{name}>" for slash in ("", "/") for name in _KINDS)
    return start if start >= 0 and any(tag.startswith(begun) for tag in tags) else len(text)
