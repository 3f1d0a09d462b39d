"""Batched generation with plain transformers: the default engine, on CPU or GPU."""

import contextlib
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dgpo_core.config.protocol import Sampling
from dgpo_core.config.rollout import RolloutConfig
from dgpo_core.rollout.cache import preallocated_cache
from dgpo_core.rollout.endings import Endings, end_tokens
from dgpo_core.rollout.engine import Finish, Generation, Request

COMPACT = 0.7  # share of unfinished rows below which the finished ones are taken out of the cache


class TransformersEngine:
    """Left-padded batches of requests of similar length, cut by padded tokens.

    Sampling draws one uniform number a token from a stream that belongs to the request, so what an episode
    samples does not depend on which other episodes share its batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: RolloutConfig) -> None:
        self.model, self.tokenizer, self._config = model, tokenizer, config
        vocabulary = model.config.get_text_config().vocab_size
        self.endings = Endings(tokenizer, end_tokens(tokenizer, model.generation_config), vocabulary)

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
    ) -> list[Generation]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
        answers: dict[int, Generation] = {}
        with self._precision():
            for batch in self._batches(requests, order):
                batch_requests = [requests[i] for i in batch]
                answers.update(zip(batch, self._run(batch_requests, sampling, stop), strict=True))
        return [answers[i] for i in range(len(requests))]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def _batches(self, requests: list[Request], order: list[int]) -> list[list[int]]:
        """Groups of similar length whose padded tokens, with what may be generated, stay in the limit."""
        batches: list[list[int]] = []
        longest = 0
        for i in order:
            longest = max(longest, len(requests[i].token_ids) + requests[i].max_new_tokens)
            if not batches or longest * (len(batches[-1]) + 1) > self._config.batch_tokens:
                batches.append([])
                longest = len(requests[i].token_ids) + requests[i].max_new_tokens
            batches[-1].append(i)
        return batches

    def _run(self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]) -> list[Generation]:
        """Prefill, then one token a step; rows that are finished leave the batch many at a time."""
        device = self.model.device
        rows = [_Row(request, sampling) for request in requests]
        ids, mask = _left_pad([row.request.token_ids for row in rows], device)
        capacity = ids.shape[1] + max(request.max_new_tokens for request in requests)
        cache = preallocated_cache(self.model.config, capacity)
        batch = rows  # the rows in the cache
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        while True:
            hidden = self.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            logits = self.model.get_output_embeddings()(hidden).float()
            tokens, logprobs = _sample(logits, batch, sampling)
            self._append(batch, tokens.tolist(), logprobs.tolist(), stop)
            going = [place for place, row in enumerate(batch) if row.finish is None]
            if not going:
                return [Generation(row.ids, row.logprobs, row.finish or Finish.LENGTH) for row in rows]
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            if len(going) <= COMPACT * len(batch):
                batch = [batch[place] for place in going]
                chosen = torch.tensor(going, device=device)
                cache.batch_select_indices(chosen)
                ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]

    def _append(
        self, batch: list["_Row"], tokens: list[int], logprobs: list[float], stop: tuple[str, ...]
    ) -> None:
        """Give each unfinished row its token, and finish the rows that it completes."""
        for row, token, logprob in zip(batch, tokens, logprobs, strict=True):
            if row.finish is not None:
                continue
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.finish = self.endings.after(row.ids, row.request.max_new_tokens, stop)


class _Row:
    """One request under way."""

    def __init__(self, request: Request, sampling: Sampling) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        count = request.max_new_tokens if sampling.temperature > 0 else 0
        self.uniforms = np.random.default_rng(request.seed).random(count)


def _left_pad(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, [rows, longest], int64."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def _sample(logits: torch.Tensor, rows: list[_Row], sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens and their log-probabilities, [rows] each; `logits` [rows, vocabulary] float32."""
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
    else:
        logprobs = (logits / sampling.temperature).log_softmax(-1)
        drawn = [0.0 if row.finish else row.uniforms[len(row.ids)] for row in rows]
        cumulative = logprobs.double().exp().cumsum(-1)
        scaled = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, scaled, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
