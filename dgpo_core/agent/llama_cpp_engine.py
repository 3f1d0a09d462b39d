"""llama.cpp as an engine: a GGUF file on a processor, token ids in and out.

The package xllamacpp has llama.cpp's server, which listens on a port of 127.0.0.1, in this process. This is
the only file that imports it.
"""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig, GenerationConfig

from dgpo_core.agent.engine import Generation, Request, StopCriteria, eos_ids
from dgpo_core.agent.loop import stable_seed
from dgpo_core.agent.vllm_server import ServerSession
from dgpo_core.config.agent import Sampling
from dgpo_core.errors import InfrastructureError, UserError

GGUF_FILE = "model.gguf"
STRIDE = 4  # tokens asked for at a time; not a stream: that withholds tokens which end inside a character
BLOCK = 256  # llama.cpp's contexts are multiples of so many tokens


class LlamaCppEngine:
    """Continues requests with the model of a GGUF file, up to `slots` side by side.

    Keys and values are float32, so greedy tokens are those of transformers where the weights are the same. It
    samples with llama.cpp's own generator. Its log-probabilities are no use to a training: they are those at
    temperature 1, over all rows of the output, and 0 for a token that ends inside a character.
    """

    lane = None

    def __init__(self, folder: Path, tokenizer: Any, longest: int, slots: int = 1) -> None:
        """Load the model.gguf in a folder that `dgpo export` has written.

        `longest`: tokens of the longest prompt with what is generated after it. Raises UserError where
        llama.cpp or the file is missing, or one does not take the other.
        """
        path = folder / GGUF_FILE
        if not path.is_file():
            raise UserError(f"{path}: no such file; `dgpo export MODEL --to gguf --out FOLDER` writes one")
        key = secrets.token_hex()  # nobody else is to use that port
        self._slots, self._server = slots, _start(path, longest, slots, key)
        self._http = httpx.Client(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=None,
        )
        ends = eos_ids(tokenizer, GenerationConfig.from_pretrained(folder))
        self.stop_criteria = StopCriteria(tokenizer, ends, AutoConfig.from_pretrained(folder).vocab_size)

    def session(self, stop: tuple[str, ...]) -> ServerSession:
        return ServerSession(lambda request, sampling: self._generate(request, sampling, stop), self._slots)

    def _generate(self, request: Request, sampling: Sampling, stop: tuple[str, ...]) -> Generation:
        """Continue a request to its end. Raises InfrastructureError, and what `on_token` raises."""
        ids: list[int] = []
        logprobs: list[float] = []
        while True:
            for token, logprob in self._continuation(request, ids, sampling):
                ids.append(token)
                logprobs.append(logprob)
                if request.on_token is not None:
                    request.on_token(token)
                if reason := self.stop_criteria.finish(ids, request.max_new_tokens, stop):
                    return Generation(ids, logprobs, reason)

    def _continuation(
        self, request: Request, ids: list[int], sampling: Sampling
    ) -> Iterator[tuple[int, float]]:
        """Sample what follows the request and its `ids`; what the slot has read already is not read again."""
        answer = self._http.post(
            "/completion",
            json={
                "prompt": [*request.token_ids, *ids],
                "n_predict": STRIDE,
                "temperature": sampling.temperature,
                "samplers": ["temperature"],  # no other rule takes part
                "seed": stable_seed(*request.seed, len(ids)),
                "return_tokens": True,
                "n_probs": 1,
                "logit_bias": [[token, False] for token in self.stop_criteria.unknown],
            },
        ).json()
        if "error" in answer:
            raise InfrastructureError(f"llama.cpp: {answer['error']['message']}")
        known = answer.get("completion_probabilities", [])  # none where all tokens are parts of a character
        for token in answer["tokens"]:
            given = bool(known) and known[0]["id"] == token
            yield token, known.pop(0)["logprob"] if given else 0.0


def _start(path: Path, longest: int, slots: int, key: str) -> Any:
    """Start llama.cpp's server with a model. Raises UserError."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError(
            "this engine needs the package xllamacpp: install the extra llama-cpp "
            "(`pip install -e '.[llama-cpp]'`)"
        ) from None
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_parallel = slots
    settings.n_ctx = slots * BLOCK * (longest // BLOCK + 1)
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.fit_params = settings.warmup = False
    settings.cache_ram_mib = 0  # of prompts that have lost their slot
    settings.verbosity = -1
    settings.api_keys = [key]
    try:
        return xllamacpp.Server(settings)
    except RuntimeError as error:
        raise UserError(f"{path}: llama.cpp cannot load it: {error}") from error
