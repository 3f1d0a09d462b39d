"""Parameters, FLOPs and bytes of transformers, by formulas on their shapes.

A multiplication and an addition are two FLOPs; attention is counted over all pairs of tokens, as torch's FLOP
counter and PaLM's appendix B do (arXiv:2204.02311), although causal kernels skip half of them. `tokens` are
padded tokens of a batch, `pairs` the sum of the sequences' squared lengths, `counted` the tokens that have
logits. docs/scaling.md compares the formulas with measurements (benchmarks/training_step.py).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dgpo_core.config.training import DEFAULT_ZERO_STAGE, ComputeConfig
from dgpo_core.config.yaml_text import parse
from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json
from dgpo_core.hub import hub_model

TABLE = Path(__file__).with_name("architectures.yaml")
FAMILIES = ("qwen2", "llama", "bert")
CHUNK = 1024  # tokens whose logits exist at one time (objectives/logprobs.py)
LOGIT_COPIES = 5  # float32 [CHUNK, vocabulary] alive in their backward pass (docs/scaling.md)
CACHE_WIDTH = {"float32": 8, "bfloat16": 6}  # keys are rotated in float32 and stay so under autocast
BUCKET = 5e8  # elements that DeepSpeed reduces at once (zero_optimization.reduce_bucket_size)
LIVE = 1e9  # elements up to which ZeRO-3 leaves weights whole (stage3_max_live_parameters)
# Bytes a token that a layer keeps for its backward pass: for each channel of hidden states, queries, keys and
# MLP, for each rank of adapters; of a checkpointed layer's input, and of the norm after all layers, for each
# hidden channel. Counted tensor by tensor from what autograd saves of transformers' Qwen2 and Llama layers:
# inputs, normalised values and outputs of both norms, queries and keys after rotation, values, attention's
# output, four vectors of the MLP. Under autocast the residual stream is float32; each matrix's input is cast.
KEPT = {
    "float32": (24, 8, 8, 16, 0, 4, 8),
    "autocast": (26, 4, 4, 8, 0, 4, 8),
    "bfloat16": (16, 4, 4, 8, 0, 2, 6),
}
# Frozen norms keep no normalised values, frozen matrices no inputs; each of seven adapters keeps its input
# and what stands between its two matrices. The first norm keeps nothing, as nothing before it is trained.
KEPT_ADAPTED = {
    "float32": (16, 8, 8, 16, 28, 4, 4),
    "autocast": (18, 6, 4, 8, 14, 2, 4),
    "bfloat16": (12, 4, 4, 8, 14, 2, 4),
}
Parts = dict[str, float]  # bytes of each process, by what they are for


@dataclass(frozen=True)
class Architecture:
    """A transformer's shape. `queries` and `keys` are widths: heads times head size.

    `tied`: input and output embedding are one matrix. `positions`: rows of learned position and segment
    embeddings (BERT), 0 with rotary positions.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int
    tied: bool
    positions: int = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Architecture":
        """Read the content of a config.json. Raises UserError for a family that is not known."""
        family, bert = config.get("model_type"), config.get("model_type") == "bert"
        if family not in FAMILIES:
            raise UserError(f"model_type {family!r} is unknown here, only {list(FAMILIES)}")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        return cls(
            family=family,
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            queries=heads * size,
            keys=(config.get("num_key_value_heads") or heads) * size,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bert or bool(config.get("tie_word_embeddings", False)),
            positions=config["max_position_embeddings"] + config["type_vocab_size"] if bert else 0,
        )

    @property
    def matrices(self) -> int:
        """Weights that are multiplied with every token: attention and a gated or plain MLP of each layer; N
        of Kaplan et al. 2020 (arXiv:2001.08361)."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        mlp = (2 if self.family == "bert" else 3) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def embedding(self) -> int:
        """Weights of the output embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, exactly as transformers builds the family."""
        h = self.hidden
        if self.family == "bert":  # biases and two layer norms; embeddings with a norm; the pooler
            vectors, rest = 9 * h + self.intermediate, (self.positions + 2) * h + h * h + h
        else:
            vectors, rest = 2 * h + (self.queries + 2 * self.keys if self.family == "qwen2" else 0), h
        return self.matrices + self.layers * vectors + rest + (1 if self.tied else 2) * self.embedding

    @property
    def backbone(self) -> int:
        """Weights without the output embedding: what a critic copies of a decoder."""
        return self.parameters - (0 if self.tied else self.embedding)

    def adapters(self, rank: int) -> int:
        """Count the weights of low-rank adapters on all linear layers of a decoder but the output embedding
        (Hu et al. 2021, arXiv:2106.09685): `rank` times inputs and outputs of each."""
        widths = 7 * self.hidden + 2 * self.queries + 2 * self.keys + 3 * self.intermediate
        return self.layers * rank * widths

    def flops(self, tokens: float, pairs: float, counted: float = 0.0, rank: int = 0) -> float:
        """Count a forward pass: 2 for each weight and token, with adapters of `rank`; 4 for each query
        channel and pair (scores, then values)."""
        layers = 2 * (self.matrices + self.adapters(rank)) * tokens + self.attention_flops(pairs)
        return layers + 2 * self.embedding * counted

    def attention_flops(self, pairs: float) -> float:
        """Count attention's two products forward."""
        return 4 * self.layers * self.queries * pairs

    def passing(self, tokens: float, precision: str) -> float:
        """Return what is alive at once inside a layer, forward without gradients or backward: a few vectors a
        token."""
        return tokens * (4 * width_of(precision) * self.intermediate + 16 * self.hidden)

    def logits(self, counted: float) -> float:
        """Return the bytes of a chunk's logits and of what a backward pass computes of them."""
        return LOGIT_COPIES * 4 * min(counted, CHUNK) * self.vocabulary

    def cast(self, name: str, precision: str) -> Parts:
        """Return autocast's copies of float32 matrices, the output embedding among them, during a pass."""
        return {f"{name}cast": 2 * (self.matrices + self.embedding)} if precision == "bfloat16" else {}

    def loaded(self, name: str, precision: str) -> Parts:
        """Return the model as it is loaded: in float32 (dgpo_core/models.py), with autocast's copies."""
        return {f"{name}weights": 4.0 * self.parameters} | self.cast(name, precision)


def architecture_of(source: str) -> Architecture:
    """Read the shape of a model folder or of a published model. Raises UserError where it cannot be known."""
    config = config_of(source)
    try:
        return Architecture.from_config(config)
    except (KeyError, UserError) as error:
        raise UserError(f"{source}: no shape in this model's config.json: {error}") from error


def config_of(source: str) -> dict[str, Any]:
    """Read a model folder's config.json, or what the table has. Raises UserError."""
    path = Path(source) / "config.json"
    if path.is_file():
        try:
            content: dict[str, Any] = parsed_json(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from error
        return content
    entry = published(source)
    if entry is None:
        raise UserError(
            f"{source}: neither a model folder nor a model whose shape is known; "
            f"download it and name its folder, or add it to {TABLE.name}"
        )
    return dict(entry["config"])


def published(source: str) -> dict[str, Any] | None:
    """Find the table's entry of a repository on the hub."""
    name = hub_model(source).name
    return next((entry for entry in table().values() if name in entry["repositories"]), None)


@cache
def table() -> dict[str, dict[str, Any]]:
    """Read name -> `repositories` on the hub, the `config` they share, and `tokens` of their tokenizer."""
    content: dict[str, dict[str, Any]] = parse(TABLE.read_text(encoding="utf-8"))
    return content


# --- models under the settings of `compute`


def width_of(precision: str) -> float:
    """Return the bytes of a number."""
    return 2.0 if precision == "bfloat16" else 4.0


def zero_stage(compute: ComputeConfig) -> int | None:
    """Return the stage of DeepSpeed's ZeRO; None with plain torch."""
    return (compute.zero_stage or DEFAULT_ZERO_STAGE) if compute.engine == "deepspeed" else None


@dataclass(frozen=True)
class Training:
    """A model of `shape` in training: its passes, and its weights, gradients and optimiser states
    (training/engines.py, training/deepspeed_engine.py), which ZeRO splits (Rajbhandari et al. 2020,
    arXiv:1910.02054). A critic is a copy of the backbone, adapters included (its head is left out: one number
    for each hidden channel).
    """

    shape: Architecture
    compute: ComputeConfig
    critic: bool = False

    @property
    def rank(self) -> int:
        """Of the adapters; 0: none, all weights are trained."""
        return self.compute.lora.rank if self.compute.lora else 0

    @property
    def numerics(self) -> str:
        """What training computes in: DeepSpeed's weights have the precision of compute, plain torch's only
        frozen ones, and autocast does the rest."""
        low = "bfloat16" if self.compute.engine == "deepspeed" else "autocast"
        return "float32" if self.compute.precision == "float32" else low

    @property
    def weights(self) -> int:
        """All of them, frozen and trained."""
        own = self.shape.backbone if self.critic else self.shape.parameters
        return own + self.shape.adapters(self.rank)

    @property
    def parameters(self) -> int:
        """Those that are trained: the adapters, or all."""
        return self.shape.adapters(self.rank) or self.weights

    def flops(self, tokens: float, pairs: float, counted: float = 0.0) -> float:
        """Count a forward and backward pass: three times the matrices; attention's backward pass has five
        products to two, because flash attention computes the scores again (Dao et al. 2022,
        arXiv:2205.14135). Logits are computed twice, with two products back, or one where the embedding is
        frozen.

        Frozen matrices have no gradient: two times, and what only leads to the frozen embedding is left out,
        but for checkpointed layers. These run forward once more, up to the last thing that they keep: without
        the last matrix (with adapters: the last adapter's second one).
        """
        shape, h, low = self.shape, self.shape.hidden, self.rank
        weights = (4 if low else 6) * shape.matrices + 6 * shape.adapters(low)
        flops = weights * tokens + 3.5 * shape.attention_flops(pairs)
        if self.compute.gradient_checkpointing:
            spared = shape.layers * h * (low or shape.intermediate)
            flops = flops + shape.flops(tokens, pairs, rank=low) - 2 * spared * tokens
        elif low:
            flops -= 2 * h * (shape.queries + 2 * shape.keys + 3 * low) * tokens
        return flops + (3 if low else 4) * (2 * shape.embedding * counted)

    def kept(self, tokens: float) -> tuple[float, float]:
        """Return the bytes that the layers keep for the backward pass (with checkpointing their inputs
        alone), and those of one layer."""
        shape = self.shape
        *widths, inputs, last = (KEPT_ADAPTED if self.rank else KEPT)[self.numerics]
        sizes = (shape.hidden, shape.queries, shape.keys, shape.intermediate, self.rank)
        channels = sum(width * size for width, size in zip(widths, sizes, strict=True))
        layer = tokens * (channels + 8 + 4 * shape.heads)  # the norms' scales; attention's log-sum-exp
        if self.compute.gradient_checkpointing:
            return tokens * shape.hidden * (shape.layers * inputs + last), layer
        # with adapters the first norm keeps nothing: what the last one keeps makes up for it
        return shape.layers * layer + (0 if self.rank else tokens * last * shape.hidden), layer

    def passes(self, tokens: float, counted: float) -> Parts:
        """Return what a forward and backward pass has alive at most, among it one layer that is computed
        again and the weights that ZeRO-3 makes whole: up to a limit it leaves them so until the end."""
        kept, layer = self.kept(tokens)
        again = layer if self.compute.gradient_checkpointing else 0.0
        activations = kept + again + self.shape.passing(tokens, self.compute.precision)
        gathered = {"gathered weights": self._width * min(self.weights, LIVE)} if self._zero == 3 else {}
        passing = {"activations": activations, "logits": self.shape.logits(counted)}
        return self.cast(self.compute.precision) | gathered | passing

    def cast(self, precision: str) -> Parts:
        """Return the copies that autocast keeps of trained float32 weights during a pass."""
        if precision == "float32" or self.numerics == "bfloat16":
            return {}
        return {"cast": 2.0 * self.parameters} if self.rank else self.shape.cast("", precision)

    def states(self) -> Parts:
        """Return what the device holds outside of passes.

        Plain torch has 16 bytes a trained number in float32, and what adapters leave frozen in the precision
        of compute; a critic's gradients exist in its own update only, when the actor's are gone. DeepSpeed
        has weights in the precision of compute, float32 masters and moments; gradients are summed in float32,
        which ZeRO-1 does beside those in bfloat16. ZeRO-3 trains a copy of a model that generates, and keeps
        a bucket for each engine; ZeRO-2 has one while a backward pass runs, and so has ZeRO-1, with sums in
        float32, unless DeepSpeed's plain bfloat16 optimiser does its work.
        """
        numbers, width, zero, critic = self.parameters, self._width, self._zero, self.critic
        shares, offload = self.compute.processes, self.compute.offload
        weights, plain = width * self.weights, width == 2 and not offload
        parts: Parts = {
            "weights": 4 * numbers + width * (self.weights - numbers),
            "gradients": 0 if critic else 4 * numbers,
            "optimizer": 8 * numbers,
        }
        if zero is not None:
            sums = (6 if plain else 4) * numbers if zero == 1 else 0 if offload else 4 * numbers / shares
            buckets = BUCKET * (width if zero > 1 else 0 if plain else 4)
            parts = {
                "weights": weights / (shares if zero == 3 else 1),
                "weights for rollouts": weights if zero == 3 and not critic else 0,
                "gradients": sums,
                "optimizer": 0 if offload else 12 * numbers / shares,
                "buckets": 0 if critic and zero < 3 else buckets,
            }
        return {("critic " if critic else "") + part: size for part, size in parts.items() if size}

    def offloaded(self) -> float:
        """Return what the host holds for all processes of one machine: masters, moments and their gradients,
        and from ZeRO-2 on the sums of the passes."""
        return (16.0 if self._zero == 1 else 20.0) * self.parameters if self.compute.offload else 0.0

    @property
    def _zero(self) -> int | None:
        return zero_stage(self.compute)

    @property
    def _width(self) -> float:
        return width_of(self.compute.precision)


def frozen(shape: Architecture, name: str, compute: ComputeConfig) -> Parts:
    """Return a model that is only asked, beside one in training. Plain torch has it in float32, with
    autocast's copies; DeepSpeed in the precision of compute, split except for its output embedding on
    request."""
    width = width_of(compute.precision)
    if zero_stage(compute) is None:
        return shape.loaded(name, compute.precision)
    if not compute.split_teacher:
        return {f"{name}weights": width * shape.parameters}
    return {
        f"{name}weights": width * (shape.backbone / compute.processes + shape.embedding),
        f"{name}gathered": width * min(shape.backbone, LIVE),
    }
