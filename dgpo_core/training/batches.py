"""Student and teacher must give each token id the same string.

Episodes as training batches: right-padded ids, and which tokens are trained on.

Language models as training asks them: what is wanted of the counted tokens, computed inside one forward.

An engine that splits weights over processes gathers a module's weights while its forward runs, and again for
its backward. So a pass happens inside a module's forward, and the output embedding is a module of its own,
although its weight may be the input embedding's.

What a step's sampled episodes say of the training, whatever it learns from them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Ending, Episode, Owner
from dgpo_core.errors import UserError
from dgpo_core.objectives.logprobs import TopK, token_logprobs


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Raises UserError when two tokenizers (with `get_vocab()`) give an id different strings."""
    first, second = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    wrong = min((i for i in first.keys() & second.keys() if first[i] != second[i]), default=None)
    if wrong is not None:
        raise UserError(
            "models: student and teacher have different tokenizers, "
            "so the teacher's tokens and distributions mean nothing to the student; "
            f"the first difference is id {wrong}: {first[wrong]!r} against {second[wrong]!r}"
        )


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of an episode and the positions of the tokens that count (each at least 1).

    `teacher`: the teacher's kept distribution at each of them, where there is one.
    """

    ids: list[int]
    positions: list[int]
    teacher: TopK | None = None


def model_sequence(episode: Episode) -> TokenSequence:
    """Only the tokens that the model wrote count."""
    return TokenSequence(episode.token_ids, [t for t, o in enumerate(episode.owners) if o == Owner.MODEL])


def response_sequence(episode: Episode) -> TokenSequence:
    """Every token after the prompt counts, the environment's too (the release's GAE)."""
    return TokenSequence(episode.token_ids, [t for t, o in enumerate(episode.owners) if o != Owner.PROMPT])


@dataclass(frozen=True)
class TokenBatch:
    """B sequences padded on the right to T tokens; N positions count.

    `ids` [B, T]; `rows` and `columns` [N] say where each counted token is *predicted*, one position before
    it; `targets` [N] are the counted tokens, sequence by sequence; `counts` [B] how many each sequence has;
    `teacher` [N] is there where every sequence has kept distributions.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    counts: list[int]
    teacher: TopK | None = None

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """[N] -> one tensor a sequence."""
        return list(values.split(self.counts))


def collate(sequences: list[TokenSequence], device: torch.device) -> TokenBatch:
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    rows, columns, targets = [], [], []
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        rows += [row] * len(sequence.positions)
        columns += [position - 1 for position in sequence.positions]
        targets += [sequence.ids[position] for position in sequence.positions]
    return TokenBatch(
        ids.to(device),
        torch.tensor(rows, dtype=torch.long, device=device),
        torch.tensor(columns, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        [len(sequence.positions) for sequence in sequences],
        _joined([s.teacher for s in sequences], device),
    )


def _joined(kept: list[TopK | None], device: torch.device) -> TopK | None:
    """The kept distributions of all sequences, or None where one has none."""
    found = [top for top in kept if top is not None]
    if not found or len(found) < len(kept):
        return None
    ids, logprobs = torch.cat([top.ids for top in found]), torch.cat([top.logprobs for top in found])
    return TopK(ids.to(device), logprobs.to(device), found[0].vocabulary)


def micro_batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, at most `max_tokens` padded tokens each (or one sequence)."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if group and lengths[group[0]] * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def counted_hidden(backbone: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Last hidden states [N, H] at the positions that predict the counted tokens.

    Padding is on the right, so causal attention alone keeps it away from every counted token.
    """
    # transformers checkpoints activations in training mode only; these models have no dropout
    checkpointed = torch.is_grad_enabled() and getattr(backbone, "is_gradient_checkpointing", False)
    if checkpointed:
        backbone.train()
    hidden: torch.Tensor = backbone(input_ids=batch.ids, use_cache=False).last_hidden_state
    if checkpointed:
        backbone.eval()
    return hidden[batch.rows, batch.columns]


def backbone_of(model: PreTrainedModel) -> torch.nn.Module:
    backbone: torch.nn.Module = model.base_model
    return backbone


def head_of(model: PreTrainedModel) -> torch.Tensor:
    """Weight of the output embedding, [vocabulary, hidden]."""
    head: torch.Tensor = model.get_output_embeddings().weight
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


Pair = tuple[torch.Tensor, torch.Tensor]
Result = TypeVar("Result", torch.Tensor, Pair)
Terms = Callable[[torch.Tensor, torch.Tensor], Result]  # (hidden [N, H], head [V, H]) -> tensors [N]


class TokenModel(torch.nn.Module):
    """`model(batch, terms)` is `terms` of the counted tokens' hidden states and the output embedding.

    It shares its parameters with the language model that it is made of. Distributions are over the first
    `vocabulary` ids: rows that no token has get no probability. None: over all rows.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone_of(model)
        self.head = _Head(head_of(model), vocabulary)

    def forward(self, batch: TokenBatch, terms: Terms[Result] | None = None) -> Result | torch.Tensor:
        """Without `terms`: the log-probabilities of the targets, float32 [N]."""
        hidden = counted_hidden(self.backbone, batch)
        if terms is None:
            logprobs: torch.Tensor = self.head(hidden, policy_terms(batch))[0]
            return logprobs
        result: Result = self.head(hidden, terms)
        return result


def policy_terms(batch: TokenBatch, temperature: float = 1.0) -> Terms[Pair]:
    """Log-probabilities of the targets, and entropies."""
    return lambda hidden, head: token_logprobs(hidden, head, batch.targets, temperature)


class _Head(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, vocabulary: int | None) -> None:
        super().__init__()
        self.weight = weight
        self._vocabulary = vocabulary

    def forward(self, hidden: torch.Tensor, terms: Terms[Result]) -> Result:
        # a slice of all rows would be the same tensor, but copy its gradient
        whole = self._vocabulary is None or self._vocabulary >= len(self.weight)
        return terms(hidden, self.weight if whole else self.weight[: self._vocabulary])


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What shows collapse: EM, length, invalid actions, searches, ...; means over the episodes."""
    n = len(episodes)
    return {
        "em": sum(e.correct for e in episodes) / n,
        "response_tokens": sum(e.model_tokens for e in episodes) / n,
        "searches": sum(len(e.searches) for e in episodes) / n,
        "hit": sum(e.hit for e in episodes) / n,
        "invalid_actions": sum(e.invalid_actions for e in episodes) / n,
        "well_formed": sum(e.well_formed for e in episodes) / n,
        "no_answer": sum(e.ending is not Ending.ANSWERED for e in episodes) / n,
    }


def sampled_entropy(episodes: Sequence[Episode]) -> float:
    """The sampling policy's entropy, nats a token, estimated by -log p of the tokens that it has sampled."""
    surprises = [
        -logprob
        for episode in episodes
        for logprob, owner in zip(episode.logprobs, episode.owners, strict=True)
        if owner == Owner.MODEL
    ]
    return sum(surprises) / len(surprises)
