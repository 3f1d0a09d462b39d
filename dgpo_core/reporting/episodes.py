"""The sample of episodes that the page's reader shows, cut into coloured segments."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dgpo_core.agent.prompts import INFORMATION_START, INFORMATION_SUFFIX, INVALID_ACTION, SEARCH_END
from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import CHECKS, Key, read_rows, rounded

PER_DATASET = 40
MAX_BYTES = 2_600_000  # of compact JSON: with plotly.js the page stays below 8 MB

# A tag closed before another opens. Retrieved text, which follows a search at once, may contain anything,
# tags of its own too: its block ends only where the environment ends one.
_SEGMENT = re.compile(
    rf"(?<={SEARCH_END})\s*{INFORMATION_START}(?P<retrieved>.*?){INFORMATION_SUFFIX}"
    r"|<(?P<tag>think|search|answer)>(?P<own>(?:(?!<(?:think|search|information|answer)>).)*?)</(?P=tag)>"
    r"|<information>(?P<information>(?:(?!<information>).)*?)</information>"
    rf"|(?P<notice>{re.escape(INVALID_ACTION.strip())})",
    re.DOTALL,
)
_COLUMNS = (
    "question_id", "dataset", "question", "golden_answers", "sample", "response", "prediction", "outcome",
    "ending", "well_formed", "hit", "searches", "failure",
)  # fmt: skip
Segment = tuple[str, str]


def segments(response: str) -> list[Segment]:
    """Split a response into (kind, text); texts of think, search, information and answer lack their tags.

    `notice` is the environment's message after an invalid action; `forged` is an information block that the
    model wrote itself (the environment's always follows a search at once); `text` is all the rest.
    """
    found: list[Segment] = []
    end = 0
    for match in _SEGMENT.finditer(response):
        if between := response[end : match.start()].strip():
            found.append(("text", between))
        if match["retrieved"] is not None:
            found.append(("information", match["retrieved"].strip()))
        elif match["notice"]:
            found.append(("notice", match["notice"]))
        elif match["tag"]:
            found.append((match["tag"], match["own"].strip()))
        else:
            answered = bool(found) and found[-1][0] == "search"
            found.append(("information" if answered else "forged", match["information"].strip()))
        end = match.end()
    if rest := response[end:].strip():
        found.append(("text", rest))
    return found


def sample_questions(keys: Sequence[Key], per_dataset: int) -> list[Key]:
    """Draw a fixed sample: in turn each data set's question of the smallest hash, at most `per_dataset`.

    Any prefix of the list is a fair sample too, so it can be cut for size.
    """
    by_dataset: dict[str, list[Key]] = {}
    for key in keys:
        by_dataset.setdefault(key[0], []).append(key)
    ranked = [sorted(own, key=_digest)[:per_dataset] for own in by_dataset.values()]
    return [key for turn in zip_longest(*ranked) for key in turn if key is not None]


def _digest(key: Key) -> str:
    return hashlib.sha256("\n".join(key).encode()).hexdigest()


def reader_data(
    evaluation: Path,
    models: Sequence[str],
    keys: Sequence[Key],
    diagnoses: Mapping[str, Mapping[Key, dict[str, Any]]],
    max_bytes: int = MAX_BYTES,
) -> list[dict[str, Any]]:
    """Return questions with every model's episode, in `keys`' order, as many as fit into `max_bytes` of JSON.

    `diagnoses` are each model's rows of diagnosis.parquet. Raises UserError naming the file that is
    malformed or lacks the episode of a sampled question.
    """
    chosen = sample_questions(keys, PER_DATASET)
    episodes = {model: _episodes(evaluation / model / "episodes.parquet", chosen) for model in models}
    kept, size = {}, 0
    for key in chosen:
        question = _question({model: own[key] | diagnoses[model][key] for model, own in episodes.items()})
        size += len(compact_json(question).encode())
        if size > max_bytes:
            break
        kept[key] = question
    return [kept[key] for key in keys if key in kept]


def _episodes(path: Path, chosen: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    # only the columns and rows of the sample: the token columns of a large run would not fit into memory
    ids = sorted({question_id for _, question_id in chosen})
    rows = read_rows(path, _COLUMNS, ("question_id", ids))
    rows.sort(key=lambda row: row["sample"], reverse=True)
    found = {(row["dataset"], row["question_id"]): row for row in rows}  # the first sample wins
    for dataset, question_id in chosen:
        if (dataset, question_id) not in found:
            raise UserError(f"{path}: no episode of question {question_id} of {dataset}")
    return found


def _question(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    first = next(iter(rows.values()))
    return {
        "set": first["dataset"],
        "id": first["question_id"],
        "question": first["question"],
        "golden": first["golden_answers"],
        "episodes": {model: _episode(row) for model, row in rows.items()},
    }


def _episode(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "outcome": row["outcome"],
        "prediction": row["prediction"],
        "ending": row["ending"],
        "form": row["well_formed"],
        "hit": row["hit"],
        "failure": row["failure"],
        "first": row["first_failure"],
        "checks": [check for check in CHECKS if row[check]],
        "segments": segments(row["response"] or ""),
        "searches": [
            [
                search["query"],
                [list(pair) for pair in zip(search["passage_ids"], _scores(search), strict=False)],
            ]
            for search in row["searches"] or ()
        ],
    }


def _scores(search: Mapping[str, Any]) -> list[float]:
    return [rounded(round(float(score), 4)) for score in search["scores"]]


def compact_json(value: Any) -> str:
    """Write JSON that is safe in a script element: without `<`, `>` and `&`, nothing can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
