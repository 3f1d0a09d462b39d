"""A model's weights in a folder, for an engine to read them from.

What vLLM is asked and how its answers are read, in this process or over HTTP (no vllm import).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from dgpo_core.agent.engine import Endings, Finish, Generation, Request, Weights, end_tokens
from dgpo_core.agent.loop import stable_seed
from dgpo_core.config.agent import RolloutConfig, Sampling
from dgpo_core.errors import InfrastructureError
from dgpo_core.temporary import temporary_folder


@contextmanager
def weights_in_folder(weights: Weights, config: RolloutConfig) -> Iterator[str]:
    """A folder of our own below `weights_folder`, by its absolute path; tensors in `rollout.precision`."""
    home = Path(config.weights_folder).resolve()
    home.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.precision)
    with temporary_folder("weights", home) as folder:
        folder.chmod(0o755)  # a server may run as another user
        # copies: a tied head and its embedding share memory, which the format does not have
        tensors = {
            name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in weights()
        }
        save_file(tensors, folder / "model.safetensors")
        yield str(folder)


# Log-probabilities at the sampling temperature, as the loop records them; vLLM's default is raw ones.
LOGPROBS_MODE = "processed_logprobs"
NEVER = -1e9  # added to a logit: no probability, whatever the logit is


def endings_of(source: str, tokenizer: Any) -> Endings:
    """How generations of the model in a folder or on the hub end."""
    config = AutoConfig.from_pretrained(source)
    try:
        settings = GenerationConfig.from_pretrained(source)
    except OSError:  # a model without generation_config.json
        settings = GenerationConfig.from_model_config(config)
    return Endings(tokenizer, end_tokens(tokenizer, settings), config.get_text_config().vocab_size)


def sampling_fields(
    request: Request, sampling: Sampling, stop: tuple[str, ...], endings: Endings
) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams; none is left to defaults that a model's folder may set.

    A request has its own random numbers. So it samples the same whatever shares its batch, but for rounding:
    other batches may add up in another order, which changes a token where two are about equally likely.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "seed": stable_seed(*request.seed),
        "max_tokens": request.max_new_tokens,
        "stop": list(stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": sorted(endings.eos),
        # vLLM takes at most 1,024 ids here, and no more as allowed ones
        "logit_bias": dict.fromkeys(endings.unknown, NEVER) or None,
        "skip_special_tokens": False,  # a tag may be a special token
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # of the sampled token only
    }


def read_generation(
    request: Request,
    ids: list[int],
    logprobs: list[float],
    reason: str | None,
    endings: Endings,
    stop: tuple[str, ...],
) -> Generation:
    """The sampled tokens up to the one that ended the generation.

    vLLM looks for stop strings in text that it decodes as tokens arrive, and holds back a character of which
    bytes are missing: tokens behind a stop string are cut off here.

    Raises InfrastructureError for a broken answer.
    """
    if reason not in ("stop", "length") or not ids or len(ids) != len(logprobs):
        raise InfrastructureError(
            f"vLLM ended a request with {reason!r}: {len(ids)} tokens, {len(logprobs)} log-probabilities"
        )
    count, finish = endings.first(ids, request.max_new_tokens, stop)
    if finish is None:
        finish = Finish.LENGTH if reason == "length" else Finish.STOP
    return Generation(ids[:count], logprobs[:count], finish)


def require_version(found: Sequence[str], expected: str) -> None:
    """Raises InfrastructureError when tokens were sampled with other weights than the last refresh's."""
    if strange := sorted(set(found) - {expected}):
        raise InfrastructureError(
            f"vLLM sampled with weights {', '.join(strange)} instead of {expected}: it was started again, or "
            "another stage uses it"
        )
