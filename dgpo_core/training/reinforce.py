"""The critic: the student's backbone with a fresh scalar head (paper, section 4.3).

From episodes to what PPO trains on: log-probabilities, values, rewards and advantages.

One pass of PPO updates over a step's experience.

DGPO and its relatives: PPO in which the gate decides who is pulled towards the reference (eqs. 2-4).
"""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.objectives import rewards as reward_functions
from dgpo_core.objectives.divergences import reverse_kl
from dgpo_core.objectives.logprobs import distillation_terms, engine_gap
from dgpo_core.objectives.policy import (
    clipped_surrogate,
    explained_variance,
    gae,
    group_advantages,
    importance_weights,
    value_loss,
    whiten,
)
from dgpo_core.training import optimizer as optim
from dgpo_core.training.batches import (
    Pair,
    Terms,
    TokenBatch,
    TokenModel,
    TokenSequence,
    backbone_of,
    check_ids,
    collate,
    counted_hidden,
    episode_metrics,
    micro_batches,
    model_sequence,
    policy_terms,
    response_sequence,
    shared_ids,
)
from dgpo_core.training.checkpoint import Checkpoint, require_finite, training_step
from dgpo_core.training.engines import FrozenModel, Optimization, TrainingEngine, training_engine
from dgpo_core.training.episode_sources import Rollout, question_order, usable
from dgpo_core.training.parallel import added, joined, passes


class Critic(torch.nn.Module):
    """Values of the states before each counted token."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone_of(student))
        self.head = torch.nn.Linear(student.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.head.to(student.device)

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """[N] float32."""
        values: torch.Tensor = self.head(counted_hidden(self.backbone, batch))
        return values.float()[:, 0]


Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Experience:
    """One entry an episode; tensors [model tokens of the episode] unless said otherwise.

    `value_sequences`, `values` and `returns` cover the tokens of `gae_scope`: the model's, or all of the
    response; GRPO has none. `kl` is the estimate against the reference, nats, zero where the gate is closed;
    `kl_outside` the same for some of the episodes where it is closed. `reference` are the reference's
    log-probabilities where the gate is open and the KL belongs into the loss (GRPO). `sampled_logprobs` are
    the engine's, where `old_logprobs` are the trainer's and may differ.
    """

    sequences: list[TokenSequence]
    old_logprobs: Tensors
    advantages: Tensors
    value_sequences: list[TokenSequence]
    values: Tensors
    returns: Tensors
    kl: Tensors
    rewards: Tensors
    gated: list[bool]
    kl_outside: Tensors
    reference: list[torch.Tensor | None]
    sampled_logprobs: Tensors | None = None


@dataclass(frozen=True)
class Rolled:
    """A step's episodes with what both algorithms need of them.

    `old` are the log-probabilities of the model tokens under the policy that acted, `sampled` the engine's
    where those are the trainer's; `correct` is boolean, `open_gate` 0 or 1 [episodes]; `inside` the episodes
    whose gate is open, `outside` those of the others on which the KL is measured without being trained on.
    """

    episodes: list[Episode]
    sequences: list[TokenSequence]
    old: Tensors
    sampled: Tensors | None
    correct: torch.Tensor
    open_gate: torch.Tensor
    inside: list[int]
    outside: list[int]

    @property
    def gated(self) -> list[bool]:
        return [bool(is_open) for is_open in self.open_gate]


@dataclass
class ExperienceMaker:
    actor: TrainingEngine  # of a TokenModel
    reference: FrozenModel | None
    critic: TrainingEngine | None
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig

    @torch.no_grad()
    def make(self, episodes: list[Episode]) -> Experience:
        sequences = [model_sequence(episode) for episode in episodes]
        correct = torch.tensor([episode.correct for episode in episodes])
        open_gate = reward_functions.gate(correct, self.recipe.guidance)
        audited = self.config.audit_episodes if self.reference is not None else 0
        sampled = _sampled_logprobs(episodes, sequences)
        by_trainer = self.config.old_logprobs == "trainer"
        rolled = Rolled(
            episodes,
            sequences,
            self._each(sequences, self._logprobs) if by_trainer else sampled,
            sampled if by_trainer else None,
            correct,
            open_gate,
            inside=[i for i, is_open in enumerate(open_gate) if is_open],
            outside=[i for i, is_open in enumerate(open_gate) if not is_open][:audited],
        )
        return self._relative(rolled) if self.critic is None else self._valued(rolled, self.critic)

    def _relative(self, rolled: Rolled) -> Experience:
        """GRPO: an episode's advantage is how much better it is than others of its question."""
        episodes, sequences, old = rolled.episodes, rolled.sequences, rolled.old
        rewards = rolled.correct.float()
        advantages = group_advantages(rewards, [(e.dataset, e.question_id) for e in episodes])
        references = dict(zip(rolled.inside, self._reference_logprobs(sequences, rolled.inside), strict=True))
        outside = zip(rolled.outside, self._reference_logprobs(sequences, rolled.outside), strict=True)
        zero = torch.zeros_like
        return Experience(
            sequences=sequences,
            old_logprobs=old,
            advantages=[torch.full_like(o, float(a)) for o, a in zip(old, advantages, strict=True)],
            value_sequences=[],
            values=[],
            returns=[],
            kl=[k3(o, references[i]) if i in references else zero(o) for i, o in enumerate(old)],
            rewards=list(rewards[:, None]),
            gated=rolled.gated,
            kl_outside=[k3(old[i], reference) for i, reference in outside],
            reference=[references.get(i) for i in range(len(episodes))],
            sampled_logprobs=rolled.sampled,
        )

    def _valued(self, rolled: Rolled, critic: TrainingEngine) -> Experience:
        """PPO: token rewards with the KL in them, and advantages by the critic's values."""
        episodes, sequences = rolled.episodes, rolled.sequences
        kl = [torch.zeros_like(logprobs) for logprobs in rolled.old]
        for i, estimate in zip(rolled.inside, self._kl(rolled, rolled.inside), strict=True):
            kl[i] = estimate
        whole = self.config.gae_scope == "all"
        value_sequences = [response_sequence(e) for e in episodes] if whole else sequences
        values = self._each(value_sequences, critic)
        # model tokens among the tokens that have a value
        owned = [
            torch.tensor([e.owners[p] == Owner.MODEL for p in s.positions])
            for e, s in zip(episodes, value_sequences, strict=True)
        ]
        scattered = [torch.zeros(len(o)).masked_scatter(o, k) for o, k in zip(owned, kl, strict=True)]
        mask = pad_sequence([torch.ones(len(o)) for o in owned], batch_first=True)
        rewards = reward_functions.token_rewards(
            rolled.correct,
            pad_sequence(scattered, batch_first=True),
            mask,
            rolled.open_gate,
            self.config.beta,
        )
        padded_values = pad_sequence(values, batch_first=True)
        advantages, returns = gae(rewards, padded_values, mask, self.config.gamma, self.config.lam)
        advantages = whiten(advantages, mask)
        lengths = [len(o) for o in owned]
        return Experience(
            sequences=sequences,
            old_logprobs=rolled.old,
            advantages=[a[:n][o] for a, n, o in zip(advantages, lengths, owned, strict=True)],
            value_sequences=value_sequences,
            values=values,
            returns=[r[:n] for r, n in zip(returns, lengths, strict=True)],
            kl=kl,
            rewards=[r[:n] for r, n in zip(rewards, lengths, strict=True)],
            gated=rolled.gated,
            kl_outside=self._kl(rolled, rolled.outside),
            reference=[None] * len(episodes),
            sampled_logprobs=rolled.sampled,
        )

    def _logprobs(self, batch: TokenBatch) -> torch.Tensor:
        logprobs: torch.Tensor = self.actor(batch, self._policy(batch))[0]
        return logprobs

    def _policy(self, batch: TokenBatch) -> Terms[Pair]:
        return policy_terms(batch, self.config.sampling.temperature)

    def _kl(self, rolled: Rolled, chosen: list[int]) -> Tensors:
        """KL estimates of the chosen episodes; the reference runs on no others."""
        if not chosen or self.reference is None:
            return []
        if self.config.kl_estimator == "full":
            return self._each([rolled.sequences[i] for i in chosen], self._full_kl)
        references = self._reference_logprobs(rolled.sequences, chosen)
        return [
            reward_functions.kl_estimate(rolled.old[i], reference, self.config.kl_estimator)
            for i, reference in zip(chosen, references, strict=True)
        ]

    def _reference_logprobs(self, sequences: list[TokenSequence], chosen: list[int]) -> Tensors:
        reference = self.reference
        if reference is None:
            return []
        return self._each(
            [sequences[i] for i in chosen],
            lambda batch: reference(batch, self._policy(batch))[0],
        )

    def _full_kl(self, batch: TokenBatch) -> torch.Tensor:
        reference, temperature = self.reference, self.config.sampling.temperature
        assert reference is not None
        theirs = reference.hidden(batch)

        def terms(hidden: torch.Tensor, head: torch.Tensor) -> Pair:
            return distillation_terms(
                hidden, head, theirs, reference.head, batch.targets, reverse_kl, temperature
            )

        kl: torch.Tensor = self.actor(batch, terms)[1]
        return kl

    def _each(self, sequences: list[TokenSequence], function) -> Tensors:  # type: ignore[no-untyped-def]
        """Apply a function of a batch -> [N] in micro-batches; one CPU tensor a sequence, in order."""
        parts = list(micro_batches([len(s.ids) for s in sequences], self.compute.micro_batch_tokens))
        own: list[list[torch.Tensor]] = []
        for part, counts in passes(parts, self.actor.lockstep):
            batch = collate([sequences[i] for i in part], self.actor.device)
            values = function(batch)
            if counts:
                own.append(batch.split(values.float().cpu()))
        results: dict[int, torch.Tensor] = {}
        for part, tensors in zip(parts, joined(own), strict=True):
            results.update(zip(part, tensors, strict=True))
        return [results[i] for i in range(len(sequences))]


def _sampled_logprobs(episodes: list[Episode], sequences: list[TokenSequence]) -> Tensors:
    """What the engine said of the tokens that the model wrote."""
    return [
        torch.tensor([episode.logprobs[position] for position in sequence.positions])
        for episode, sequence in zip(episodes, sequences, strict=True)
    ]


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """GRPO's KL estimate, as in its loss; `k1` there would have no gradient on average."""
    return reward_functions.kl_estimate(logprobs, reference, "k3")


def training_metrics(episodes: list[Episode], experience: Experience) -> dict[str, float]:
    """What shows collapse: the episodes' own metrics, reward, KL inside and outside the gate, ..."""
    inside = [k for k, is_gated in zip(experience.kl, experience.gated, strict=True) if is_gated]
    metrics = episode_metrics(episodes)
    metrics["reward"] = sum(float(r.sum()) for r in experience.rewards) / len(episodes)
    for name, estimates in (("kl_inside", inside), ("kl_outside", experience.kl_outside)):
        if estimates:
            metrics[name] = float(torch.cat(estimates).mean())
    if experience.sampled_logprobs is not None:
        metrics |= engine_gap(torch.cat(experience.old_logprobs), torch.cat(experience.sampled_logprobs))
    if experience.values:
        metrics["explained_variance"] = explained_variance(
            torch.cat(experience.values), torch.cat(experience.returns)
        )
    return metrics


@dataclass
class Updater:
    actor: TrainingEngine  # of a TokenModel
    critic: TrainingEngine | None
    config: ReinforceConfig
    compute: ComputeConfig

    def update(self, experience: Experience, order: list[int]) -> dict[str, float]:
        """One actor and, with a critic, one critic update a mini-batch; metrics are averages over them."""
        parts = mini_batches(order, self.config.mini_batch_size)
        rows = [self._mini_batch(experience, part) for part in parts]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def _mini_batch(self, experience: Experience, chosen: list[int]) -> dict[str, float]:
        metrics = self._actor_gradient(experience, chosen)
        metrics["actor_grad_norm"] = self.actor.step()
        if self.critic is not None:
            metrics["value_loss"] = self._critic_gradient(self.critic, experience, chosen)
            metrics["critic_grad_norm"] = self.critic.step()
        return metrics

    def _actor_gradient(self, experience: Experience, chosen: list[int]) -> dict[str, float]:
        """Loss sums over model tokens, with the mini-batch's token count as the one denominator."""
        sequences = [experience.sequences[i] for i in chosen]
        tokens = sum(len(s.positions) for s in sequences)
        totals = dict.fromkeys(("policy_loss", "entropy", "clip_fraction", "approx_kl"), 0.0)
        lengths = [len(s.ids) for s in sequences]
        parts = micro_batches(lengths, self.compute.micro_batch_tokens)
        for part, counts in passes(parts, self.actor.lockstep):
            batch = collate([sequences[i] for i in part], self.actor.device)
            old = _stream(experience.old_logprobs, chosen, part).to(self.actor.device)
            advantages = _stream(experience.advantages, chosen, part).to(self.actor.device)
            logprobs, entropy = self.actor(batch, policy_terms(batch, self.config.sampling.temperature))
            losses, clipped = clipped_surrogate(logprobs, old, advantages, self.config.clip)
            if self.config.importance_cap is not None and experience.sampled_logprobs is not None:
                sampled = _stream(experience.sampled_logprobs, chosen, part).to(self.actor.device)
                losses = losses * importance_weights(old, sampled, self.config.importance_cap)
            loss = losses.sum() / tokens - self.config.entropy_weight * entropy.sum() / tokens
            guidance = self._guidance(experience, [chosen[i] for i in part], logprobs)
            loss = loss + self.config.beta * guidance / tokens
            self.actor.backward(loss if counts else 0 * loss)
            if not counts:
                continue
            totals["policy_loss"] += losses.sum().item() / tokens
            totals["entropy"] += entropy.sum().item() / tokens
            totals["clip_fraction"] += clipped.sum().item() / tokens
            totals["approx_kl"] += (old - logprobs).sum().item() / tokens
        return added(totals)

    def _guidance(self, experience: Experience, part: list[int], logprobs: torch.Tensor) -> torch.Tensor:
        """Sum of the KL estimates that belong into the loss: of gated episodes, under GRPO."""
        total = logprobs.new_zeros(())
        own = logprobs.split([len(experience.old_logprobs[i]) for i in part])
        for i, policy in zip(part, own, strict=True):
            reference = experience.reference[i]
            if reference is not None:
                total = total + k3(policy, reference.to(policy.device)).sum()
        return total

    def _critic_gradient(self, critic: TrainingEngine, experience: Experience, chosen: list[int]) -> float:
        sequences = [experience.value_sequences[i] for i in chosen]
        tokens = sum(len(s.positions) for s in sequences)
        total = 0.0
        lengths = [len(s.ids) for s in sequences]
        parts = micro_batches(lengths, self.compute.micro_batch_tokens)
        for part, counts in passes(parts, critic.lockstep):
            batch = collate([sequences[i] for i in part], critic.device)
            old = _stream(experience.values, chosen, part).to(critic.device)
            returns = _stream(experience.returns, chosen, part).to(critic.device)
            losses = value_loss(critic(batch), old, returns, self.config.value_clip)
            loss = self.config.value_loss_weight * losses.sum() / tokens
            critic.backward(loss if counts else 0 * loss)
            total += loss.item() if counts else 0.0
        return added({"value_loss": total})["value_loss"]


def mini_batches(order: list[int], size: int) -> list[list[int]]:
    """As few parts of at most `size` as possible, of equal lengths to one: where episodes failed, no single
    left-over episode makes an update of its own."""
    count = -(-len(order) // size)
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def _stream(tensors: list[torch.Tensor], chosen: list[int], part: list[int]) -> torch.Tensor:
    """Values of a micro-batch's tokens, in the order in which `collate` lays them out."""
    return torch.cat([tensors[chosen[i]] for i in part])


Metrics = dict[str, float]

# Training stops when one of these is no number; causes first, as the first one says what to lower.
WATCHED = ["kl_inside", "kl_outside", "reward", "value_loss", "critic_grad_norm", "policy_loss", "entropy"]
WATCHED += ["approx_kl", "actor_grad_norm"]


@dataclass
class Reinforcer:
    """Trains `student` in place. `reference` is the model that the recipe names, frozen.

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

    def __post_init__(self) -> None:
        self.vocabulary = shared_ids(self.known, self.student, self.reference)

    def train(
        self,
        questions: int,
        rollout: Rollout,
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, list[Metrics]], None],
    ) -> list[Metrics]:
        """Rows of metrics, one a step. Resumes from the checkpoint exactly.

        `report` is given the number of steps and the rows so far. Raises NotFinite at the first step that
        gives no numbers; the checkpoint is then the last one before it.
        """
        config = self.config
        torch.manual_seed(self.seed)
        critic = None
        if self.recipe.algorithm == "ppo":  # made of the student while its weights are whole
            how = self._optimization(config.critic_learning_rate, config.critic_learning_rate_warmup)
            critic = training_engine(Critic(self.student), how, self.compute, published=False)
        how = self._optimization(config.actor_learning_rate, config.actor_learning_rate_warmup)
        actor = training_engine(TokenModel(self.student, self.vocabulary), how, self.compute)
        reference = None
        if self.reference is not None:
            reference = FrozenModel(self.reference, self.compute, self.vocabulary)
        parts: dict[str, Any] = {"actor": actor}
        if critic is not None:
            parts["critic"] = critic
        rows: list[Metrics] = []
        if state := checkpoint.load():
            rows = state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        maker = ExperienceMaker(actor, reference, critic, self.recipe, config, self.compute)
        updater = Updater(actor, critic, config, self.compute)
        actor.publish()
        for step in range(len(rows), config.steps):
            with training_step(step + 1, self._rate_behind):
                row = self._step(rollout(self._questions(questions, step), step), maker, updater, step)
                actor.publish()
                if (step + 1) % config.dev_every == 0 or step + 1 == config.steps:
                    row["dev_em"] = evaluate()
            rows.append({"step": step + 1, **row})
            report(config.steps, rows)
            if (step + 1) % config.checkpoint_every == 0:
                checkpoint.save({"rows": rows, **{name: part.state_dict() for name, part in parts.items()}})
        actor.finish()
        return rows

    def _rate_behind(self, quantity: str) -> str:
        """Return the setting that a quantity which is no number asks to lower."""
        part = "critic" if quantity in ("value_loss", "critic_grad_norm") else "actor"
        return f"reinforce.{part}_learning_rate (now {getattr(self.config, f'{part}_learning_rate'):g})"

    def _optimization(self, learning_rate: float, warmup: float) -> Optimization:
        config = self.config
        updates = config.steps * (config.batch_size // config.mini_batch_size)
        schedule = optim.constant(math.ceil(warmup * updates))
        return Optimization(learning_rate, config.weight_decay, config.max_grad_norm, schedule)

    def _questions(self, count: int, step: int) -> list[int]:
        """Indices of a step's questions; under GRPO each as often as its group has episodes."""
        config = self.config
        group = config.group_size if self.recipe.algorithm == "grpo" else 1
        chosen = question_order(count, config.batch_size // group, step, self.seed)
        return [question for question in chosen for _ in range(group)]

    def _step(self, episodes: list[Episode], maker: ExperienceMaker, updater: Updater, step: int) -> Metrics:
        learned = usable(episodes)
        row: Metrics = {"gate_excluded": 1 - len(learned) / len(episodes)}
        if not learned:  # not one token of the student, where prompts leave it no room
            return row
        check_ids(learned, self.vocabulary)
        experience: Experience = maker.make(learned)
        row["gate_open"] = sum(experience.gated) / len(episodes)
        row["gate_closed"] = 1 - row["gate_open"] - row["gate_excluded"]
        row |= training_metrics(learned, experience)
        row["unrewarded"] = float(not any(episode.correct for episode in learned))
        order = list(range(len(learned)))
        random.Random(f"mini-{self.seed}-{step}").shuffle(order)
        _require_numbers(row)  # before weights are changed by it
        row |= updater.update(experience, order)
        _require_numbers(row)
        return row


def _require_numbers(row: Metrics) -> None:
    """Raise NotFinite for a watched metric that is nan or infinite."""
    require_finite({name: row[name] for name in WATCHED if name in row})
