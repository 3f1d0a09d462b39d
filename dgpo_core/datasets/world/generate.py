"""Entities and facts of an embedded world, from a seed."""

import random
from dataclasses import dataclass, field

from dgpo_core.config.data import WorldConfig
from dgpo_core.datasets.world import relations as r
from dgpo_core.datasets.world.names import NameMaker

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
        return r.mention(self.type, self.name)


@dataclass(frozen=True)
class Fact:
    """`relation` of `subject` is `value`; `entity` is the value's entity, None for words and years."""

    subject: Entity
    relation: r.Relation
    value: str
    entity: Entity | None

    @property
    def kind(self) -> str:
        """`name`, `word` or `year`."""
        if self.relation.object == "year":
            return "year"
        return "word" if self.value.islower() else "name"


@dataclass
class World:
    config: WorldConfig
    seed: int
    entities: list[Entity] = field(default_factory=list)
    facts: dict[tuple[int, str], Fact] = field(default_factory=dict)  # by (subject key, noun)

    def fact(self, subject: Entity, noun: str) -> Fact:
        return self.facts[subject.key, noun]

    def facts_of(self, subject: Entity) -> list[Fact]:
        return [self.facts[subject.key, rel.noun] for rel in r.relations_of(subject.type)]

    def of_type(self, entity_type: str) -> list[Entity]:
        return [entity for entity in self.entities if entity.type == entity_type]


def passages_per_entity(config: WorldConfig) -> float:
    """Expected number of passages of one entity: two if popular, one if rare."""
    return 2.0 - config.rare_share


def generate_world(config: WorldConfig, seed: int) -> World:
    """A world of about `config.passages` passages. Same configuration and seed: same world."""
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
    """Titles as encyclopedias write them: the bare name, with the type in brackets where shared."""
    holders: dict[str, int] = {}
    for entity in world.entities:
        holders[entity.name] = holders.get(entity.name, 0) + 1
    world.entities = [
        Entity(e.key, e.type, e.name, f"{e.name} ({e.type})" if holders[e.name] > 1 else e.name, e.popular)
        for e in world.entities
    ]


def _draw_facts(world: World, rng: random.Random, names: NameMaker) -> None:
    by_type = {entity_type: world.of_type(entity_type) for entity_type in TYPE_SHARES}
    for entity in world.entities:
        for relation in r.relations_of(entity.type):
            value, target = _value(entity, relation, by_type, rng, names)
            world.facts[entity.key, relation.noun] = Fact(entity, relation, value, target)


def _value(
    subject: Entity,
    relation: r.Relation,
    by_type: dict[str, list[Entity]],
    rng: random.Random,
    names: NameMaker,
) -> tuple[str, Entity | None]:
    if relation.object in by_type:
        target = rng.choice([e for e in by_type[relation.object] if e.key != subject.key])
        return target.name, target
    if relation.object == "year":
        return str(rng.randint(*YEARS[relation.noun])), None
    words = {"occupation": r.OCCUPATIONS, "industry": r.INDUSTRIES, "genre": r.GENRES}
    if relation.object in words:
        return rng.choice(words[relation.object]), None
    return names.word(2), None  # rivers and currencies have names but no article


def random_value(world: World, object_type: str, rng: random.Random) -> str:
    """Any value of `object_type`, for sentences that only look like answers."""
    if object_type == "year":
        return str(rng.randint(1900, 1999))
    return rng.choice(world.of_type(object_type)).name
