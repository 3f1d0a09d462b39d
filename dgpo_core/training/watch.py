"""What trainings are watched for: numbers that are none, and collapse (`watch` in params.yaml).

A healthy training is not changed by it. What is done is decided by the rows of metrics alone, so that a
training that was killed decides as one that was not.

Collapse is measured by means over the last `window` steps with an EM, against those at the best mean EM so
far: EM itself, and what drifts when a policy collapses (`BOUNDS`). A training that has never reached
NEAR_ZERO has nothing to lose. The bounds are ours, and wide: in the trainings of results/ that learned, all
of them stable, the means stayed within 0.93 to 1.09 times the searches at the best EM, 0.93 to 1.07 times the
tokens, 0.57 to 1.18 times the entropy, up to 2.04 times the KL, and 0.1 invalid actions above.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from dgpo_core.agent.episode import Episode, write_episodes
from dgpo_core.config.training import WatchConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.files import replacement
from dgpo_core.training.episode_sources import Metrics
from dgpo_core.training.parallel import leads

BAD = "bad_step"  # a row's column, where the step was dropped
NEAR_ZERO = 0.05  # EM
BOUNDS: dict[str, tuple[str, Callable[[float], tuple[float, float]]]] = {  # column, mean at best EM -> bounds
    "em": ("em", lambda best: (best / 2, inf)),
    "searches": ("searches", lambda best: (best / 2, 2 * best + 1)),
    "invalid_actions": ("invalid_actions", lambda best: (-inf, best + 0.25)),
    "response_tokens": ("response_tokens", lambda best: (best / 2, 2 * best)),
    "entropy": ("entropy", lambda best: (best / 4, 4 * best + 0.5)),
    "kl": ("kl_inside", lambda best: (-inf, 4 * max(best, 0.0) + 0.1)),
}
REPETITION = "repetition"  # a row has it where it is degenerate (`episode_metrics`)


@dataclass(frozen=True)
class Watch:
    """Watches one training; the episodes of dropped steps go to `folder`, if there is one."""

    config: WatchConfig = field(default_factory=WatchConfig)
    folder: Path | None = None

    def kept(self, step: int) -> Path | None:
        """Return where the episodes of a dropped step are kept, for inspection."""
        return self.folder and self.folder / f"step-{step:06d}.parquet"

    def drop(self, rows: Sequence[Metrics], episodes: list[Episode], error: NotFinite) -> Metrics:
        """Drop the step after `rows`: keep its episodes and the reason, and return its row.

        Raise the error where it is the last of `max_bad_steps` in a row.
        """
        if (path := self.kept(len(rows) + 1)) and leads():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacement(path) as part:
                write_episodes(part, episodes, {"reason": str(error)})
        before = rows[len(rows) - self.config.max_bad_steps + 1 :]
        if len(rows) + 1 >= self.config.max_bad_steps and all(BAD in row for row in before):
            raise error
        return {"episodes": float(len(episodes)), BAD: 1.0}

    def alarms(self, rows: Sequence[Metrics]) -> dict[str, str]:
        """Return what is beyond its bounds after these steps, each with what happened to it."""
        window = self.config.window
        learned = [row for row in rows if "em" in row]
        if len(learned) < window:
            return {}
        means = [_mean(learned[end - window : end], "em") or 0.0 for end in range(window, len(learned) + 1)]
        place = means.index(max(means))
        if means[place] < NEAR_ZERO:
            return {}
        best, now = learned[place : place + window], learned[-window:]
        found = {}
        for figure, (column, bounds) in BOUNDS.items():
            at_best, lately = _mean(best, column), _mean(now, column)
            if at_best is not None and lately is not None:
                low, high = bounds(at_best)
                if not low <= lately <= high:
                    found[figure] = f"{column} {at_best:.3g} -> {lately:.3g}"
        if all(REPETITION in row for row in now):
            found[REPETITION] = f"{_mean(now, REPETITION):.0%} of what it writes is repeated"
        wanted = {figure: said for figure, said in found.items() if self._action(figure) != "ignore"}
        best_step = int(best[-1]["step"])
        return {figure: f"{said} since step {best_step}, of best EM" for figure, said in wanted.items()}

    def new_alarms(self, rows: Sequence[Metrics]) -> dict[str, str]:
        """Return the alarms that the last step has raised."""
        before = self.alarms(rows[:-1])
        return {figure: said for figure, said in self.alarms(rows).items() if figure not in before}

    def rolls_back(self, rows: Sequence[Metrics]) -> bool:
        """Return whether training ends here with the best validated model.

        Raise UserError where it stops instead.
        """
        found = self.alarms(rows)
        stopping = [figure for figure in found if self._action(figure) == "stop"]
        rolling = [figure for figure in found if self._action(figure) == "roll_back"]
        if rolling and not any("dev_em" in row for row in rows):
            stopping += rolling  # no model was validated before
        if stopping:
            raise UserError(
                f"collapsed at step {len(rows)}: {'; '.join(found.values())}. Change what makes it collapse; "
                f"or set watch.{stopping[0]}: warn, and it goes on from its checkpoint"
            )
        return bool(rolling)

    @property
    def may_roll_back(self) -> bool:
        """Return whether the best validated model must be kept."""
        return any(self._action(figure) == "roll_back" for figure in (*BOUNDS, REPETITION))

    def _action(self, figure: str) -> str:
        return str(getattr(self.config, figure))


def _mean(rows: Sequence[Mapping[str, float]], column: str) -> float | None:
    values = [row[column] for row in rows if column in row]
    return sum(values) / len(values) if values else None
