"""Articles of the embedded encyclopedia, cut into passages."""

import random
from dataclasses import dataclass

from dgpo_core.datasets.records import Passage
from dgpo_core.datasets.world import relations as r
from dgpo_core.datasets.world.generate import Entity, Fact, World, random_value


@dataclass(frozen=True)
class Article:
    entity: Entity
    passages: list[Passage]
    facts: list[list[Fact]]  # the facts that each passage states


def write_articles(world: World) -> list[Article]:
    """One article an entity; the passages' ids count through the world in the articles' order."""
    rng = random.Random(f"articles-{world.seed}")
    by_type = {entity_type: world.of_type(entity_type) for entity_type in r.DISTRACTORS}
    articles, next_id = [], 0
    for entity in world.entities:
        facts = world.facts_of(entity)
        rng.shuffle(facts)
        middle = (len(facts) + 1) // 2
        groups = [facts[:middle], facts[middle:]] if entity.popular else [facts]
        passages = []
        for group in groups:
            passages.append(Passage(str(next_id), entity.title, _text(world, entity, group, by_type, rng)))
            next_id += 1
        articles.append(Article(entity, passages, groups))
    return articles


def _text(
    world: World,
    entity: Entity,
    facts: list[Fact],
    by_type: dict[str, list[Entity]],
    rng: random.Random,
) -> str:
    """Sentences in random order; the first names the subject, later ones may use a pronoun."""
    sentences = [(rng.choice(fact.relation.statements), fact.value) for fact in facts]
    for _ in range(world.config.distractors):
        template, object_type = rng.choice(r.DISTRACTORS[entity.type])
        sentences.append((template, random_value(world, object_type, rng)))
    rng.shuffle(sentences)
    written = []
    for position, (template, value) in enumerate(sentences):
        subject = entity.mention
        if position and template.startswith("{s}") and rng.random() < 0.5:
            subject = r.PRONOUNS.get(entity.type, "It")
        text = template.format(s=subject, o=value)
        written.append(text[0].upper() + text[1:])
    return " ".join(written)
