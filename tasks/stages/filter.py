"""Stage `filter`: keep the teacher's correct episodes, and say what was dropped and why."""

from collections import Counter
from pathlib import Path

from dgpo_core.agent.episode import Ending, Episode, Outcome, read_episodes, read_metadata, write_episodes
from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import Keep
from dgpo_core.training.keep import keeps
from tasks.project.paths import CORRECT_EPISODES, TEACHER_EPISODES
from tasks.stages.inputs import require_episodes
from tasks.stages.outputs import write_csv, write_metrics
from tasks.stages.stage import stage, stage_main

AUDIT = Path("data/correct/audit.csv")
NO_TEACHER = (
    "where no teacher knows the protocol, take a scripted expert (teach.policy: expert), or a larger model "
    "behind an endpoint (models.teacher: openai:<model>@<base URL>); docs/data.md, No teacher yet"
)
STRICTER: tuple[Keep, ...] = ("searched", "evidence")  # than correct


def reason(episode: Episode) -> str:
    """Return which rules of `keep` a correct episode meets, or the first thing that is wrong with it."""
    if episode.outcome is Outcome.CORRECT:
        if episode.hit:
            return "kept, evidence found"
        return "kept, evidence not found" if episode.searches else "kept, no search"
    if episode.outcome is Outcome.FAILED:
        return "infrastructure failed"
    if episode.ending is Ending.LENGTH:
        return "no room in the context"
    if episode.prediction is None:
        return "no answer"
    return "wrong answer, evidence found" if episode.hit else "wrong answer, evidence not found"


def audit(episodes: list[Episode]) -> dict[tuple[str, str], int]:
    """Count episodes by (data set, reason), most frequent first."""
    return dict(Counter((e.dataset, reason(e)) for e in episodes).most_common())


def filter_episodes() -> None:
    """Write the correct episodes, and an audit of all."""
    load_params()  # a broken params.yaml stops every stage
    with stage("filter", config={}, inputs=[TEACHER_EPISODES], outputs=[CORRECT_EPISODES, AUDIT]) as run:
        episodes = read_episodes(TEACHER_EPISODES)
        kept = [episode for episode in episodes if episode.correct]
        require_episodes(len(kept), f"correct teacher episodes in {TEACHER_EPISODES}", NO_TEACHER)
        write_episodes(run.output(CORRECT_EPISODES), kept, read_metadata(TEACHER_EPISODES))
        counts = audit(episodes)
        table = [[dataset, why, count] for (dataset, why), count in sorted(counts.items())]
        write_csv(run.output(AUDIT), [["data set", "reason", "episodes"], *table])
        summary: dict[str, float] = {"raw": len(episodes), "kept": len(kept)}
        for rule in STRICTER:
            summary[f"kept_{rule}"] = sum(keeps(rule, episode) for episode in kept)
        for (_, why), count in counts.items():
            if not why.startswith("kept"):
                key = why.replace(",", "").replace(" ", "_")
                summary[key] = summary.get(key, 0) + count
        write_metrics(run, summary)


if __name__ == "__main__":
    stage_main("filter", filter_episodes)
