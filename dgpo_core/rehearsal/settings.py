"""A resolved profile with the smallest numbers that still run every part of every stage."""

import copy
from importlib.util import find_spec
from typing import Any

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
    params, notes = _laid_over(resolved, SMALL), []
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


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values of `above` in place of those of `below`, in depth; a mapping of `above` that is empty
    replaces."""
    merged = copy.deepcopy(below)
    for key, value in above.items():
        deep = isinstance(value, dict) and value and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if deep else copy.deepcopy(value)
    return merged
