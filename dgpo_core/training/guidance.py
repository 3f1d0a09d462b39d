"""Guidance as a term of the loss: the KL to a reference, in the pass that step (7) makes anyway."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dgpo_core.config.recipes import Reinforcement
from dgpo_core.objectives.divergences import Divergence, forward_kl, reverse_kl
from dgpo_core.objectives.logprobs import PerToken, guided_logprobs
from dgpo_core.objectives.rewards import kl_estimate
from dgpo_core.objectives.turns import last_turns, sod_weights
from dgpo_core.training.batches import TokenBatch
from dgpo_core.training.engines import FrozenModel, TrainingEngine

WHOLE: dict[str, Divergence] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}  # over the vocabulary


@dataclass(frozen=True)
class GuidanceLoss:
    """The KL to a reference as a term of the loss, on the tokens of episodes whose gate is open."""

    reference: FrozenModel
    divergence: str
    weight: float
    turns: str = "equal"

    @classmethod
    def of(cls, recipe: Reinforcement, reference: FrozenModel | None) -> "GuidanceLoss | None":
        """Return the term of a recipe, if it places the KL in the loss."""
        if recipe.weight is None or reference is None:
            return None
        return cls(reference, recipe.divergence, recipe.weight, recipe.turns)

    def forward(
        self,
        actor: TrainingEngine,
        batch: TokenBatch,
        read: TokenBatch,
        guided: Bool[Tensor, " N"],
        temperature: float,
    ) -> PerToken:
        """Return log-probabilities, entropies, KL and the reference's log-probabilities, by one pass.

        The last two are 0 at tokens that are not `guided`. `read` are the guided episodes, or, where there is
        none and processes must call the reference equally often, another one.
        """
        theirs = self.reference.hidden(read)[: int(guided.sum())]
        whole = WHOLE.get(self.divergence)

        def function(hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"]) -> PerToken:
            return guided_logprobs(
                hidden, head, batch.targets, temperature, guided, theirs, self.reference.head, whole
            )

        logprobs, entropy, kl, reference = actor(batch, function)
        if whole is None:
            kl = kl_estimate(logprobs, reference, self.divergence) * guided
        return logprobs, entropy, kl, reference

    def turn_weights(
        self, old_logprobs: Float[Tensor, " N"], reference: Float[Tensor, " N"], batch: TokenBatch
    ) -> Float[Tensor, " N"]:
        """Return each token's weight in the term, by its turn."""
        if self.turns == "last":
            return last_turns(batch.turns, batch.rows)
        if self.turns == "sod":
            return sod_weights(old_logprobs, reference, batch.turns, batch.rows)
        return torch.ones_like(old_logprobs)
