"""The action that a turn of the model holds, and the protocol's form of a whole response."""

import re
from dataclasses import dataclass
from enum import StrEnum

from dgpo_core.text import trimmed

# the content holds no opening tag of its own kind: one that was never closed does not swallow the next
_ACTION = re.compile(r"<(search|answer)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_CONTENT = r"(?:(?!</?(?:think|search|information|answer)>).)*"  # of a tag: no other tag in it
_THINK, _SEARCH, _REPLY = (rf"\s*<{tag}>{_CONTENT}</{tag}>\s*" for tag in ("think", "search", "answer"))
_SEARCH_TURN = re.compile(f"{_THINK}{_SEARCH}", re.DOTALL)
_ANSWER_TURN = re.compile(f"{_THINK}{_REPLY}", re.DOTALL)


class ActionKind(StrEnum):
    SEARCH = "search"
    ANSWER = "answer"
    INVALID = "invalid"


@dataclass(frozen=True)
class Action:
    """A search or an answer; `content` is the query or answer, trimmed, and empty for an invalid action."""

    kind: ActionKind
    content: str = ""


def parse_action(turn_text: str) -> Action:
    """Return the first complete `<search>` or `<answer>` of one turn of the model."""
    match = _ACTION.search(turn_text)
    if match is None or not (content := trimmed(match[2])):  # an empty query or answer is no action
        return Action(ActionKind.INVALID)
    return Action(ActionKind(match[1]), content)


def last_answer(response_text: str) -> str | None:
    """Return the prediction: the last complete `<answer>` of the response, unless it is empty."""
    answers = _ANSWER.findall(response_text)
    return trimmed(answers[-1]) or None if answers else None


def is_well_formed(model_turns: list[str]) -> bool:
    """Return whether the turns are think -> (search -> information -> think)* -> answer."""
    if not model_turns:
        return False
    *searches, reply = model_turns
    return bool(_ANSWER_TURN.fullmatch(reply)) and all(_SEARCH_TURN.fullmatch(text) for text in searches)
