"""Stage `data`: write the embedded world's corpus and questions in the published formats."""

from dgpo_core.config.params import load_params
from dgpo_core.datasets.records import write_jsonl
from dgpo_core.datasets.world.articles import write_articles
from dgpo_core.datasets.world.generate import generate_world
from dgpo_core.datasets.world.questions import write_questions
from tasks.agents import write_metrics
from tasks.paths import CORPUS, METRICS, QUESTIONS, questions_file
from tasks.stage import main, stage


def generate() -> None:
    params = load_params()
    with stage("data", config=params.world.model_dump(), inputs=[], outputs=[CORPUS, QUESTIONS]) as run:
        world = generate_world(params.world, params.world.seed)
        articles = write_articles(world)
        questions = write_questions(world, articles)
        passages = [passage for article in articles for passage in article.passages]
        write_jsonl(CORPUS, passages)
        for number, ((name, split), items) in enumerate(questions.items(), 1):
            write_jsonl(questions_file(name, split), items)
            run.progress(number, len(questions))
        summary = {"passages": len(passages), "articles": len(articles), "facts": len(world.facts)}
        summary |= {f"{name}_{split}": len(items) for (name, split), items in questions.items()}
        write_metrics(METRICS / "data.json", summary)
        run.summary(summary)


if __name__ == "__main__":
    main(generate)
