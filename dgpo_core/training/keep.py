"""Which of the teacher's episodes a distillation learns from (docs/method.md, "Recipes")."""

from dgpo_core.agent.episode import Episode
from dgpo_core.config.recipes import Keep


def keeps(rule: Keep, episode: Episode) -> bool:
    """Return whether the rule keeps an episode.

    correct: the paper's. searched: correct, and not from memory (always search: Liu et al., 2026). evidence:
    correct, and a retrieved passage has a golden answer: what was guessed is not imitated.
    """
    return rule == "all" or (
        episode.correct
        and (rule != "searched" or bool(episode.searches))
        and (rule != "evidence" or episode.hit)
    )
