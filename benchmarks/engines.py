"""Tokens per second of the engines, in one run: `python -m benchmarks.engines` (where vLLM is installed).

The default is the embedded teacher on a CPU: whole episodes, each engine with the same questions. With
`--shape qwen2.5-0.5b` or `qwen2.5-3b` a model of that shape with random weights is built, for a GPU. It
writes no tags: its turns are of fixed lengths, and random tokens stand for what is retrieved. One line an
engine: seconds to start, generated tokens, seconds, tokens a second, seconds of this process on the CPU
(for machines that do other things too; with VLLM_ENABLE_V1_MULTIPROCESSING=0 vLLM is in this process);
for vLLM also the seconds of a refresh. Fewer episodes: `--episodes 64`; one engine: `--engines vllm`.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dgpo_core.agent.engine import Engine, Request, generate, weights_of
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.agent.vllm_engine import VllmEngine
from dgpo_core.config.agent import GREEDY, ProtocolConfig, RolloutConfig, Sampling, VllmConfig
from dgpo_core.config.data import QuestionCounts, WorldConfig
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.planning.shapes import table
from dgpo_core.retrieval.index import index_passages
from dgpo_core.world.facts import generate_world
from dgpo_core.world.questions import write_articles, write_questions
from tasks.project.paths import MODELS

SHAPES = {"qwen2.5-0.5b": "Qwen2.5-0.5B", "qwen2.5-3b": "Qwen2.5-3B"}  # in the plan's table
VOCABULARY = 151_936
PROMPT, WRITTEN, RETRIEVED, TURNS = 350, 150, 500, 3  # tokens, at real shapes; turns of an episode
TINY = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=64, max_information=320)


def episodes(count: int, tokenizer: Any) -> Callable[[Engine], int]:
    """Return a run of greedy episodes in a small world, which returns how many tokens the model wrote."""
    made = WorldConfig(passages=400, questions=QuestionCounts(train=count, dev=10, test=20, hard=8))
    world = generate_world(made, 7)
    articles = write_articles(world)
    questions = write_questions(world, articles)["onehop", "train"][:count]
    index = index_passages([p for article in articles for p in article.passages], EncoderConfig(kind="bm25"))
    tasks = [Task(question, "onehop", seed=(i,)) for i, question in enumerate(questions)]

    def run(engine: Engine) -> int:
        loop = AgentLoop(engine, tokenizer, index, TINY, 3)
        return sum(episode.model_tokens for episode in loop.run(tasks, GREEDY))

    return run


def turns(count: int) -> Callable[[Engine], int]:
    """Return a run of turns of fixed lengths at temperature 1, all side by side as in the agent loop."""

    def draw(tokens: int) -> list[int]:
        return [rng.randrange(1000, VOCABULARY) for _ in range(tokens)]

    rng = random.Random(0)
    prompts, retrieved = [draw(PROMPT) for _ in range(count)], [draw(RETRIEVED) for _ in range(count)]

    def run(engine: Engine) -> int:
        contexts, written = [list(prompt) for prompt in prompts], 0
        for turn in range(TURNS):
            requests = [Request(ids, WRITTEN, (i, turn)) for i, ids in enumerate(contexts)]
            answers = generate(engine, requests, Sampling(), ())
            written += sum(len(answer.token_ids) for answer in answers)
            contexts = [
                ids + answer.token_ids + more
                for ids, answer, more in zip(contexts, answers, retrieved, strict=True)
            ]
        return written

    return run


def random_model(shape: str, folder: Path) -> None:
    """Write a Qwen2 of that shape, bfloat16, without end-of-text tokens."""
    torch.manual_seed(0)
    values = table()[SHAPES[shape]]["config"] | {"bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(**values)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(str(MODELS / "student")).save_pretrained(folder)


def measure(
    name: str, source: str, run: Callable[[Engine], int], config: RolloutConfig, context: int
) -> None:
    """Print the line of one engine."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.precision)
    engine: Engine
    if name == "vllm":
        engine = VllmEngine(source, tokenizer, config, context)
    else:
        engine = TransformersEngine(load_model(source, device, dtype), tokenizer, config)
    ready = time.perf_counter()
    run(engine)  # the first time kernels are chosen and compiled
    refresh = ""
    if isinstance(engine, VllmEngine):
        weights = weights_of(load_model(source, "cpu", dtype))
        refreshing = time.perf_counter()
        engine.refresh(weights)  # forgets the prefixes of the first time, too
        refresh = f"   refresh {time.perf_counter() - refreshing:.2f} s"
    begun, used = time.perf_counter(), time.process_time()
    tokens = run(engine)
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    print(
        f"{name:13s} start {ready - started:6.1f} s   {tokens:7d} tokens in {seconds:7.2f} s   "
        f"{tokens / seconds:9.0f} tokens/s   CPU {used:7.2f} s{refresh}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--episodes", type=int, default=200)
    engines = ["transformers", "vllm"]
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--memory", type=float, default=0.4, help="share of the memory that vLLM may take")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vllm = VllmConfig(gpu_memory_utilization=chosen.memory, eager=chosen.shape is None)
        config = RolloutConfig(
            precision="bfloat16" if chosen.shape else "float32", vllm=vllm, weights_folder=f"{folder}/weights"
        )
        if chosen.shape:
            random_model(chosen.shape, Path(folder) / "model")
            source, run, context = f"{folder}/model", turns(chosen.episodes), 4096
        else:
            source, context = str(MODELS / "teacher"), TINY.max_context
            run = episodes(chosen.episodes, load_tokenizer(source))
        for name in chosen.engines:
            measure(name, source, run, config, context)


if __name__ == "__main__":
    main()
