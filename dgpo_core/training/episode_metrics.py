"""What a step's sampled episodes say of the training, whatever it learns from them."""

from collections.abc import Sequence

from dgpo_core.protocol.episode import Ending, Episode, Owner


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
