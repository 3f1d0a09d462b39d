"""DGPO and its relatives: PPO or GRPO in which a gate decides what is pulled towards a reference (eqs. 2-4).

`Reinforcer.train` repeats one step (docs/method.md, "Equations"):

(1) roll out: the student answers the step's questions, searching as it likes;
(2) log-probabilities of what it wrote under the student, pi_old of eq. 2;
(3) gate: which episodes are pulled towards the reference, in DGPO the wrong ones (eq. 4);
(4) KL of the student to the reference (the teacher, or the model that training started from), whose own
    log-probabilities are computed where the gate is open, and nowhere else but for an audit;
(5) rewards: exact match, and under PPO the KL (eqs. 3 and 4);
(6) advantages: over a critic's values (PPO), or over other episodes of the same question (GRPO);
(7) update: the clipped surrogate (eq. 2), the entropy and, under GRPO, the KL; under PPO also the critic.

(1) and the loop are `Reinforcer`, (2) to (6) `ExperienceMaker`, (7) `Updater`. Only tokens that the model
wrote have an advantage, a KL and a gradient; the prompt's and the environment's are context.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.objectives.divergences import reverse_kl
from dgpo_core.objectives.logprobs import PerToken, distillation_losses, engine_gap
from dgpo_core.objectives.policy import (
    clipped_surrogate,
    explained_variance,
    gae,
    group_advantages,
    importance_weights,
    value_loss,
    whiten,
)
from dgpo_core.objectives.rewards import gate, kl_estimate, token_rewards
from dgpo_core.threads import single_threaded
from dgpo_core.training.batches import (
    HeadFunction,
    TokenBatch,
    TokenModel,
    TokenSequence,
    backbone_of,
    check_ids,
    counted_hidden,
    model_sequence,
    policy_function,
    response_sequence,
    shared_ids,
)
from dgpo_core.training.checkpoint import Checkpoint, require_finite, training_step
from dgpo_core.training.engines import FrozenModel, TrainingEngine, each_sequence, summed, training_engine
from dgpo_core.training.episode_sources import (
    Metrics,
    Rollout,
    episode_metrics,
    question_order,
    shuffled,
    usable,
)
from dgpo_core.training.optimizer import Optimization, constant
from dgpo_core.training.overlap import StepEpisodes

# Training stops when one of these is no number; causes first, as the first one says what to lower.
WATCHED = ["kl_inside", "kl_outside", "reward", "value_loss", "critic_grad_norm", "policy_loss", "entropy"]
WATCHED += ["approx_kl", "actor_grad_norm"]

ByEpisode = list[Float[Tensor, " tokens"]]  # one tensor an episode, of the tokens that the model wrote


@dataclass
class Reinforcer:
    """Trains `student` in place. `reference` is the model that the recipe names, frozen.

    `sampler` is the model that rolls out: a copy of the student under `overlap`, by default the student.
    Distributions are over the ids that the tokenizer knows, the first `known`, as far as both models have
    rows for them; None: all of these rows.
    """

    student: PreTrainedModel
    reference: PreTrainedModel | None
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig
    seed: int
    known: int | None = None
    sampler: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        self.vocabulary = shared_ids(self.known, self.student, self.reference)

    @single_threaded()
    def train(
        self,
        questions: int,
        rollout: Rollout,
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, list[Metrics]], None],
    ) -> list[Metrics]:
        """Train on questions 0 to `questions` - 1 and return one row of metrics a step.

        Resume from the checkpoint exactly. `report` is called with the number of steps and the rows so far.
        Raise NotFinite at the first step that gives no numbers; the checkpoint is then the last before it.
        """
        config = self.config
        torch.manual_seed(self.seed)
        actor, reference, critic = self._engines()
        engines = {"actor": actor} if critic is None else {"actor": actor, "critic": critic}
        rows: list[Metrics] = []
        stepped = StepEpisodes(
            lambda step: rollout(self._questions(questions, step), step),
            self.student,
            self.sampler or self.student,
            config.steps,
        )
        if state := checkpoint.load():
            rows, stepped.pending = state["rows"], state.get("pending")
            for name, engine in engines.items():
                engine.load_state_dict(state[name])
        maker = ExperienceMaker(actor, reference, critic, self.recipe, config, self.compute)
        updater = Updater(actor, critic, config, self.compute)
        actor.publish()
        for step in range(len(rows), config.steps):
            with training_step(step + 1, self._rate_behind):
                # (1) Roll out: the student as it is now answers the step's questions; or it has, a step ago.
                episodes = stepped.take(step)
                with stepped.ahead(step + 1):
                    row = self._learn(episodes, maker, updater, step)
                actor.publish()
                if (step + 1) % config.dev_every == 0 or step + 1 == config.steps:
                    stepped.refresh()
                    row["dev_em"] = evaluate()
            rows.append({"step": step + 1, **row})
            report(config.steps, rows)
            if (step + 1) % config.checkpoint_every == 0:
                states = {name: engine.state_dict() for name, engine in engines.items()}
                checkpoint.save({"rows": rows, "pending": stepped.pending, **states})
        actor.finish()
        return rows

    def _learn(
        self, episodes: list[Episode], maker: "ExperienceMaker", updater: "Updater", step: int
    ) -> Metrics:
        """Do (2) to (7) with a step's episodes and return the step's metrics."""
        learned = usable(episodes)
        row: Metrics = {"gate_excluded": 1 - len(learned) / len(episodes)}
        if not learned:  # not one token of the student, where prompts leave it no room
            return row
        check_ids(learned, self.vocabulary)

        # (2) to (6) Log-probabilities, gate, KL, rewards, advantages.
        experience = maker.make(learned)
        row["gate_open"] = float(experience.gate.sum()) / len(episodes)
        row["gate_closed"] = 1 - row["gate_open"] - row["gate_excluded"]
        row |= training_metrics(learned, experience)
        row["unrewarded"] = float(not any(episode.correct for episode in learned))
        _require_numbers(row)  # before weights are changed by it

        # (7) Update, in mini-batches of shuffled episodes.
        row |= updater.update(experience, shuffled(len(learned), f"mini-{self.seed}-{step}"))
        _require_numbers(row)
        return row

    def _engines(self) -> tuple[TrainingEngine, FrozenModel | None, TrainingEngine | None]:
        """Return actor, reference and, for PPO, critic."""
        config, critic = self.config, None
        if self.recipe.algorithm == "ppo":  # made of the student while its weights are whole
            settings = self._optimization(config.critic_learning_rate, config.critic_learning_rate_warmup)
            critic = training_engine(Critic(self.student), settings, self.compute, published=False)
        settings = self._optimization(config.actor_learning_rate, config.actor_learning_rate_warmup)
        actor = training_engine(TokenModel(self.student, self.vocabulary), settings, self.compute)
        if self.reference is None:
            return actor, None, critic
        return actor, FrozenModel(self.reference, self.compute, self.vocabulary), critic

    def _optimization(self, learning_rate: float, warmup: float) -> Optimization:
        config = self.config
        updates = config.steps * (config.batch_size // config.mini_batch_size)
        schedule = constant(math.ceil(warmup * updates))
        return Optimization(learning_rate, config.weight_decay, config.max_grad_norm, schedule)

    def _questions(self, count: int, step: int) -> list[int]:
        """Return the indices of a step's questions; under GRPO each as often as its group has episodes."""
        group = self.config.group_size if self.recipe.algorithm == "grpo" else 1
        chosen = question_order(count, self.config.batch_size // group, step, self.seed)
        return [question for question in chosen for _ in range(group)]

    def _rate_behind(self, quantity: str) -> str:
        """Return the setting that a quantity which is no number asks to lower."""
        part = "critic" if quantity in ("value_loss", "critic_grad_norm") else "actor"
        return f"reinforce.{part}_learning_rate (now {getattr(self.config, f'{part}_learning_rate'):g})"


def _require_numbers(row: Metrics) -> None:
    """Raise NotFinite for a watched metric that is nan or infinite."""
    require_finite({name: row[name] for name in WATCHED if name in row})


@dataclass(frozen=True)
class GatedEpisodes:
    """What steps (2) to (4) give, whatever the algorithm.

    `sampled_logprobs` are the engine's, where `old_logprobs` are the trainer's and may differ. `kl` is in
    nats, and zero where the gate is closed; `kl_outside` has that of some of the episodes where it is closed.
    """

    sequences: list[TokenSequence]
    old_logprobs: ByEpisode
    sampled_logprobs: ByEpisode | None
    correct: Bool[Tensor, " episodes"]
    gate: Float[Tensor, " episodes"]
    kl: ByEpisode
    kl_outside: ByEpisode


@dataclass(frozen=True)
class PPOExperience(GatedEpisodes):
    """What an update of PPO learns from.

    `value_sequences`, `rewards`, `values` and `returns` cover the tokens of `gae_scope`: those that the model
    wrote, or the whole response.
    """

    rewards: list[Tensor]
    advantages: ByEpisode
    value_sequences: list[TokenSequence]
    values: list[Tensor]
    returns: list[Tensor]


@dataclass(frozen=True)
class GRPOExperience(GatedEpisodes):
    """What an update of GRPO learns from.

    `rewards` has one number an episode; `reference_logprobs` are there where the gate is open, for the loss.
    """

    rewards: list[Float[Tensor, " 1"]]
    advantages: ByEpisode
    reference_logprobs: list[Float[Tensor, " tokens"] | None]


Experience = PPOExperience | GRPOExperience


@dataclass
class ExperienceMaker:
    """Computes what a step's update learns from: steps (2) to (6)."""

    actor: TrainingEngine  # of a TokenModel
    reference: FrozenModel | None
    critic: TrainingEngine | None  # of a Critic; GRPO has none
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig

    @torch.no_grad()
    def make(self, episodes: list[Episode]) -> Experience:
        """Return the experience of episodes of which each has a token of the model."""
        sequences = [model_sequence(episode) for episode in episodes]

        # (2) Log-probabilities of what the model wrote, under the weights that wrote it (pi_old of eq. 2).
        sampled = _sampled_logprobs(episodes, sequences)
        by_trainer = self.config.old_logprobs == "trainer"
        old = self._each(sequences, self._policy_logprobs) if by_trainer else sampled

        # (3) Gate: which episodes are pulled towards the reference (the second case of eq. 4).
        correct: Bool[Tensor, " episodes"] = torch.tensor([episode.correct for episode in episodes])
        open_gate: Float[Tensor, " episodes"] = gate(correct, self.recipe.guidance)
        inside = [i for i, is_open in enumerate(open_gate) if is_open]
        outside = [i for i, is_open in enumerate(open_gate) if not is_open][: self.config.audit_episodes]

        # (4) KL[student || reference] at each token of these episodes; the reference runs on no others.
        kl, references = self._kl(sequences, old, inside)
        kl_outside, _ = self._kl(sequences, old, outside)

        gated = GatedEpisodes(
            sequences,
            old,
            sampled if by_trainer else None,
            correct,
            open_gate,
            [kl.get(i, torch.zeros_like(logprobs)) for i, logprobs in enumerate(old)],
            list(kl_outside.values()),
        )
        if self.critic is None:
            return self._grpo(episodes, gated, references)
        return self._ppo(episodes, gated, self.critic)

    def _ppo(self, episodes: list[Episode], gated: GatedEpisodes, critic: TrainingEngine) -> PPOExperience:
        """Do (5) and (6) of PPO."""
        whole = self.config.gae_scope == "all"
        value_sequences = [response_sequence(episode) for episode in episodes] if whole else gated.sequences
        written: list[Bool[Tensor, " tokens"]] = [  # by the model, among the tokens that have a value
            torch.tensor([episode.owners[position] == Owner.MODEL for position in sequence.positions])
            for episode, sequence in zip(episodes, value_sequences, strict=True)
        ]
        lengths = [len(tokens) for tokens in written]
        mask: Float[Tensor, "episodes tokens"]
        mask = pad_sequence([torch.ones(length) for length in lengths], batch_first=True)

        # (5) Rewards (eqs. 3 and 4): EM on the last token, -beta KL on every token where the gate is open.
        kl = [
            torch.zeros(len(tokens)).masked_scatter(tokens, own)
            for tokens, own in zip(written, gated.kl, strict=True)
        ]
        padded_kl: Float[Tensor, "episodes tokens"] = pad_sequence(kl, batch_first=True)
        rewards: Float[Tensor, "episodes tokens"]
        rewards = token_rewards(gated.correct, padded_kl, mask, gated.gate, self.config.beta)

        # (6) Advantages: GAE over the critic's values, whitened over the step's tokens.
        values = self._each(value_sequences, critic)
        padded_values: Float[Tensor, "episodes tokens"] = pad_sequence(values, batch_first=True)
        advantages, returns = gae(rewards, padded_values, mask, self.config.gamma, self.config.lam)
        advantages = whiten(advantages, mask)

        return PPOExperience(
            **vars(gated),
            rewards=[row[:n] for row, n in zip(rewards, lengths, strict=True)],
            advantages=[a[:n][own] for a, n, own in zip(advantages, lengths, written, strict=True)],
            value_sequences=value_sequences,
            values=values,
            returns=[row[:n] for row, n in zip(returns, lengths, strict=True)],
        )

    def _grpo(
        self, episodes: list[Episode], gated: GatedEpisodes, references: dict[int, Float[Tensor, " tokens"]]
    ) -> GRPOExperience:
        """Do (5) and (6) of GRPO."""
        # (5) Rewards (eq. 3): EM; the KL is a term of the loss.
        rewards: Float[Tensor, " episodes"] = gated.correct.float()

        # (6) Advantages: how much better an episode is than others of its question, at each of its tokens.
        questions = [(episode.dataset, episode.question_id) for episode in episodes]
        advantages: Float[Tensor, " episodes"] = group_advantages(rewards, questions)

        return GRPOExperience(
            **vars(gated),
            rewards=list(rewards[:, None]),
            advantages=[
                torch.full_like(old, float(advantage))
                for old, advantage in zip(gated.old_logprobs, advantages, strict=True)
            ],
            reference_logprobs=[references.get(i) for i in range(len(episodes))],
        )

    def _kl(
        self, sequences: list[TokenSequence], old: ByEpisode, chosen: list[int]
    ) -> tuple[dict[int, Float[Tensor, " tokens"]], dict[int, Float[Tensor, " tokens"]]]:
        """Return the KL of the chosen episodes, and the reference's log-probabilities that it is made of."""
        if not chosen or self.reference is None:
            return {}, {}
        own = [sequences[i] for i in chosen]
        estimator = "k3" if self.critic is None else self.config.kl_estimator  # GRPO's is that of its loss
        if estimator == "full":
            return dict(zip(chosen, self._each(own, self._full_kl), strict=True)), {}
        references = dict(zip(chosen, self._each(own, self._reference_logprobs), strict=True))
        return {i: kl_estimate(old[i], theirs, estimator) for i, theirs in references.items()}, references

    def _policy_logprobs(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        logprobs: Tensor = self.actor(batch, self._policy_function(batch))[0]
        return logprobs

    def _reference_logprobs(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        assert self.reference is not None
        return self.reference(batch, self._policy_function(batch))[0]

    def _policy_function(self, batch: TokenBatch) -> HeadFunction:
        return policy_function(batch, self.config.sampling.temperature)

    def _full_kl(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        """Compute the KL over the whole vocabulary."""
        reference, temperature = self.reference, self.config.sampling.temperature
        assert reference is not None
        theirs = reference.hidden(batch)

        def losses(hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"]) -> PerToken:
            return distillation_losses(
                hidden, head, theirs, reference.head, batch.targets, reverse_kl, temperature
            )

        kl: Tensor = self.actor(batch, losses)[1]
        return kl

    def _each(self, sequences: list[TokenSequence], function: Callable[[TokenBatch], Tensor]) -> list[Tensor]:
        return each_sequence(self.actor, sequences, self.compute.micro_batch_tokens, function)


def _sampled_logprobs(episodes: list[Episode], sequences: list[TokenSequence]) -> ByEpisode:
    """Return the log-probabilities with which the engine sampled what the model wrote."""
    return [
        torch.tensor([episode.logprobs[position] for position in sequence.positions])
        for episode, sequence in zip(episodes, sequences, strict=True)
    ]


def training_metrics(episodes: list[Episode], experience: Experience) -> Metrics:
    """Return what shows collapse: the episodes' own metrics, reward, KL inside and outside the gate, ..."""
    inside = [kl for kl, is_open in zip(experience.kl, experience.gate, strict=True) if is_open]
    metrics = episode_metrics(episodes)
    metrics["reward"] = sum(float(rewards.sum()) for rewards in experience.rewards) / len(episodes)
    for name, estimates in (("kl_inside", inside), ("kl_outside", experience.kl_outside)):
        if estimates:
            metrics[name] = float(torch.cat(estimates).mean())
    if experience.sampled_logprobs is not None:
        metrics |= engine_gap(torch.cat(experience.old_logprobs), torch.cat(experience.sampled_logprobs))
    if isinstance(experience, PPOExperience):
        values, returns = torch.cat(experience.values), torch.cat(experience.returns)
        metrics["explained_variance"] = explained_variance(values, returns)
    return metrics


@dataclass
class Updater:
    """Updates actor and critic once by every mini-batch of a step's episodes: step (7)."""

    actor: TrainingEngine  # of a TokenModel
    critic: TrainingEngine | None  # of a Critic; GRPO has none
    config: ReinforceConfig
    compute: ComputeConfig

    def update(self, experience: Experience, order: list[int]) -> Metrics:
        """Update by the episodes in this order; return averages of the mini-batches' metrics."""
        rows = [self._step(experience, part) for part in mini_batches(order, self.config.mini_batch_size)]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def _step(self, experience: Experience, chosen: list[int]) -> Metrics:
        metrics = self._actor_gradient(experience, chosen)
        metrics["actor_grad_norm"] = self.actor.step()
        if self.critic is not None and isinstance(experience, PPOExperience):
            metrics["value_loss"] = self._critic_gradient(self.critic, experience, chosen)
            metrics["critic_grad_norm"] = self.critic.step()
        return metrics

    def _actor_gradient(self, experience: Experience, chosen: list[int]) -> Metrics:
        """Add up the gradient of the policy's loss (eq. 2), an average over the mini-batch's model tokens."""
        config, actor = self.config, self.actor
        sequences = [experience.sequences[i] for i in chosen]
        tokens = sum(len(sequence.positions) for sequence in sequences)

        def objective(part: list[int], batch: TokenBatch) -> tuple[Float[Tensor, ""], Metrics]:
            episodes = [chosen[i] for i in part]
            old = _flat(experience.old_logprobs, episodes).to(actor.device)
            advantages = _flat(experience.advantages, episodes).to(actor.device)
            logprobs, entropy = actor(batch, policy_function(batch, config.sampling.temperature))
            losses, clipped = clipped_surrogate(logprobs, old, advantages, config.clip)
            if config.importance_cap is not None and experience.sampled_logprobs is not None:
                sampled = _flat(experience.sampled_logprobs, episodes).to(actor.device)
                losses = losses * importance_weights(old, sampled, config.importance_cap)
            loss = losses.sum() / tokens - config.entropy_weight * entropy.sum() / tokens
            if isinstance(experience, GRPOExperience):
                loss = loss + config.beta * _kl_of_gated(experience, episodes, logprobs) / tokens
            sums = (losses.sum(), entropy.sum(), clipped.sum(), (old - logprobs).sum())
            return loss, dict(zip(names, (value.item() / tokens for value in sums), strict=True))

        names = ("policy_loss", "entropy", "clip_fraction", "approx_kl")
        return summed(actor, sequences, self.compute.micro_batch_tokens, names, objective)

    def _critic_gradient(self, critic: TrainingEngine, experience: PPOExperience, chosen: list[int]) -> float:
        """Add up the gradient of the clipped squared error of the values, and return the loss."""
        sequences = [experience.value_sequences[i] for i in chosen]
        tokens = sum(len(sequence.positions) for sequence in sequences)

        def objective(part: list[int], batch: TokenBatch) -> tuple[Float[Tensor, ""], Metrics]:
            episodes = [chosen[i] for i in part]
            old = _flat(experience.values, episodes).to(critic.device)
            returns = _flat(experience.returns, episodes).to(critic.device)
            losses = value_loss(critic(batch), old, returns, self.config.value_clip)
            loss = self.config.value_loss_weight * losses.sum() / tokens
            return loss, {"value_loss": loss.item()}

        limit = self.compute.micro_batch_tokens
        return summed(critic, sequences, limit, ["value_loss"], objective)["value_loss"]


def mini_batches(order: list[int], size: int) -> list[list[int]]:
    """Cut into as few parts of at most `size` as possible, of equal lengths to one.

    Where episodes failed, no single left-over episode makes an update of its own.
    """
    count = -(-len(order) // size)
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def _flat(values: list[Tensor], episodes: list[int]) -> Float[Tensor, " N"]:
    """Join the values of these episodes' tokens, in the order in which `collate` lays them out."""
    return torch.cat([values[i] for i in episodes])


def _kl_of_gated(
    experience: GRPOExperience, episodes: list[int], logprobs: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Sum the k3 estimates of episodes whose gate is open; k1 in a loss would have no gradient on average."""
    total = logprobs.new_zeros(())
    own = logprobs.split([len(experience.old_logprobs[i]) for i in episodes])
    for i, policy in zip(episodes, own, strict=True):
        reference = experience.reference_logprobs[i]
        if reference is not None:
            total = total + kl_estimate(policy, reference.to(policy.device), "k3").sum()
    return total


class Critic(torch.nn.Module):
    """Gives the value of the state before each counted token: the student's backbone with a fresh head."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone_of(student))
        self.head = torch.nn.Linear(student.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.head.to(student.device)

    def forward(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        """Return the values, float32."""
        values: Tensor = self.head(counted_hidden(self.backbone, batch))
        return values.float()[:, 0]
