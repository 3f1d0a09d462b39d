"""Where the stages put things; dvc.yaml names the same places."""

from pathlib import Path

CORPUS = Path("data/corpus.jsonl")
QUESTIONS = Path("data/questions")
INDEX = Path("data/index")
TEACHER_EPISODES = Path("data/teacher/episodes.parquet")
CORRECT_EPISODES = Path("data/correct/episodes.parquet")
BASE_MODELS = Path("models/base")
RECIPES = Path("models/recipes")
EVALUATION = Path("evaluation")
METRICS = Path("metrics")
PLOTS = Path("plots")
REPORTS = Path("reports")


def questions_file(name: str, split: str) -> Path:
    return QUESTIONS / name / f"{split}.jsonl"


def cold_start_model(cold_start: str) -> Path:
    """What the distill stage writes: the model that `kd` alone is, and that RL starts from."""
    return RECIPES / cold_start
