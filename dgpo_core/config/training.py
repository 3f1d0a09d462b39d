"""Sections of the stages that run models; the defaults are the paper's (table 8)."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dgpo_core.config.agent import GREEDY, Sampling
from dgpo_core.config.base import Section
from dgpo_core.config.endpoint import EndpointConfig


class LoraConfig(Section):
    """Low-rank adapters on all linear layers but the output embedding; merged when the model is saved."""

    rank: PositiveInt = 32
    alpha: PositiveInt = Field(64, description="the adapters' product is scaled by alpha / rank")


DEFAULT_ZERO_STAGE = 2  # where compute.zero_stage is null


class ComputeConfig(Section):
    """How training runs; changes results by rounding only (but for `lora`, which trains other weights)."""

    FREE = frozenset(
        {"micro_batch_tokens", "processes", "hostfile", "zero_stage", "offload", "split_teacher"}
        | {"gradient_checkpointing", "keep_last"}
    )

    device: str = "cuda"
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="of compute; weights are fp32")
    micro_batch_tokens: PositiveInt = Field(
        32_768, description="padded tokens in one training pass; on a processor a pass a thread"
    )
    engine: Literal["torch", "deepspeed"] = Field(
        "torch", description="of training: everything in every process, or split by DeepSpeed"
    )
    processes: PositiveInt = Field(1, description="of a training stage on each machine, one a GPU")
    hostfile: str | None = Field(
        None, description="machines that train together, `name slots=n` a line, this one first"
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="deepspeed splits 1: optimiser state, 2: gradients too, 3: weights too; null is 2",
    )
    offload: bool = Field(False, description="deepspeed: optimiser state in the host's memory")
    split_teacher: bool = Field(False, description="deepspeed: frozen models are split, not one a process")
    gradient_checkpointing: bool = Field(
        False, description="activations are computed again in the backward pass: less memory, a third slower"
    )
    keep_last: PositiveInt = Field(2, description="checkpoints of a training; a damaged one is passed over")
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters {rank, alpha} instead of all weights"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        only = {"zero_stage": self.zero_stage, "offload": self.offload, "split_teacher": self.split_teacher}
        if self.engine == "torch" and (wrong := [key for key, value in only.items() if value]):
            raise ValueError(f"{wrong[0]} is DeepSpeed's: set engine: deepspeed, or leave it out")
        if self.spawns and self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"device {self.device}: processes get a device each: set device: cuda (or cpu), "
                "and CUDA_VISIBLE_DEVICES to say which"
            )
        return self

    @property
    def spawns(self) -> bool:
        """Return whether a training stage starts processes of its own."""
        return self.processes > 1 or self.hostfile is not None or self.engine == "deepspeed"


class TeachConfig(Section):
    """Teacher episodes on the training questions."""

    FREE = frozenset({"endpoint"})

    policy: Literal["teacher", "expert"] = Field(
        "teacher",
        description="who writes them; expert: a script that reads the gold passages (docs/data.md)",
    )
    questions: PositiveInt | None = Field(None, description="first so many of each set; null: all")
    sampling: Sampling = GREEDY
    seed: NonNegativeInt = Field(0, description="of sampling; greedy episodes do not depend on it")
    chunk: PositiveInt = Field(256, description="episodes between two checkpoints")
    api: Literal["chat", "completions"] = Field(
        "chat",
        description="of a teacher behind an endpoint; completions: the text in the student's chat template",
    )
    endpoint: EndpointConfig = EndpointConfig()


class DistributionsConfig(Section):
    """The teacher's distributions on its own episodes, kept for all epochs and recipes."""

    top_k: PositiveInt | None = Field(64, description="likeliest tokens kept at each position; null: all")
    sample: PositiveInt = Field(
        64, description="episodes, drawn from all, that the certificate is measured on"
    )
    chunk: PositiveInt = Field(4096, description="episodes between two checkpoints")


class OnPolicyConfig(Section):
    """Distillation on the student's own episodes (GKD), sized like a step of reinforcement learning."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = Field(512, description="the student's episodes a step")
    learning_rate: PositiveFloat = 1e-6
    warmup_steps: NonNegativeInt = 0
    dev_every: PositiveInt = Field(50, description="steps between two looks at the validation questions")
    intervention: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that the teacher writes a turn, at the first step; it falls evenly to 0",
    )


class CorpusTextConfig(Section):
    """Distillation on the corpus's text, which heals a model that has lost layers."""

    tokens: int = Field(256, ge=2, description="of a sequence: passages laid end to end, and cut")
    sequences: PositiveInt | None = Field(None, description="an epoch reads so many; null: the whole corpus")
    validation: PositiveInt = Field(64, description="sequences held out for the validation loss")
    dev_every: PositiveInt = Field(50, description="steps between two validations, and checkpoints")


class TaidConfig(Section):
    """TAID's interpolation t between student and teacher (docs/method.md, "Divergences")."""

    start: float = Field(0.4, gt=0, le=1)
    end: float = Field(1.0, gt=0, le=1)
    step_size: PositiveFloat = Field(5e-4, description="of the adaptive part of t's growth")
    decay: float = Field(0.99, ge=0, lt=1, description="of the moving average of the loss's relative fall")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.start > self.end:
            raise ValueError("start: t rises from start to end, which must not be below it")
        return self


class DistillmConfig(Section):
    """DistiLLM's adaptive use of student episodes (docs/method.md, "Divergences")."""

    growth: PositiveFloat = Field(0.1, description="of phi, the share of student batches, at each rise")
    tolerance: NonNegativeFloat = Field(0.1, description="nats by which the validation loss must have risen")
    replay: PositiveInt = Field(1000, description="student episodes kept for replay")
    validation: PositiveInt = Field(64, description="teacher episodes held out for the validation loss")


class DistillConfig(Section):
    """Distillation: on teacher episodes (eq. 1), on the student's own, or on both."""

    FREE = frozenset({"min_em"})

    epochs: PositiveInt = Field(5, description="over the teacher episodes, or the corpus")
    teacher: Literal["live", "cache"] = Field(
        "live", description="runs in training, or has run before (stage distributions)"
    )
    batch_size: PositiveInt = Field(64, description="episodes, or sequences of the corpus")
    learning_rate: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    ce_weight: NonNegativeFloat = Field(1.0, description="paper 1; the released framework drops it: 0")
    kl_weight: NonNegativeFloat = Field(1.0, description="lambda of eq. 1")
    skew: float = Field(0.1, gt=0, lt=1, description="alpha of the skewed divergences (DistiLLM)")
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="of the generalised JSD (GKD)")
    sampling: Sampling = Field(Sampling(), description="of the student's own episodes")
    on_policy: OnPolicyConfig = OnPolicyConfig()
    corpus: CorpusTextConfig = CorpusTextConfig()
    taid: TaidConfig = TaidConfig()
    distillm: DistillmConfig = DistillmConfig()
    dev_questions: PositiveInt = Field(200, description="validation questions after each epoch")
    patience: PositiveInt | None = Field(
        None,
        description="validations without a rise of EM that end training, of which the best model is kept",
    )
    min_em: float = Field(
        0.0, ge=0, le=1, description="validation EM of a model that a recipe of recipes.reinforce starts from"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.ce_weight == self.kl_weight == 0:
            raise ValueError("ce_weight and kl_weight are both 0: kd would have no loss")
        if self.distillm.replay < self.batch_size:
            raise ValueError("distillm.replay: must be at least batch_size, which is drawn from it")
        return self


class ReinforceConfig(Section):
    """PPO, GRPO or REINFORCE with distillation guidance (eqs. 2-4)."""

    FREE = frozenset({"checkpoint_every"})

    steps: PositiveInt = 1000
    batch_size: PositiveInt = Field(512, description="episodes a step")
    mini_batch_size: PositiveInt = Field(256, description="episodes an update")
    actor_learning_rate: PositiveFloat = 1e-6
    actor_learning_rate_warmup: float = Field(
        0.285, ge=0, le=1, description="share of the steps in which the rate rises from 0"
    )
    critic_learning_rate: PositiveFloat = 1e-5
    critic_learning_rate_warmup: float = Field(
        0.015, ge=0, le=1, description="likewise; actor and critic learn from the first step on"
    )
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    beta: NonNegativeFloat = Field(0.001, description="weight of the KL in the reward (eq. 4)")
    repeat_penalty: NonNegativeFloat = Field(
        0.0, description="PPO, REINFORCE: off the reward of a search that brought nothing new"
    )
    preserve_weight: NonNegativeFloat = Field(
        0.0, description="of the loss on falling likelihoods of turns whose advantage is not negative (LLDS)"
    )
    group_size: int = Field(5, ge=2, description="GRPO: episodes of one question")
    critic_only_steps: NonNegativeInt = Field(
        0, description="PPO: first steps in which the critic alone learns (verl: critic_warmup)"
    )
    audit_episodes: NonNegativeInt = Field(
        16, description="ungated episodes a step whose KL is measured too, for the gate's audit"
    )
    old_logprobs: Literal["trainer", "rollout"] = Field(
        "trainer",
        description="who computes pi_old: the trainer again, or the engine (right where both compute alike)",
    )
    importance_cap: PositiveFloat | None = Field(
        None,
        description="weight of a token's policy loss: min(pi by trainer / pi by engine, cap); null: off",
    )
    overlap: bool = Field(
        False,
        description="a step's episodes are sampled while the step before it trains: one update off-policy",
    )
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(1.0, ge=0, le=1)
    gae_scope: Literal["model_tokens", "all"] = Field("model_tokens", description="the release: all")
    clip: PositiveFloat = 0.2
    value_clip: PositiveFloat = 0.5
    value_loss_weight: NonNegativeFloat = 0.5
    entropy_weight: NonNegativeFloat = 0.001
    sampling: Sampling = Sampling()
    dev_every: PositiveInt = Field(50, description="steps between two looks at the validation questions")
    dev_questions: PositiveInt = 200
    patience: PositiveInt | None = Field(
        None,
        description="validations without a rise of EM that end training, of which the best model is kept",
    )
    checkpoint_every: PositiveInt = Field(20, description="steps")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.mini_batch_size:
            raise ValueError("batch_size must be a multiple of mini_batch_size")
        if self.importance_cap is not None and self.old_logprobs == "rollout":
            raise ValueError("importance_cap compares trainer and engine: set old_logprobs: trainer, or null")
        if self.overlap and self.importance_cap is None:
            raise ValueError(
                "overlap trains on episodes of older weights: set importance_cap (2.0, say), "
                "and old_logprobs: trainer"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy rollouts explore nothing")
        return self


Action = Literal["ignore", "warn", "stop", "roll_back"]


class WatchConfig(Section):
    """What distillation and reinforcement learning are watched for; a healthy one is not changed by it.

    Where a figure collapses: warn; stop, and keep the checkpoint; roll_back: end with the best validated
    model.
    """

    max_failed_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="of a step's or a validation's episodes; with more the stage stops at once",
    )
    max_bad_steps: PositiveInt = Field(
        3, description="in a row that give no numbers, and are dropped, with which training stops"
    )
    window: PositiveInt = Field(10, description="steps whose mean is compared with that of the best EM")
    em: Action = Field("warn", description="under half of its best")
    searches: Action = Field("warn", description="under half, or more than twice and one")
    invalid_actions: Action = Field("warn", description="0.25 an episode more")
    response_tokens: Action = Field("warn", description="under half, or more than twice")
    entropy: Action = Field("warn", description="under a quarter, or more than four times and 0.5 nats")
    kl: Action = Field("warn", description="inside the gate: more than four times and 0.1 nats")
    repetition: Action = Field(
        "warn", description="over 0.8 of what the model writes, at each step of a window"
    )


class EvaluateConfig(Section):
    """Test sets and ARCap (paper, section 5); the release samples at temperature 1."""

    FREE = frozenset({"trace_episodes"})

    sampling: Sampling = GREEDY
    seed: NonNegativeInt = Field(0, description="of sampling; greedy episodes do not depend on it")
    chunk: PositiveInt = Field(512, description="episodes between two checkpoints")
    questions: PositiveInt | None = Field(None, description="first so many of each set; null: all")
    split_questions: PositiveInt = Field(
        200,
        description="training questions, and as many validation questions, that trained models are asked",
    )
    counterfactual_questions: NonNegativeInt = Field(
        100, description="first so many of each set are asked again with other passages; 0: none"
    )
    trace_episodes: NonNegativeInt = Field(
        40, description="episodes of a model that MLflow gets as traces; 0: none, in training either"
    )


class ReportConfig(Section):
    """The questions that reports count."""

    first: dict[str, PositiveInt] = Field(
        {},
        description="first so many questions of these test sets (the paper's Bamboogle: 124 of 125)",
    )
