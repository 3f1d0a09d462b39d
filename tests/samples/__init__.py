"""Where the sample files are (README.md), and settings that read them."""

from pathlib import Path
from typing import Any

from dgpo_core.config.data import PublishedConfig

SAMPLES = Path(__file__).parent
PASSAGES = 24


def sample_config(**changes: Any) -> PublishedConfig:
    """Make settings that read all sample files, whose counts are not the paper's."""
    settings: dict[str, Any] = {
        "questions": str(SAMPLES / "flashrag"),
        "corpus": str(SAMPLES / "wiki-18.jsonl"),
        "musique": [str(SAMPLES / "musique/musique_ans_v1.0_dev.jsonl")],
        "nq": [str(SAMPLES / "nq/nq-dev-original.jsonl"), str(SAMPLES / "nq/nq-dev-simplified.jsonl")],
        "dev_questions": 2,
        "check_counts": False,
    }
    return PublishedConfig.model_validate(settings | changes)
