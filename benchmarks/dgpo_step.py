"""One full DGPO step at true shapes, on random weights: `python -m benchmarks.dgpo_step`.

A student with its critic and a frozen teacher of published shapes (dgpo_core/planning/architectures.yaml),
and episodes of realistic lengths made from a seed. What is timed is the pipeline's own code:
`ExperienceMaker` (the policy's, the teacher's and the critic's passes) and `Updater` (mini-batches of actor
and critic). Passes are as large as fits: `--micro-batch-tokens` is halved after a CUDA out-of-memory until a
step goes through; what is left of a mini-batch is accumulated. `--rollout transformers` also generates the
episodes' turns, at their lengths, with the default engine.

Needs torch, transformers, numpy, pyarrow, pydantic, jaxtyping and ruamel.yaml. Prints JSON.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dgpo_core.agent.engine import EpisodeCache, Generation, Request
from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import RolloutConfig, Sampling
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.planning.shapes import Architecture, table
from dgpo_core.training.batches import Critic, TokenModel
from dgpo_core.training.engines import FrozenModel, training_engine
from dgpo_core.training.optimizer import Optimization, constant
from dgpo_core.training.reinforce import ExperienceMaker, Updater

PROMPT, TURN, INFORMATION = (150, 220), (25, 160), (350, 500)  # tokens: least and most of a part
SEARCHES = (1, 2, 2, 3, 4)  # drawn from, each as often
SMALLEST = 2048  # padded tokens of a pass below which nothing is tried


@dataclass(frozen=True)
class Settings:
    student: str = "Qwen2.5-0.5B"
    teacher: str = "Qwen2.5-3B"
    episodes: int = 512
    mini_batch: int = 256
    micro_batch_tokens: int = 32_768
    steps: int = 2  # the last one is reported: the first also allocates
    device: str = "cuda"
    precision: str = "bfloat16"
    rollout: str = "none"
    wrong: float = 0.65  # share of the episodes whose gate is open
    shrink: int = (
        1  # divides widths and layers of both models, and twice the vocabulary: parts keep their shares
    )
    scale: float = 1.0  # of the episodes' lengths
    seed: int = 0


def make_episodes(settings: Settings, vocabulary: int) -> list[Episode]:
    """Make episodes of random tokens: a prompt, turns with retrieved text between them, an answer."""
    rng = random.Random(f"dgpo-step-{settings.seed}")
    order = random.Random(f"wrong-{settings.seed}").sample(range(settings.episodes), settings.episodes)
    wrong = set(order[: round(settings.wrong * settings.episodes)])

    def length(bounds: tuple[int, int]) -> int:
        return max(2, round(settings.scale * rng.randint(*bounds)))

    episodes = []
    for number in range(settings.episodes):
        owners = [Owner.PROMPT] * length(PROMPT)
        searches = rng.choice(SEARCHES)
        for _ in range(searches):
            owners += [Owner.MODEL] * length(TURN) + [Owner.ENVIRONMENT] * length(INFORMATION)
        owners += [Owner.MODEL] * length(TURN)
        episodes.append(
            Episode(
                question_id=str(number),
                dataset="synthetic",
                question="?",
                golden_answers=["x"],
                sample=0,
                token_ids=[rng.randrange(vocabulary) for _ in owners],
                owners=[int(owner) for owner in owners],
                logprobs=[-1.0 if owner is Owner.MODEL else 0.0 for owner in owners],
                response="",
                prediction=None if number in wrong else "x",
                outcome=Outcome.WRONG if number in wrong else Outcome.CORRECT,
                ending=Ending.ANSWERED,
                well_formed=True,
                hit=False,
                generations=searches + 1,
                invalid_actions=0,
                cut_turns=0,
            )
        )
    return episodes


def shape_of(name: str, settings: Settings) -> dict[str, Any]:
    """Return the config of a published shape, shrunk."""
    values = dict(table()[name]["config"])
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        values[key] = max(1, values[key] // settings.shrink)
    values["vocab_size"] //= settings.shrink**2
    return values


def random_model(name: str, settings: Settings) -> PreTrainedModel:
    """Make a model of a published shape on the device (float32, as the stages load theirs)."""
    values = shape_of(name, settings)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return model


class Clock:
    """Measures seconds by part; waits for the device."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device.startswith("cuda")

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the seconds of what runs inside to `part`."""
        started = self._now()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - started

    def watch(self, owner: object, parts: dict[str, str]) -> None:
        """Measure every call of these methods of `owner`: method -> part."""
        for name, part in parts.items():
            setattr(owner, name, self.measure(part)(getattr(owner, name)))

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def run(settings: Settings) -> dict[str, Any]:
    """Measure, with as large passes as fit."""
    config = ReinforceConfig(batch_size=settings.episodes, mini_batch_size=settings.mini_batch)
    student, teacher = (random_model(name, settings) for name in (settings.student, settings.teacher))
    episodes = make_episodes(settings, student.config.vocab_size)
    result: dict[str, Any] = {
        "settings": asdict(settings),
        **describe(episodes, student, teacher),
    }
    if settings.rollout == "transformers":
        result["rollout"] = roll_out(settings, student, episodes)
    tokens, precision = settings.micro_batch_tokens, cast(Literal["float32", "bfloat16"], settings.precision)
    while True:
        compute = ComputeConfig(device=settings.device, precision=precision, micro_batch_tokens=tokens)
        try:
            trainers = make_trainers(student, teacher, config, compute)
            for _ in range(settings.steps):
                clock = Clock(settings.device)
                if settings.device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                one_step(clock, *trainers, episodes)
            break
        except torch.cuda.OutOfMemoryError:
            if tokens // 2 < SMALLEST:
                raise
            tokens //= 2
            del trainers
            student.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    total = clock.seconds["step"]
    peak = torch.cuda.max_memory_allocated() / 2**30 if settings.device.startswith("cuda") else None
    result |= {
        "micro_batch_tokens": tokens,
        "seconds": {part: round(seconds, 3) for part, seconds in clock.seconds.items()},
        "teacher_share": round(clock.seconds.get("teacher", 0.0) / total, 4),
        "peak_memory_gib": peak and round(peak, 2),  # of tensors in the last step; null without a GPU
        "tokens_per_second": round(result["tokens"] / total, 1),
        "model_flops": model_flops(settings, episodes, config),
    }
    return result


def make_trainers(
    student: PreTrainedModel, teacher: PreTrainedModel, config: ReinforceConfig, compute: ComputeConfig
) -> tuple[ExperienceMaker, Updater]:
    """Make of the models what `Reinforcer.train` does before its first step of DGPO."""

    def optimization(rate: float) -> Optimization:
        return Optimization(rate, config.weight_decay, config.max_grad_norm, constant())

    rates = config.critic_learning_rate, config.actor_learning_rate
    critic = training_engine(Critic(student), optimization(rates[0]), compute, published=False)
    actor = training_engine(TokenModel(student), optimization(rates[1]), compute)
    recipe = Reinforcement(start="student", guidance="selective", reference="teacher")
    maker = ExperienceMaker(actor, FrozenModel(teacher, compute), critic, recipe, config, compute)
    return maker, Updater(actor, critic, config, compute)


def one_step(clock: Clock, maker: ExperienceMaker, updater: Updater, episodes: list[Episode]) -> None:
    """Do what `Reinforcer.train` does between two rollouts."""
    maker, updater = replace(maker), replace(updater)  # copies, on which this step's clock is put
    clock.watch(maker, {"_policy_logprobs": "policy log-probabilities", "_reference_logprobs": "teacher"})
    clock.watch(updater, {"_actor_gradient": "actor gradient", "_critic_gradient": "critic gradient"})
    with clock.measure("step"):
        with clock.measure("experience"):
            experience = maker.make(episodes)
        with clock.measure("update"):
            updater.update(experience, list(range(len(episodes))))
    timed = clock.seconds
    timed["values"] = timed["experience"] - timed["policy log-probabilities"] - timed.get("teacher", 0.0)


def roll_out(settings: Settings, student: PreTrainedModel, episodes: list[Episode]) -> dict[str, float]:
    """Generate every turn at its length with the default engine, between the environment's own texts."""

    class Tokenizer:
        """No text is looked at: nothing is to stop a turn before its length."""

        eos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(student.config.vocab_size)}

        def batch_decode(self, tokens: list[list[int]]) -> list[str]:
            return [""] * len(tokens)

    precision: Any = settings.precision
    config = RolloutConfig(precision=precision, slots=len(episodes))
    if student.generation_config is not None:
        student.generation_config.eos_token_id = None
    engine = TransformersEngine(student, Tokenizer(), config)
    started = time.perf_counter()
    written = converse(engine, [_turns(episode) for episode in episodes], settings.seed)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "written_tokens_per_second": round(written / seconds, 1)}


Turns = list[tuple[list[int], int]]  # what the environment says, and how many tokens are then written


def _turns(episode: Episode) -> Turns:
    ends = [0, *(turn.end for turn in episode.turns)]
    return [
        (episode.token_ids[end : turn.start], turn.end - turn.start)
        for end, turn in zip(ends, episode.turns, strict=False)
    ]


def converse(engine: TransformersEngine, conversations: list[Turns], seed: int) -> int:
    """Write all turns at their lengths, each conversation as fast as it goes; return the tokens written."""
    session, caches = engine.session(()), [EpisodeCache() for _ in conversations]

    def ask(number: int, turn: int, history: list[int]) -> None:
        said, length = conversations[number][turn]
        caches[number].renew = turn + 1 < len(conversations[number])
        request = Request([*history, *said], length, (seed, number, turn), caches[number])
        session.add([request], Sampling())

    for number in range(len(conversations)):
        ask(number, 0, [])
    written, going = 0, len(conversations)
    while going:
        for request, result in session.advance():
            assert isinstance(result, Generation)
            written += len(result.token_ids)
            _, number, turn = request.seed
            if caches[number].renew:
                ask(number, turn + 1, [*request.token_ids, *result.token_ids])
            else:
                going -= 1
    return written


def model_flops(settings: Settings, episodes: list[Episode], config: ReinforceConfig) -> dict[str, float]:
    """Count what each part of a step must compute, by the plan's formulas (docs/scaling.md).

    A backward pass counts twice its forward pass, attention half of all pairs, and nothing that is computed
    again to save memory: model-FLOP utilisation is of these.
    """
    names = (settings.student, settings.teacher)
    student, teacher = (Architecture.from_config(shape_of(name, settings)) for name in names)
    policy = values = reference = 0.0
    outside = 0
    for episode in episodes:
        n, own = len(episode.token_ids), episode.model_tokens
        policy += student.flops(n, n**2 / 2, own)
        values += student.flops(n, n**2 / 2)
        audited = episode.correct and outside < config.audit_episodes
        outside += audited
        if not episode.correct or audited:
            reference += teacher.flops(n, n**2 / 2, own)
    parts = {"policy log-probabilities": policy, "teacher": reference, "values": values}
    parts |= {"actor gradient": 3 * policy, "critic gradient": 3 * values}
    parts["update"] = parts["actor gradient"] + parts["critic gradient"]
    return parts | {"step": policy + values + reference + parts["update"]}


def describe(episodes: list[Episode], student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, Any]:
    """Return sizes of models and episodes, and what they are computed with."""
    n = len(episodes)
    return {
        "parameters": {"student": student.num_parameters(), "teacher": teacher.num_parameters()},
        "episode_tokens": round(sum(len(e.token_ids) for e in episodes) / n, 1),
        "model_tokens": round(sum(e.model_tokens for e in episodes) / n, 1),
        "gated": sum(not e.correct for e in episodes) / n,
        "tokens": sum(len(e.token_ids) for e in episodes),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the settings from the command line, where each has an option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Settings):
        kind = int if field.default is None else type(field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    print(json.dumps(run(parse()), indent=2))
