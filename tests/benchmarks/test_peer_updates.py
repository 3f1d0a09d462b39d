"""The updates that are timed beside TRL's are the same updates: their gradients agree."""

import random
import shutil
from pathlib import Path

import pytest

from benchmarks import peer_updates
from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner
from tests.conftest import ROOT

P, M, E = Owner.PROMPT, Owner.MODEL, Owner.ENVIRONMENT


def episode(number: int) -> Episode:
    """Return an episode of random tokens with two turns, every third one correct."""
    rng = random.Random(number)
    owners = [P] * rng.randint(3, 9) + [M] * rng.randint(2, 9) + [E] * rng.randint(1, 9) + [M] * 3
    return Episode(
        question_id=str(number // 4), dataset="onehop", question="?", golden_answers=["!"], sample=number % 4,
        token_ids=[rng.randrange(1, 1000) for _ in owners], owners=[int(owner) for owner in owners],
        logprobs=[-1.0 * (owner == M) for owner in owners], response="", prediction=None,
        outcome=Outcome.WRONG if number % 3 else Outcome.CORRECT, ending=Ending.ANSWERED, well_formed=True,
        hit=False, generations=2, invalid_actions=0, cut_turns=0,
    )  # fmt: skip


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where a demo has been: its settings, student and teacher."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "models").mkdir()
    for name, model in (("kd", "student"), ("teacher", "teacher")):
        (tmp_path / "models" / name).symlink_to(ROOT / "models" / model)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("kind", ["GRPO", "KD", "GKD"])
def test_gradients_are_trls(kind: str) -> None:
    pytest.importorskip("trl")
    ours, few, whole = (
        make().gradient() for make in peer_updates.contenders(kind, [episode(i) for i in range(12)]).values()
    )
    assert ours.norm() > 0
    assert (few - whole).norm() < 1e-4 * whole.norm()
    assert (ours - whole).norm() < 1e-4 * whole.norm()
