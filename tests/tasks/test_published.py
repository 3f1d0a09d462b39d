"""The whole way on the sample files: data, index, and what the retriever answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dgpo_core.config.params import load_params, resolve_profile
from dgpo_core.datasets.records import read_questions
from dgpo_core.errors import UserError
from dgpo_core.retrieval.shards import read_manifest, read_shard
from tasks.stages.data import generate
from tasks.stages.index import index
from tasks.stages.inputs import retriever
from tests.dgpo_core.retrieval.flat import write_parts
from tests.samples import PASSAGES, SAMPLES, sample_config


def use(folder: Path, retrieval: dict[str, Any], **published: Any) -> None:
    """Resolve a profile that takes the samples, and everything else from the defaults."""
    profile = folder / "samples.yaml"
    data = {"source": "published", "published": sample_config(**published).model_dump()}
    profile.write_text(yaml.safe_dump({"data": data, "retrieval": {"shard_size": 10, **retrieval}}))
    (folder / "params.yaml").write_text(yaml.safe_dump(resolve_profile(profile), sort_keys=False))


def answered() -> dict[str, float]:
    """Share of each set's test questions of whose top three passages one has a golden answer."""
    params = load_params()
    searched, shares = retriever(params), {}
    for name in params.questions.test:
        questions = read_questions(Path(f"data/questions/{name}/test.jsonl"))
        found = searched.search([question.question for question in questions], params.retrieval.top_k)
        hits = [
            any(answer in hit.passage.contents for hit in three for answer in question.golden_answers)
            for question, three in zip(questions, found, strict=True)
        ]
        shares[name] = sum(hits) / len(hits)
    return shares


def test_bm25_answers_from_the_published_files(workplace: Path) -> None:
    use(workplace, {"encoder": {"kind": "bm25"}})
    generate()
    metrics = json.loads(Path("metrics/data.json").read_text())
    assert metrics["passages"] == PASSAGES
    assert (metrics["nq_train"], metrics["nq_dev"], metrics["nq_test"]) == (6, 2, 5)
    assert (metrics["musique_gold_joined"], metrics["musique_gold_not_found"]) == (3, 1)
    assert metrics["source corpus"] == str(SAMPLES / "wiki-18.jsonl")
    musique = read_questions(Path("data/questions/musique/test.jsonl"))
    assert musique[0].metadata["golden_passages"][0]["title"] == "The Salt Lantern (film)"
    nq = read_questions(Path("data/questions/nq/test.jsonl"))
    assert nq[0].metadata["long_answers"][0].startswith("Its lighthouse was built")
    index()
    shares = answered()
    assert shares["nq"] == shares["triviaqa"] == shares["popqa"] == 1.0
    assert all(share > 0 for share in shares.values())


def test_published_vectors_answer_as_our_own_do(
    workplace: Path, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real dense encoder; then its vectors as a faiss index in parts, which is not encoded again."""
    encoder = {"kind": "sentence-transformers", "model": str(minilm)}
    use(workplace, {"encoder": encoder})
    generate()
    index()
    own = answered()
    assert min(own["nq"], own["triviaqa"], own["popqa"]) == 1.0
    shards = read_manifest(Path("data/index")).shards
    vectors = np.array([v for name in shards for _, v in read_shard(Path("data/index") / name)], np.float32)
    parts = [str(part) for part in write_parts(workplace, vectors)]
    use(workplace, {"encoder": encoder, "vectors": parts})
    index()
    imported = [v for name in shards for _, v in read_shard(Path("data/index") / name)]
    np.testing.assert_array_equal(np.array(imported, np.float32), vectors)
    assert answered() == own
    use(workplace, {"encoder": encoder, "vectors": parts[:2]})
    with pytest.raises(UserError, match="is a part missing"):
        index()


def test_wrong_counts_stop_the_stage_and_leave_nothing(workplace: Path) -> None:
    use(workplace, {"encoder": {"kind": "bm25"}}, check_counts=True)
    with pytest.raises(UserError, match=r"nq/train has 8 records, but the paper \(table 9\) has 79,168"):
        generate()
    assert not Path("data/corpus.jsonl").exists()
    assert not Path("data/questions").exists()
