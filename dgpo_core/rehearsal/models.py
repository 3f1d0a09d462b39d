"""Small tokenizers that behave as Qwen2's and Llama 3's do: byte-level BPE, chat template, tags in pieces.

Models of a true architecture scaled down: family, grouped queries, tied or not, padding rows are kept.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer, Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from dgpo_core.agent import prompts
from dgpo_core.models import load_tokenizer, save_model
from dgpo_core.objectives.logprobs import token_logprobs
from dgpo_core.planning.architectures import config_of, published
from dgpo_core.training.batches import TokenSequence, backbone_of, collate, counted_hidden, head_of

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


HEAD_SIZE = 32  # the least that vLLM runs on a processor
LAYERS = 2
LEARNED = 0.02  # nats a token below which an episode is known by heart
PATIENCE = 400  # steps


def scaled_config(source: str, tokens: int) -> dict[str, Any]:
    """config.json's content of `source` with few layers and a small width, for a tokenizer of `tokens`
    tokens."""
    config = config_of(source)
    heads = config["num_attention_heads"]
    ratio = heads // config.get("num_key_value_heads", heads)  # queries that share keys and values
    groups = 2 if ratio <= 4 else 1
    hidden = ratio * groups * HEAD_SIZE
    return {
        "model_type": config["model_type"],
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": ratio * groups,
        "num_key_value_heads": groups,
        "vocab_size": tokens + padding_rows(source, config),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def padding_rows(source: str, config: dict[str, Any]) -> int:
    """Rows of the embedding that no token has."""
    entry = published(source)
    known = entry["tokens"] if entry else len(load_tokenizer(source))
    return max(0, int(config["vocab_size"]) - known)


def random_model(source: str, tokenizer: Any, seed: int) -> PreTrainedModel:
    """Random weights in float32."""
    values = scaled_config(source, len(tokenizer))
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        dtype="float32",
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def learn_by_heart(model: PreTrainedModel, sequences: list[TokenSequence]) -> float:
    """Train until `sequences` are known: a teacher whose answers are right, so that the stages behind it have
    something to do. Returns the last loss, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loss = torch.tensor(float("inf"))
    model.train()
    for step in range(PATIENCE):
        batch = collate([sequences[step % len(sequences)]], model.device)
        hidden = counted_hidden(backbone_of(model), batch)
        loss = -token_logprobs(hidden, head_of(model), batch.targets)[0]
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if float(loss.max().detach()) < LEARNED:
            break
    model.eval()
    return float(loss.mean().detach())


def save_random_student(source: str, tokenizer: Any, folder: Path) -> None:
    save_model(random_model(source, tokenizer, seed=1), tokenizer, folder)


def save_taught_teacher(source: str, tokenizer: Any, sequences: list[TokenSequence], folder: Path) -> float:
    model = random_model(source, tokenizer, seed=2)
    loss = learn_by_heart(model, sequences)
    save_model(model, tokenizer, folder)
    return loss


def save_encoder(texts: list[str], folder: Path) -> None:
    """A random BERT with a word-piece tokenizer: E5's architecture."""
    learned = BertWordPieceTokenizer()
    learned.train_from_iterator(texts, vocab_size=500, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=128,
    )
    save_model(BertModel(config), tokenizer, folder)
