"""Every text that the environment puts into an episode, in Search-R1's wording, which the paper follows.

Texts become token ids here too: what people and documents write never becomes a control token of the model,
nor a tag of the protocol.
"""

import re
import threading
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from dgpo_core.text import start_of, trimmed

TAGS = (
    "<think>", "</think>", "<search>", "</search>",
    "<information>", "</information>", "<answer>", "</answer>",
)  # fmt: skip
# also as wider forms of the signs, which some tokenizers make ordinary ones (NFKC)
_TAG_BEGINS = re.compile(
    r"[<\uff1c\ufe64](?=[/\uff0f]?(?:think|search|information|answer)[>\uff1e\ufe65])", re.I
)
SEARCH_END, ANSWER_END = "</search>", "</answer>"
INFORMATION_START, INFORMATION_END = "<information>", "</information>"

PAPER_INSTRUCTION = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you "
    "get new information. After reasoning, if you find you lack some knowledge, you can call a search engine "
    "by <search> query </search> and it will return the top searched results between <information> and "
    "</information>. You can search as many times as your want. If you find no further external knowledge "
    "needed, you can directly provide the answer inside <answer> and </answer>, without detailed "
    "illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
)
SHORT_INSTRUCTION = "Answer the question. Search if you need to. Question: {question}\n"
INSTRUCTIONS = {"paper": PAPER_INSTRUCTION, "short": SHORT_INSTRUCTION}

INVALID_ACTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and "
    "</search>. If I want to give the final answer, I should put the answer between <answer> and </answer>. "
    "Let me try again.\n"
)
INFORMATION_PREFIX = f"\n\n{INFORMATION_START}"
INFORMATION_SUFFIX = f"{INFORMATION_END}\n\n"

# of all scripts: a full-width, an Arabic or a Greek one ends a question as well
QUESTION_MARKS = tuple(
    "?\u037e\u055e\u061f\u1367\u1945\u203d\u2047\u2048\u2049\u2cfa\u2cfb\u2e2e\ua60f\ua6f7\ufe16\ufe56\uff1f"
)

# Llama 3's template tells the model a date, today's unless it is given one: episodes would change every day.
TEMPLATE_DATE = "26 Jul 2024"  # the one that the template itself falls back on

Documents = Literal["plain", "release"]  # how passages are shown


def without_tags(text: str) -> str:
    """Return what somebody else has written, with a space in what looks like a tag: `< /information>`."""
    return _TAG_BEGINS.sub(r"\g<0> ", text)


def with_question_mark(question: str) -> str:
    """Return `question`, trimmed, with a question mark at its end if it has none of any script."""
    question = trimmed(question)
    return question if question.endswith(QUESTION_MARKS) else question + "?"


def document(number: int, title: str, text: str, form: Documents = "plain") -> str:
    """Return one retrieved passage as the model sees it; `number` counts from 1.

    As `release`, the title keeps its quotes: Search-R1's `_passages2string` takes the first line as it is.
    """
    shown = f'"{title}"' if form == "release" else title
    return f"Doc {number}(Title: {without_tags(shown)}) {without_tags(text)}\n"


def information(passages: Iterable[tuple[str, str]], form: Documents = "plain") -> str:
    """Return the block in which (title, text) of each passage are shown.

    As `release`, the last text's line break is gone: Search-R1's `execute_predictions` strips them all.
    """
    documents = "".join(document(number, *passage, form) for number, passage in enumerate(passages, 1))
    if form == "release":
        documents = documents.strip()
    return f"{INFORMATION_PREFIX}{documents}{INFORMATION_SUFFIX}"


def message_text(question: str, instruction: str) -> str:
    """Return the user's message; `instruction` is a key of INSTRUCTIONS."""
    return INSTRUCTIONS[instruction].format(question=with_question_mark(without_tags(question)))


def prompt_text(question: str, instruction: str, tokenizer: Any) -> str:
    """Return an episode's first text: the user's message in the model's chat template, if it has one."""
    message = message_text(question, instruction)
    if not tokenizer.chat_template:
        return message
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        tokenize=False,
        date_string=TEMPLATE_DATE,
    )
    return text


def known_ids(tokenizer: Any) -> int:
    """Return one more than the largest id that has a token.

    A model's output may have more rows, for the sake of even sizes (Qwen2.5: 151,936 for 151,665 tokens).
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    return 1 + max(ids.values())


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text of the environment; `<|im_end|>` in a passage is ordinary characters."""
    return _encode(text, tokenizer, split=True)


def encode_start(text: str, tokenizer: Any, count: int) -> list[int]:
    """Return the first `count` ids of `encode_text(text)`; a long text is not tokenised whole for them."""
    return encode_text(start_of(text, lambda part: encode_text(part, tokenizer), count), tokenizer)[:count]


def encode_prompt(question: str, instruction: str, tokenizer: Any) -> list[int]:
    """Return the ids of `prompt_text`, in which only the chat template writes control tokens."""
    text = prompt_text(question, instruction, tokenizer)
    message = message_text(question, instruction)
    if message not in text:
        message = message.strip()  # as some templates do
    own = encode_text(message, tokenizer)
    if own == _encode(message, tokenizer):  # as good as always: nothing to keep apart
        return _encode(text, tokenizer)
    before, _, after = text.partition(message)
    around = [_encode(part, tokenizer) for part in (before, after)]
    return [*around[0], *own, *around[1]]


# Whether control tokens are split is a state of the tokenizer, which a call sets before it encodes.
_ENCODING = threading.Lock()


def _encode(text: str, tokenizer: Any, split: bool = False) -> list[int]:
    """Return the ids of a text; with `split` what looks like a control token is text too."""
    options = {"split_special_tokens": True} if split else {}
    ids: list[int] = []
    for piece in _pieces(text, tokenizer) if split else [text]:
        with _ENCODING:
            ids += tokenizer.encode(piece, add_special_tokens=False, **options)
    return ids


def _pieces(text: str, tokenizer: Any) -> list[str]:
    """Return `text`, cut inside of each token that the tokenizer takes for one although it is not special."""
    inside = _added(tokenizer)
    places = [match.start() + 1 for match in inside.finditer(text)] if inside else []
    return [text[start:stop] for start, stop in pairwise([0, *places, len(text)])] if places else [text]


@lru_cache(maxsize=8)
def _added(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of added tokens that are not special, as Qwen's `<tool_call>`: none splits them."""
    tokens = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = [token.content for token in tokens if not token.special and token.content not in TAGS]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None
