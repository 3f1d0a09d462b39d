"""DGPO and its relatives: PPO, GRPO or REINFORCE in which a gate opens to a reference's pull (eqs. 2-4).

`Reinforcer.train` repeats one step (docs/method.md, "Equations"):

(1) roll out: the student answers the step's questions, searching as it likes;
(2) log-probabilities of what it wrote under the student, pi_old of eq. 2;
(3) gate: which episodes are pulled towards the reference, in DGPO the wrong ones (eq. 4);
(4) KL of the student to the reference (the teacher, or the model that training started from), which reads
    the episodes whose gate is open, and no others but for an audit;
(5) rewards: exact match and, where the recipe places it there, the KL (eqs. 3 and 4);
(6) advantages: over a critic's values (PPO), the mean of the step's tokens (REINFORCE), or other episodes of
    the same question (GRPO);
(7) update: the clipped surrogate (eq. 2), the entropy and, where the recipe places it there, the KL, of which
    (4) is then a part of this pass; under PPO also the critic.

(1) and the loop are `Reinforcer`, (2) to (6) `ExperienceMaker`, (7) `Updater`. Only tokens that the model
wrote have an advantage, a KL and a gradient; the prompt's and the environment's are context.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dgpo_core.agent.actions import ActionKind, parse_action
from dgpo_core.agent.episode import Decode, Episode, Owner, Turn, nothing_new
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.errors import NotFinite
from dgpo_core.objectives.divergences import reverse_kl
from dgpo_core.objectives.logprobs import PerToken, distillation_losses, engine_gap
from dgpo_core.objectives.policy import (
    EpisodeTokens,
    clipped_surrogate,
    explained_variance,
    gae,
    group_advantages,
    importance_weights,
    value_loss,
    whiten,
)
from dgpo_core.objectives.rewards import gate, kl_estimate, token_rewards
from dgpo_core.objectives.turns import fallen_likelihood
from dgpo_core.threads import single_threaded
from dgpo_core.training.batches import (
    Critic,
    HeadFunction,
    TokenBatch,
    TokenModel,
    TokenSequence,
    check_ids,
    collate,
    model_sequence,
    policy_function,
    response_sequence,
    sampled_logprobs,
    shared_ids,
)
from dgpo_core.training.checkpoint import BestModel, Checkpoint, require_finite, training_step
from dgpo_core.training.engines import (
    FrozenModel,
    TrainingEngine,
    each_sequence,
    summed,
    training_engine,
    update,
)
from dgpo_core.training.episode_sources import (
    Metrics,
    Rollout,
    episode_metrics,
    mini_batches,
    question_order,
    shuffled,
    usable,
)
from dgpo_core.training.guidance import GuidanceLoss
from dgpo_core.training.optimizer import Optimization, constant
from dgpo_core.training.overlap import StepEpisodes
from dgpo_core.training.watch import BAD, Watch

# A step is dropped when one of these is no number; causes first, as the first one says what to lower.
WATCHED = ("kl_inside", "kl_outside", "reward")

Answered = frozenset[tuple[str, str]]  # (data set, question) that the teacher answers correctly
ByEpisode = list[Float[Tensor, " tokens"]]  # one tensor an episode, of the tokens that the model wrote


@dataclass
class Reinforcer:
    """Trains `student` in place. `reference` is the model that the recipe names, frozen.

    `sampler` is the model that rolls out: a copy of the student under `overlap`, by default the student.
    Distributions are over the ids that the tokenizer knows, the first `known`, as far as both models have
    rows for them; None: all of these rows. `answered` are the questions that the teacher answers correctly,
    for the gate `teachable`; `decode` is the tokenizer's, for `repeat_penalty`.
    """

    student: PreTrainedModel
    reference: PreTrainedModel | None
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig
    seed: int
    known: int | None = None
    sampler: PreTrainedModel | None = None
    answered: Answered = frozenset()
    decode: Decode | None = None
    watch: Watch = field(default_factory=Watch)

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

        With `patience`, or rolled back, the student is in the end the best of those that were validated.
        Resume from the checkpoint exactly. `report` is called with the number of steps and the rows so far.
        Raise NotFinite after too many steps without numbers, UserError for a collapse that stops training.
        """
        config = self.config
        torch.manual_seed(self.seed)
        actor, reference, critic = self._engines()
        best = BestModel(config.patience, self.watch.may_roll_back)
        engines = {"actor": actor} if critic is None else {"actor": actor, "critic": critic}
        parts: dict[str, Any] = {**engines, "best": best}
        rows: list[Metrics] = []
        asked = partial(self._questions, questions)
        sampler = self.sampler or self.student
        stepped = StepEpisodes(lambda n: rollout(asked(n), n), self.student, sampler, config.steps)
        if state := checkpoint.load():
            rows, stepped.pending = state["rows"], state.get("pending")
            for name, part in parts.items():
                part.load_state_dict(state[name])
        maker = ExperienceMaker(
            actor, reference, critic, self.recipe, config, self.compute, self.answered, self.decode
        )
        updater = Updater(actor, critic, config, self.compute, GuidanceLoss.of(self.recipe, reference))
        actor.publish()
        for step in range(len(rows), config.steps):
            if best.over or self.watch.rolls_back(rows):
                break
            with training_step(step + 1, self._rate_behind):
                pending = stepped.pending
                with checkpoint.saved_when_stopped(engines, {"best": best}, rows=rows, pending=pending):
                    row = self._step(stepped, maker, updater, rows)
                actor.publish()
                if (step + 1) % config.dev_every == 0 or step + 1 == config.steps:
                    stepped.refresh()
                    row["dev_em"] = evaluate()
                    best.validated(row["dev_em"], actor.weights)
            rows.append({"step": step + 1, **row})
            report(config.steps, rows)
            if (step + 1) % config.checkpoint_every == 0 and BAD not in row:
                states = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save({"rows": rows, "pending": stepped.pending, **states})
        actor.finish(best.chosen(self.watch.rolls_back(rows)))
        return rows

    def _step(
        self, stepped: StepEpisodes, maker: "ExperienceMaker", updater: "Updater", rows: list[Metrics]
    ) -> Metrics:
        """Do the step after `rows` and return its metrics; from a mini-batch without numbers on, drop it."""
        step, episodes = len(rows), list[Episode]()
        try:
            # (1) Roll out: the student as it is now answers the step's questions; or it has, a step ago.
            episodes = stepped.take(step)
            with stepped.ahead(step + 1):
                return self._learn(episodes, maker, updater, step)
        except NotFinite as error:
            if any(engine.spent for engine in (updater.actor, updater.critic) if engine is not None):
                raise
            return self.watch.drop(rows, episodes, error) | {"gate_excluded": 1.0}

    def _learn(
        self, episodes: list[Episode], maker: "ExperienceMaker", updater: "Updater", step: int
    ) -> Metrics:
        """Do (2) to (7) with a step's episodes and return the step's metrics."""
        learned = usable(episodes)
        row: Metrics = {"episodes": float(len(episodes))}
        row["gate_excluded"] = 1 - len(learned) / len(episodes)
        if not learned:  # not one token of the student, where prompts leave it no room
            return row
        check_ids(learned, self.vocabulary)

        # (2) to (6) Log-probabilities, gate, KL, rewards, advantages.
        experience = maker.make(learned)
        row["gate_open"] = float(experience.gate.sum()) / len(episodes)
        row["gate_closed"] = 1 - row["gate_open"] - row["gate_excluded"]
        row |= training_metrics(learned, experience)
        row["unrewarded"] = float(not any(episode.correct for episode in learned))
        require_finite({name: row[name] for name in WATCHED if name in row} | largest(experience))

        # (7) Update, in mini-batches of shuffled episodes.
        order = shuffled(len(learned), f"mini-{self.seed}-{step}")
        row |= updater.update(experience, order, critic_only=step < self.config.critic_only_steps)
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
        part = "critic" if quantity in ("value", "value_loss", "critic_grad_norm") else "actor"
        return f"reinforce.{part}_learning_rate (now {getattr(self.config, f'{part}_learning_rate'):g})"


@dataclass(frozen=True)
class GatedEpisodes:
    """What steps (2) to (4) give, whatever the algorithm.

    `sampled_logprobs` are the engine's, where `old_logprobs` are the trainer's and may differ. `kl`, in nats,
    has the episodes whose gate is open, where the KL is a reward; `kl_outside` has some of the others.
    """

    sequences: list[TokenSequence]
    old_logprobs: ByEpisode
    sampled_logprobs: ByEpisode | None
    correct: Bool[Tensor, " episodes"]
    gate: Float[Tensor, " episodes"]
    kl: dict[int, Float[Tensor, " tokens"]]
    kl_outside: dict[int, Float[Tensor, " tokens"]]


@dataclass(frozen=True)
class Experience(GatedEpisodes):
    """What an update learns from. `rewards` are those of tokens; under GRPO one number an episode."""

    rewards: list[Tensor]
    advantages: ByEpisode


@dataclass(frozen=True)
class PPOExperience(Experience):
    """What an update of actor and critic learns from.

    `value_sequences`, `rewards`, `values` and `returns` cover the tokens of `gae_scope`: those that the model
    wrote, or the whole response.
    """

    value_sequences: list[TokenSequence]
    values: list[Tensor]
    returns: list[Tensor]


@dataclass
class ExperienceMaker:
    """Computes what a step's update learns from: steps (2) to (6)."""

    actor: TrainingEngine  # of a TokenModel
    reference: FrozenModel | None
    critic: TrainingEngine | None  # of a Critic; only PPO has one
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig
    answered: Answered = frozenset()
    decode: Decode | None = None

    @torch.no_grad()
    def make(self, episodes: list[Episode]) -> Experience:
        """Return the experience of episodes of which each has a token of the model."""
        sequences = [model_sequence(episode) for episode in episodes]

        # (2) Log-probabilities of what the model wrote, under the weights that wrote it (pi_old of eq. 2).
        sampled = sampled_logprobs(episodes, sequences)
        by_trainer = self.config.old_logprobs == "trainer"
        old = self._each(sequences, self._policy_logprobs) if by_trainer else sampled

        # (3) Gate: which episodes are pulled towards the reference (the second case of eq. 4).
        correct: Bool[Tensor, " episodes"] = torch.tensor([episode.correct for episode in episodes])
        answered = torch.tensor([(e.dataset, e.question_id) in self.answered for e in episodes])
        open_gate: Float[Tensor, " episodes"] = gate(correct, self.recipe.guidance, answered)
        inside = [i for i, is_open in enumerate(open_gate) if is_open]
        outside = [i for i, is_open in enumerate(open_gate) if not is_open][: self.config.audit_episodes]

        # (4) KL[student || reference] at each token of these episodes; the reference runs on no others.
        in_reward = self.recipe.placement == "reward"
        estimator = self.recipe.divergence if in_reward else "k1"
        kl = self._kl(sequences, old, inside, estimator) if in_reward else {}
        kl_outside = self._kl(sequences, old, outside, estimator)

        gated = GatedEpisodes(
            sequences,
            old,
            sampled if by_trainer else None,
            correct,
            open_gate,
            kl,
            kl_outside,
        )
        if self.recipe.algorithm == "grpo":
            return self._grpo(episodes, gated)
        if self.critic is None:
            return self._reinforce(episodes, gated)
        return self._ppo(episodes, gated, self.critic)

    def _ppo(self, episodes: list[Episode], gated: GatedEpisodes, critic: TrainingEngine) -> PPOExperience:
        """Do (5) and (6) of PPO."""
        whole = self.config.gae_scope == "all"
        value_sequences = [response_sequence(episode) for episode in episodes] if whole else gated.sequences
        written: list[Bool[Tensor, " tokens"]] = [  # by the model, among the tokens that have a value
            torch.tensor([episode.owners[position] == Owner.MODEL for position in sequence.positions])
            for episode, sequence in zip(episodes, value_sequences, strict=True)
        ]

        # (5) Rewards.
        rewards, mask = self._token_rewards(episodes, gated, value_sequences, written)

        # (6) Advantages: GAE over the critic's values, whitened over the step's tokens.
        values = self._each(value_sequences, critic)
        padded_values: EpisodeTokens = pad_sequence(values, batch_first=True)
        advantages, returns = gae(rewards, padded_values, mask, self.config.gamma, self.config.lam)
        advantages = whiten(advantages, mask)

        return PPOExperience(
            **vars(gated),
            rewards=_rows(rewards, written),
            advantages=[row[own] for row, own in zip(_rows(advantages, written), written, strict=True)],
            value_sequences=value_sequences,
            values=values,
            returns=_rows(returns, written),
        )

    def _reinforce(self, episodes: list[Episode], gated: GatedEpisodes) -> Experience:
        """Do (5) and (6) of REINFORCE."""
        # (5) Rewards.
        written = [torch.ones(len(old), dtype=torch.bool) for old in gated.old_logprobs]
        rewards, mask = self._token_rewards(episodes, gated, gated.sequences, written)

        # (6) Advantages: the rewards to come minus their mean, whitened over the step's tokens.
        to_come, _ = gae(rewards, torch.zeros_like(rewards), mask, self.config.gamma, lam=1.0)
        advantages = whiten(to_come, mask)

        return Experience(
            **vars(gated), rewards=_rows(rewards, written), advantages=_rows(advantages, written)
        )

    def _grpo(self, episodes: list[Episode], gated: GatedEpisodes) -> Experience:
        """Do (5) and (6) of GRPO."""
        # (5) Rewards (eqs. 3 and 4): EM, and -beta times the sum of the KL where the gate is open.
        rewards: Float[Tensor, " episodes"] = gated.correct.float()
        for i, own in gated.kl.items():
            rewards[i] -= self.config.beta * own.sum()

        # (6) Advantages: how much better an episode is than others of its question, at each of its tokens.
        questions = [(episode.dataset, episode.question_id) for episode in episodes]
        advantages: Float[Tensor, " episodes"] = group_advantages(rewards, questions)

        return Experience(
            **vars(gated),
            rewards=list(rewards[:, None]),
            advantages=[
                torch.full_like(old, float(advantage))
                for old, advantage in zip(gated.old_logprobs, advantages, strict=True)
            ],
        )

    def _token_rewards(
        self,
        episodes: list[Episode],
        gated: GatedEpisodes,
        sequences: list[TokenSequence],
        written: list[Bool[Tensor, " tokens"]],
    ) -> tuple[EpisodeTokens, EpisodeTokens]:
        """Return rewards of the tokens of `sequences`, of which the model wrote some, and a mask of padding.

        EM on the last token (eq. 3), -beta KL on every token where the gate is open (eq. 4), and a penalty on
        the last token of each turn whose search brought nothing new.
        """
        mask: EpisodeTokens = pad_sequence([torch.ones(len(own)) for own in written], batch_first=True)
        kl = [torch.zeros(len(own)) for own in written]
        for i, own in gated.kl.items():
            kl[i].masked_scatter_(written[i], own)
        padded_kl: EpisodeTokens = pad_sequence(kl, batch_first=True)
        rewards = token_rewards(gated.correct, padded_kl, mask, gated.gate, self.config.beta)
        if self.config.repeat_penalty:
            for row, (episode, sequence) in enumerate(zip(episodes, sequences, strict=True)):
                for turn in self._repeating(episode):
                    rewards[row, sequence.positions.index(turn.end - 1)] -= self.config.repeat_penalty
        return rewards, mask

    def _repeating(self, episode: Episode) -> list[Turn]:
        """Return the turns whose searches brought nothing new."""
        assert self.decode is not None
        searched = [
            turn
            for turn, text in zip(episode.turns, episode.turn_texts(self.decode), strict=True)
            if turn.reply_end > turn.end and parse_action(text).kind is ActionKind.SEARCH
        ]
        return [
            turn for turn, repeats in zip(searched, nothing_new(episode.searches), strict=True) if repeats
        ]

    def _kl(
        self, sequences: list[TokenSequence], old: ByEpisode, chosen: list[int], estimator: str
    ) -> dict[int, Float[Tensor, " tokens"]]:
        """Return the KL of the chosen episodes to the reference, if there is one."""
        if not chosen or self.reference is None:
            return {}
        own = [sequences[i] for i in chosen]
        if estimator == "reverse_kl":
            return dict(zip(chosen, self._each(own, self._whole_kl), strict=True))
        references = self._each(own, self._reference_logprobs)
        return {
            i: kl_estimate(old[i], theirs, estimator) for i, theirs in zip(chosen, references, strict=True)
        }

    def _policy_logprobs(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        logprobs: Tensor = self.actor(batch, self._policy_function(batch))[0]
        return logprobs

    def _reference_logprobs(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        assert self.reference is not None
        return self.reference(batch, self._policy_function(batch))[0]

    def _policy_function(self, batch: TokenBatch) -> HeadFunction:
        return policy_function(batch, self.config.sampling.temperature)

    def _whole_kl(self, batch: TokenBatch) -> Float[Tensor, " N"]:
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


def _rows(values: EpisodeTokens, tokens: ByEpisode) -> ByEpisode:
    """Return each episode's values without the padding; `tokens` has as many as there are."""
    return [row[: len(own)] for row, own in zip(values, tokens, strict=True)]


def training_metrics(episodes: list[Episode], experience: Experience) -> Metrics:
    """Return what shows collapse: the episodes' own metrics, reward, KL inside and outside the gate, ..."""
    metrics = episode_metrics(episodes)
    metrics["reward"] = sum(float(rewards.sum()) for rewards in experience.rewards) / len(episodes)
    for name, kl in (("kl_inside", experience.kl), ("kl_outside", experience.kl_outside)):
        if kl:
            metrics[name] = float(torch.cat(list(kl.values())).mean())
    if experience.sampled_logprobs is not None:
        metrics |= engine_gap(torch.cat(experience.old_logprobs), torch.cat(experience.sampled_logprobs))
    if isinstance(experience, PPOExperience):
        values, returns = torch.cat(experience.values), torch.cat(experience.returns)
        metrics["explained_variance"] = explained_variance(values, returns)
    return metrics


def largest(experience: Experience) -> Metrics:
    """Return the largest magnitudes of what an update learns from: one that is no number shows in them."""
    logprobs = [*experience.old_logprobs, *(experience.sampled_logprobs or [])]
    parts = {"log-probability of a sampled token": logprobs, "advantage": experience.advantages}
    if isinstance(experience, PPOExperience):
        parts = {"value": [*experience.values, *experience.returns], **parts}
    return {name: float(torch.cat(tensors).abs().max()) for name, tensors in parts.items()}


@dataclass
class Updater:
    """Updates actor and critic once by every mini-batch of a step's episodes: step (7)."""

    actor: TrainingEngine  # of a TokenModel
    critic: TrainingEngine | None  # of a Critic; only PPO has one
    config: ReinforceConfig
    compute: ComputeConfig
    guidance: GuidanceLoss | None = None

    def update(self, experience: Experience, order: list[int], critic_only: bool = False) -> Metrics:
        """Update by the episodes in this order; return averages of the mini-batches' metrics."""
        parts = mini_batches(order, self.config.mini_batch_size)
        rows = [self._step(experience, part, critic_only) for part in parts]
        found = {key: [row[key] for row in rows if key in row] for row in rows for key in row}
        return {key: sum(values) / len(values) for key, values in found.items()}

    def _step(self, experience: Experience, chosen: list[int], critic_only: bool) -> Metrics:
        """Update critic and actor by a mini-batch. Raise NotFinite before one is updated by no number."""
        valued: Metrics = {}
        if self.critic is not None and isinstance(experience, PPOExperience):
            loss = self._critic_gradient(self.critic, experience, chosen)
            valued = update(self.critic, {"value_loss": loss}, "critic_grad_norm")
        if critic_only and self.critic is not None:
            return valued
        return update(self.actor, self._actor_gradient(experience, chosen), "actor_grad_norm") | valued

    def _actor_gradient(self, experience: Experience, chosen: list[int]) -> Metrics:
        """Add up the gradient of the policy's loss (eq. 2), an average over the mini-batch's model tokens."""
        config, actor, guidance = self.config, self.actor, self.guidance
        sequences = [experience.sequences[i] for i in chosen]
        tokens = sum(len(sequence.positions) for sequence in sequences)
        inside = sum(len(experience.sequences[i].positions) for i in chosen if experience.gate[i])

        def objective(part: list[int], batch: TokenBatch) -> tuple[Float[Tensor, ""], Metrics]:
            episodes = [chosen[i] for i in part]
            old = _flat(experience.old_logprobs, episodes).to(actor.device)
            advantages = _flat(experience.advantages, episodes).to(actor.device)
            gates = experience.gate[episodes].bool()
            guided = gates.repeat_interleave(torch.tensor(batch.counts)).to(actor.device)
            logprobs, entropy, kl, reference = self._forward(experience, episodes, batch, guided)
            losses, clipped = clipped_surrogate(logprobs, old, advantages, config.clip)
            if config.importance_cap is not None and experience.sampled_logprobs is not None:
                sampled = _flat(experience.sampled_logprobs, episodes).to(actor.device)
                losses = losses * importance_weights(old, sampled, config.importance_cap)
            loss = losses.sum() / tokens - config.entropy_weight * entropy.sum() / tokens
            sums = [losses.sum(), entropy.sum(), clipped.sum(), (old - logprobs).sum()]
            if guidance is not None:
                kl = kl * guidance.turn_weights(old, reference, batch)
                loss = loss + guidance.weight * kl.sum() / tokens
                sums += [kl.sum(), ((old - reference) * guided).sum() * tokens / max(1, inside)]
            if config.preserve_weight:
                fallen = fallen_likelihood(logprobs, old, advantages, batch.turns)
                loss = loss + config.preserve_weight * fallen.sum() / tokens
                sums += [fallen.sum()]
            return loss, dict(zip(names, (value.item() / tokens for value in sums), strict=True))

        names = ["policy_loss", "entropy", "clip_fraction", "approx_kl"]
        names += ["guidance_loss", "kl_inside"] if guidance is not None else []
        names += ["preserve_loss"] if config.preserve_weight else []
        metrics = summed(actor, sequences, self.compute.micro_batch_tokens, names, objective)
        if not inside:
            metrics.pop("kl_inside", None)
        return metrics

    def _forward(
        self, experience: Experience, episodes: list[int], batch: TokenBatch, guided: Bool[Tensor, " N"]
    ) -> PerToken:
        """Return what `GuidanceLoss.forward` does, with zeros where no token of the micro-batch is guided."""
        actor, temperature = self.actor, self.config.sampling.temperature
        read = [i for i in episodes if experience.gate[i]] or (episodes[:1] if actor.lockstep else [])
        if self.guidance is None or not read:
            logprobs, entropy = actor(batch, policy_function(batch, temperature))
            return logprobs, entropy, torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        gated = collate([experience.sequences[i] for i in read], actor.device)
        return self.guidance.forward(actor, batch, gated, guided, temperature)

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


def _flat(values: list[Tensor], episodes: list[int]) -> Float[Tensor, " N"]:
    """Join the values of these episodes' tokens, in the order in which `collate` lays them out."""
    return torch.cat([values[i] for i in episodes])
