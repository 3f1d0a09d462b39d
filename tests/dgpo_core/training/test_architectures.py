"""The paper's architectures, scaled down: random weights, and what their configurations do differently.

Qwen2.5 and Llama 3 with grouped queries, tied and untied output embeddings, Llama's rope scaling,
vocabularies padded to different sizes, more than one end token, chat templates as theirs, in bfloat16.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import ProtocolConfig, RolloutConfig, Sampling
from dgpo_core.config.training import DistillConfig, ReinforceConfig
from dgpo_core.models import load_model, load_tokenizer, save_model
from dgpo_core.retrieval.index import Index
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes
from dgpo_core.training.reinforce import Reinforcer
from tests.dgpo_core.making import distillation, exact, question, reinforcement, weights_of

QWEN: dict[str, Any] = {"model_type": "qwen2", "rope_theta": 1e6}
LLAMA: dict[str, Any] = {"model_type": "llama", "rope_theta": 5e5}
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
# (student, teacher): heads per key-value head, padding of the vocabulary, tied as in the published ones
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2.5 0.5B <- 3B": (
        QWEN | {"heads": 14, "groups": 2, "padding": 267, "tie_word_embeddings": True},
        QWEN | {"heads": 16, "groups": 2, "padding": 267, "tie_word_embeddings": True},
    ),
    "qwen2.5 0.5B <- 7B": (
        QWEN | {"heads": 14, "groups": 2, "padding": 267, "tie_word_embeddings": True},
        QWEN | {"heads": 28, "groups": 4, "padding": 395, "tie_word_embeddings": False},
    ),
    "llama 3 1B <- 8B": (
        LLAMA | {"heads": 8, "groups": 2, "padding": 0, "tie_word_embeddings": True}
        | {"rope_scaling": SCALED | {"factor": 32.0}},
        LLAMA | {"heads": 8, "groups": 2, "padding": 0, "tie_word_embeddings": False}
        | {"rope_scaling": SCALED | {"factor": 8.0}},
    ),
}  # fmt: skip
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You "
    "are a helpful assistant.<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>"
    "{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n<|im_end|>"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\n{{ message['content'] | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
COMPUTE = exact(600, precision="bfloat16")
Pair = tuple[PreTrainedModel, PreTrainedModel, Any]  # student, teacher, tokenizer


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Pair:
    """Student, teacher and tokenizer, once written and loaded again."""
    student, teacher = PAIRS[request.param]
    template = QWEN_TEMPLATE if student["model_type"] == "qwen2" else LLAMA_TEMPLATE
    for seed, (name, shape) in enumerate((("student", student), ("teacher", teacher))):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        own = load_tokenizer(str(tmp_path / "tokenizer"))
        own.chat_template = template
        save_model(made(shape, own, seed), own, tmp_path / name)
    loaded = load_tokenizer(str(tmp_path / "student"))
    assert loaded.chat_template == template
    return load_model(str(tmp_path / "student")), load_model(str(tmp_path / "teacher")), loaded


def made(shape: dict[str, Any], tokenizer: Any, seed: int) -> PreTrainedModel:
    shape = dict(shape)
    heads, groups, padding = shape.pop("heads"), shape.pop("groups"), shape.pop("padding")
    config = AutoConfig.for_model(
        **shape,
        vocab_size=len(tokenizer) + padding,
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ends  # Qwen2.5 has two, Llama 3 three
    return model


def episodes_of(
    model: PreTrainedModel, tokenizer: Any, index: Index, step: int, count: int = 6
) -> list[Episode]:
    """Episodes of an untrained model: it writes nonsense, whose tokens are as good to train on as any."""
    limits = ProtocolConfig(instruction="short", max_turns=1, max_context=256, max_new_tokens=12)
    engine = TransformersEngine(model, tokenizer, RolloutConfig(precision="bfloat16"))
    tasks = [Task(question(name=f"q{i}"), "onehop", seed=(step, i)) for i in range(count)]
    return AgentLoop(engine, tokenizer, index, limits, 2).run(tasks, Sampling())


def test_distillation(pair: Pair, index: Index, tmp_path: Path) -> None:
    """The KL is the one of both models' own logits, over the ids that have a token; and it falls."""
    student, teacher, tokenizer = pair
    episodes = episodes_of(teacher, tokenizer, index, 0)
    config = DistillConfig(epochs=3, batch_size=3, learning_rate=3e-3, ce_weight=0.0)
    source, known = TeacherEpisodes(episodes, config, 0), len(tokenizer)
    distiller = Distiller(student, teacher, distillation(), config, COMPUTE, source, known=known)
    before, expected = distiller.loss(episodes), mean_kl(student, teacher, episodes, known)
    assert before == pytest.approx(expected, rel=0.05)
    distiller.train(Checkpoint(tmp_path / "state"), lambda: 0.0, lambda *_: None)
    assert distiller.loss(episodes) < 0.95 * before

    save_model(student, tokenizer, tmp_path / "trained")
    again = load_model(str(tmp_path / "trained"))
    for model in (again, student):
        del model.config._name_or_path
    assert again.config.to_dict() == student.config.to_dict()
    assert again.generation_config is not None and len(again.generation_config.eos_token_id) == 2
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())


def test_reinforcement(pair: Pair, index: Index, tmp_path: Path) -> None:
    """Real rollouts and one step of DGPO; the trainer's log-probabilities are nearly the engine's."""
    student, teacher, tokenizer = pair
    rolled: list[Episode] = []

    def rollout(chosen: list[int], step: int) -> list[Episode]:
        rolled.extend(episodes_of(student, tokenizer, index, step, len(chosen)))
        return rolled

    config = ReinforceConfig(
        steps=1, batch_size=6, mini_batch_size=3, actor_learning_rate=1e-3, critic_learning_rate=1e-3
    )
    before = weights_of(student)
    trainer = Reinforcer(student, teacher, reinforcement(), config, COMPUTE, 0, known=len(tokenizer))
    (row,) = trainer.train(20, rollout, Checkpoint(tmp_path / "state"), lambda: 0.0, lambda *_: None)
    assert row["gate_open"] == 1.0 and row["entropy"] > 0
    assert all(value == value for value in row.values())
    assert row["actor_grad_norm"] > 0 and row["critic_grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())
    student.load_state_dict(before)
    for episode in rolled:
        own = logprobs(student, episode, len(tokenizer))
        sampled = torch.tensor([episode.logprobs[i] for i in model_tokens(episode)])
        assert (own - sampled).abs().mean() < 0.05


def model_tokens(episode: Episode) -> list[int]:
    return [place for place, owner in enumerate(episode.owners) if owner == Owner.MODEL]


def table(model: PreTrainedModel, episode: Episode, size: int) -> torch.Tensor:
    """Log-probabilities [tokens, first `size` ids] by the model's own forward."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits: torch.Tensor = model(torch.tensor([episode.token_ids])).logits[0, :, :size]
        return logits.float().log_softmax(-1)


def logprobs(model: PreTrainedModel, episode: Episode, known: int) -> torch.Tensor:
    own, places = table(model, episode, known), model_tokens(episode)
    return torch.stack([own[place - 1, episode.token_ids[place]] for place in places])


def mean_kl(student: PreTrainedModel, teacher: PreTrainedModel, episodes: list[Episode], known: int) -> float:
    kls: list[torch.Tensor] = []
    for episode in episodes:
        own, theirs = table(student, episode, known), table(teacher, episode, known)
        kl = (theirs.exp() * (theirs - own)).sum(-1)
        kls += [kl[place - 1] for place in model_tokens(episode)]
    return float(torch.stack(kls).mean())
