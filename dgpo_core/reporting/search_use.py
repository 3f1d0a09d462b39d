"""The report's tables of the use of search: a row a measurement, with a plain name and what it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dgpo_core.reporting.formats import MINUS, Row, cell, model_label, signed_cell

NAMES = {  # in the order of the measurements: name, meaning
    "em_true_retriever": ("EM, true retriever", "on the questions that are asked again below"),
    "em_closed_book": ("EM, closed book", "the answer forced right after the question: known or guessed"),
    "em_empty_retriever": ("EM, empty retriever", "searches return no passage"),
    "em_random_passages": ("EM, random passages", "searches return random passages of the corpus"),
    "em_gold_passages": ("EM, gold passages", "searches return the question's gold passages"),
    "em_of_search": ("EM, due to search", "true minus empty retriever, question by question"),
    "searches_nothing_new": ("Searches: nothing new", "after the first: only passages seen before"),
    "searches_no_evidence": ("Searches: no evidence", "brought no evidence that was still missing"),
    "thinking_degenerate": ("Degenerate thinking", "turns of the next four kinds"),
    "thinking_empty": ("Thinking: empty", "turns that think nothing"),
    "thinking_question": ("Thinking: the question", "turns that think the question, word for word"),
    "thinking_repeated": ("Thinking: repeated", "turns that think what an earlier turn thought"),
    "thinking_loop": ("Thinking: a loop", "turns with the same words three times in a row"),
    "decisions_right": ("Decisions: right", "after a search: answers with all evidence, else searches on"),
    "answered_too_early": ("Answered too early", "of the decisions with evidence missing"),
    "searched_too_long": ("Searched too long", "of the decisions with all evidence there"),
    "decisions_neither": ("Decisions: neither", "neither answers nor searches"),
}
BETTER = {  # of what says that somebody searches well: 1 where more of it is better, -1 where less is
    "searches_nothing_new": -1,
    "searches_no_evidence": -1,
    "thinking_degenerate": -1,
    "decisions_right": 1,
}


def search_use_table(counted: Mapping[str, Mapping[str, Row]]) -> Row | None:
    """Return a row a measurement and a column a model; None where no model was counted."""
    return _table([model_label(model) for model in counted], list(counted.values()), _share)


def search_use_differences(compared: Mapping[str, Mapping[str, Row]]) -> Row | None:
    """Return the same rows with a column a pair of models: paired differences."""
    heads = [f" {MINUS} ".join(map(model_label, pair.split("-"))) for pair in compared]
    return _table(heads, list(compared.values()), lambda entry: signed_cell(entry, 3))


def _table(heads: list[str], columns: Sequence[Mapping[str, Row]], shown: Callable[[Row], Row]) -> Row | None:
    rows = [
        {
            "name": name,
            "meaning": meaning,
            "cells": [shown(own[key]) if key in own else cell(None, None, None, 3) for own in columns],
        }
        for key, (name, meaning) in NAMES.items()
        if any(key in own for own in columns)
    ]
    return {"heads": heads, "rows": rows} if rows else None


def _share(entry: Mapping[str, Any]) -> Row:
    note = f"of {entry['occasions']:,}, in {entry['n']:,} questions"
    return cell(entry["mean"], entry["ci95"], None, 3) | {"note": note}
