"""What generation gains by our cache, with the model in `models/student`: `python -m benchmarks.rollout`.

First a decoding step with our cache and with transformers' own: batch, tokens in the cache, milliseconds with
each, and their ratio. Then episodes of several turns, whose keys and values are kept from turn to turn or
computed again (`rollout.kept_tokens: 0`): tokens that the environment appends to a turn, seconds, ratio.
"""

import random
import time

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from dgpo_core.agent.engine import EpisodeCache, Request
from dgpo_core.agent.transformers_engine import TransformersEngine, preallocated_cache
from dgpo_core.config.agent import RolloutConfig, Sampling
from dgpo_core.models import load_model, load_tokenizer
from tasks.project.paths import MODELS

STEPS = 20
EPISODES, TURNS, PROMPT, WRITTEN = 128, 5, 32, 64  # as the untrained student's of `tiny`, who never answers
ROUNDS = 3


@torch.inference_mode()
def step_time(model: PreTrainedModel, cache: Cache, batch: int, tokens: int) -> float:
    """Measure the milliseconds of one decoding step after a prefill of `tokens`."""
    ids = torch.randint(20, 700, (batch, tokens), generator=torch.Generator().manual_seed(0))
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    started = time.perf_counter()
    for _ in range(STEPS):
        model.base_model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    return (time.perf_counter() - started) / STEPS * 1000


def episodes_time(engine: TransformersEngine, appended: int, episodes: int = EPISODES) -> float:
    """Measure the seconds of a batch of episodes whose turns all have the same number of tokens."""
    rng = random.Random(0)

    def words(count: int) -> list[int]:
        return [rng.randrange(20, 700) for _ in range(count)]

    histories, caches = [words(PROMPT) for _ in range(episodes)], [EpisodeCache() for _ in range(episodes)]
    started = time.perf_counter()
    for turn in range(TURNS):
        asked = [
            Request(list(history), WRITTEN, (place, turn), cache)
            for place, (history, cache) in enumerate(zip(histories, caches, strict=True))
        ]
        for history, answer in zip(histories, engine.generate(asked, Sampling(), ()), strict=True):
            history += answer.token_ids + words(appended)
    return time.perf_counter() - started


def main() -> None:
    source = str(MODELS / "student")
    model, tokenizer = load_model(source), load_tokenizer(source)
    print("batch tokens  preallocated  dynamic  ratio")
    for batch, tokens in ((32, 100), (96, 300), (96, 600)):
        ours = step_time(model, preallocated_cache(model.config, tokens + STEPS), batch, tokens)
        theirs = step_time(model, DynamicCache(config=model.config), batch, tokens)
        print(f"{batch:5d} {tokens:6d} {ours:10.1f} ms {theirs:5.1f} ms {theirs / ours:5.1f}x")
    configs = [RolloutConfig(precision="float32", kept_tokens=tokens) for tokens in (262_144, 0)]
    kept, again = (TransformersEngine(model, tokenizer, config) for config in configs)
    print("appended   kept  again  ratio")
    for appended in (52, 160):
        rounds = [(episodes_time(kept, appended), episodes_time(again, appended)) for _ in range(ROUNDS)]
        ours, theirs = (min(times) for times in zip(*rounds, strict=True))
        print(f"{appended:8d} {ours:5.1f} s {theirs:4.1f} s {theirs / ours:5.1f}x")


if __name__ == "__main__":
    main()
