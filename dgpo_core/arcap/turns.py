"""What the model itself wrote in an episode; text of the environment never gets here."""

import re
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

from dgpo_core.protocol.episode import Episode, Owner

Decode = Callable[[list[int]], Any]  # a tokenizer's `decode`: token ids -> text (typed for batches too)

_ATTEMPT = re.compile(r"<answer>(.*?)(?=</?(?:think|search|information|answer)>|\Z)", re.DOTALL)


def model_turns(episode: Episode, decode: Decode) -> list[str]:
    """The text of each generation: the runs of tokens that the model owns."""
    runs = [(owner, len(list(run))) for owner, run in groupby(episode.owners)]
    ends = [0]
    for _, length in runs:
        ends.append(ends[-1] + length)
    return [
        decode(episode.token_ids[start:end])
        for (owner, _), (start, end) in zip(runs, pairwise(ends), strict=True)
        if owner == Owner.MODEL
    ]


def answer_attempts(turns: list[str]) -> list[str]:
    """The stripped content of every `<answer>` that the model opened, up to the next tag or its turn's end.

    Unlike the prediction, these include answers that were empty, nested or never closed.
    """
    return [match[1].strip() for turn in turns for match in _ATTEMPT.finditer(turn)]
