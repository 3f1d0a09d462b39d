"""Names made from syllables.

Every syllable is one consonant and one vowel, so that a name has exactly one division into syllables and
the embedded tokenizer can give each syllable a token of its own.
"""

import random

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]


class NameMaker:
    """Draws words that were not drawn before."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def word(self, syllables: int) -> str:
        """A capitalised word of exactly `syllables` syllables, new to this maker."""
        for _ in range(1000):
            name = "".join(self._rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()
            if name not in self._used:
                self._used.add(name)
                return name
        return self.word(syllables + 1)  # this length is nearly used up
