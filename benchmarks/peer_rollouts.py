"""Episodes a second beside the field's loops, for `make bench`.

The same model, questions, retriever, turns and limits. Before anything is timed, greedy episodes are compared
with those of Search-R1's loop: they must be the same texts.
"""

from collections.abc import Callable
from functools import partial

from benchmarks.alternation import Rounds, alternate
from benchmarks.peer_loops import BatchLoop, TrlLoop
from dgpo_core.agent.loop import AgentLoop
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY
from dgpo_core.config.params import load_params
from dgpo_core.models import load_model, load_tokenizer
from tasks.stages.inputs import retriever
from tasks.stages.rollouts import split_tasks


def compare(source: str, episodes: int, rounds: int) -> tuple[Rounds, float]:
    """Time all loops on `episodes` training questions.

    Return the times, and the share of greedy episodes that are the same as those of Search-R1's loop.
    """
    params, tokenizer, index = load_params(), load_tokenizer(source), retriever(load_params())
    config, top_k, sampling = params.protocol, params.retrieval.top_k, params.reinforce.sampling
    tasks = split_tasks(params, "train", 0)
    tasks = tasks[:: max(1, len(tasks) // episodes)][:episodes]
    questions = [task.question.question for task in tasks]
    ours = AgentLoop(
        TransformersEngine(load_model(source), tokenizer, params.rollout), tokenizer, index, config, top_k
    )
    plain = BatchLoop(load_model(source), tokenizer, index, config, top_k)
    kinder = BatchLoop(load_model(source), tokenizer, index, config, top_k, stops=True)
    trl = TrlLoop(load_model(source), tokenizer, index, config, top_k, sampling.temperature)
    pairs = zip(ours.run(tasks, GREEDY), plain.run(questions, GREEDY), strict=True)
    same = sum(tokenizer.decode(episode.token_ids) == text for episode, text in pairs) / len(tasks)
    contenders: dict[str, Callable[[], object]] = {
        "ours": partial(ours.run, tasks, sampling),
        "Search-R1's loop": partial(plain.run, questions, sampling),
        "Search-R1's loop, stopped at tags": partial(kinder.run, questions, sampling),
        "TRL's GRPOTrainer": partial(trl.run, questions),
    }
    name = f"rollouts of {len(tasks)} questions"
    return alternate(name, contenders, rounds, len(tasks), "episode"), same
