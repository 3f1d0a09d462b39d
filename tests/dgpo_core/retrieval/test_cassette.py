"""Retrieval that is recorded and replayed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.config.retrieval import Location, RetrievalConfig, cassette_file, parse_location
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.cassette import Cassette
from dgpo_core.retrieval.index import Index, open_index
from dgpo_core.retrieval.ranking import Hit
from dgpo_core.retrieval.shards import read_manifest
from dgpo_core.world.pretraining import build_tokenizer
from tests.dgpo_core.agent.scripted import ScriptedEngine
from tests.dgpo_core.making import question

TOKENIZER = build_tokenizer()
HEAD = '{"index": "d"}\n'
Queries = list[tuple[str, str]]


def opened(shards: Path, location: str, **settings: Any) -> Index:
    config = {"encoder": read_manifest(shards).encoder_config.model_dump(), "location": location, **settings}
    return open_index(shards, RetrievalConfig.model_validate(config))


def episodes(index: Index, asked: list[str]) -> list[Episode]:
    """One a query, which searches twice: for the query, and for its first word."""

    def script(seed: tuple[int, ...], turn: int) -> str:
        query = asked[seed[0]]
        return [
            "<answer> x </answer>",
            f"<search> {query.split()[0]} </search>",
            f"<search> {query} </search>",
        ][max(0, 2 - turn)]

    loop = AgentLoop(ScriptedEngine(TOKENIZER, script), TOKENIZER, index, ProtocolConfig(), 3)
    return loop.run([Task(question(), "onehop", seed=(i,)) for i in range(len(asked))], GREEDY)


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_run_is_replayed_exactly_without_its_index(
    dense_shards: Path, queries: Queries, tmp_path: Path, hybrid: bool
) -> None:
    """Passages, scores, ids and all: of a recorded run its manifest is enough, and no query is encoded."""
    asked, tape = [query for query, _ in queries[:9]], tmp_path / "tapes/run.jsonl"
    plain = episodes(opened(dense_shards, "embedded", hybrid=hybrid), asked)
    recorded = episodes(opened(dense_shards, f"record:{tape}+embedded", hybrid=hybrid), asked)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(dense_shards / "manifest.json", bare)
    replayed = episodes(opened(bare, f"replay:{tape}", hybrid=hybrid), asked)
    assert plain == recorded == replayed
    assert all(len(episode.searches) == 2 for episode in plain)
    with pytest.raises(UserError, match=r"was recorded of the index .*, which data/index names"):
        opened(bare, f"replay:{tape}", hybrid=not hybrid)


def test_a_query_that_was_not_recorded_ends_the_run_and_is_named(
    shards: Path, queries: Queries, tmp_path: Path
) -> None:
    """It is no empty result and no failed episode; nor are more passages of a query that was."""
    asked, tape = [query for query, _ in queries[:3]], tmp_path / "run.jsonl"
    episodes(opened(shards, f"record:{tape}+embedded"), asked[:2])
    replayed = opened(shards, f"replay:{tape}")
    with pytest.raises(UserError, match=rf"no record of 1 of \d queries with top_k 3, as of '{asked[2]}'"):
        episodes(replayed, asked)
    with pytest.raises(UserError, match="no record of 1 of 1 queries with top_k 5"):
        replayed.search(asked[:1], 5)
    with pytest.raises(UserError, match="no such file; record it first"):
        opened(shards, f"replay:{tmp_path}/none.jsonl")


class Counting:
    """Finds a passage named by how many calls there were; the first `failures` calls fail."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.asked = failures, list[str]()

    def hits(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        if self.failures:
            self.failures -= 1
            raise InfrastructureError("down")
        self.asked += queries
        return [[Hit(Passage(str(len(self.asked)), "Títle\u2028", "text\nmore"), 1 / 3)] for _ in queries]

    def close(self) -> None:
        """Do nothing."""


def test_a_killed_recording_goes_on_and_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    """The last line is cut off in the middle; a failure is not recorded, and half a surrogate pair is."""
    tape, first = tmp_path / "run.jsonl", Counting()
    found = Cassette(tape, "d", first).hits(["a", "b\ud800", "a"], 3)
    assert first.asked == ["a", "b\ud800"] and found[0] == found[2]
    whole = tape.read_bytes()
    for cut in range(1, 40):
        tape.write_bytes(whole[:-cut])
        again = Counting()
        assert Cassette(tape, "d", again).hits(["a"], 3) == found[:1]
        assert again.asked == [], cut
    second = Counting(failures=1)
    recording = Cassette(tape, "d", second)
    with pytest.raises(InfrastructureError):
        recording.hits(["b\ud800"], 3)
    other = Cassette(tape, "d", Counting())  # of another process, beside it
    both = recording.hits(["b\ud800", "c"], 3), other.hits(["c"], 3)
    assert second.asked == ["b\ud800", "c"] and len(both) == 2
    replayed = Cassette(tape, "d")
    assert replayed.hits(["c", "a", "b\ud800"], 3) == [both[0][1], found[0], both[0][0]]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}\n",
        HEAD + "[]\n",
        HEAD + '{"query": "q", "top_k": 3, "hits": [["1", "t"]]}\n',
        HEAD + '{"query": "q", "top_k": 3, "hits": [["1", "t", "x", "high"]]}\n',
        HEAD + '{"que',
    ],
)
def test_what_is_no_cassette_is_said(tmp_path: Path, content: str) -> None:
    tape = tmp_path / "run.jsonl"
    tape.write_text(content)
    with pytest.raises(UserError, match=r"run\.jsonl(:\d: no line of a cassette| is empty)"):
        Cassette(tape, "d")


def test_locations_of_cassettes() -> None:
    recording = "record:tapes/a.jsonl+retriever+http://host:8000"
    assert parse_location(recording) == parse_location("retriever+http://host:8000")
    assert cassette_file(recording) == "tapes/a.jsonl" and cassette_file("embedded") is None
    assert parse_location("replay:a+b.jsonl") == Location("replay", "a+b.jsonl")
    for wrong in ("record:", "record:a", "record:+embedded", "record:a+", "replay:"):
        with pytest.raises(ValueError, match="location: must be"):
            parse_location(wrong)
