"""Stage `data`: write corpus and questions, of the embedded world, the published data sets or own files."""

from collections.abc import Mapping

from dgpo_core.config.params import Params, load_params
from dgpo_core.datasets.documents import find_documents, read_documents
from dgpo_core.datasets.published import SETTING, fetch, fetch_questions, load_questions, write_corpus
from dgpo_core.datasets.question_sets import find_question_files, load_question_sets
from dgpo_core.datasets.records import Question, write_jsonl
from dgpo_core.world.facts import generate_world
from dgpo_core.world.questions import write_articles, write_questions
from tasks.project.paths import CORPUS, EXTRACTED, QUESTIONS, questions_file
from tasks.stages.outputs import write_metrics
from tasks.stages.stage import Run, stage, stage_main

Splits = dict[tuple[str, str], list[Question]]  # (set, split)


def generate() -> None:
    params = load_params()
    sources = {"world": write_world, "published": write_published, "files": write_files}
    sources[params.data.source](params)


def write_world(params: Params) -> None:
    with stage("data", config=params.world.model_dump(), inputs=[], outputs=[CORPUS, QUESTIONS]) as run:
        world = generate_world(params.world, params.world.seed)
        articles = write_articles(world)
        questions = write_questions(world, articles)
        passages = [passage for article in articles for passage in article.passages]
        write_jsonl(run.output(CORPUS), passages)
        write_splits(run, questions)
        counts = {"passages": len(passages), "articles": len(articles), "facts": len(world.facts)}
        summarize(run, counts, questions, sources={})


def write_published(params: Params) -> None:
    config = params.data.published
    question_files = fetch_questions(config, params.questions)
    corpus = fetch(config.corpus, f"{SETTING}.corpus")
    files = {**question_files.named, "corpus": corpus}
    settings = {"data": config.model_dump(), "questions": params.questions.model_dump()}
    inputs = [file.path for file in files.values()]
    with stage("data", config=settings, inputs=inputs, outputs=[CORPUS, QUESTIONS]) as run:
        questions, counts = load_questions(config, question_files)  # it takes seconds, the corpus minutes
        passages = write_corpus(
            config,
            corpus,
            run.output(CORPUS),
            lambda done, total: run.progress(done, total, unit="passages"),
        )
        write_splits(run, questions)
        sources = {f"source {name}": file.origin for name, file in files.items()}
        summarize(run, {"passages": passages, **counts}, questions, sources)


def write_files(params: Params) -> None:
    config = params.data.files
    documents = find_documents(config.corpus)
    files = find_question_files(config.questions, params.questions)
    settings = {"data": config.model_dump(), "questions": params.questions.model_dump()}
    inputs = [*documents, *dict.fromkeys(path for paths in files.values() for path in paths)]
    with stage("data", config=settings, inputs=inputs, outputs=[CORPUS, QUESTIONS]) as run:
        questions, told = load_question_sets(config.questions, params.questions, files)
        reading = read_documents(
            documents,
            config.passage_words,
            EXTRACTED,
            lambda done, total: run.progress(done, total, unit="files"),
        )
        write_jsonl(run.output(CORPUS), reading.passages)
        write_splits(run, questions)
        for remark in (*told, *reading.remarks):
            print(remark, flush=True)
        unread = {f"not read {place}": why for place, why in reading.unread.items()}
        summarize(run, reading.counts, questions, unread)


def write_splits(run: Run, questions: Splits) -> None:
    folder = run.output(QUESTIONS)
    for number, ((name, split), items) in enumerate(questions.items(), 1):
        write_jsonl(questions_file(name, split, folder), items)
        run.progress(number, len(questions))


def summarize(run: Run, counts: Mapping[str, float], questions: Splits, sources: dict[str, str]) -> None:
    """Write the stage's metrics: `counts`, the questions of each split, and what is known of the sources."""
    summary: dict[str, object] = {**counts}
    summary |= {f"{name}_{split}": len(items) for (name, split), items in questions.items()}
    write_metrics(run, summary | sources)


if __name__ == "__main__":
    stage_main("data", generate)
