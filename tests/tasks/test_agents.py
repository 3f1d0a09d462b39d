"""What training stages tell while they run."""

from typing import Any, cast

from tasks.agents import reporter
from tasks.stage import Run


class Recorder:
    def __init__(self) -> None:
        self.shown: list[tuple[float, float, dict[str, Any]]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def progress(self, done: float, total: float, **values: Any) -> None:
        self.shown.append((done, total, values))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))


def test_a_resumed_stage_shows_its_last_look_and_none_before_the_first() -> None:
    run = Recorder()
    report = reporter(cast(Run, run), ("em", "kl_inside"))
    report(9, [{"step": 1, "em": 0.5, "reward": 0.4}])
    report(9, [{"step": 1, "dev_em": 0.3}, {"step": 2, "em": 0.6, "kl_inside": 0.1}])
    assert run.shown == [(1, 9, {"em": 0.5}), (2, 9, {"em": 0.6, "kl_inside": 0.1, "dev_em": 0.3})]
    assert run.logged == [(1, {"em": 0.5, "reward": 0.4}), (2, {"em": 0.6, "kl_inside": 0.1})]
