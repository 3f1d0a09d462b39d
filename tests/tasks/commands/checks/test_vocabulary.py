"""What `dgpo doctor` finds of the tokenizers."""

from pathlib import Path

from dgpo_core.config.params import load_params
from tasks.commands.checks.vocabulary import vocabulary
from tests.tasks.commands.test_preflight import other_vocabulary
from tests.tasks.miniature import make_project


def test_tokenizers_of_two_families_are_found_before_a_run(workplace: Path) -> None:
    make_project(workplace)
    (same,) = vocabulary(load_params())
    assert same.level == "ok"
    other_vocabulary(workplace)
    (differ,) = vocabulary(load_params())
    assert differ.level == "error" and "different tokenizers" in differ.message
    assert "models.student" in differ.advice
