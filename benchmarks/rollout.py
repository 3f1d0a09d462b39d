"""Time of a decoding step with our cache and with transformers' own: `python -m benchmarks.rollout`.

One line a setting: batch, tokens in the cache, milliseconds a step with each cache, and their ratio.
"""

import time

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from dgpo_core.rollout.cache import preallocated_cache
from dgpo_core.training.models import load_model
from tasks.paths import MODELS

STEPS = 20


@torch.inference_mode()
def step_time(model: PreTrainedModel, cache: Cache, batch: int, tokens: int) -> float:
    """Milliseconds of one decoding step after a prefill of `tokens`."""
    ids = torch.randint(20, 700, (batch, tokens), generator=torch.Generator().manual_seed(0))
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    started = time.perf_counter()
    for _ in range(STEPS):
        model.base_model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    return (time.perf_counter() - started) / STEPS * 1000


def main() -> None:
    model = load_model(str(MODELS / "student"))
    print("batch tokens  preallocated  dynamic  ratio")
    for batch, tokens in ((32, 100), (96, 300), (96, 600)):
        ours = step_time(model, preallocated_cache(model.config, tokens + STEPS), batch, tokens)
        theirs = step_time(model, DynamicCache(config=model.config), batch, tokens)
        print(f"{batch:5d} {tokens:6d} {ours:10.1f} ms {theirs:5.1f} ms {theirs / ours:5.1f}x")


if __name__ == "__main__":
    main()
