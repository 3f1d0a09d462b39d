"""The index in this process: dense and sparse, for a moment or in a folder that stays."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError
from dgpo_core.retrieval.collection import Content, Point
from dgpo_core.retrieval.embedded import EmbeddedBackend
from dgpo_core.retrieval.encoders import Bm25Encoder
from dgpo_core.retrieval.ranking import Query, rank
from tests.conftest import ROOT, run_python
from tests.dgpo_core.retrieval.conftest import content, dense_content


def unreadable(made: Content) -> Content:
    """The same collection, of which nothing may be read any more."""
    return replace(made, parts=[])


def test_dense_vectors_are_ranked_by_inner_product(passages: list[Passage]) -> None:
    made, matrix = dense_content(passages[:60])
    backend = EmbeddedBackend(made)
    asked = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    for exact in (False, True):
        results = rank(backend.search, Query("text", asked.tolist(), 4, exact))
        for query, points in zip(asked, results, strict=True):
            scores = matrix @ query
            assert [point.number for point in points] == np.argsort(-scores)[:4].tolist()
            assert [point.passage for point in points] == [passages[p.number] for p in points]
            assert [p.score for p in points] == pytest.approx(np.sort(scores)[::-1][:4].tolist(), rel=1e-5)


def test_scores_do_not_depend_on_the_build(passages: list[Passage], queries: list[tuple[str, str]]) -> None:
    encoder = Bm25Encoder(30.0)
    made = content(passages, encoder.encode_passages([p.contents for p in passages]), None)
    asked = encoder.encode_queries([query for query, _ in queries[:100]])
    builds = []
    for _ in range(2):
        backend = EmbeddedBackend(made)
        found = backend.search(Query("text", asked, 11))
        builds.append([sorted((p.number, p.score) for p in points) for points in found])
    scores = [dict(pairs) for pairs in builds[0]]
    for first, pairs in zip(scores, builds[1], strict=True):
        for number, score in pairs:
            assert first.get(number, score) == score, "to the last bit"


def test_a_folder_outlives_the_index(passages: list[Passage], tmp_path: Path) -> None:
    made, matrix = dense_content(passages[:40])
    query = [matrix[7].tolist()]
    first = EmbeddedBackend(made, tmp_path)
    before = first.search(Query("text", query, 3))
    first.close()
    second = EmbeddedBackend(unreadable(made), tmp_path)
    assert second.search(Query("text", query, 3)) == before
    second.close()
    vectors = Bm25Encoder(30.0).encode_passages([p.contents for p in passages[:40]])
    other = replace(content(passages[:40], vectors, None), name="dgpo-other")
    asked = Bm25Encoder(30.0).encode_queries([passages[3].title])
    kept = EmbeddedBackend(other, tmp_path)
    scores = kept.search(Query("text", asked, 3))
    kept.close()
    assert EmbeddedBackend(unreadable(other), tmp_path).search(Query("text", asked, 3)) == scores, (
        "its terms too"
    )
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["dgpo-other", made.name]


def test_a_build_that_failed_is_made_again(passages: list[Passage], tmp_path: Path) -> None:
    made, matrix = dense_content(passages[:40], parts=2)

    def fail() -> Iterator[Point]:
        raise OSError("disk full")

    broken = replace(made, parts=[made.parts[0], replace(made.parts[1], read=fail)])
    with pytest.raises(OSError, match="disk full"):
        EmbeddedBackend(broken, tmp_path)
    assert not (tmp_path / made.name).exists()
    backend = EmbeddedBackend(made, tmp_path)
    assert backend.search(Query("text", [matrix[39].tolist()], 1))[0][0].number == 39
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [made.name]


def test_one_process_at_a_time(passages: list[Passage], tmp_path: Path) -> None:
    """The lock is the kernel's: it goes with the process that held it, however that ended."""
    made, _ = dense_content(passages[:5])
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / f"{made.name}.lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(InfrastructureError, match="another process searches this index"):
            EmbeddedBackend(made, tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=30)
        EmbeddedBackend(made, tmp_path).close()
    finally:
        holder.kill()
        holder.communicate(timeout=30)


def test_nothing_stays_of_a_temporary_one(passages: list[Passage], tmp_path: Path) -> None:
    code = (
        "from dgpo_core.config.retrieval import EncoderConfig; "
        "from dgpo_core.datasets.records import Passage; "
        "from dgpo_core.retrieval.index import index_passages; import os; "
        "made = index_passages([Passage('a', 'T', 'red house')], EncoderConfig(kind='bm25')); "
        "print(len(os.listdir(os.environ['TMPDIR'])), made.search(['red'], 1)[0][0].passage.id)"
    )
    done = run_python(code, TMPDIR=str(tmp_path))
    assert (done.stdout, done.stderr) == ("2 a\n", ""), "the folder, and the file that says whose it is"
    assert list(tmp_path.iterdir()) == []
