"""What can be said of a query from its words alone."""

import re

from dgpo_core.arcap.evidence import golden_passages
from dgpo_core.datasets.records import Question
from dgpo_core.scoring.answers import normalize

# words that name nothing: question words, auxiliaries, prepositions, conjunctions, pronouns
FUNCTION_WORDS = frozenset(
    "who whom whose what which when where why how many much is are was were be been being do does did has "
    "have had can could will would in on at of off to from by for with into about as than and or but not "
    "that this these those it its he his him she her they their there".split()
)
_POSSESSIVE = re.compile(r"['\N{RIGHT SINGLE QUOTATION MARK}]s\b")
_QUALIFIER = re.compile(r"\s*\([^)]*\)$")  # "Harbour (film)": what tells a title from others is no name


def content_words(text: str) -> frozenset[str]:
    """Normalised words without function words; a possessive 's is no part of a word."""
    return frozenset(normalize(_POSSESSIVE.sub("", text)).split()) - FUNCTION_WORDS


def repeats(query: str, texts: list[str]) -> bool:
    """Whether the normalised query is one of the normalised texts."""
    return normalize(query) in {normalize(text) for text in texts}


def is_sensible(query: str, question: Question, earlier: list[str], missing: frozenset[str]) -> bool:
    """Whether the query, asked after the `earlier` ones, could be expected to find the `missing` evidence.

    It must not repeat an earlier query. It must name a missing gold passage: have more than half of the
    words of its title that the model could know, from the question or from gold passages retrieved before.
    Where it could know no such word, any content word of these will do. Without known gold passages, a first
    query must share a content word with the question; a later one may be about what only the passages name.
    """
    if repeats(query, earlier):
        return False
    words, passages = content_words(query), golden_passages(question)
    if not passages and earlier:
        return bool(words)
    known = content_words(question.question).union(
        *(content_words(f"{p['title']} {p['text']}") for p in passages if p["id"] not in missing)
    )
    titles = [content_words(_QUALIFIER.sub("", p["title"])) for p in passages if p["id"] in missing]
    names = [name for title in titles if (name := title & known)]
    if not names:
        return bool(words & known)
    return any(2 * len(words & name) > len(name) for name in names)
