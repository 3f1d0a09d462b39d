"""Text to token ids: what people and documents write never becomes one of the model's control tokens."""

from collections.abc import Callable
from typing import Any

from dgpo_core.protocol.prompts import message_text, prompt_text

READ = 6  # characters for a token that is wanted; of most texts one has 3 to 5
MARGIN = 200  # tokens beyond those that count
ELSEWHERE = 13  # characters between two ends of a text: groups of 2 or 3 characters end differently there


def known_ids(tokenizer: Any) -> int:
    """Return one more than the largest id that has a token.

    A model's output may have more rows, for the sake of even sizes (Qwen2.5: 151,936 for 151,665 tokens).
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    return 1 + max(ids.values())


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text of the environment; `<|im_end|>` in a passage is ordinary characters."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_start(text: str, tokenizer: Any, count: int) -> list[int]:
    """Return the first `count` ids of `encode_text(text)`; a long text is not tokenised whole for them."""
    return encode_text(start_of(text, lambda part: encode_text(part, tokenizer), count), tokenizer)[:count]


def start_of(text: str, encode: Callable[[str], list[int]], count: int) -> str:
    """Return a text that begins with the same `count` tokens: `text`, or the start of a much longer one.

    What follows a place can change the tokens before it, but not far before it. So the start has more tokens
    than `count`, and is made twice, with different ends: where that makes a difference, `text` is returned.
    """
    length = READ * (count + MARGIN)
    while 2 * length < len(text):
        start = text[:length]
        ids = encode(start)
        if len(ids) >= count + MARGIN:
            return start if encode(start[:-ELSEWHERE])[:count] == ids[:count] else text
        length *= 4  # long tokens, as of white space
    return text


def encode_prompt(question: str, instruction: str, tokenizer: Any) -> list[int]:
    """Ids of `prompts.prompt_text`, in which only the chat template writes control tokens."""
    text = prompt_text(question, instruction, tokenizer)
    message = message_text(question, instruction)
    if message not in text:
        message = message.strip()  # as some templates do
    own = encode_text(message, tokenizer)
    if own == tokenizer.encode(message, add_special_tokens=False):  # as good as always: nothing to keep apart
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    before, _, after = text.partition(message)
    around = [tokenizer.encode(part, add_special_tokens=False) for part in (before, after)]
    return [*around[0], *own, *around[1]]
