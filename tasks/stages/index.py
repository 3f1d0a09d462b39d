"""Stage `index`: encode the corpus, put it into a Qdrant collection, and measure what is found there."""

import json
from pathlib import Path

from dgpo_core.config.params import Params, load_params
from dgpo_core.config.retrieval import parse_location
from dgpo_core.datasets.published import fetch
from dgpo_core.datasets.records import read_questions
from dgpo_core.retrieval.client import ServiceClient, describe_service
from dgpo_core.retrieval.index import Searcher
from dgpo_core.retrieval.shards import FlatIndex, Manifest, build_shards, write_manifest
from tasks.project.paths import CORPUS, INDEX, METRICS, questions_file
from tasks.stages.inputs import measured_recall, retriever, validation_questions
from tasks.stages.outputs import write_metrics
from tasks.stages.stage import stage, stage_main


def index() -> None:
    params = load_params()
    location = parse_location(params.retrieval.location)
    parts = [fetch(place, "retrieval.vectors").path for place in params.retrieval.vectors]
    # only what the vectors are made of: after a failure behind them, other settings do not encode anew
    config = params.retrieval.model_dump(include={"encoder", "precision", "vectors", "shard_size"})
    config["served"] = location.kind == "service"
    with stage("index", config=config, inputs=[CORPUS, *parts], outputs=[INDEX]) as run:
        # encoded in the stage's state, so that a killed run keeps its finished shards
        shards = run.state / "shards"
        if location.kind == "service":
            manifest = _served(location.place, shards, params)
        else:
            digest = "".join(run.inputs[part.as_posix()] for part in parts)
            imported = FlatIndex(parts, digest) if parts else None
            manifest = build_shards(CORPUS, shards, params.retrieval, run.progress, imported=imported)
        summary = {"passages": manifest.passages} | recall(params, shards)
        shards.rename(run.output(INDEX))
        write_metrics(run.output(METRICS / "index.json"), summary)
        run.summary(summary)
        print(f"index: {json.dumps(summary)}")


def _served(url: str, folder: Path, params: Params) -> Manifest:
    """Nothing to encode: the index is the one that the service has now.

    Raise UserError when it does not answer the validation questions as a retriever does.
    """
    served = describe_service(url)
    client = ServiceClient(url, served.digest)
    client.require(validation_questions(params), params.retrieval.top_k)
    client.close()
    manifest = Manifest(
        "", served.digest, served.passages, 0.0, None, params.retrieval.encoder.model_dump(), []
    )
    write_manifest(folder, manifest)
    return manifest


def recall(params: Params, folder: Path) -> dict[str, float]:
    """`search_recall`: of the top k against exact search. `recall_<set>`: of the gold passages.

    The latter is the share of validation questions whose first gold passage is among the top k for the bare
    question. Raises UserError when the former is below retrieval.min_recall.
    """
    measured: dict[str, float] = {}

    def accept(searcher: Searcher) -> None:
        found = measured_recall(params, searcher)
        if found is not None and found.share is not None:
            measured["search_recall"] = found.share
        if found is not None and found.silent > found.queries / 2:
            print(
                f"index: warning: {found.silent} of {found.queries} validation questions find nothing at all"
            )

    collection = retriever(params, folder, accept)
    if collection.searcher and not measured:  # nothing had to be made
        accept(collection.searcher)
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
    stage_main("index", index)
