"""FLOPs and bytes of passes through a transformer, by its shape.

Conventions: a multiplication and an addition are two FLOPs; attention is counted over all pairs of tokens, as
torch's FLOP counter and PaLM's appendix B do (arXiv:2204.02311), although causal kernels skip half of them.
`tokens` are padded tokens of a batch; `pairs` the sum of the sequences' squared lengths.
"""

from dgpo_core.planning.architectures import Architecture

CHUNK = 1024  # tokens whose logits exist at one time (objectives/logprobs.py)
CACHE_WIDTH = {"float32": 8, "bfloat16": 6}  # keys are rotated in float32 and stay so under autocast
HEAD_COPIES = 5  # float32 [CHUNK, vocabulary] alive in its backward pass (docs/benchmarks.md)


def forward_flops(shape: Architecture, tokens: float, pairs: float) -> float:
    """Layers only: 2 for each weight and token; 4 for each query channel and pair (scores, then values)."""
    return 2 * shape.matrices * tokens + 4 * shape.layers * shape.queries * pairs


def training_flops(shape: Architecture, tokens: float, pairs: float) -> float:
    """Forward and backward: three times the matrices; attention's backward pass has five products to two,
    because flash attention computes the scores again (Dao et al. 2022, arXiv:2205.14135)."""
    attention = 4 * shape.layers * shape.queries * pairs
    return 3 * 2 * shape.matrices * tokens + 3.5 * attention


def head_flops(shape: Architecture, tokens: float, training: bool = False) -> float:
    """Output embedding on `tokens` positions; in training forward, computed again, and two products back."""
    return 2 * shape.hidden * shape.vocabulary * tokens * (4 if training else 1)


def activation_bytes(shape: Architecture, tokens: float, precision: str) -> float:
    """What the layers of a Qwen2 or Llama decoder keep of a forward pass for the backward pass, in bytes.

    Counted tensor by tensor from what autograd saves of transformers' layers without checkpointing
    (`benchmarks/training_step.py` compares): a token and layer keeps the inputs, normalised values and
    outputs of both norms, queries and keys after rotation, values, attention's output, and four vectors of
    the MLP. The residual stream is float32 also under bfloat16 autocast, which casts the input of each matrix
    anew.
    """
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    small = 8 + 4 * shape.heads  # the norms' scales; attention's log-sum-exp
    layer = (
        26 * h + 4 * q + 4 * k + 8 * i if precision == "bfloat16" else 24 * h + 8 * q + 8 * k + 16 * i
    ) + small
    return tokens * (shape.layers * layer + 8 * h)  # and the last norm


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
