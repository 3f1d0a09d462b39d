"""An episode as a tree of steps: turns of the model and searches, with the text and tokens of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from dgpo_core.protocol.actions import ActionKind, parse_action
from dgpo_core.protocol.episode import Episode, Outcome, Owner, Search
from dgpo_core.protocol.prompts import INFORMATION_END, INFORMATION_START
from dgpo_core.reporting.episodes import sample_questions

Decode = Callable[[list[int]], Any]  # a tokenizer's `decode`: token ids -> text (typed for batches too)


@dataclass(frozen=True)
class Step:
    """A span of the episode, of one of MLflow's types; `error` is why it failed."""

    name: str
    kind: Literal["AGENT", "LLM", "RETRIEVER"]
    inputs: Any
    outputs: Any
    attributes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def sample(episodes: list[Episode], limit: int) -> list[Episode]:
    """At most `limit` episodes: failed ones first, then evenly over data sets, one a question.

    The questions are those of the report's reader, and so the same for every model.
    """
    failed = [episode for episode in episodes if episode.outcome is Outcome.FAILED][:limit]
    others = {(e.dataset, e.question_id): e for e in reversed(episodes) if e.outcome is not Outcome.FAILED}
    chosen = sample_questions(sorted(others), limit)[: limit - len(failed)]
    return failed + [others[key] for key in chosen]


def steps(episode: Episode, decode: Decode) -> list[Step]:
    """Turns of the model, each followed by the search that it asked for.

    The input of a turn is all that stood before it. A search that was asked for and not answered because
    the retriever failed is a step with an error; after the last turn none is asked.
    """
    found: list[Step] = []
    searches = iter(episode.searches)
    for turn, (start, end, after) in enumerate(_turns(episode), 1):
        text = decode(episode.token_ids[start:end])
        action = parse_action(text)
        usage = {"input_tokens": start, "output_tokens": end - start, "total_tokens": end}
        attributes = {"turn": turn, "action": str(action.kind), "mlflow.chat.tokenUsage": usage}
        prompt = decode(episode.token_ids[:start])
        found.append(Step(f"turn {turn}", "LLM", {"prompt": prompt}, text, attributes))
        if action.kind is not ActionKind.SEARCH:
            continue
        query = {"query": action.content}
        if search := next(searches, None):
            shown = decode(episode.token_ids[end:after])
            found.append(
                Step(f"search {turn}", "RETRIEVER", query, documents(search, shown), {"hit": search.hit})
            )
        elif episode.failure is not None:
            found.append(Step(f"search {turn}", "RETRIEVER", query, [], error=episode.failure))
    return found


def documents(search: Search, shown: str) -> list[dict[str, Any]]:
    """What a search found, in MLflow's form of documents, with the text that the model was shown.

    A passage for which there was no room left has empty contents.
    """
    rest = shown.partition(INFORMATION_START)[2].rpartition(INFORMATION_END)[0]
    found = []
    for number, (passage, score) in enumerate(zip(search.passage_ids, search.scores, strict=True), 1):
        own, following, rest = rest.partition(f"\nDoc {number + 1}(Title: ")
        rest = following.lstrip("\n") + rest
        title, content = _split_title(own.removeprefix(f"Doc {number}(Title: "))
        metadata = {"doc_id": passage, "title": title, "score": round(score, 4)}
        found.append({"page_content": content.strip(), "metadata": metadata, "id": passage})
    return found


def _split_title(document: str) -> tuple[str, str]:
    """Title and text of `title) text`; a title may hold brackets itself."""
    depth = 1
    for place, character in enumerate(document):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return document[:place], document[place + 1 :]
    return "", document


def _turns(episode: Episode) -> Iterator[tuple[int, int, int]]:
    """(start, end, end of what the environment said next) of each run of the model's tokens."""
    runs: list[tuple[int, int, int]] = []
    place = 0
    for owner, run in groupby(episode.owners):
        end = place + len(list(run))
        runs.append((owner, place, end))
        place = end
    for index, (owner, start, end) in enumerate(runs):
        if owner == Owner.MODEL:
            yield start, end, runs[index + 1][2] if index + 1 < len(runs) else end
