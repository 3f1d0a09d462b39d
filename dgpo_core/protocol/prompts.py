"""Every text that the environment puts into an episode, in Search-R1's wording, which the paper follows."""

from collections.abc import Iterable
from typing import Any, Literal

from dgpo_core.text import trimmed

TAGS = (
    "<think>", "</think>", "<search>", "</search>",
    "<information>", "</information>", "<answer>", "</answer>",
)  # fmt: skip
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

Documents = Literal["plain", "release"]  # how passages are shown


def with_question_mark(question: str) -> str:
    question = trimmed(question)
    return question if question.endswith(QUESTION_MARKS) else question + "?"


# Llama 3's template tells the model a date, today's unless it is given one: episodes would change every day.
TEMPLATE_DATE = "26 Jul 2024"  # the one that the template itself falls back on


def document(number: int, title: str, text: str, form: Documents = "plain") -> str:
    """Return one retrieved passage as the model sees it; `number` counts from 1.

    As `release`, the title keeps its quotes: Search-R1's `_passages2string` takes the first line as it is.
    """
    shown = f'"{title}"' if form == "release" else title
    return f"Doc {number}(Title: {shown}) {text}\n"


def information(passages: Iterable[tuple[str, str]], form: Documents = "plain") -> str:
    """Return the block in which (title, text) of each passage are shown.

    As `release`, the last text's line break is gone: Search-R1's `execute_predictions` strips them all.
    """
    documents = "".join(document(number, *passage, form) for number, passage in enumerate(passages, 1))
    if form == "release":
        documents = documents.strip()
    return f"{INFORMATION_PREFIX}{documents}{INFORMATION_SUFFIX}"


def message_text(question: str, instruction: str) -> str:
    """What the user says; `instruction` is a key of INSTRUCTIONS."""
    return INSTRUCTIONS[instruction].format(question=with_question_mark(question))


def prompt_text(question: str, instruction: str, tokenizer: Any) -> str:
    """The first text of an episode: the user's message through the model's chat template, if it has one."""
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
