"""The plan's estimates beside measurements, on the CPU: `python -m benchmarks.training_step`.

First small models, each in a process of its own: one policy update (`training/reinforce.py`) with torch's
FLOP counter, and what the process's memory grew by. Then the published shapes: parameters and FLOPs of a
forward and backward pass without any weights (fake tensors), and bytes that autograd keeps in two layers (of
real tensors: with fake ones attention takes another path). Small models also with checkpointing and adapters.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from dgpo_core.config.training import ComputeConfig, LoraConfig, ReinforceConfig
from dgpo_core.models import add_adapters
from dgpo_core.planning.shapes import Architecture, Training, table
from dgpo_core.training.batches import TokenModel, TokenSequence, collate, counted_hidden
from dgpo_core.training.engines import training_engine
from dgpo_core.training.optimizer import Optimization, constant
from dgpo_core.training.parallel import autocast
from dgpo_core.training.reinforce import Experience, Updater

SMALL = {
    "qwen2, 4 layers": {
        "model_type": "qwen2", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 704, "vocab_size": 32_000, "tie_word_embeddings": True,
    },
    "llama, 6 layers": {
        "model_type": "llama", "hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 10,
        "num_key_value_heads": 5, "intermediate_size": 1024, "vocab_size": 16_000, "tie_word_embeddings":
        False,
    },
}  # fmt: skip
PUBLISHED = ("Qwen2.5-0.5B", "Qwen2.5-3B", "Llama-3.2-1B")
SHORT = {"num_hidden_layers": 2, "vocab_size": 500}  # to which published shapes are cut
ODD_LENGTH = 500  # there: EPISODES of it have as many tokens as no matrix has rows
EPISODES, LENGTH, COUNTED = 4, 512, 128  # of a batch: sequences, tokens of each, tokens that count
LORA = LoraConfig(rank=16)
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": LORA},
    "LoRA, checkpointing": {"lora": LORA, "gradient_checkpointing": True},
}
RETURNS = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed: the peak is the tensors'
Numbers = dict[str, float]


def compute_of(precision: str, setting: str = "") -> ComputeConfig:
    """Return how the CPU computes, all of a batch in one pass."""
    values = {"device": "cpu", "precision": precision, "micro_batch_tokens": EPISODES * LENGTH}
    return ComputeConfig.model_validate(values | SETTINGS[setting])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# torch counts its GPU kernels of attention, and not the one for the CPU
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def model_of(config: dict[str, Any], compute: ComputeConfig | None = None) -> Any:
    """Make a model with random weights, as tasks/stages/rollouts.py (`load_student`) loads one."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    if compute and compute.lora:
        if compute.precision == "bfloat16":
            model = model.to(torch.bfloat16)
        add_adapters(model, compute.lora, 0)
    if compute and compute.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def estimate(shape: Architecture, compute: ComputeConfig) -> Numbers:
    """Estimate one update of EPISODES sequences in one pass."""
    tokens, counted, training = EPISODES * LENGTH, EPISODES * COUNTED, Training(shape, compute)
    return {
        "parameters": training.parameters,
        "flops": training.flops(tokens, tokens * LENGTH, counted),
        "memory": sum((training.states() | training.passes(tokens, counted)).values()),
        "saved": training.kept(tokens)[0],
    }


def update_of(config: dict[str, Any], compute: ComputeConfig) -> tuple[Any, Callable[[], object]]:
    """Make a model, and return it with a function that updates it by EPISODES sequences in one pass."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the counter sees the operations of its own thread
    model = model_of(config, compute)
    how = Optimization(learning_rate=1e-4, weight_decay=0.01, max_grad_norm=1.0, schedule=constant())
    actor = training_engine(TokenModel(model), how, compute)
    updater = Updater(actor, None, ReinforceConfig(), compute)
    ids = torch.randint(config["vocab_size"], (EPISODES, LENGTH)).tolist()
    positions = list(range(LENGTH - COUNTED, LENGTH))
    zeros = [torch.zeros(COUNTED) for _ in ids]
    experience = Experience(
        sequences=[TokenSequence(row, positions) for row in ids],
        old_logprobs=zeros,
        sampled_logprobs=None,
        correct=torch.ones(len(ids), dtype=torch.bool),
        gate=torch.zeros(len(ids)),
        kl={},
        kl_outside={},
        rewards=[torch.ones(1) for _ in ids],
        advantages=[torch.ones(COUNTED) for _ in ids],
    )
    return model, partial(updater.update, experience, list(range(EPISODES)))


def measure(config: dict[str, Any], compute: ComputeConfig) -> Numbers:
    """Do the same update: count its FLOPs, and what the process's peak memory grows by."""
    load_first(compute)
    before = peak()
    model, update = update_of(config, compute)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        update()
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops": counter.get_total_flops(),
        "memory": peak() - before,
        "saved": saved_bytes(model, compute, LENGTH),
    }


def load_first(compute: ComputeConfig) -> None:
    """Load what torch and its libraries load when first used: it is not the update's."""
    torch.ones(8, requires_grad=True).sum().backward()
    if compute.lora:
        import peft  # noqa: F401


def saved_bytes(model: Any, compute: ComputeConfig, length: int) -> float:
    """Count the bytes that autograd keeps of the layers' forward pass, without weights and their casts."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2}
    found: dict[int, torch.Tensor] = {}  # the tensors themselves: what is freed may lend its address

    def note(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights and tuple(sorted(tensor.shape)) not in shapes:
            found[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(compute):
        batch = collate([TokenSequence([0] * length, [length - 1])] * EPISODES, model.device)
        counted_hidden(model.base_model, batch)
    return float(sum(tensor.untyped_storage().nbytes() for tensor in found.values()))


def measure_published(config: dict[str, Any], precision: str) -> Numbers:
    """Count parameters and FLOPs of the true shape, and what is kept of the one that is cut to SHORT."""
    compute = compute_of(precision)
    saved = saved_bytes(model_of(config | SHORT), compute, ODD_LENGTH)
    with FakeTensorMode():
        model = model_of(config)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            ids = torch.zeros(EPISODES, LENGTH, dtype=torch.long)
            with autocast(compute):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.sum().backward()
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops": counter.get_total_flops(),
            "saved": saved,
        }


def peak() -> float:
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _row(name: str, compute: str, planned: Numbers, measured: Numbers, keys: tuple[str, ...]) -> str:
    cells = []
    for key in keys:
        unit = {"parameters": 1.0, "flops": 1e12}.get(key, 2**30)
        form = "{:,.0f}" if key == "parameters" else "{:.3g}"
        ratio = planned[key] / measured[key]
        values = " / ".join(form.format(figures[key] / unit) for figures in (planned, measured))
        cells.append(f"{values} | {ratio:.3f}")
    return f"| {name} | {compute} | {' | '.join(cells)} |"


def main() -> None:
    keys: tuple[str, ...] = ("parameters", "flops", "saved", "memory")
    heads = "model | compute | trained: plan / measured | ratio | TFLOPs | ratio | kept, GiB | ratio"
    print(f"| {heads} | memory, GiB | ratio |\n|{'---|' * 10}")
    for name, config in SMALL.items():
        for setting, precision in itertools.product(SETTINGS, ("float32", "bfloat16")):
            command = [sys.executable, "-m", "benchmarks.training_step", "--one", name, precision, setting]
            environment = os.environ | RETURNS
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            planned = estimate(Architecture.from_config(config), compute_of(precision, setting))
            told = ", ".join(filter(None, (precision, setting)))
            print(_row(name, told, planned, json.loads(done.stdout), keys), flush=True)
    keys = ("parameters", "flops", "saved")
    for name in PUBLISHED:
        config = table()[name]["config"]
        shape, tokens = Architecture.from_config(config), EPISODES * LENGTH
        short = Architecture.from_config(config | SHORT)
        planned = {
            "parameters": shape.parameters,
            "flops": Training(shape, compute_of("bfloat16")).flops(tokens, tokens * LENGTH),
            "saved": Training(short, compute_of("bfloat16")).kept(EPISODES * ODD_LENGTH)[0],
        }
        measured = measure_published(config, "bfloat16")
        print(_row(name, "bfloat16", planned, measured, keys) + " | |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(SMALL[sys.argv[2]], compute_of(*sys.argv[3:]))))
    else:
        main()
