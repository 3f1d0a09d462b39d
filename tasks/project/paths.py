"""Where the stages put things; dvc.yaml names the same places."""

from pathlib import Path

CORPUS = Path("data/corpus.jsonl")
QUESTIONS = Path("data/questions")
INDEX = Path("data/index")
AUDIT_PAGE = Path("data/audit/index.html")
AUDIT_SUMMARY = Path("data/audit/summary.md")
AUDIT_PASSED = Path("data/audit/passed")  # always the same: what runs a model waits for it
TEACHER_EPISODES = Path("data/teacher/episodes.parquet")
DISTRIBUTIONS = Path("data/distributions")
CORRECT_EPISODES = Path("data/correct/episodes.parquet")
GIVEN = Path("models/given")  # links to the two models that a run starts from, wherever they are
MODELS = Path("models")  # a folder for each: the embedded student and teacher, and every recipe's
EVALUATION = Path("evaluation")
METRICS = Path("metrics")
PLOTS = Path("plots")
PROCESSOR_TIME = PLOTS / "processor_time"  # apart from the curves, which are the same again
REPORTS = Path("reports")
EXTRACTED = Path(".state/documents")  # texts of documents by content: a cache, never needed


def questions_file(name: str, split: str, folder: Path = QUESTIONS) -> Path:
    return folder / name / f"{split}.jsonl"
