"""The table of dropped episodes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

from dgpo_core.agent.episode import Search, write_episodes
from tasks.project.paths import TEACHER_EPISODES
from tasks.stages.filter import AUDIT, filter_episodes
from tests.dgpo_core.making import random_episode
from tests.tasks.miniature import make_project


def test_reasons_and_names_with_commas_are_one_column(workplace: Path) -> None:
    make_project(workplace)
    TEACHER_EPISODES.parent.mkdir(parents=True)
    wrong = replace(random_episode(2, correct=False), prediction="y", hit=True, dataset='trivia, "quoted"')
    right, searches = random_episode(1, correct=True), [Search("q", ["p"], [1.0])]
    found = [replace(right, searches=searches, hit=True)]
    write_episodes(TEACHER_EPISODES, [right, replace(right, searches=searches), *found, wrong, wrong], {})
    filter_episodes()
    assert list(csv.reader(AUDIT.open(newline=""))) == [
        ["data set", "reason", "episodes"],
        ["onehop", "kept, evidence found", "1"],
        ["onehop", "kept, evidence not found", "1"],
        ["onehop", "kept, no search", "1"],
        ['trivia, "quoted"', "wrong answer, evidence found", "2"],
    ]
    summary = json.loads(Path("metrics/filter.json").read_text())
    assert [summary[key] for key in ("raw", "kept", "kept_searched", "kept_evidence")] == [5, 3, 2, 1]
