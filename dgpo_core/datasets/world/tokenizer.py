"""The embedded models' tokenizer: words of the encyclopedia, syllables of its names, halves of years.

A Unigram model with a hand-made vocabulary: the scores make whole words win over syllables, and syllables
over single characters, so a name always has the same tokens wherever it stands after a space.
"""

import re
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgpo_core.datasets.world import relations as r
from dgpo_core.datasets.world.generate import SUFFIXES
from dgpo_core.datasets.world.names import SYLLABLES
from dgpo_core.protocol import prompts

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACE = "▁"
WORD, SYLLABLE, CHARACTER = -2.0, -4.0, -8.0  # log-scores of the Unigram model
# words of the expert's thoughts and of the reading drill that no relation template has
EXTRA_TEXT = (
    "user assistant system I need to find first then earlier than Now know yes no not is in a an the of"
)


def _static_text() -> str:
    parts = [EXTRA_TEXT, prompts.SHORT_INSTRUCTION, prompts.INVALID_ACTION, prompts.document(1, "", "")]
    parts += [*r.OCCUPATIONS, *r.INDUSTRIES, *r.GENRES, *r.PRONOUNS.values(), "It"]
    for relation in r.RELATIONS:
        parts += [relation.noun, relation.subject, *relation.statements]
        parts += [*relation.questions, *relation.other_questions]
    parts += [template for templates in r.DISTRACTORS.values() for template, _ in templates]
    parts += [text for texts in r.COMPARISONS.values() for text in texts]
    parts += [suffix for suffixes in SUFFIXES.values() for suffix in suffixes]
    return re.sub(r"\{\w*\}|<[^>]*>", " ", " ".join(parts))


def _vocabulary() -> list[tuple[str, float]]:
    words = sorted(set(re.findall(r"[A-Za-z]+", _static_text())))
    pieces: dict[str, float] = {"<unk>": 0.0}
    for word in words:
        pieces[SPACE + word] = WORD
        pieces[SPACE + word[0].upper() + word[1:]] = WORD
    for word in words:
        if word[0].isupper():
            pieces.setdefault(word, WORD)  # at the start of a line
    for syllable in SYLLABLES:
        pieces.setdefault(SPACE + syllable.capitalize(), SYLLABLE)
        pieces.setdefault(syllable, SYLLABLE)
    for number in range(100):
        pieces.setdefault(f"{number:02d}", SYLLABLE)
    for digit in string.digits:
        pieces.setdefault(SPACE + digit, SYLLABLE)
    for century in ("18", "19", "20"):
        pieces.setdefault(SPACE + century, SYLLABLE)
    for character in (*string.ascii_letters, *string.digits, *string.punctuation, "\n", SPACE):
        pieces.setdefault(character, CHARACTER)
    return list(pieces.items())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; the same on every machine, since nothing is drawn or trained."""
    tokenizer = Tokenizer(models.Unigram(_vocabulary(), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="never")
    tokenizer.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in prompts.TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token=TURN_END, pad_token=END_OF_TEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder)
