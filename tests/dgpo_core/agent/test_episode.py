"""Episodes on disk."""

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
    Search,
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
    path = tmp_path / "new" / "e.parquet"
    write_episodes(path, episodes, {"index": "äb1"})
    assert read_episodes(path) == episodes
    assert read_metadata(path) == {"index": "äb1"}


def test_bad_files_are_the_users(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    with pytest.raises(UserError, match=r"e\.parquet: no such file"):
        read_episodes(path)
    path.write_text("hello")
    with pytest.raises(UserError, match=r"e\.parquet: not a Parquet file"):
        read_episodes(path)
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
