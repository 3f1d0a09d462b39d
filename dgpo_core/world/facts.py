"""The embedded world: entities with names made from syllables, and facts about them, drawn from a seed.

Every syllable is one consonant and one vowel, so that a name has exactly one division into syllables and the
embedded tokenizer can give each syllable a token of its own.

The tables say what the encyclopedia can state. In the templates `{s}` is the subject and `{o}` the object.
"""

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property

from dgpo_core.config.data import WorldConfig

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]


class NameMaker:
    """Draws words that were not drawn before."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def word(self, syllables: int) -> str:
        """Draw a capitalised word of exactly `syllables` syllables that is new to this maker."""
        for _ in range(1000):
            name = "".join(self._rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()
            if name not in self._used:
                self._used.add(name)
                return name
        return self.word(syllables + 1)  # this length is nearly used up


@dataclass(frozen=True)
class Relation:
    """One kind of fact: "the `noun` of `subject` is `object`".

    `questions` are the phrasings of the training and the ordinary test questions; `other_questions` appear in
    the sets `phrasing` and `hard` only.
    """

    subject: str
    noun: str
    object: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    other_questions: tuple[str, ...]

    def noun_phrase(self, subject: str) -> str:
        return f"the {self.noun} of {subject}"


def _relation(subject: str, noun: str, obj: str, statements: str, questions: str, other: str) -> Relation:
    return Relation(
        subject,
        noun,
        obj,
        *(tuple(part.strip() for part in text.split("|")) for text in (statements, questions, other)),
    )


# object types that are plain words, not entities
OCCUPATIONS = "painter poet singer lawyer chemist doctor teacher pilot farmer judge sculptor engineer".split()
INDUSTRIES = "steel textiles shipping banking mining tobacco glass paper railways timber oil wine".split()
GENRES = "drama comedy horror romance history fantasy travel crime satire war music family".split()

RELATIONS: tuple[Relation, ...] = (
    _relation(
        "person", "birthplace", "city",
        "{s} was born in {o}.|{s} came from {o}.|The birthplace of {s} was {o}.",
        "Where was {s} born|What is the birthplace of {s}",
        "Which city did {s} come from|In which place was {s} born",
    ),
    _relation(
        "person", "birth year", "year",
        "{s} was born in {o}.|The birth year of {s} was {o}.",
        "When was {s} born|What is the birth year of {s}",
        "In what year was {s} born",
    ),
    _relation(
        "person", "spouse", "person",
        "{s} was married to {o}.|{s} had a spouse, {o}.|{s} shared a house with the spouse {o}.",
        "Who was {s} married to|Who is the spouse of {s}",
        "Whom did {s} marry",
    ),
    _relation(
        "person", "employer", "company",
        "{s} worked for {o}.|{s} was employed by {o}.|{o} was the employer of {s}.",
        "Who employed {s}|What is the employer of {s}",
        "Which company did {s} work for",
    ),
    _relation(
        "person", "school", "university",
        "{s} studied at {o}.|{s} was educated at {o}.|{s} had a degree from {o}.",
        "Where did {s} study|What is the school of {s}",
        "Where was {s} educated",
    ),
    _relation(
        "person", "occupation", "occupation",
        "{s} was a {o}.|{s} worked as a {o}.|By occupation {s} was a {o}.",
        "What is the occupation of {s}|What did {s} work as",
        "What was the job of {s}",
    ),
    _relation(
        "film", "director", "person",
        "{s} was directed by {o}.|{o} was the director of {s}.|{o} directed {s}.",
        "Who directed {s}|Who is the director of {s}",
        "Whose work as a director was {s}",
    ),
    _relation(
        "film", "star", "person",
        "{s} starred {o}.|{o} was the star of {s}.|{o} played the lead in {s}.",
        "Who starred in {s}|Who is the star of {s}",
        "Who played the lead in {s}",
    ),
    _relation(
        "film", "release year", "year",
        "{s} was released in {o}.|{s} came out in {o}.|The release of {s} was in {o}.",
        "When was {s} released|What is the release year of {s}",
        "In what year did {s} come out",
    ),
    _relation(
        "film", "producer", "company",
        "{s} was produced by {o}.|{o} was the producer of {s}.",
        "Who produced {s}|Who is the producer of {s}",
        "Which company produced {s}",
    ),
    _relation(
        "book", "author", "person",
        "{s} was written by {o}.|{o} was the author of {s}.|{o} wrote {s}.",
        "Who wrote {s}|Who is the author of {s}",
        "Whose work as an author was {s}",
    ),
    _relation(
        "book", "publisher", "company",
        "{s} was published by {o}.|{o} was the publisher of {s}.",
        "Who published {s}|Who is the publisher of {s}",
        "Which company published {s}",
    ),
    _relation(
        "book", "genre", "genre",
        "{s} was a {o} book.|{s} was a work of {o}.|The genre of {s} was {o}.",
        "What is the genre of {s}|What kind of book is {s}",
        "Which genre was {s} a work of",
    ),
    _relation(
        "company", "founder", "person",
        "{s} was founded by {o}.|{o} was the founder of {s}.|{o} started {s}.",
        "Who founded {s}|Who is the founder of {s}",
        "Who started {s}",
    ),
    _relation(
        "company", "seat", "city",
        "{s} had its seat in {o}.|{s} was based in {o}.|The head office of {s} was in {o}.",
        "Where is {s} based|What is the seat of {s}",
        "Which city had the head office of {s}",
    ),
    _relation(
        "company", "industry", "industry",
        "{s} was active in {o}.|The industry of {s} was {o}.|{s} made its money in {o}.",
        "What is the industry of {s}|Which industry is {s} active in",
        "In what did {s} make its money",
    ),
    _relation(
        "university", "location", "city",
        "{s} was located in {o}.|The location of {s} was {o}.|{s} stood in {o}.",
        "Where is {s} located|What is the location of {s}",
        "In which city did {s} stand",
    ),
    _relation(
        "university", "rector", "person",
        "{s} was led by {o}.|{o} was the rector of {s}.",
        "Who led {s}|Who is the rector of {s}",
        "Who was in charge of {s}",
    ),
    _relation(
        "city", "country", "country",
        "{s} was a city in {o}.|{s} lay in {o}.|{s} was part of {o}.",
        "Which country is {s} in|What is the country of {s}",
        "Which country was {s} part of",
    ),
    _relation(
        "city", "mayor", "person",
        "{s} had a mayor, {o}.|{o} was the mayor of {s}.|{o} became mayor of {s}.",
        "Who is the mayor of {s}|Who was the mayor of {s}",
        "Who became mayor of {s}",
    ),
    _relation(
        "city", "river", "river",
        "{s} stood on the river {o}.|The river {o} ran through {s}.",
        "What is the river of {s}|Which river ran through {s}",
        "On which river did {s} stand",
    ),
    _relation(
        "country", "capital", "city",
        "{s} was ruled from {o}.|The capital of {s} was {o}.|{o} was the capital of {s}.",
        "What is the capital of {s}|Which city is the capital of {s}",
        "From which city was {s} ruled",
    ),
    _relation(
        "country", "president", "person",
        "{s} had a president, {o}.|{o} was the president of {s}.",
        "Who is the president of {s}|Who was the president of {s}",
        "Who ruled {s} as president",
    ),
    _relation(
        "country", "currency", "currency",
        "{s} used the {o} as money.|The currency of {s} was the {o}.",
        "What is the currency of {s}|Which currency is used in {s}",
        "Which money did {s} use",
    ),
)  # fmt: skip

# Sentences with a value of an askable type in them that answers no question: what makes reading hard.
DISTRACTORS: dict[str, tuple[tuple[str, str], ...]] = {
    "person": (
        ("{s} often visited {o}.", "city"),
        ("{s} was a friend of {o}.", "person"),
        ("{s} won a prize in {o}.", "year"),
        ("{s} owned a share of {o}.", "company"),
    ),
    "film": (
        ("{s} was first shown in {o}.", "city"),
        ("{s} was praised by {o}.", "person"),
        ("{s} was shown again in {o}.", "year"),
    ),
    "book": (
        ("{s} was praised by {o}.", "person"),
        ("{s} was printed again in {o}.", "year"),
        ("{s} was sold by {o}.", "company"),
    ),
    "company": (
        ("{s} was later sold to {o}.", "company"),
        ("{s} owned a house in {o}.", "city"),
        ("{s} was praised by {o}.", "person"),
    ),
    "university": (
        ("{s} was often visited by {o}.", "person"),
        ("{s} owned a house in {o}.", "city"),
    ),
    "city": (
        ("{s} was often visited by {o}.", "person"),
        ("{s} was rebuilt in {o}.", "year"),
        ("{s} lay one day from {o}.", "city"),
    ),
    "country": (
        ("{s} was often visited by {o}.", "person"),
        ("{s} was at war with {o}.", "country"),
    ),
}

TYPES = tuple(DISTRACTORS)
PRONOUNS = {"person": "This person"}  # every other type: "It"

INDIRECT = "{s} had the same {noun} as {o}."  # a statement of a fact by naming who has the same value

COMPARISONS: dict[str, tuple[str, ...]] = {
    # relation noun -> questions about the earlier of {a} and {b}
    "release year": ("Which film came out first, {a} or {b}",),
    "birth year": ("Who was born first, {a} or {b}",),
}


def relations_of(entity_type: str) -> list[Relation]:
    return [relation for relation in RELATIONS if relation.subject == entity_type]


def mention(entity_type: str, name: str) -> str:
    """Return how a text speaks of an entity: "the film Karumi", but people and countries by name alone."""
    return name if entity_type in ("person", "country") else f"the {entity_type} {name}"


# Share of each entity type; every relation's object type is among them, a plain word or a year.
TYPE_SHARES = {
    "person": 0.34,
    "film": 0.17,
    "book": 0.14,
    "company": 0.12,
    "city": 0.13,
    "university": 0.05,
    "country": 0.05,
}
SUFFIXES = {"company": ("Works", "Group", "House"), "country": ("Land", "Isles", "Coast")}
MAX_REUSE = 0.9  # of names: at 1 a type would run out of names to take over
YEARS = {"birth year": (1900, 1959), "release year": (1940, 1999)}


@dataclass(frozen=True)
class Entity:
    """A thing with an article. `popular` entities have longer articles; `title` is unique in its world."""

    key: int
    type: str
    name: str
    title: str
    popular: bool

    @property
    def mention(self) -> str:
        return mention(self.type, self.name)


@dataclass(frozen=True)
class Fact:
    """`relation` of `subject` is `value`; `entity` is the value's entity, None for words and years."""

    subject: Entity
    relation: Relation
    value: str
    entity: Entity | None

    @property
    def kind(self) -> str:
        """Return the kind of the value: `name`, `word` or `year`."""
        if self.relation.object == "year":
            return "year"
        return "word" if self.value.islower() else "name"


@dataclass
class World:
    """Entities, and facts by (key of the subject, noun of the relation)."""

    config: WorldConfig
    seed: int
    entities: list[Entity] = field(default_factory=list)
    facts: dict[tuple[int, str], Fact] = field(default_factory=dict)
    references: dict[tuple[int, str], Fact] = field(
        default_factory=dict
    )  # indirect fact -> whose value it has

    def fact(self, subject: Entity, noun: str) -> Fact:
        return self.facts[subject.key, noun]

    def reference(self, fact: Fact) -> Fact | None:
        """Return the fact of another entity that has this one's value; None for one that is stated itself."""
        return self.references.get((fact.subject.key, fact.relation.noun))

    def facts_of(self, subject: Entity) -> list[Fact]:
        return [self.facts[subject.key, rel.noun] for rel in relations_of(subject.type)]

    def of_type(self, entity_type: str) -> list[Entity]:
        return self._by_type.get(entity_type, [])

    @cached_property
    def _by_type(self) -> dict[str, list[Entity]]:  # when facts are drawn, all entities are there
        by_type: dict[str, list[Entity]] = {}
        for entity in self.entities:
            by_type.setdefault(entity.type, []).append(entity)
        return by_type


def passages_per_entity(config: WorldConfig) -> float:
    """Return how many passages an article has on average: that of a rare entity has one."""
    stating = sum(share * passage_count(config, kind) for kind, share in TYPE_SHARES.items())
    return config.rare_share + (1 - config.rare_share) * (stating + config.asides)


def passage_count(config: WorldConfig, entity_type: str) -> int:
    """Return how many passages with facts the article of a popular entity has."""
    if config.facts_per_passage is None:
        return 2
    return -(-len(relations_of(entity_type)) // config.facts_per_passage)


def generate_world(config: WorldConfig, seed: int) -> World:
    """Generate a world of about `config.passages` passages; configuration and seed decide it."""
    rng = random.Random(f"world-{seed}")
    world = World(config, seed)
    names = NameMaker(rng)
    total = round(config.passages / passages_per_entity(config))
    first_names = [names.word(2) for _ in range(max(8, total // 12))]
    last_names = [names.word(3) for _ in range(max(8, total // 5))]
    reusable: list[str] = []  # names that another entity of another type already has
    taken: set[tuple[str, str]] = set()
    for entity_type, share in TYPE_SHARES.items():
        for _ in range(max(4, round(total * share))):
            name = ""
            while not name or (entity_type, name) in taken:
                name = _name(entity_type, rng, names, first_names, last_names, reusable, config)
            taken.add((entity_type, name))
            if entity_type != "person":
                reusable.append(name)
            popular = rng.random() >= config.rare_share
            world.entities.append(Entity(len(world.entities), entity_type, name, name, popular))
    _disambiguate_titles(world)
    _draw_facts(world, rng, names)
    _draw_references(world)
    return world


def _name(
    entity_type: str,
    rng: random.Random,
    names: NameMaker,
    first_names: list[str],
    last_names: list[str],
    reusable: list[str],
    config: WorldConfig,
) -> str:
    if entity_type == "person":
        return f"{rng.choice(first_names)} {rng.choice(last_names)}"
    if entity_type in SUFFIXES:
        return f"{names.word(rng.choice((2, 3)))} {rng.choice(SUFFIXES[entity_type])}"
    if reusable and rng.random() < min(config.ambiguity, MAX_REUSE):
        return rng.choice(reusable).split(" ")[0]  # a film that shares its name with a book or a city
    return names.word(rng.choice((2, 3)))


def _disambiguate_titles(world: World) -> None:
    """Give titles as encyclopedias do: the bare name, with the type in brackets where names are shared."""
    holders = Counter(entity.name for entity in world.entities)
    world.entities = [
        replace(e, title=f"{e.name} ({e.type})") if holders[e.name] > 1 else e for e in world.entities
    ]


def _draw_facts(world: World, rng: random.Random, names: NameMaker) -> None:
    by_type = {entity_type: world.of_type(entity_type) for entity_type in TYPE_SHARES}
    for entity in world.entities:
        for relation in relations_of(entity.type):
            value, target = _value(entity, relation, by_type, rng, names)
            world.facts[entity.key, relation.noun] = Fact(entity, relation, value, target)


TRAIN_SHARE, DEV_SHARE = 0.38, 0.17  # of the facts; the others are tested


def fact_split(world: World, fact: Fact) -> str:
    """Return `train`, `dev` or `test`, by a hash of the fact: stable whatever else is generated."""
    key = f"{world.seed}-{fact.subject.key}-{fact.relation.noun}"
    draw = hashlib.sha256(key.encode()).digest()[0] / 256
    return "train" if draw < TRAIN_SHARE else "dev" if draw < TRAIN_SHARE + DEV_SHARE else "test"


def _draw_references(world: World) -> None:
    """Make a share of the popular entities' facts indirect: each names one of its split with the same value.

    That one is stated itself, so that a reader is sent on at most once.
    """
    rng = random.Random(f"references-{world.seed}")
    indirect, alike = [], defaultdict(list)
    for fact in world.facts.values():
        if not fact.subject.popular:
            continue
        if rng.random() < world.config.indirect:
            indirect.append(fact)
        else:
            alike[fact.relation.noun, fact.value, fact_split(world, fact)].append(fact)
    for fact in indirect:
        if others := alike[fact.relation.noun, fact.value, fact_split(world, fact)]:
            world.references[fact.subject.key, fact.relation.noun] = rng.choice(others)


def _value(
    subject: Entity,
    relation: Relation,
    by_type: dict[str, list[Entity]],
    rng: random.Random,
    names: NameMaker,
) -> tuple[str, Entity | None]:
    if relation.object in by_type:
        others, own = by_type[relation.object], subject.type == relation.object
        place = rng.choice(range(len(others) - own))
        place += own and others[place].key >= subject.key  # keys ascend: the subject is passed over
        return others[place].name, others[place]
    if relation.object == "year":
        return str(rng.randint(*YEARS[relation.noun])), None
    words = {"occupation": OCCUPATIONS, "industry": INDUSTRIES, "genre": GENRES}
    if relation.object in words:
        return rng.choice(words[relation.object]), None
    return names.word(2), None  # rivers and currencies have names but no article


def random_value(world: World, object_type: str, rng: random.Random) -> str:
    """Draw any value of `object_type`, for sentences that only look like answers."""
    if object_type == "year":
        return str(rng.randint(1900, 1999))
    return rng.choice(world.of_type(object_type)).name
