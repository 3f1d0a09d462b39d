"""An engine with a copy of the model's weights: refresh, probe, and the loop that refreshes by itself."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from dgpo_core.agent.engine import Weights
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY, ProbeConfig, ProtocolConfig, RolloutConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.training.weight_sync import EngineSync, SyncedLoop
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.making import exact, padded, question, tiny_model

PROBE = ProbeConfig(prompts=2, tokens=12, tolerance=1e-4)
PROMPTS = [list(range(20, 40)), list(range(5, 12))]


class CopyEngine(TransformersEngine):
    """Has weights of its own; `lost` of them never arrive."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, lost: str = "none") -> None:
        super().__init__(copy.deepcopy(model), tokenizer, RolloutConfig(precision="float32"))
        self.lost, self.refreshes, self.rests = lost, 0, 0

    def refresh(self, weights: Weights) -> None:
        self.refreshes += 1
        own = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in weights():
                if self.lost not in name:
                    own.pop(name).copy_(tensor)
        assert all(self.lost in name for name in own), "weights were not all given"

    def sleep(self) -> None:
        self.rests += 1


def trained(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def synced(tokenizer: Tokenizer, lost: str = "none") -> EngineSync:
    """A small model and an engine with a copy of it."""
    model = tiny_model(tokenizer, 3)
    return EngineSync(CopyEngine(model, tokenizer, lost), model, PROMPTS, PROBE, exact())


def test_refreshed_engine_computes_the_same(tokenizer: Tokenizer) -> None:
    sync = synced(tokenizer)
    assert sync.probe()["engine_gap_max"] < 1e-4
    trained(sync.model)
    assert sync.probe()["engine_gap_mean"] > 0.01
    sync.refresh()
    assert sync.probe()["engine_gap_max"] < 1e-4
    assert sync.probe()["engine_ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("lost", ["layers.1.mlp.down_proj", "q_proj.bias", "input_layernorm"])
def test_weights_that_do_not_arrive_stop_the_stage(tokenizer: Tokenizer, lost: str) -> None:
    sync = synced(tokenizer, lost)
    trained(sync.model)
    said = r"rollout\.probe\.tolerance: after a refresh .* allowed mean 0\.0001"
    with pytest.raises(UserError, match=said):
        sync.refresh()


def test_loop_refreshes_before_each_run_and_rests_after_it(tokenizer: Tokenizer) -> None:
    sync = synced(tokenizer)
    model, engine = sync.model, sync.engine
    assert isinstance(engine, CopyEngine)
    config = ProtocolConfig(max_turns=1, max_new_tokens=8)
    loop = SyncedLoop(sync, tokenizer, Answering(), config, 3)
    own = TransformersEngine(model, tokenizer, RolloutConfig(precision="float32"))
    shared = AgentLoop(own, tokenizer, Answering(), config, 3)
    tasks = [Task(question(name=f"q{i}"), "onehop", seed=(i,)) for i in range(3)]
    for runs in (1, 2):
        assert loop.run(tasks, GREEDY) == shared.run(tasks, GREEDY)
        assert (engine.refreshes, engine.rests) == (runs, runs)
        trained(model)


def test_a_model_without_numbers_is_not_taken_for_weights_that_did_not_arrive(tokenizer: Tokenizer) -> None:
    sync = synced(tokenizer)
    with torch.no_grad():
        next(sync.model.parameters())[25] = torch.inf
    with pytest.raises(NotFinite, match="the log-probability of a sampled token is not a number"):
        sync.refresh()


def test_engine_and_probe_leave_out_the_same_rows(tokenizer: Tokenizer) -> None:
    model = padded(tiny_model(tokenizer, 3), 64)
    engine = CopyEngine(model, tokenizer)
    sync = EngineSync(engine, model, PROMPTS, PROBE, exact(), known=len(tokenizer))
    assert sync.probe()["engine_gap_max"] < 1e-4
    assert replace(sync, known=None).probe()["engine_gap_mean"] > 0.1
