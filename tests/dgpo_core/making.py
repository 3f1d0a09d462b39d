"""Small real parts that many tests share: models, episodes, questions."""

import copy
import random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner
from dgpo_core.config.data import ModelShape, QuestionCounts, WorldConfig
from dgpo_core.config.recipes import Distillation, Reinforcement
from dgpo_core.config.training import ComputeConfig
from dgpo_core.datasets.records import Question
from dgpo_core.models import build_model
from dgpo_core.training.batches import Critic, TokenModel, TokenSequence, model_sequence
from dgpo_core.training.engines import FrozenModel, TorchEngine
from dgpo_core.training.optimizer import Optimization, constant

SHAPE = ModelShape(hidden_size=32, layers=2, heads=2, intermediate_size=48)
SMALL_WORLD = WorldConfig(passages=400, questions=QuestionCounts(train=40, dev=10, test=20, hard=8))


def exact(tokens: int = 10_000, **changes: Any) -> ComputeConfig:
    """Compute in float32 on the CPU, `tokens` padded tokens at a time."""
    values = {"device": "cpu", "precision": "float32", "micro_batch_tokens": tokens}
    return ComputeConfig.model_validate(values | changes)


def reinforcement(algorithm: str = "ppo", guidance: str = "selective", **more: Any) -> Reinforcement:
    """A recipe that is guided by the teacher, if at all."""
    reference = "none" if guidance == "none" else "teacher"
    return Reinforcement.model_validate(
        {"start": "student", "algorithm": algorithm, "guidance": guidance, "reference": reference} | more
    )


def distillation(objective: str = "kd", episodes: str = "teacher") -> Distillation:
    return Distillation.model_validate({"start": "student", "objective": objective, "episodes": episodes})


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    """Take the gradients of a module's parameters, at least one, away."""
    found = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    assert found
    module.zero_grad()
    return found


def tiny_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """A random Qwen2, 32 wide, 2 layers, float32."""
    torch.manual_seed(seed)
    model = build_model(SHAPE, tokenizer)
    model.eval()
    return model


def padded(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """A copy whose head has `rows` more rows that no token has, the likeliest of all."""
    known = len(model.get_output_embeddings().weight)
    wider = copy.deepcopy(model)
    wider.resize_token_embeddings(known + rows, mean_resizing=False)
    with torch.no_grad():
        weight = wider.get_output_embeddings().weight
        weight[known:] = 20 * weight[:rows]
    return wider


def student_teacher_critic(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PreTrainedModel, PreTrainedModel, Critic]:
    """Small random models, and a critic whose values are not all 0."""
    student = tiny_model(tokenizer, 1)
    critic = Critic(student)
    torch.manual_seed(9)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    return student, tiny_model(tokenizer, 2), critic


def torch_engine(module: torch.nn.Module, compute: ComputeConfig, max_grad_norm: float = 1e9) -> TorchEngine:
    """AdamW with a constant learning rate of 1e-3."""
    return TorchEngine(module, Optimization(1e-3, 0.01, max_grad_norm, constant()), compute)


def engines(
    parts: tuple[PreTrainedModel, PreTrainedModel, Critic], compute: ComputeConfig
) -> tuple[TorchEngine, FrozenModel, TorchEngine]:
    """Actor, reference and critic as the trainers hold them."""
    student, teacher, critic = parts
    actor = torch_engine(TokenModel(student), compute)
    return actor, FrozenModel(teacher, compute), torch_engine(critic, compute)


def random_episode(seed: int, vocabulary: int = 500, correct: bool | None = None) -> Episode:
    """Random ids: a prompt, then one to three turns of the model with text of the environment between."""
    rng = random.Random(f"episode-{seed}")
    owners = [Owner.PROMPT] * rng.randint(3, 9)
    turns = rng.randint(1, 3)
    for turn in range(turns):
        owners += [Owner.MODEL] * rng.randint(2, 7)
        if turn < turns - 1:
            owners += [Owner.ENVIRONMENT] * rng.randint(1, 12)
    is_correct = rng.random() < 0.5 if correct is None else correct
    return Episode(
        question_id=f"q{seed}",
        dataset="onehop",
        question="?",
        golden_answers=["x"],
        sample=0,
        token_ids=[rng.randrange(vocabulary) for _ in owners],
        owners=[int(owner) for owner in owners],
        logprobs=[-rng.random() if owner is Owner.MODEL else 0.0 for owner in owners],
        response="",
        prediction="x" if is_correct else None,
        outcome=Outcome.CORRECT if is_correct else Outcome.WRONG,
        ending=Ending.ANSWERED,
        well_formed=True,
        hit=False,
        generations=turns,
        invalid_actions=0,
        cut_turns=0,
    )


def question(
    text: str = "Where was Ada born", answers: tuple[str, ...] = ("Paris",), name: str = "q0"
) -> Question:
    return Question(name, text, answers)


def table(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] by the model's own forward."""
    logprobs: torch.Tensor = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    return logprobs


def logprobs_of(
    model: PreTrainedModel, sequence: TokenSequence | Episode, temperature: float = 1.0
) -> torch.Tensor:
    """Of the tokens that count, or that the model wrote."""
    sequence = model_sequence(sequence) if isinstance(sequence, Episode) else sequence
    own = table(model, sequence.ids, temperature)
    return torch.stack([own[position - 1, sequence.ids[position]] for position in sequence.positions])


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copy the weights as they are now."""
    return {name: value.clone() for name, value in model.state_dict().items()}
