"""Stage `index`: encode the corpus, make its Qdrant collection, and measure what searches find there."""

import json
from pathlib import Path

from dgpo_core.config.params import Params, load_params
from dgpo_core.config.retrieval import parse_location
from dgpo_core.datasets.published import fetch
from dgpo_core.datasets.records import read_questions
from dgpo_core.retrieval.client import ServiceClient, describe_service
from dgpo_core.retrieval.index import Searcher
from dgpo_core.retrieval.shards import FlatIndex, Manifest, build_shards, write_manifest
from tasks.project.paths import CORPUS, INDEX, questions_file
from tasks.stages.inputs import measured_recall, retriever, validation_questions
from tasks.stages.outputs import write_metrics
from tasks.stages.stage import stage, stage_main


def index() -> None:
    params = load_params()
    location = parse_location(params.retrieval.location)
    parts = [fetch(place, "retrieval.vectors").path for place in params.retrieval.vectors]
    # only what the vectors are made of: where a later part failed, other settings do not encode anew
    config = params.retrieval.model_dump(include={"encoder", "precision", "vectors", "shard_size"})
    config["served"] = location.kind == "service"
    with stage("index", config=config, inputs=[CORPUS, *parts], outputs=[INDEX]) as run:
        # encoded in the stage's state, so that a killed run keeps its finished shards
        shards = run.state / "shards"
        if location.kind == "service":
            manifest = _served(location.address, shards, params)
        else:
            digest = "".join(run.inputs[part.as_posix()] for part in parts)
            imported = FlatIndex(parts, digest) if parts else None
            manifest = build_shards(CORPUS, shards, params.retrieval, run.progress, imported=imported)
        summary = {"passages": manifest.passages} | recall(params, shards)
        shards.rename(run.output(INDEX))
        write_metrics(run, summary)
        print(f"index: {json.dumps(summary)}")


def _served(url: str, folder: Path, params: Params) -> Manifest:
    """Describe the index that a service has now: there is nothing to encode.

    Raises UserError when it does not answer the validation questions as a retriever does.
    """
    served = describe_service(url)
    client = ServiceClient(url, served.digest)
    client.require(validation_questions(params), params.retrieval.top_k)
    client.close()
    encoder = params.retrieval.encoder.recorded()
    manifest = Manifest("", served.digest, served.passages, 0.0, None, encoder, [])
    write_manifest(folder, manifest)
    return manifest


def recall(params: Params, folder: Path) -> dict[str, float]:
    """Measure `search_recall`, of the top k against exact search, and `recall_<set>`, of gold passages.

    The latter is the share of validation questions whose first gold passage is among the top k for the bare
    question. Raises UserError when the former is below retrieval.min_recall.
    """
    metrics: dict[str, float] = {}

    def accept(searcher: Searcher) -> None:
        found = measured_recall(params, searcher)
        if found is not None and found.share is not None:
            metrics["search_recall"] = found.share
        if found is not None and found.without_hits > found.queries / 2:
            without = f"{found.without_hits} of {found.queries} validation questions"
            print(f"index: warning: {without} find nothing at all")

    opened = retriever(params, folder, accept)
    if opened.searcher and not metrics:  # the collection was there already
        accept(opened.searcher)
    for name in params.questions.train:
        dev = read_questions(questions_file(name, "dev"))
        # passages of another corpus, as published gold contexts are, have no id
        with_gold = [
            q for q in dev if any(each.get("id") for each in q.metadata.get("golden_passages", [])[:1])
        ]
        results = opened.search([question.question for question in with_gold], params.retrieval.top_k)
        found = [
            question.metadata["golden_passages"][0]["id"] in {hit.passage.id for hit in hits}
            for question, hits in zip(with_gold, results, strict=True)
        ]
        if found:
            metrics[f"recall_{name}"] = sum(found) / len(found)
    return metrics


if __name__ == "__main__":
    stage_main("index", index)
