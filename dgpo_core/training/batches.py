"""Episodes as training batches: right-padded ids, and which tokens are trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dgpo_core.errors import UserError
from dgpo_core.objectives.logprobs import TopK
from dgpo_core.protocol.episode import Episode, Owner


@dataclass(frozen=True)
class Sequence:
    """Token ids of an episode and the positions of the tokens that count (each at least 1).

    `teacher`: the teacher's kept distribution at each of them, where there is one.
    """

    ids: list[int]
    positions: list[int]
    teacher: TopK | None = None


def model_sequence(episode: Episode) -> Sequence:
    """Only the tokens that the model wrote count."""
    return Sequence(episode.token_ids, [t for t, o in enumerate(episode.owners) if o == Owner.MODEL])


def response_sequence(episode: Episode) -> Sequence:
    """Every token after the prompt counts, the environment's too (the release's GAE)."""
    return Sequence(episode.token_ids, [t for t, o in enumerate(episode.owners) if o != Owner.PROMPT])


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


def collate(sequences: list[Sequence], device: torch.device) -> TokenBatch:
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
