"""A handful of passages and questions in the published formats (docs/data.md), written by us.

A resolved profile with the smallest numbers that still run every part of every stage.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dgpo_core.config.params import overlay
from dgpo_core.datasets.published import TEST_SPLITS
from dgpo_core.datasets.records import Passage, Question, write_jsonl

ANSWER = "yes"  # of every question: what the rehearsal's teacher has learned by heart
QUERY = "harbour towns"
PLACES = ("Aldmoor", "Brenwick", "Carrow", "Dunhaven", "Elmsea", "Farholt", "Grayport", "Hythe Bay")
SPLITS = {"train": 8, "dev": 4, "test": 4}


def passages() -> list[Passage]:
    """One for each place, with the title in quotes and the text below it, as wiki-18 has them."""
    return [
        Passage(
            str(number),
            place,
            f"{place} is a harbour town. Its lighthouse was built in {1840 + 7 * number}, yes.",
        )
        for number, place in enumerate(PLACES)
    ]


def questions(dataset: str, split: str) -> list[Question]:
    """With the metadata that ARCap looks for: golden passages and a long answer."""
    found = passages()
    made = []
    for number in range(SPLITS[split]):
        passage = found[(number + len(dataset)) % len(found)]
        metadata = {
            "golden_passages": [{"id": passage.id, "title": passage.title, "text": passage.text}],
            "long_answer": passage.text,
        }
        text = f"Is {passage.title} a harbour town with a lighthouse ({split} {number})"
        made.append(Question(f"{split}_{number}", text, (ANSWER,), metadata))
    return made


def write_corpus(path: Path) -> None:
    write_jsonl(path, passages())


def write_question_sets(folder: Path, datasets: Iterable[str]) -> None:
    """`folder`/<set>/<split>.jsonl, as the stage `data` leaves them."""
    for dataset in datasets:
        for split in SPLITS:
            write_jsonl(folder / dataset / f"{split}.jsonl", questions(dataset, split))


def write_published(folder: Path, train: Iterable[str], test: Iterable[str]) -> None:
    """What the stage `data` reads: FlashRAG's question sets, wiki-18, MuSiQue's and NQ's own files."""
    write_corpus(folder / "corpus.jsonl")
    for dataset in train:
        write_jsonl(folder / "questions" / dataset / "train.jsonl", questions(dataset, "train"))
    for dataset in test:
        file = folder / "questions" / dataset / f"{TEST_SPLITS[dataset]}.jsonl"
        write_jsonl(file, questions(dataset, "test"))
    _write_rows(folder / "musique.jsonl", map(_of_musique, questions("musique", "test")))
    _write_rows(folder / "nq.jsonl", map(_of_nq, questions("nq", "test")))


def _of_musique(question: Question) -> dict[str, Any]:
    (passage,) = question.metadata["golden_passages"]
    paragraph = {"title": passage["title"], "paragraph_text": passage["text"], "is_supporting": True}
    return {
        "question": question.question,
        "paragraphs": [paragraph],
        "answer": ANSWER,
        "answer_aliases": [],
    }


def _of_nq(question: Question) -> dict[str, Any]:
    """The simplified form: the page's words, of which the last one is the short answer."""
    (passage,) = question.metadata["golden_passages"]
    words = passage["text"].split(" ")
    span = {"start_token": 0, "end_token": len(words)}
    short = {"start_token": len(words) - 1, "end_token": len(words)}
    annotation = {"long_answer": span, "short_answers": [short], "yes_no_answer": "NONE"}
    return {
        "question_text": question.question,
        "document_text": passage["text"],
        "annotations": [annotation],
    }


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# What is small in a rehearsal; everything else is the profile's.
SMALL: dict[str, dict[str, Any]] = {
    "models": {"student": "models/student", "teacher": "models/teacher"},
    "protocol": {"max_turns": 2, "max_new_tokens": 24, "max_information": 96, "max_context": 1024},
    "rollout": {"batch_tokens": 8192},
    "compute": {"micro_batch_tokens": 2048},
    "data": {
        "published": {
            "questions": "published/questions",
            "corpus": "published/corpus.jsonl",
            "musique": ["published/musique.jsonl"],
            "nq": ["published/nq.jsonl"],
            "dev_questions": 4,
            "check_counts": False,
            "limits": {},
        }
    },
    "retrieval": {"vectors": []},
    "teach": {"questions": 2, "chunk": 4},
    "distributions": {"sample": 2},
    "distill": {
        "epochs": 1,
        "batch_size": 2,
        "dev_questions": 2,
        "min_em": 0.0,
        "on_policy": {"steps": 1, "batch_size": 2, "dev_every": 1},
        "distillm": {"validation": 1},
    },
    "reinforce": {
        "steps": 1,
        "batch_size": 4,
        "mini_batch_size": 2,
        "group_size": 2,
        "audit_episodes": 1,
        "dev_every": 1,
        "dev_questions": 2,
        "checkpoint_every": 1,
    },
    "evaluate": {"questions": 2, "chunk": 16, "trace_episodes": 1},
    "report": {"first": {}},
    "promote": {"log_weights": False},
}
# engine -> (module that it needs, what stands in for it)
ENGINES = {
    "rollout": {"vllm": ("vllm", "transformers"), "vllm-server": ("vllm", "transformers")},
    "compute": {"deepspeed": ("deepspeed", "torch")},
}

# settings of an engine that do not go with the one that stands in for it
WITHOUT: dict[str, dict[str, Any]] = {
    "deepspeed": {"zero_stage": None, "offload": False, "split_teacher": False}
}


def scaled_down(resolved: dict[str, Any], cuda: bool) -> tuple[dict[str, Any], list[str]]:
    """The parameters of a rehearsal, and notes on what stands in for what this machine lacks.

    `resolved` is a params.yaml's content; `cuda` whether a GPU can be used.
    """
    params, notes = overlay(resolved, SMALL), []
    if params["compute"]["device"] != "cpu" and not cuda:
        params["compute"]["device"] = "cpu"
        notes.append("no GPU: everything runs on the processor")
    notes += _local_retrieval(params["retrieval"])
    for section, engines in ENGINES.items():
        asked = params[section].get("engine")
        module, other = engines.get(asked, (None, None))
        if module and (find_spec(module) is None or asked == "vllm-server"):
            params[section] |= {"engine": other, **WITHOUT.get(asked, {})}
            notes.append(f"{section}.engine {asked}: not here, {other} stands in")
    return params, notes


def _local_retrieval(retrieval: dict[str, Any]) -> list[str]:
    """Nothing is asked of the hub or of servers, and no collection of anybody's is touched."""
    notes, encoder, location = [], retrieval["encoder"], retrieval["location"]
    if encoder["kind"] != "bm25":
        if encoder["kind"] == "sentence-transformers":
            notes.append(f"encoder {encoder['model']}: a random one of E5's kind stands in")
        encoder |= {"kind": "dense", "model": "models/encoder", "revision": None}
    if location not in ("embedded", "memory"):
        notes.append(f"the index at {location}: the embedded engine stands in")
        retrieval["location"] = "embedded"
    return notes
