"""Models as GGUF files, which llama.cpp, Ollama and LM Studio read: Qwen2's and Llama's architectures.

llama.cpp's own converter is a script of its repository, in no package; the names of keys and tensors are
those of the package `gguf`, which comes from the same repository. This is the only file that imports it.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dgpo_core.errors import UserError

ARCHITECTURES = {"qwen2": "QWEN2", "llama": "LLAMA"}  # transformers' name -> gguf's
Precision = Literal["f32", "f16", "q8_0"]
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
# llama.cpp's names of the rules by which a text is split before byte pairs are merged.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {_SPLIT % r"\p{N}": "qwen2", _SPLIT % r"\p{N}{1,3}": "llama-bpe"}


def write_gguf(model: PreTrainedModel, tokenizer: Any, path: Path, precision: Precision, name: str) -> None:
    """Write weights and tokenizer to `path`. Raises UserError for what llama.cpp cannot run.

    Vectors (norms and biases) are float32 whatever the precision, as in llama.cpp's own conversion.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "a GGUF file needs the package gguf: install the extra gguf (`pip install -e '.[gguf]'`)"
        ) from None
    config = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"the architecture {config.model_type} cannot be written as GGUF, only {known}")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[precision]])
    _write_shape(writer, config)
    _write_tokenizer(writer, tokenizer, config.vocab_size, gguf.TokenType)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, weight in _tensors(model):
        kind = gguf.GGMLQuantizationType[precision.upper() if weight.ndim > 1 else "F32"]
        place = names.get_name(key, try_suffixes=(".weight", ".bias")) or key
        try:
            writer.add_tensor(place, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
        except gguf.QuantError as error:
            raise UserError(f"{precision}: {key} of shape {tuple(weight.shape)}: {error}") from None
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: Any) -> None:
    if getattr(config, "use_sliding_window", False):
        raise UserError("sliding windows of attention cannot be written as GGUF")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


# --- weights

ROPE = "rope_freqs.weight"


def _tensors(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Return the weights by transformers' names, in float32 on the CPU; a tied head is the embedding's."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = []
    for key, parameter in model.named_parameters():
        weight = parameter.detach().float().cpu()
        projection = key.split(".")[-2]
        if config.model_type == "llama" and projection in heads:
            weight = _interleaved(weight, heads[projection])
        found.append((key, weight.contiguous()))
    if config.rope_parameters["rope_type"] != "default":
        found.append((ROPE, _rope_factors(model)))
    return found


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows: for Llama llama.cpp rotates neighbours, transformers the two halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """Return by what llama.cpp has to divide each frequency of the rotation. Raises UserError.

    Llama 3's rule is one of constant factors; others depend on the length of the text.
    """
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        raise UserError(f"rope_type {rope['rope_type']} cannot be written as GGUF, only default and llama3")
    rotation: Any = model.base_model.rotary_emb
    scaled: Tensor = rotation.inv_freq.float().cpu()
    unscaled = torch.tensor(rope["rope_theta"]) ** -(torch.arange(len(scaled)) / len(scaled))
    return unscaled / scaled


# --- tokenizer


def _write_tokenizer(writer: Any, tokenizer: Any, rows: int, kinds: Any) -> None:
    """Write a byte-level BPE tokenizer. Raises UserError for another one."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = described["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"a tokenizer of the type {bpe['type']} cannot be written as GGUF, only BPE")
    texts, types = [f"[PAD{i}]" for i in range(rows)], [kinds.UNUSED] * rows
    for text, i in bpe["vocab"].items():
        texts[i], types[i] = text, kinds.NORMAL
    for token in described["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer(described["pre_tokenizer"]))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    merges = bpe["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the chat template writes it
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(described: dict[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer (tokenizer.json's description). Raises UserError."""
    parts = described.get("pretokenizers", [described])
    for part in parts:
        regex = part.get("pattern", {}).get("Regex")
        if regex in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[regex]
        if part["type"] == "Digits" and part["individual_digits"]:
            return "smollm"
    if len(parts) == 1 and parts[0]["type"] == "ByteLevel" and parts[0]["use_regex"]:
        return "gpt-2"
    raise UserError(
        "llama.cpp has no name for this tokenizer's way of splitting texts (pre_tokenizer of "
        "tokenizer.json): export the model with --to hf"
    )
