"""The embedded models' tokenizer: Qwen2's, with a small vocabulary made by hand instead of trained.

Byte-level BPE with Qwen2's own splitting, so that `AutoTokenizer` loads it as what it is. The merges make
syllables of names first, and then chain the pieces of each word that the encyclopedia's texts use, from the
left. No chain can begin inside a name, so a name always has the same tokens wherever it stands after a space.
"""

import re

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from dgpo_core.agent import prompts
from dgpo_core.world.facts import (
    COMPARISONS,
    DISTRACTORS,
    GENRES,
    INDUSTRIES,
    OCCUPATIONS,
    PRONOUNS,
    RELATIONS,
    SUFFIXES,
    SYLLABLES,
    TYPES,
)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACE, NEWLINE = "Ġ", "Ċ"  # how byte-level BPE writes a space and a line break
EXTRA_WORDS = "I need is than earlier"  # of the expert's thoughts and the reading drill
LINE_STARTS = ("Doc", "(Title", "Answer", "My", "user", "assistant")  # written without a space before
PUNCTUATION = ((".", NEWLINE), ("?", NEWLINE), (NEWLINE, NEWLINE), (SPACE, "("), (")", ")"))


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the tokenizer; it is the same on every machine, since nothing is drawn or trained."""
    merges: dict[tuple[str, str], None] = {}  # ordered: earlier merges are applied first
    for syllable in SYLLABLES:
        merges[syllable[0], syllable[1]] = None
        merges[syllable[0].upper(), syllable[1]] = None
        merges[SPACE, syllable.capitalize()] = None
    for word in sorted(set(re.findall(r"[A-Za-z]+", _static_text()))):
        _chain(SPACE + word, merges)
    merges.update(dict.fromkeys(PUNCTUATION))
    for word in (*LINE_STARTS, *TYPES):  # last: some could begin inside other words
        _chain(word, merges)
    vocabulary = [*sorted(ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=list(merges),  # type: ignore[arg-type]
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
    )
    tokenizer.add_tokens([AddedToken(TURN_START, special=True)])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in prompts.TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _chain(word: str, merges: dict[tuple[str, str], None]) -> None:
    """Add the merges that join `word`'s pieces from left to right into one token."""
    pieces = _syllabify(word)
    left = pieces[0]
    for piece in pieces[1:]:
        merges.setdefault((left, piece))
        left += piece


def _syllabify(word: str) -> list[str]:
    """Split a word as the merges for names leave it: into syllables, and other characters one by one."""
    syllables = {*SYLLABLES, *(syllable.capitalize() for syllable in SYLLABLES)}
    starts = {SPACE + syllable.capitalize() for syllable in SYLLABLES}
    pieces, position = [], 0
    while position < len(word):
        size = 3 if word[position : position + 3] in starts else 2
        if size == 2 and word[position : position + 2] not in syllables:
            size = 1
        pieces.append(word[position : position + size])
        position += size
    return pieces


def _static_text() -> str:
    """Return every word that templates and prompts put into a text, in the case in which they do."""
    parts: list[str] = [EXTRA_WORDS, prompts.SHORT_INSTRUCTION, prompts.INVALID_ACTION]
    parts += [*OCCUPATIONS, *INDUSTRIES, *GENRES, *PRONOUNS.values(), *TYPES, "It The the"]
    for relation in RELATIONS:
        parts += [relation.noun, *relation.statements, *relation.questions, *relation.other_questions]
    parts += [template for templates in DISTRACTORS.values() for template, _ in templates]
    parts += [text for texts in (*COMPARISONS.values(), *SUFFIXES.values()) for text in texts]
    return re.sub(r"\{\w*\}|<[^>]*>", " ", " ".join(parts))
