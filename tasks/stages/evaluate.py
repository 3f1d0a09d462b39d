"""Stage `evaluate`: run a model on every test set, measure its ARCap and its use of search, and say why its
answers are wrong.

What was trained is also asked training and validation questions: has it learnt by heart?
"""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.agent.answers import contains_answer, token_f1
from dgpo_core.agent.episode import Episode, Outcome, write_episodes
from dgpo_core.agent.loop import AgentLoop, Task, collect, em_of, stable_seed
from dgpo_core.config.agent import GREEDY, Sampling
from dgpo_core.config.params import Params, load_params
from dgpo_core.config.recipes import STUDENT, TEACHER
from dgpo_core.datasets.records import Passage, Question, read_questions
from dgpo_core.evaluation import arcap, diagnosis, search_use
from dgpo_core.evaluation.counterfactuals import counterfactual_em
from dgpo_core.models import load_tokenizer
from dgpo_core.retrieval.shards import read_manifest, read_passages
from tasks.project.paths import EVALUATION, INDEX, QUESTIONS, questions_file
from tasks.stages.inputs import local, model_source, retriever
from tasks.stages.outputs import write_metrics
from tasks.stages.rollouts import agent_loop, split_tasks, tasks_for
from tasks.stages.stage import Run, stage, stage_main
from tasks.tracking.traces import trace_episodes


def evaluate(model: str) -> None:
    """Evaluate one model and write what the report and a promotion read."""
    params = load_params()
    source, out = model_source(params, model), EVALUATION / model
    config = params.sections("evaluate", "protocol", "rollout", "retrieval", "questions") | {"model": source}
    inputs = [INDEX, QUESTIONS, *local(source)]
    with stage(f"evaluate@{model}", config=config, inputs=inputs, outputs=[out]) as run:
        tokenizer = load_tokenizer(source)
        index = retriever(params)
        evaluator = Evaluator(params, agent_loop(params, source, tokenizer, index), run)
        episodes = evaluator.test_sets()
        rows = evaluator.arcap(episodes)
        counts = search_use.use_of_search(episodes, evaluator.asked(), tokenizer.decode)
        counts += evaluator.counterfactuals(episodes)
        folder = run.output(out)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(question_table(episodes), folder / "questions.parquet", compression="zstd")
        write_episodes(folder / "episodes.parquet", episodes, {"index": index.digest})
        pq.write_table(arcap.as_table(rows), folder / "arcap.parquet", compression="zstd")
        pq.write_table(search_use.as_table(counts), folder / "search_use.parquet", compression="zstd")
        if model not in (STUDENT, TEACHER):
            pq.write_table(evaluator.splits(), folder / "splits.parquet", compression="zstd")
        diagnoses = diagnosis.diagnose(episodes, evaluator.asked(), tokenizer.decode)
        pq.write_table(diagnoses, folder / "diagnosis.parquet", compression="zstd")
        write_metrics(run, summarize(params, episodes))
        trace_episodes(run, episodes, tokenizer.decode, params.evaluate.trace_episodes)


class Evaluator:
    """Runs the test sets and ARCap's extra episodes, all through the same loop."""

    def __init__(self, params: Params, loop: AgentLoop, run: Run) -> None:
        self._params, self._loop, self._run = params, loop, run

    def questions(self, dataset: str) -> list[Question]:
        """Read as many questions of a test set as are asked."""
        return read_questions(questions_file(dataset, "test"))[: self._params.evaluate.questions]

    def asked(self) -> dict[tuple[str, str], Question]:
        """Return every test question by data set and id."""
        return {(name, q.id): q for name in self._params.questions.test for q in self.questions(name)}

    def tasks(self) -> list[Task]:
        """Return a task for every test question."""
        return [
            task
            for name in self._params.questions.test
            for task in tasks_for(name, self.questions(name), self._params.evaluate.seed)
        ]

    def test_sets(self) -> list[Episode]:
        """Run an episode for every test question."""
        return self._collect(self.tasks(), "test")

    def splits(self) -> pa.Table:
        """Return greedy EM on training and on validation questions, a row a question."""
        params, rows = self._params, []
        each = max(1, params.evaluate.split_questions // len(params.questions.train))
        for split in ("train", "dev"):
            tasks = split_tasks(params, split, params.evaluate.seed, each)
            rows += [
                {"split": split, "dataset": e.dataset, "question_id": e.question_id}
                | {"em": e.correct, "failed": e.outcome is Outcome.FAILED}
                for e in self._collect(tasks, split, sampling=GREEDY)
            ]
        return pa.Table.from_pylist(rows)

    def arcap(self, episodes: list[Episode]) -> list[arcap.ArcapValue]:
        """Measure everything for which a test set plays the part."""
        rows: list[arcap.ArcapValue] = []
        for role in ("nq", "musique"):
            dataset = self._params.questions.playing(role)
            if dataset is None:
                continue
            own = [episode for episode in episodes if episode.dataset == dataset]
            rows += arcap.source_referencing(
                role,
                dataset,
                self.questions(dataset),
                self._params.evaluate.seed,
                self._collect,
                self._params.protocol.documents,
            )
            if role == "nq":
                rows += arcap.query_rewriting(role, own)
            rows += arcap.thinking(role, own)
        return rows

    def counterfactuals(self, episodes: list[Episode]) -> list[search_use.Count]:
        """Ask the first questions of each test set again, with other passages than the retriever's."""
        config, places = self._params.evaluate, Counter[str]()
        asked = []
        for task, episode in zip(self.tasks(), episodes, strict=True):
            places[task.dataset] += 1
            if places[task.dataset] <= config.counterfactual_questions:
                asked.append((task, episode))

        def run(tasks: list[Task], name: str) -> list[Episode]:
            # which questions these are depends on the episodes, and a failed one may be another next time
            ids = [(task.dataset, task.question.id) for task in tasks]
            return self._collect(tasks, name, f"{name}-{stable_seed(*ids):08x}")

        return counterfactual_em(asked, corpus_sample(), self._params.retrieval.top_k, config.seed, run)

    def _collect(
        self, tasks: list[Task], name: str, state: str = "", sampling: Sampling | None = None
    ) -> list[Episode]:
        config = self._params.evaluate
        return collect(
            self._loop,
            tasks,
            sampling or config.sampling,
            config.chunk,
            self._run.state / (state or name),
            lambda done, total, em: self._run.progress(done, total, part=name, em=em),
        )


def corpus_sample() -> list[Passage]:
    """Return the passages of the index's first shard; none where a service has the index."""
    shards = read_manifest(INDEX).shards
    return read_passages(INDEX / shards[0]) if shards else []


def summarize(params: Params, episodes: list[Episode]) -> dict[str, float]:
    """Return EM of each test set, their average, and how many episodes failed."""
    summary: dict[str, float] = {
        name: em_of([e for e in episodes if e.dataset == name]) for name in params.questions.test
    }
    summary["average"] = sum(summary.values()) / len(summary)
    summary["failed"] = sum(e.outcome is Outcome.FAILED for e in episodes)
    return summary


def question_table(episodes: list[Episode]) -> pa.Table:
    """Return one row of metrics an episode, in order: the columns that reports and paired tests read."""
    return pa.Table.from_pylist([_question_row(episode) for episode in episodes])


def _question_row(episode: Episode) -> dict[str, object]:
    return {
        "dataset": episode.dataset,
        "question_id": episode.question_id,
        "question": episode.question,
        "golden_answers": episode.golden_answers,
        "prediction": episode.prediction,
        "outcome": str(episode.outcome),
        "em": episode.correct,
        "f1": token_f1(episode.prediction, episode.golden_answers),
        "sub_em": contains_answer(episode.prediction, episode.golden_answers),
        "hit": episode.hit,
        "searches": len(episode.searches),
        "generations": episode.generations,
        "well_formed": episode.well_formed,
        "invalid_actions": episode.invalid_actions,
        "cut_turns": episode.cut_turns,
        "ending": str(episode.ending),
        "model_tokens": episode.model_tokens,
    }


if __name__ == "__main__":
    stage_main("evaluate", evaluate, "model")
