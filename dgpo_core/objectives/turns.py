"""Losses that go turn by turn: weights of a KL, LLDS's likelihoods that must not fall.

`turns` numbers each token's turn, `episodes` its episode, both from 0 over the whole batch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dgpo_core.objectives.policy import Tokens

MOST = 1.2  # of SOD's weights: 1 + delta, as in the released script
LEAST = 1e-6  # added to SOD's distances, in nats
ROUNDING = 1e-4  # nats by which a turn may fall without LLDS: two passes over it differ by less

Numbers = Int[Tensor, " tokens"]


@torch.no_grad()
def sod_weights(logprobs: Tokens, reference: Tokens, turns: Numbers, episodes: Numbers) -> Tokens:
    """Return min(d_1 / d_k, 1.2) for the tokens of an episode's turn k (SOD; Zhong et al., 2026, eq. 7).

    d_k is the mean of |log pi - log pi_reference| over the turn's tokens: where the student has strayed since
    its first turn, what the reference says of its words tells less.
    """
    distances = _sums((logprobs - reference).abs(), turns) / _sums(torch.ones_like(logprobs), turns) + LEAST
    first = torch.full_like(turns[: int(episodes.max()) + 1], len(turns))
    first.scatter_reduce_(0, episodes, turns, "amin")
    return (distances[first[episodes]] / distances[turns]).clamp(max=MOST)


@torch.no_grad()
def last_turns(turns: Numbers, episodes: Numbers) -> Tokens:
    """Return 1 for the tokens of each episode's last turn, and 0 for those before it.

    Of a wrong answer to good passages the last turn is at fault, not the searches that found them, and so
    it is of an answer that should have been another search.
    """
    last = torch.zeros_like(turns[: int(episodes.max()) + 1])
    last.scatter_reduce_(0, episodes, turns, "amax")
    return (turns == last[episodes]).float()


def fallen_likelihood(logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens, turns: Numbers) -> Tokens:
    """Return max(0, log pi_old - log pi), or 0 where the advantage is negative (LLDS; Deng et al., 2025).

    Only tokens of turns whose likelihood has fallen as a whole count: the paper's gate by actions.
    """
    falls = (old_logprobs - logprobs) * (advantages >= 0)
    fallen = _sums(falls.detach(), turns) > ROUNDING
    return falls.relu() * fallen[turns]


def _sums(values: Tokens, turns: Numbers) -> Float[Tensor, " turns"]:
    """Return the sum of each turn."""
    return values.new_zeros(int(turns.max()) + 1).index_add_(0, turns, values)
