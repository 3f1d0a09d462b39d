"""Stage `reinforce`: PPO of one recipe, guided by the teacher as its gate says (eqs. 2-4)."""

import sys
from pathlib import Path

from transformers import PreTrainedModel

from dgpo_core.config.params import Params, load_params
from dgpo_core.config.training import Recipe
from dgpo_core.errors import UserError
from dgpo_core.protocol.episode import Episode
from dgpo_core.rollout.collect import stable_seed
from dgpo_core.rollout.loop import Task
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import check_same_vocabulary
from dgpo_core.training.models import load_model, load_tokenizer, save_model
from dgpo_core.training.reinforce import Reinforcer
from tasks.agents import DevEvaluator, agent_loop, retriever, split_tasks, write_curves, write_metrics
from tasks.paths import INDEX, METRICS, PLOTS, QUESTIONS, RECIPES, cold_start_model
from tasks.stage import main, stage


def reinforce(name: str) -> None:
    params = load_params()
    recipe = params.recipe(name)
    if recipe.rl == "none":
        raise UserError(f"recipes.{name}: rl is none, so there is nothing to reinforce")
    start = params.models.student if recipe.cold_start == "none" else str(cold_start_model(recipe.cold_start))
    out, curves = RECIPES / name, PLOTS / f"reinforce-{name}.csv"
    config = {
        key: getattr(params, key).model_dump()
        for key in ("reinforce", "compute", "protocol", "rollout", "retrieval", "models", "questions")
    } | {"seed": params.seed, "recipe": recipe.model_dump()}
    inputs = [INDEX, QUESTIONS, *(Path(m) for m in (start, params.models.teacher) if Path(m).is_dir())]
    with stage(f"reinforce@{name}", config=config, inputs=inputs, outputs=[out, curves]) as run:
        tokenizer = load_tokenizer(start)
        student = load_model(start, params.compute.device)
        reference = _reference(params, recipe, start, tokenizer)
        loop = agent_loop(params, student, tokenizer, retriever(params))
        tasks = split_tasks(params, "train", params.seed)

        def rollout(chosen: list[int], step: int) -> list[Episode]:
            drawn = [
                Task(tasks[i].question, tasks[i].dataset, seed=(stable_seed(params.seed, step, place),))
                for place, i in enumerate(chosen)
            ]
            return loop.run(drawn, params.reinforce.sampling)

        latest = {"dev_em": float("nan")}

        def report(step: int, steps: int, row: dict[str, float]) -> None:
            latest.update({k: v for k, v in row.items() if k == "dev_em"})
            shown = {k: row[k] for k in ("em", "kl", "searches") if k in row}
            run.progress(step, steps, **shown, **latest)
            run.metrics(step, row)

        dev = DevEvaluator(params, loop, params.reinforce.dev_questions)
        trainer = Reinforcer(student, reference, recipe, params.reinforce, params.compute, params.seed)
        rows = trainer.train(len(tasks), rollout, Checkpoint(run.state), dev, report)
        save_model(student, tokenizer, out)
        write_curves(curves, rows)
        summary = {"dev_em": rows[-1]["dev_em"], "failed": sum(row["failed"] for row in rows)}
        summary |= {key: rows[-1][key] for key in ("em", "searches", "kl", "entropy") if key in rows[-1]}
        write_metrics(METRICS / f"reinforce-{name}.json", summary)
        run.summary(summary)
        run.register_model(name, out)


def _reference(params: Params, recipe: Recipe, start: str, tokenizer: object) -> PreTrainedModel | None:
    """The frozen model of the KL term: the teacher, the model that RL starts from, or none."""
    if recipe.guidance == "none":
        return None
    if recipe.reference == "initial":
        return load_model(start, params.compute.device)
    check_same_vocabulary(tokenizer, load_tokenizer(params.models.teacher))
    return load_model(params.models.teacher, params.compute.device)


if __name__ == "__main__":
    main(lambda: reinforce(sys.argv[1]))
