"""Small tokenizers that behave as Qwen2's and Llama 3's do: byte-level BPE, chat template, tags in pieces."""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from dgpo_core.protocol import prompts

SIZE = 600  # of the vocabulary that is learned
# Both families split words, runs of other characters and line breaks before merging (their tokenizer.json).
SPLIT = r"'[a-z]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
# Without a system message Qwen2.5 puts in a line of its own, and Llama 3 a block with dates.
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer(family: str, texts: list[str]) -> Any:
    """`family`: qwen2 or llama; learned from `texts` and the protocol's own, the same on every machine."""
    special = QWEN_SPECIAL if family == "qwen2" else LLAMA_SPECIAL
    learned = _learn([*texts, *prompts.INSTRUCTIONS.values(), prompts.INVALID_ACTION, *prompts.TAGS])
    vocabulary, merges = learned["vocab"], [tuple(pair) for pair in learned["merges"]]
    if family == "qwen2":
        tokenizer: Any = Qwen2Tokenizer(
            vocab=vocabulary,
            merges=merges,  # type: ignore[arg-type]
            unk_token=special[0],
            pad_token=special[0],
            eos_token=special[2],
        )
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = QWEN_TEMPLATE
        return tokenizer
    backend = _backend(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[4], pad_token=special[1]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def _backend(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = ByteLevelDecoder()
    return backend


def _learn(texts: list[str]) -> dict[str, Any]:
    """Vocabulary and merges."""
    backend = _backend(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    learned: dict[str, Any] = json.loads(backend.to_str())["model"]
    return learned
