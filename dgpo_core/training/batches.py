"""Episodes as batches of token ids, and language models that answer for the tokens that count in them.

A token counts when its probability or value is trained on; its distribution stands one position before it.
Shapes: B sequences, T tokens of the longest one, N tokens that count, H hidden size, V vocabulary.

An engine that splits weights over processes gathers a module's weights while its forward runs, and again for
its backward. So everything is computed inside a module's forward, and the output embedding is a module of its
own, although its weight may be the input embedding's.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.errors import UserError
from dgpo_core.objectives.logprobs import PerToken, TopK, token_logprobs


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of an episode and the positions of those that count (each at least 1).

    `teacher` has the teacher's stored distribution of each of them, where there is one.
    """

    ids: list[int]
    positions: list[int]
    teacher: TopK | None = None


def model_sequence(episode: Episode) -> TokenSequence:
    """Return the episode's ids with the tokens that the model wrote counting."""
    return TokenSequence(episode.token_ids, [t for t, o in enumerate(episode.owners) if o == Owner.MODEL])


def response_sequence(episode: Episode) -> TokenSequence:
    """Return the episode's ids with every token after the prompt counting (the release's GAE)."""
    return TokenSequence(episode.token_ids, [t for t, o in enumerate(episode.owners) if o != Owner.PROMPT])


def sampled_logprobs(episodes: list[Episode], sequences: list[TokenSequence]) -> list[Tensor]:
    """Return, of each episode, the log-probabilities with which the engine sampled the counted tokens."""
    return [
        torch.tensor([episode.logprobs[position] for position in sequence.positions])
        for episode, sequence in zip(episodes, sequences, strict=True)
    ]


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right.

    `rows` and `columns` say where each counted token is *predicted*, one position before it; `targets` are
    the counted tokens, sequence by sequence; `counts` has how many each sequence has; `teacher` is there
    where every sequence has stored distributions.
    """

    ids: Int[Tensor, "B T"]
    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    counts: list[int]
    teacher: TopK | None = None

    @property
    def turns(self) -> Int[Tensor, " N"]:
        """Number the turns over the batch: tokens of one sequence that follow each other."""
        begins = torch.ones_like(self.rows, dtype=torch.bool)
        begins[1:] = (self.rows.diff() != 0) | (self.columns.diff() != 1)
        return begins.cumsum(0) - 1

    def split(self, values: Tensor) -> list[Tensor]:
        """Split values [N, ...] into one tensor a sequence."""
        return list(values.split(self.counts))


def collate(sequences: list[TokenSequence], device: torch.device) -> TokenBatch:
    """Pad sequences on the right with id 0, on `device`."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    rows, columns, targets = [], [], []
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        rows += [row] * len(sequence.positions)
        columns += [position - 1 for position in sequence.positions]
        targets += [sequence.ids[position] for position in sequence.positions]
    stored = [sequence.teacher for sequence in sequences if sequence.teacher is not None]
    return TokenBatch(
        ids.to(device),
        torch.tensor(rows, dtype=torch.long, device=device),
        torch.tensor(columns, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        [len(sequence.positions) for sequence in sequences],
        _concatenate(stored, device) if len(stored) == len(sequences) else None,
    )


def _concatenate(stored: list[TopK], device: torch.device) -> TopK:
    ids, logprobs = torch.cat([top.ids for top in stored]), torch.cat([top.logprobs for top in stored])
    return TopK(ids.to(device), logprobs.to(device), stored[0].vocabulary)


def micro_batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices in groups of similar length: `max_tokens` padded tokens each at most, or one sequence."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if group and lengths[group[0]] * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def counted_hidden(backbone: torch.nn.Module, batch: TokenBatch) -> Float[Tensor, "N H"]:
    """Return the last hidden states at the positions that predict the counted tokens.

    Padding is on the right, so causal attention alone keeps it away from every counted token.
    """
    # transformers checkpoints activations in training mode only; these models have no dropout
    checkpointed = torch.is_grad_enabled() and getattr(backbone, "is_gradient_checkpointing", False)
    if checkpointed:
        backbone.train()
    hidden: Float[Tensor, "B T H"] = backbone(input_ids=batch.ids, use_cache=False).last_hidden_state
    if checkpointed:
        backbone.eval()
    return hidden[batch.rows, batch.columns]


def backbone_of(model: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its output embedding."""
    backbone: torch.nn.Module = model.base_model
    return backbone


def head_of(model: PreTrainedModel) -> Float[Tensor, "V H"]:
    """Return the weight of the output embedding."""
    head: Tensor = model.get_output_embeddings().weight
    return head


def shared_ids(known: int | None, *models: PreTrainedModel | None) -> int:
    """Return how many ids, from 0 on, have a row in every model's output; at most the tokenizer's `known`."""
    rows = min(len(head_of(model)) for model in models if model is not None)
    return rows if known is None else min(rows, known)


def check_ids(episodes: Iterable[Episode], vocabulary: int) -> None:
    """Raise UserError for an episode with an id that is not one of the first `vocabulary`."""
    for episode in episodes:
        if (largest := max(episode.token_ids)) >= vocabulary:
            raise UserError(
                f"the episode of {episode.dataset} {episode.question_id} has the token {largest}, but models "
                f"and tokenizer share the first {vocabulary} ids only: collect the episodes again, or set "
                "models to two with one tokenizer"
            )


# (hidden [N, H], head [V, H]) -> two values of each token, [N] each
HeadFunction = Callable[[Tensor, Tensor], PerToken]


class TokenModel(torch.nn.Module):
    """Calls a function with the counted tokens' hidden states and the output embedding of a language model.

    The module shares its parameters with the language model that it is made of. Distributions are over the
    first `vocabulary` ids: rows that no token has get no probability. None: over all rows.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone_of(model)
        self.head = _Head(head_of(model), vocabulary)

    def forward(self, batch: TokenBatch, function: HeadFunction | None = None) -> PerToken | Tensor:
        """Return what `function` does; without one, the log-probabilities of the targets, float32 [N]."""
        hidden = counted_hidden(self.backbone, batch)
        if function is None:
            logprobs: Float[Tensor, " N"] = self.head(hidden, policy_function(batch))[0]
            return logprobs
        result: PerToken = self.head(hidden, function)
        return result


def policy_function(batch: TokenBatch, temperature: float = 1.0) -> HeadFunction:
    """Return the function that gives the targets' log-probabilities, and entropies."""
    return lambda hidden, head: token_logprobs(hidden, head, batch.targets, temperature)


class _Head(torch.nn.Module):
    def __init__(self, weight: Float[Tensor, "V H"], vocabulary: int | None) -> None:
        super().__init__()
        self.weight = weight
        self._vocabulary = vocabulary

    def forward(self, hidden: Float[Tensor, "N H"], function: HeadFunction) -> PerToken:
        # a slice of all rows would be the same tensor, but copy its gradient
        whole = self._vocabulary is None or self._vocabulary >= len(self.weight)
        return function(hidden, self.weight if whole else self.weight[: self._vocabulary])


class Critic(torch.nn.Module):
    """Gives the value of the state before each counted token: the student's backbone with a fresh head."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone_of(student))
        self.head = torch.nn.Linear(student.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.head.to(student.device)

    def forward(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        """Return the values, float32."""
        values: Tensor = self.head(counted_hidden(self.backbone, batch))
        return values.float()[:, 0]
