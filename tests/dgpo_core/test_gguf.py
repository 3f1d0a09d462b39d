"""Models of llama.cpp's format as model folders: the same function of the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dgpo_core.errors import UserError
from dgpo_core.gguf import convert
from dgpo_core.models import load_model, load_tokenizer

gguf = pytest.importorskip("gguf")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
NAMES = {  # llama.cpp's of a layer's weights
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def small_llama(vocabulary: int) -> LlamaForCausalLM:
    """Two layers, two heads that share keys, one matrix for both embeddings; numbers that bfloat16 has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    model.eval()
    return model


def write_gguf(file: Path) -> LlamaForCausalLM:
    """Write a small model, with its tokenizer, as llama.cpp's converter does."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġ", "ab"]
    model = small_llama(len(tokens))
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    for name, number in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template(TEMPLATE)
    for name, value in _tensors(model).items():
        writer.add_tensor(name, value.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    weights: dict[str, Any] = model.model.state_dict()
    config = model.config
    tensors = {
        "token_embd.weight": weights["embed_tokens.weight"],
        "output_norm.weight": weights["norm.weight"],
    }
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, theirs in NAMES.items():
            value = weights[f"layers.{layer}.{name}.weight"]
            if name in heads:  # llama.cpp rotates neighbours, transformers halves
                halves = value.reshape(heads[name], 2, -1, config.hidden_size)
                value = halves.swapaxes(1, 2).reshape(value.shape)
            tensors[f"blk.{layer}.{theirs}.weight"] = value
    return tensors


def test_a_converted_model_is_the_model_that_was_written(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "small.gguf")
    convert(tmp_path / "small.gguf", tmp_path / "model")
    loaded, tokenizer = load_model(str(tmp_path / "model")), load_tokenizer(str(tmp_path / "model"))
    ids = torch.tensor([[1, 5, 9, 3, 28, 30]])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, written(ids).logits, atol=1e-4)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|im_start|>ab<|im_end|>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [1, 30, 2]
    assert tokenizer.eos_token == "<|im_end|>"
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"broken\.gguf: cannot load a model"):
        convert(tmp_path / "broken.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()
