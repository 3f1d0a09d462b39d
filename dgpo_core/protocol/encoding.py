"""Text to token ids: what people and documents write never becomes one of the model's control tokens."""

from typing import Any

from dgpo_core.protocol.prompts import message_text, prompt_text


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
