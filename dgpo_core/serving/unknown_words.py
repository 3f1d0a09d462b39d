"""What of a question is unknown to the index: its names or, where it has none, all of its content words.

A model that knows another world answers a question about ours with confidence, and a passage may contain that
answer. That no passage has the names which were asked about is then the only sign.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.text import normalize, stands_in

if TYPE_CHECKING:
    from dgpo_core.retrieval.ranking import Retriever

POSSESSIVE = re.compile(r"['’]s\b")
MARKS = "\"'“”‘’«»()[],.;:?!¿¡"
# Words of questions that say nothing of what they are about.
FUNCTION_WORDS = frozenset(
    "about after all also and any are as at be been before between both but by can could did do does "
    "first for from had has have he her his how i if in into is it its last many me much of on or other "
    "she should so that their them then there these they this those to was we were what when where "
    "which who whom whose why will with would you your".split()
)


def unknown_words(question: str, found: Iterable[str], retriever: "Retriever", top_k: int) -> list[str]:
    """Return the question's names that stand neither in `found` nor in what a search for them finds.

    `found` are texts of passages. Of a question without names, which are told by their capital letters, the
    content words are returned if all are unknown. A retriever that fails says nothing.
    """
    first, *others = _words(question) or [""]
    words = {normalize(word): word for word in (first, *others)}
    words = {key: word for key, word in words.items() if key and key not in FUNCTION_WORDS}
    names = {key for key, word in words.items() if word in others and word[0].isupper()}
    asked = [key for key in words if not names or key in names]
    missing = _missing(asked, found)
    if missing:
        try:
            hits = retriever.search(missing, top_k)
        except (InfrastructureError, UserError):
            return []
        passages = [f"{hit.passage.title} {hit.passage.text}" for each in hits for hit in each]
        missing = _missing(missing, passages)
    return [words[key] for key in missing] if names or len(missing) == len(words) else []


def unknown_note(words: list[str]) -> str | None:
    """Return what is said of an answer to a question with these unknown words, or None."""
    return f"no passage that was found has {', '.join(words)}" if words else None


def _words(question: str) -> list[str]:
    """Return the words of a question as they are written, without marks around them."""
    stripped = (word.strip(MARKS) for word in POSSESSIVE.sub("", question).split())
    return [word for word in stripped if word]


def _missing(words: list[str], texts: Iterable[str]) -> list[str]:
    """Return those of the normalised `words` that stand in none of `texts`."""
    normalized = [normalize(text) for text in texts]
    return [word for word in words if not any(stands_in(word, text) for text in normalized)]
