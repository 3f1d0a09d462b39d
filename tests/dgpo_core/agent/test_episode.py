"""Turns of episodes, and episodes on disk."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgpo_core.agent.episode import (
    Ending,
    Episode,
    Outcome,
    Owner,
    Search,
    Turn,
    model_runs,
    nothing_new,
    read_episodes,
    read_metadata,
    write_episodes,
)
from dgpo_core.errors import UserError
from tests.dgpo_core.making import random_episode

FLOATS = st.floats(width=32, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
EPISODES = st.builds(
    replace,
    st.integers(0, 9).map(random_episode),
    golden_answers=st.lists(TEXT, max_size=3),
    logprobs=st.lists(FLOATS, max_size=4),
    prediction=st.none() | TEXT,
    outcome=st.sampled_from(Outcome),
    ending=st.sampled_from(Ending),
    failure=st.none() | TEXT,
    searches=st.lists(
        st.builds(Search, TEXT, st.lists(TEXT, max_size=3), st.lists(FLOATS, max_size=3), st.booleans()),
        max_size=3,
    ),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EPISODES, max_size=3))
def test_round_trip(tmp_path: Path, episodes: list[Episode]) -> None:
    path = tmp_path / "new" / "folder" / "e.parquet"
    write_episodes(path, episodes, {"index": "äb1"})
    assert read_episodes(path) == episodes
    assert read_metadata(path) == {"index": "äb1"}


def test_a_table_is_compressed_and_needs_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    write_episodes(path, [random_episode(0)])
    assert read_metadata(path) == {}
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


def test_bad_files_are_the_users(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    with pytest.raises(UserError, match=r"e\.parquet: no such file"):
        read_episodes(path)
    path.write_text("hello")
    for read in (read_episodes, read_metadata):
        with pytest.raises(UserError, match=r"e\.parquet: not a Parquet file of episodes: .*Parquet") as told:
            read(path)
        assert "\n" not in str(told.value)
    pq.write_table(pa.table({"question_id": ["a"]}), path)
    with pytest.raises(UserError, match=r"e\.parquet: .*lacks the columns .*'token_ids'"):
        read_episodes(path)
    write_episodes(path, [random_episode(0)])
    table = pq.read_table(path)
    outcome = table.schema.get_field_index("outcome")
    pq.write_table(table.set_column(outcome, "outcome", pa.array(["great"])), path)
    with pytest.raises(UserError, match=r"e\.parquet: not an episode: 'great'"):
        read_episodes(path)
    pq.write_table(table.set_column(outcome, "outcome", pa.array([1])), path)
    with pytest.raises(UserError, match=r"columns \['outcome'\] have other types"):
        read_episodes(path)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=3))
def test_turns_hold_every_token_of_the_model_and_the_reply_to_it(seeds: list[int]) -> None:
    episodes = [random_episode(seed) for seed in seeds]
    for each in episodes:
        texts = each.turn_texts(lambda ids: " ".join(map(str, ids)))
        assert len(each.turns) == len(texts) == each.generations
        own = [i for i, owner in zip(each.token_ids, each.owners, strict=True) if owner == Owner.MODEL]
        assert [int(i) for text in texts for i in text.split()] == own
        for turn, following in zip(each.turns, [*each.turns[1:], None], strict=True):
            assert turn.reply_end == (following.start if following else len(each.token_ids))
            assert {*each.owners[turn.end : turn.reply_end]} <= {Owner.ENVIRONMENT}
    starts, _ = model_runs([owner for each in episodes for owner in each.owners])
    assert len(starts) == sum(each.generations for each in episodes)


def test_searches_that_bring_nothing_new() -> None:
    """Known passages in any order, or none at all."""
    found = [["a", "b"], ["b", "c"], ["c", "a"], [], ["d"], ["d"]]
    searches = [Search("q", passages, [1.0] * len(passages)) for passages in found]
    assert nothing_new(searches) == [False, False, True, True, False, True]


def test_an_episode_without_a_generation_has_no_turns() -> None:
    prompt = replace(random_episode(0), token_ids=[1, 2], owners=[Owner.PROMPT, Owner.ENVIRONMENT])
    assert prompt.turns == []
    assert replace(prompt, owners=[Owner.PROMPT, Owner.MODEL]).turns == [Turn(1, 2, 2)]
