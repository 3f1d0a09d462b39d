"""Points of shards: numbered through, part by part, with a second vector where the index is a hybrid one."""

from pathlib import Path

from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.collection import encoded_content, index_digest, stored_content
from dgpo_core.retrieval.encoders import Bm25Encoder
from dgpo_core.retrieval.shards import read_manifest


def test_parts_are_the_corpus(shards: Path, passages: list[Passage]) -> None:
    manifest = read_manifest(shards)
    made = stored_content(shards, manifest)
    assert [(part.first, part.count) for part in made.parts] == [(0, 40), (40, 40), (80, 40), (120, 30)]
    points = list(made.points())
    assert [point.number for point in points] == list(range(150))
    assert [point.passage for point in points] == passages[:150]
    assert list(made.points()) == points, "each time anew"
    assert [point.number for point in made.parts[2].read()] == list(range(80, 120))
    assert (made.name, made.digest, made.vectors) == (manifest.collection, manifest.digest, {"text": None})


def test_a_hybrid_index_is_another_one(dense_shards: Path, passages: list[Passage]) -> None:
    manifest = read_manifest(dense_shards)
    lexical = Bm25Encoder(manifest.average_words)
    made = stored_content(dense_shards, manifest, lexical)
    assert made.vectors == {"text": 16, "bm25": None}
    assert made.digest == index_digest(manifest.digest, hybrid=True) != manifest.digest
    assert made.name == f"dgpo-hybrid-{made.digest[:12]}"
    points = list(made.points())
    texts = [passage.contents for passage in passages[:150]]
    assert [point.vectors["bm25"] for point in points] == lexical.encode_passages(texts)
    plain = [point.vectors["text"] for point in stored_content(dense_shards, manifest).points()]
    assert [point.vectors["text"] for point in points] == plain


def test_passages_in_memory(passages: list[Passage]) -> None:
    encoder = Bm25Encoder(30.0)
    made = encoded_content(passages[:5], encoder)
    assert made.count == 5
    vectors = encoder.encode_passages([p.contents for p in passages[:5]])
    assert [point.vectors for point in made.points()] == [{"text": vector} for vector in vectors]
