"""What the encyclopedia can say: entity types, relations, and their phrasings.

In the templates `{s}` is the subject and `{o}` the object. `questions` are the phrasings of the training
and the ordinary test questions; `other_questions` appear in the "other phrasings" and hard sets only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact, `noun of subject is object`."""

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

COMPARISONS: dict[str, tuple[str, ...]] = {
    # relation noun -> questions about the earlier of {a} and {b}
    "release year": ("Which film came out first, {a} or {b}",),
    "birth year": ("Who was born first, {a} or {b}",),
}


def relations_of(entity_type: str) -> list[Relation]:
    return [relation for relation in RELATIONS if relation.subject == entity_type]


def mention(entity_type: str, name: str) -> str:
    """How a text speaks of an entity: "the film Karumi", but plain names for people and countries."""
    return name if entity_type in ("person", "country") else f"the {entity_type} {name}"
