"""Language models as training asks them: what is wanted of the counted tokens, computed inside one forward.

An engine that splits weights over processes gathers a module's weights while its forward runs, and again for
its backward. So a pass happens inside a module's forward, and the output embedding is a module of its own,
although its weight may be the input embedding's.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from dgpo_core.objectives.logprobs import token_logprobs
from dgpo_core.training.batches import TokenBatch, backbone_of, counted_hidden, head_of

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
