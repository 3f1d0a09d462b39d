"""Our embedded index beside faiss, bm25s and Qdrant's local client: `python -m benchmarks.peer_retrieval`.

Passages of 100 words drawn by Zipf's law, and random vectors around centres (benchmarks/retrieval.py). Every
contender is a process of its own on one core, with the same files: it builds (passages a second: from the
corpus's file to the first answer, or from the vectors), then the contenders search in turns, a query at a
time and all queries together. Every word ends in a digit, so that neither stemming nor stop words change it,
and all tokenisers find the same terms. Recall is the share of the top 3 whose score is that of an exact
search's third or better: of the vectors' in float64, or of bm25s's, which scores every passage by Lucene's
formula. What takes longer than LIMIT or more than MEMORY is left out. Then, with the demo's models: the share
of a step of reinforcement learning that waits for the index. Writes its part of docs/benchmarks.md.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternation import Rounds, fill
from benchmarks.retrieval import QUERIES, TOP_K, make_texts, make_vectors
from benchmarks.training_step import peak
from dgpo_core.agent.prompts import known_ids
from dgpo_core.config.params import load_params
from dgpo_core.config.retrieval import EncoderConfig, QdrantConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.retrieval.index import Index
from dgpo_core.retrieval.ranking import Hit
from dgpo_core.temporary import temporary_folder
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.reinforce import Reinforcer
from tasks.stages.inputs import model_source, retriever
from tasks.stages.rollouts import split_tasks, training_loop, training_rollout

SIZES = (2_000, 20_000, 200_000, 1_000_000)
DIMENSIONS, TERMS = 384, 8  # of a vector; of a query
LIMIT, MEMORY = 300.0, 8 * 2**30  # seconds to build, and bytes of a process's own memory
SEARCHING = 10.0  # seconds of a round at most: slow ones are asked fewer queries
TIE = 1e-5  # of scores: float32's rounding
HEAD = [
    "| passages | vectors | contender | passages/s in | queries/s out | times ours (least to greatest) | "
    "ms: p50, p99 | recall@3 | GiB |",
    "|---|---|---|---|---|---|---|---|---|",
]
BM25 = EncoderConfig(kind="bm25")
Scores = list[list[float]]  # of each query's best passages, best first


def make_files(folder: Path, passages: int) -> None:
    """Write corpus, vectors and queries, always the same."""
    make_texts_and_queries(folder, passages)
    vectors, queries = make_vectors(passages, DIMENSIONS)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries)


def make_texts_and_queries(folder: Path, passages: int) -> None:
    """Write corpus and queries; a query has words of one passage."""
    texts, rng = make_texts(passages, ending="7"), np.random.default_rng(1)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            row = Passage(str(number), f"title{number}", text).to_json()
            file.write(json.dumps(row) + "\n")
    asked = [
        rng.permutation(sorted(set(texts[n].split())))[:TERMS] for n in rng.integers(passages, size=QUERIES)
    ]
    (folder / "queries.json").write_text(json.dumps([" ".join(words) for words in asked]))


def exact_scores(folder: Path) -> Scores:
    """Return the scores of each query's best passages, by inner products in float64."""
    vectors, queries = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    best = np.full((len(queries), TOP_K), -np.inf)
    for start in range(0, len(vectors), 10_000):
        scores = queries.astype(np.float64) @ vectors[start : start + 10_000].T.astype(np.float64)
        best = np.sort(np.hstack([best, scores]), axis=1)[:, -TOP_K:]
    return best[:, ::-1].tolist()  # type: ignore[no-any-return]


class Contender(ABC):
    """Something that searches the files of `make_files`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def build(self) -> None: ...

    @abstractmethod
    def search(self, chosen: range) -> Scores:
        """Search for some of the queries."""


class Lexical(Contender):
    @property
    def corpus(self) -> Iterator[Passage]:
        with (self.folder / "corpus.jsonl").open(encoding="utf-8") as file:
            yield from (Passage.from_json(json.loads(line)) for line in file)

    def queries(self, chosen: range) -> list[str]:
        asked: list[str] = json.loads((self.folder / "queries.json").read_text())
        return [asked[i] for i in chosen]


class Dense(Contender):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self.queries = np.load(folder / "queries.npy")


class OurBm25(Lexical):
    """What the stage `index` does and the others open: shards on disk, then the embedded engine."""

    def build(self) -> None:
        from dgpo_core.retrieval.index import open_index
        from dgpo_core.retrieval.shards import build_shards

        config = RetrievalConfig(encoder=BM25)
        build_shards(self.folder / "corpus.jsonl", self.folder / "shards", config, lambda *_: None)
        self._searcher = open_index(self.folder / "shards", config).searcher

    def search(self, chosen: range) -> Scores:
        assert self._searcher
        found = self._searcher.search(self.queries(chosen), TOP_K)
        return [[candidate.score for candidate in best] for best in found]


class Bm25s(Lexical):
    def build(self) -> None:
        import bm25s

        self._tokens = partial(bm25s.tokenize, stopwords=None, show_progress=False)
        self._index = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
        tokens = self._tokens([passage.contents for passage in self.corpus])
        self._index.index(tokens, show_progress=False)

    def search(self, chosen: range) -> Scores:
        tokens = self._tokens(self.queries(chosen))
        _, scores = self._index.retrieve(tokens, k=TOP_K, show_progress=False)
        return (2.2 * scores).tolist()  # type: ignore[no-any-return]  # Qdrant's formula keeps the k1 + 1


class LocalBm25(Lexical):
    """Qdrant's client-local mode, with our encoder's sparse vectors."""

    def build(self) -> None:
        from qdrant_client import QdrantClient, models

        from dgpo_core.retrieval.encoders import Bm25Encoder

        passages = list(self.corpus)
        self._encoder = Bm25Encoder(sum(len(p.contents.split()) for p in passages) / len(passages))
        self._client, idf = QdrantClient(":memory:"), models.SparseVectorParams(modifier=models.Modifier.IDF)
        self._client.create_collection("it", {}, {"bm25": idf})
        vectors = self._encoder.encode_passages([passage.contents for passage in passages])
        self._sparse = models.SparseVector
        self._client.upload_points(
            "it",
            (
                models.PointStruct(id=i, vector={"bm25": self._vector(vector)}, payload=vars(passage))
                for i, (passage, vector) in enumerate(zip(passages, vectors, strict=True))
            ),
        )

    def _vector(self, vector: Any) -> Any:
        return self._sparse(indices=vector.indices, values=vector.values)

    def search(self, chosen: range) -> Scores:
        vectors = self._encoder.encode_queries(self.queries(chosen))
        answers = [
            self._client.query_points("it", query=self._vector(v), using="bm25", limit=TOP_K) for v in vectors
        ]
        return [[point.score for point in answer.points] for answer in answers]


class OurDense(Dense):
    """The embedded engine with vectors that are given."""

    def build(self) -> None:
        from dgpo_core.retrieval.collection import ENCODED, Content, Part, Point
        from dgpo_core.retrieval.embedded import EmbeddedBackend

        def points() -> Iterator[Point]:
            for number, vector in enumerate(self.vectors):
                yield Point(number, Passage(str(number), "", ""), {ENCODED: vector.tolist()})

        count = len(self.vectors)
        parts = [Part(0, count, points)]
        self._backend = EmbeddedBackend(Content("it", "it", count, {ENCODED: DIMENSIONS}, parts))

    def search(self, chosen: range) -> Scores:
        from dgpo_core.retrieval.collection import ENCODED
        from dgpo_core.retrieval.ranking import Query, rank

        vectors = [self.queries[i].tolist() for i in chosen]
        found = rank(self._backend.search, Query(ENCODED, vectors, TOP_K))
        return [[candidate.score for candidate in best] for best in found]


class Faiss(Dense):
    def index(self) -> Any:
        import faiss

        return faiss.IndexFlatIP(DIMENSIONS)

    def build(self) -> None:
        self._index = self.index()
        self._index.add(np.ascontiguousarray(self.vectors))

    def search(self, chosen: range) -> Scores:
        scores, _ = self._index.search(self.queries[chosen.start : chosen.stop], TOP_K)
        return scores.tolist()  # type: ignore[no-any-return]


class FaissHnsw(Faiss):
    """With the graph's settings of `retrieval.qdrant`."""

    def index(self) -> Any:
        import faiss

        recipe = QdrantConfig()
        index = faiss.IndexHNSWFlat(DIMENSIONS, recipe.hnsw_m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = recipe.hnsw_ef_construct, recipe.hnsw_ef
        return index


class LocalDense(Dense):
    """Qdrant's client-local mode."""

    def build(self) -> None:
        from qdrant_client import QdrantClient, models

        self._client = QdrantClient(":memory:")
        params = models.VectorParams(size=DIMENSIONS, distance=models.Distance.DOT)
        self._client.create_collection("it", params)
        self._client.upload_collection("it", self.vectors)

    def search(self, chosen: range) -> Scores:
        answers = [self._client.query_points("it", query=self.queries[i], limit=TOP_K) for i in chosen]
        return [[point.score for point in answer.points] for answer in answers]


CONTENDERS: dict[str, dict[str, tuple[type[Contender], str]]] = {  # ours first; with what it needs
    "BM25": {
        "ours, embedded": (OurBm25, "qdrant_edge"),
        "bm25s": (Bm25s, "bm25s"),
        "Qdrant's client, local": (LocalBm25, "qdrant_client"),
    },
    "dense": {
        "ours, embedded": (OurDense, "qdrant_edge"),
        "faiss, flat": (Faiss, "faiss"),
        "faiss, HNSW": (FaissHnsw, "faiss"),
        "Qdrant's client, local": (LocalDense, "qdrant_client"),
    },
}


def serve(kind: type[Contender], folder: Path, core: int, connection: Connection) -> None:
    """Build, and report the seconds; then answer each (queries, together) by seconds a search, and scores."""
    os.sched_setaffinity(0, {core})
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    contender, before = kind(folder), peak()
    try:
        started = time.perf_counter()
        contender.build()
        contender.search(range(1))
        connection.send(time.perf_counter() - started)
        while asked := connection.recv():
            count, together = asked
            seconds: list[float] = []
            scores: Scores = []
            for part in [range(count)] if together else [range(i, i + 1) for i in range(count)]:
                started = time.perf_counter()
                scores += contender.search(part)
                seconds.append(time.perf_counter() - started)
            connection.send((seconds, scores, peak() - before))
    except MemoryError:
        connection.send(None)


class Running:
    """A contender in its process, which has built and answered `count` queries; else `failure` says why."""

    def __init__(self, kind: type[Contender], folder: Path, core: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(kind, folder, core, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.failure, self.count = self._built(), 1
        if self.failure:
            return self.close()
        seconds = self.ask()[0][0]
        self.count = max(1, min(QUERIES, int(SEARCHING / seconds)))
        self.latencies, self.scores, _ = self.ask()
        return None

    def _built(self) -> str:
        """Wait until it has been built; return why it has not."""
        if not self._connection.poll(LIMIT):
            return f"over {LIMIT / 60:.0f} minutes"
        try:
            self.build_seconds = self._connection.recv()
        except EOFError:
            self.build_seconds = None
        return "" if self.build_seconds else f"over {MEMORY / 2**30:.0f} GiB"

    def ask(self, together: bool = False) -> tuple[list[float], Scores, float]:
        """Let it search for its queries; return seconds, scores and what its peak memory grew by."""
        self._connection.send((self.count, together))
        answer: tuple[list[float], Scores, float] = self._connection.recv()
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def start(group: str, folder: Path) -> tuple[dict[str, Running], dict[str, str]]:
    """Start all contenders of a group; return those that search, and why the others do not."""
    able: dict[str, Running] = {}
    absent: dict[str, str] = {}
    core = min(os.sched_getaffinity(0))
    for name, (kind, package) in CONTENDERS[group].items():
        if not find_spec(package):
            absent[name] = f"no {package} here"
            continue
        running = Running(kind, folder, core)
        if running.failure:
            absent[name] = running.failure
        else:
            able[name] = running
        print(f"{group}: {name}: {running.failure or 'built'}", file=sys.stderr, flush=True)
    return able, absent


def in_turns(able: dict[str, Running], rounds: int) -> Rounds:
    """Time all queries together in turns; return the seconds of a query."""
    seconds: dict[str, list[float]] = {name: [] for name in able}
    names = list(able)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(able[name].ask(together=True)[0][0] / able[name].count)
    return Rounds("queries", seconds, unit="query")


def recall(scores: Scores, exact: Scores) -> float:
    """Return the share of the exact top 3 that was found, or passages that score as much."""
    found = [
        score >= best[-1] * (1 - TIE) - TIE for own, best in zip(scores, exact, strict=False) for score in own
    ]
    return sum(found) / (TOP_K * min(len(scores), len(exact)))


def agreement(scores: Scores, others: Scores) -> float:
    """Return the share of queries with the same scores rank by rank: rankings that differ in ties only."""
    pairs = list(zip(scores, others, strict=False))
    return sum(np.allclose(own, other, rtol=TIE, atol=0) for own, other in pairs) / len(pairs)


def compare(group: str, folder: Path, passages: int, rounds: int) -> list[str]:
    """Return a group's rows of the table."""
    able, absent = start(group, folder)
    times = in_turns(able, rounds)
    exact = exact_scores(folder) if group == "dense" else able["bm25s"].scores if "bm25s" in able else None
    rows = []
    for name, one in able.items():
        ratios = (
            times.ratios(name) if times.ours in CONTENDERS[group] and times.ours.startswith("ours") else []
        )
        compared = f"**{times.ratio(name):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""
        middle, late = np.percentile(one.latencies, [50, 99]) * 1000
        cells = [
            f"{passages / one.build_seconds:,.0f}",
            f"{times.rate(name):,.4g}",
            "1" if name.startswith("ours") else compared,
            f"{middle:.2f}, {late:.2f}",
            f"{recall(one.scores, exact):.3f}" if exact else "",
            f"{one.ask()[2] / 2**30:.2f}",
        ]
        rows.append(f"| {passages:,} | {group} | {name} | {' | '.join(cells)} |")
        if group == "BM25" and exact:
            same = agreement(one.scores, exact)
            print(f"{passages:,}: {name}: {same:.1%} of the rankings are bm25s's but for ties", flush=True)
        one.close()
    return rows + [f"| {passages:,} | {group} | {name} | {why} | | | | | |" for name, why in absent.items()]


class Timed:
    """A Retriever whose searches are timed."""

    def __init__(self, index: Index) -> None:
        self._index, self.digest, self.seconds = index, index.digest, 0.0

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        started = time.perf_counter()
        found = self._index.search(queries, top_k)
        self.seconds += time.perf_counter() - started
        return found


def waiting(steps: int = 4) -> str:
    """Do some steps of the demo's reinforcement learning; say which share of them the index took."""
    params = load_params()
    recipe = params.reinforcement("dgpo")
    source = model_source(params, recipe.start)
    if not Path(source).is_dir():
        return f"the share of a step that waits for the index: no {source} here (`make demo`)"
    tokenizer, student, teacher = (
        load_tokenizer(source),
        load_model(source),
        load_model(params.models.teacher),
    )
    index = Timed(retriever(params))
    loop = training_loop(params, student, source, tokenizer, index)
    tasks = split_tasks(params, "train", params.seed)
    rollout = training_rollout(loop, tasks, params.reinforce.sampling, params.seed)
    config = params.reinforce.model_copy(update={"steps": steps, "dev_every": steps + 1})
    trainer = Reinforcer(student, teacher, recipe, config, params.compute, params.seed, known_ids(tokenizer))
    started = time.perf_counter()
    with temporary_folder("benchmark") as folder:
        trainer.train(len(tasks), rollout, Checkpoint(folder), lambda: 0.0, lambda *_: None)
    whole = time.perf_counter() - started
    return (
        f"{steps} steps of `reinforce@dgpo` ({config.batch_size} episodes each, {whole / steps:.1f} s): "
        f"{index.seconds / whole:.2%} of the time in the index"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, help="passages")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    packages = ("qdrant-edge-py", "qdrant-client", "faiss-cpu", "bm25s")
    lines = [f"One core each, {', '.join(f'{name} {version(name)}' for name in packages)}; {DIMENSIONS}"]
    lines[0] += f" dimensions; {QUERIES} queries."
    print(lines[0])
    lines += ["", *HEAD]
    for passages in given.sizes:
        with temporary_folder("benchmark") as folder:
            make_files(folder, passages)
            for group in CONTENDERS:
                rows = compare(group, folder, passages, given.rounds)
                print(*rows, sep="\n", flush=True)
                lines += rows
    lines += ["", f"- {waiting()}"]
    fill("retrieval", "\n".join(lines))


if __name__ == "__main__":
    main()
