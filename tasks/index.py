"""Stage `index`: encode the corpus and put it into a Qdrant collection."""

import json
from pathlib import Path

from dgpo_core.config.params import Params, load_params
from dgpo_core.datasets.published.places import fetch
from dgpo_core.datasets.records import read_questions
from dgpo_core.retrieval.flat_index import FlatIndex
from dgpo_core.retrieval.shards import build_shards
from tasks.agents import retriever, write_metrics
from tasks.files import remove
from tasks.paths import CORPUS, INDEX, METRICS, questions_file
from tasks.stage import main, stage


def index() -> None:
    params = load_params()
    config = params.retrieval.model_dump()
    parts = [fetch(place, "retrieval.vectors").path for place in params.retrieval.vectors]
    with stage("index", config=config, inputs=[CORPUS, *parts], outputs=[INDEX]) as run:
        # encoded in the stage's state, so that a killed run keeps its finished shards
        shards = run.state / "shards"
        digest = "".join(run.inputs[part.as_posix()] for part in parts)
        imported = FlatIndex(parts, digest) if parts else None
        manifest = build_shards(CORPUS, shards, params.retrieval, run.progress, imported=imported)
        summary = {"passages": manifest.passages} | recall(params, shards)
        remove(INDEX)
        INDEX.parent.mkdir(parents=True, exist_ok=True)
        remove(INDEX)
        shards.rename(INDEX)
        write_metrics(METRICS / "index.json", summary)
        run.summary(summary)
        print(f"index: {json.dumps(summary)}")


def recall(params: Params, folder: Path) -> dict[str, float]:
    """Share of validation questions whose first gold passage is among the top k for the bare question."""
    collection = retriever(params, folder)
    measured = {}
    for name in params.questions.train:
        questions = [
            q for q in read_questions(questions_file(name, "dev")) if q.metadata.get("golden_passages")
        ]
        found = collection.search([q.question for q in questions], params.retrieval.top_k)
        hits = [
            question.metadata["golden_passages"][0]["id"] in {hit.passage.id for hit in passages}
            for question, passages in zip(questions, found, strict=True)
        ]
        if hits:
            measured[f"recall_{name}"] = sum(hits) / len(hits)
    return measured


if __name__ == "__main__":
    main(index)
