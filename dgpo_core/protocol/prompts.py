"""Every text that the environment puts into an episode, in Search-R1's wording, which the paper follows."""

from typing import Any

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


def with_question_mark(question: str) -> str:
    question = question.strip()
    return question if question.endswith("?") else question + "?"


def document(number: int, title: str, text: str) -> str:
    """One retrieved passage as the model sees it; `number` counts from 1."""
    return f"Doc {number}(Title: {title}) {text}\n"


def message_text(question: str, instruction: str) -> str:
    """What the user says; `instruction` is a key of INSTRUCTIONS."""
    return INSTRUCTIONS[instruction].format(question=with_question_mark(question))


def prompt_text(question: str, instruction: str, tokenizer: Any) -> str:
    """The first text of an episode: the user's message through the model's chat template, if it has one."""
    message = message_text(question, instruction)
    if not tokenizer.chat_template:
        return message
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
    )
    return text
