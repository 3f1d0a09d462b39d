"""GRPO beside TRL's GRPOTrainer: one mini-batch, without KL and entropy."""

from torch import Tensor, tensor

from benchmarks.updates import (
    ARGUMENTS,
    STUDENT,
    Comparison,
    OurUpdate,
    TrlLoss,
    prompt_length,
    scratch,
    trl_batches,
)
from dgpo_core.agent.episode import Episode
from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.objectives.policy import group_advantages
from dgpo_core.training.reinforce import ExperienceMaker, Reinforcer, Updater

RECIPE = Reinforcement(start="kd", algorithm="grpo", guidance="none", reference="none")


def ours(episodes: list[Episode]) -> OurUpdate:
    """Return our side."""
    params = load_params()
    config = params.reinforce.model_copy(update={"entropy_weight": 0.0, "beta": 0.0})
    model = load_model(STUDENT)
    actor, _, _ = Reinforcer(model, None, RECIPE, config, params.compute, 0)._engines()
    experience = ExperienceMaker(actor, None, None, RECIPE, config, params.compute).make(episodes)
    updater, everything = Updater(actor, None, config, params.compute), list(range(len(episodes)))
    return OurUpdate(
        [model],
        lambda: updater._actor_gradient(experience, everything),
        lambda: updater._step(experience, everything, critic_only=False),
    )


class Theirs(TrlLoss):
    """TRL's side."""

    def __init__(self, episodes: list[Episode], rows: int) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        config, model = load_params().reinforce, load_model(STUDENT)
        questions = [(episode.dataset, episode.question_id) for episode in episodes]
        advantages = group_advantages(tensor([float(e.correct) for e in episodes]), questions)

        def extra(i: int) -> dict[str, Tensor]:
            sampled = episodes[i].logprobs[prompt_length(episodes[i]) :]
            return {"advantages": advantages[i], "old_per_token_logps": tensor(sampled)}

        super().__init__(model, trl_batches(episodes, rows, extra), config)
        arguments = GRPOConfig(
            output_dir=scratch(), beta=0.0, loss_type="dapo", epsilon=config.clip,
            temperature=config.sampling.temperature, num_generations=2, **ARGUMENTS,
        )  # fmt: skip
        self._trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "?"}] * 2),
            processing_class=load_tokenizer(STUDENT),
        )
        self._trainer.current_gradient_accumulation_steps = 1

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self._trainer._compute_loss(self.model, batch)
        return loss


GRPO = Comparison("GRPOTrainer", ours, Theirs)
