"""FLOPs and bytes of passes through a transformer, by its shape.

Conventions: a multiplication and an addition are two FLOPs; attention is counted over all pairs of tokens, as
torch's FLOP counter and PaLM's appendix B do (arXiv:2204.02311), although causal kernels skip half of them.
`tokens` are padded tokens of a batch; `pairs` the sum of the sequences' squared lengths.
"""

from dataclasses import dataclass
from typing import Literal

from dgpo_core.config.training import ComputeConfig
from dgpo_core.planning.architectures import Architecture

CHUNK = 1024  # tokens whose logits exist at one time (objectives/logprobs.py)
CACHE_WIDTH = {"float32": 8, "bfloat16": 6}  # keys are rotated in float32 and stay so under autocast
HEAD_COPIES = 5  # float32 [CHUNK, vocabulary] alive in its backward pass (docs/scaling.md)


Numerics = Literal["float32", "autocast", "bfloat16"]


@dataclass(frozen=True)
class Kept:
    """Bytes a token that a layer keeps for its backward pass, for each channel of hidden states, queries,
    keys and MLP, and for each rank of adapters; `input`: of the layer's input alone, `last`: by the norm
    after all layers, for each hidden channel."""

    hidden: int
    queries: int
    keys: int
    intermediate: int
    rank: int
    input: int
    last: int


# Counted tensor by tensor from what autograd saves of transformers' Qwen2 and Llama layers: inputs,
# normalised values and outputs of both norms, queries and keys after rotation, values, attention's output,
# four vectors of the MLP. Under autocast the residual stream is float32; each matrix's input is cast.
KEPT: dict[Numerics, Kept] = {
    "float32": Kept(24, 8, 8, 16, 0, input=4, last=8),
    "autocast": Kept(26, 4, 4, 8, 0, input=4, last=8),
    "bfloat16": Kept(16, 4, 4, 8, 0, input=2, last=6),
}
# Frozen norms keep no normalised values, frozen matrices no inputs; each of seven adapters keeps its input
# and what stands between its two matrices. The first norm keeps nothing, as nothing before it is trained.
KEPT_ADAPTED: dict[Numerics, Kept] = {
    "float32": Kept(16, 8, 8, 16, 28, input=4, last=4),
    "autocast": Kept(18, 6, 4, 8, 14, input=2, last=4),
    "bfloat16": Kept(12, 4, 4, 8, 14, input=2, last=4),
}


def numerics(compute: ComputeConfig) -> Numerics:
    """In which training computes: DeepSpeed's weights have the precision of compute, plain torch's only
    adapted ones (training/engines.py), and autocast does the rest."""
    if compute.precision == "float32":
        return "float32"
    return "bfloat16" if compute.engine == "deepspeed" else "autocast"


def rank(compute: ComputeConfig) -> int:
    """Of the adapters; 0: none, all weights are trained."""
    return compute.lora.rank if compute.lora else 0


def forward_flops(shape: Architecture, tokens: float, pairs: float, rank: int = 0) -> float:
    """Layers only, with adapters of `rank`: 2 for each weight and token; 4 for each query channel and pair
    (scores, then values)."""
    return 2 * (shape.matrices + shape.adapters(rank)) * tokens + _attention_flops(shape, pairs)


def _attention_flops(shape: Architecture, pairs: float) -> float:
    return 4 * shape.layers * shape.queries * pairs


def training_flops(shape: Architecture, tokens: float, pairs: float, compute: ComputeConfig) -> float:
    """Forward and backward: three times the matrices; attention's backward pass has five products to two,
    because flash attention computes the scores again (Dao et al. 2022, arXiv:2205.14135).

    Frozen matrices have no gradient: two times, and what only leads to the frozen embedding is left out, but
    for checkpointed layers. These run forward once more, up to the last thing that they keep: without the
    last matrix (with adapters: the last adapter's second one).
    """
    low, attention = rank(compute), _attention_flops(shape, pairs)
    h, into = shape.hidden, shape.queries + 2 * shape.keys
    weights = (4 if low else 6) * shape.matrices + 6 * shape.adapters(low)
    flops = weights * tokens + 3.5 * attention
    if compute.gradient_checkpointing:
        spared = shape.layers * h * (low or shape.intermediate)
        return flops + forward_flops(shape, tokens, pairs, low) - 2 * spared * tokens
    return flops - (2 * h * (into + 3 * low) * tokens if low else 0)


def head_flops(shape: Architecture, tokens: float) -> float:
    """Output embedding on `tokens` positions."""
    return 2 * shape.hidden * shape.vocabulary * tokens


def head_training_flops(shape: Architecture, tokens: float, compute: ComputeConfig) -> float:
    """Forward, computed again, and two products back; one where it is frozen."""
    return (3 if compute.lora else 4) * head_flops(shape, tokens)


def activation_bytes(shape: Architecture, tokens: float, compute: ComputeConfig) -> float:
    """What the layers of a Qwen2 or Llama decoder keep of a forward pass for the backward pass, in bytes;
    with checkpointing each layer's input alone (`benchmarks/training_step.py` compares).
    """
    kept = _kept(compute)
    if compute.gradient_checkpointing:
        return tokens * shape.hidden * (shape.layers * kept.input + kept.last)
    # with adapters the first norm keeps nothing: what the last one keeps makes up for it
    last = 0 if compute.lora else tokens * kept.last * shape.hidden
    return shape.layers * layer_bytes(shape, tokens, compute) + last


def layer_bytes(shape: Architecture, tokens: float, compute: ComputeConfig) -> float:
    """What one layer keeps; with checkpointing while it is computed again."""
    kept = _kept(compute)
    channels = kept.hidden * shape.hidden + kept.queries * shape.queries + kept.keys * shape.keys
    channels += kept.intermediate * shape.intermediate + kept.rank * rank(compute)
    return tokens * (channels + 8 + 4 * shape.heads)  # the norms' scales; attention's log-sum-exp


def update_bytes(shape: Architecture, tokens: float, compute: ComputeConfig) -> float:
    """Alive at once in the layers' forward and backward pass, at most."""
    again = layer_bytes(shape, tokens, compute) if compute.gradient_checkpointing else 0.0
    return activation_bytes(shape, tokens, compute) + again + passing_bytes(shape, tokens, compute.precision)


def _kept(compute: ComputeConfig) -> Kept:
    return (KEPT_ADAPTED if compute.lora else KEPT)[numerics(compute)]


def passing_bytes(shape: Architecture, tokens: float, precision: str) -> float:
    """What is alive at once inside a layer, forward without gradients or backward: a few vectors a token."""
    width = 2 if precision == "bfloat16" else 4
    return tokens * (4 * width * shape.intermediate + 16 * shape.hidden)


def head_bytes(shape: Architecture, tokens: float = CHUNK) -> float:
    """Logits and what is computed of them for one chunk of counted tokens."""
    return HEAD_COPIES * 4 * min(tokens, CHUNK) * shape.vocabulary


def cast_bytes(shape: Architecture, precision: str) -> float:
    """bfloat16 copies of float32 matrices that autocast keeps during a pass, the output embedding among
    them."""
    return 2 * (shape.matrices + shape.vocabulary * shape.hidden) if precision == "bfloat16" else 0


def cache_bytes(shape: Architecture, tokens: float, width: int) -> float:
    """Key-value cache; `width` are the bytes of one key's and one value's channel together."""
    return tokens * shape.layers * shape.keys * width
