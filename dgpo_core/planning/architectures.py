"""Shapes of transformers, from a config.json or from the table of the published models, and their
parameters."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dgpo_core.config.yaml_text import parse
from dgpo_core.errors import UserError

TABLE = Path(__file__).with_name("architectures.yaml")
DECODERS = ("qwen2", "llama")


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
        """From the content of a config.json. Raises UserError for a family that is not known."""
        family = config.get("model_type")
        if family not in (*DECODERS, "bert"):
            raise UserError(f"model_type {family!r} is unknown here, only {[*DECODERS, 'bert']}")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        bert = family == "bert"
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
    def layer_matrices(self) -> int:
        """Weights of one layer that are multiplied with every token: attention, and a gated or plain MLP."""
        attention = 2 * self.hidden * self.queries + 2 * self.hidden * self.keys
        return attention + (2 if self.family == "bert" else 3) * self.hidden * self.intermediate

    @property
    def matrices(self) -> int:
        """The same of all layers, without embeddings: N of Kaplan et al. 2020 (arXiv:2001.08361)."""
        return self.layers * self.layer_matrices

    @property
    def parameters(self) -> int:
        """All weights, exactly as transformers builds the family."""
        h = self.hidden
        if self.family == "bert":
            vectors = 4 * h + self.intermediate + h + 4 * h  # biases and two layer norms with bias
            pooler = h * h + h
            return self.matrices + self.layers * vectors + (self.vocabulary + self.positions + 2) * h + pooler
        biases = self.queries + 2 * self.keys if self.family == "qwen2" else 0
        embeddings = (1 if self.tied else 2) * self.vocabulary * h
        return self.matrices + self.layers * (2 * h + biases) + h + embeddings

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters on all linear layers of a decoder but the output embedding
        (Hu et al. 2021, arXiv:2106.09685): `rank` times inputs and outputs of each."""
        widths = 7 * self.hidden + 2 * self.queries + 2 * self.keys + 3 * self.intermediate
        return self.layers * rank * widths

    @property
    def backbone(self) -> int:
        """Weights without the output embedding: what a critic copies of a decoder."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)


def architecture_of(source: str) -> Architecture:
    """Of a model folder or of a published model. Raises UserError where the shape cannot be known."""
    config = config_of(source)
    try:
        return Architecture.from_config(config)
    except (KeyError, UserError) as error:
        raise UserError(f"{source}: no shape in this model's config.json: {error}") from error


def config_of(source: str) -> dict[str, Any]:
    """Content of a model folder's config.json, or what the table has. Raises UserError."""
    path = Path(source) / "config.json"
    if path.is_file():
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from error
        return content
    found = published(source)
    if found is None:
        raise UserError(
            f"{source}: neither a model folder nor a model whose shape is known; "
            f"download it and name its folder, or add it to {TABLE.name}"
        )
    return dict(found["config"])


def published(source: str) -> dict[str, Any] | None:
    """The table's entry of a repository on the hub."""
    return next((entry for entry in table().values() if source in entry["repositories"]), None)


@cache
def table() -> dict[str, dict[str, Any]]:
    """Name -> `repositories` on the hub, the `config` they share, and `tokens` of their tokenizer."""
    content: dict[str, dict[str, Any]] = parse(TABLE.read_text(encoding="utf-8"))
    return content
