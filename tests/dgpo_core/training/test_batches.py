"""How episodes are cut into batches, and pairs of tokenizers that can and cannot share them."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Owner
from dgpo_core.errors import UserError
from dgpo_core.training.batches import (
    collate,
    micro_batches,
    model_sequence,
    response_sequence,
)
from dgpo_core.vocabulary import check_same_vocabulary
from tests.dgpo_core.making import random_episode

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_micro_batches(lengths: list[int], limit: int) -> None:
    groups = list(micro_batches(lengths, limit))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= limit
    for group, following in itertools.pairwise(groups):
        longest = max(lengths[i] for i in group)
        assert max(lengths[i] for i in following) <= min(lengths[i] for i in group)
        assert longest * (len(group) + 1) > limit, "the next sequence would have fitted"


def test_sequences_count_the_right_owners() -> None:
    for seed in range(20):
        episode = random_episode(seed)
        for sequence, counted in (
            (model_sequence(episode), {Owner.MODEL}),
            (response_sequence(episode), {Owner.MODEL, Owner.ENVIRONMENT}),
        ):
            assert sequence.ids == episode.token_ids
            assert sequence.positions == [t for t, o in enumerate(episode.owners) if Owner(o) in counted]


def test_turns_are_numbered_over_the_batch() -> None:
    episodes = [random_episode(seed) for seed in range(7)]
    batch = collate([model_sequence(episode) for episode in episodes], CPU)
    lengths = [turn.end - turn.start for episode in episodes for turn in episode.turns]
    expected = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert batch.turns.tolist() == expected and len(lengths) > 7


def test_collate() -> None:
    sequences = [model_sequence(random_episode(seed)) for seed in range(7)]
    batch = collate(sequences, CPU)
    assert batch.ids.shape == (7, max(len(s.ids) for s in sequences))
    place = 0
    for row, sequence in enumerate(sequences):
        assert batch.ids[row, : len(sequence.ids)].tolist() == sequence.ids
        for position in sequence.positions:
            assert (int(batch.rows[place]), int(batch.columns[place])) == (row, position - 1)
            assert batch.targets[place] == sequence.ids[position]
            place += 1
    assert place == len(batch.targets)
    parts = batch.split(batch.targets)
    assert [part.tolist() for part in parts] == [[s.ids[p] for p in s.positions] for s in sequences]


def test_vocabularies(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    check_same_vocabulary(tokenizer, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    longer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    longer.add_tokens(["<extra>"])
    check_same_vocabulary(tokenizer, longer)  # more tokens are no contradiction
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    other.add_tokens(["<other>"])
    with pytest.raises(UserError, match=r"different tokenizers.* id \d+: '<other>' against '<extra>'"):
        check_same_vocabulary(other, longer)
