"""The table of dropped episodes."""

import csv
from dataclasses import replace
from pathlib import Path

from dgpo_core.agent.episode import write_episodes
from tasks.project.paths import TEACHER_EPISODES
from tasks.stages.filter import AUDIT, filter_episodes
from tests.dgpo_core.making import random_episode
from tests.tasks.miniature import make_project


def test_reasons_and_names_with_commas_are_one_column(workplace: Path) -> None:
    make_project(workplace)
    TEACHER_EPISODES.parent.mkdir(parents=True)
    wrong = replace(random_episode(2, correct=False), prediction="y", hit=True, dataset='trivia, "quoted"')
    write_episodes(TEACHER_EPISODES, [random_episode(1, correct=True), wrong, wrong], {})
    filter_episodes()
    assert list(csv.reader(AUDIT.open(newline=""))) == [
        ["data set", "reason", "episodes"],
        ["onehop", "kept", "1"],
        ['trivia, "quoted"', "wrong answer, evidence found", "2"],
    ]
