"""Stage `distill`: cold start of the student on the teacher's correct episodes (eq. 1)."""

import sys
from pathlib import Path

import torch

from dgpo_core.config.params import load_params
from dgpo_core.errors import UserError
from dgpo_core.protocol.episode import read_episodes
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import Distiller, check_same_vocabulary
from dgpo_core.training.models import load_model, load_tokenizer, save_model
from tasks.agents import DevEvaluator, agent_loop, require_episodes, retriever, write_curves, write_metrics
from tasks.paths import CORRECT_EPISODES, INDEX, METRICS, PLOTS, QUESTIONS, cold_start_model
from tasks.stage import main, stage


def distill(cold_start: str) -> None:
    params = load_params()
    name, out = f"distill@{cold_start}", cold_start_model(cold_start)
    config = {
        key: getattr(params, key).model_dump()
        for key in ("distill", "compute", "protocol", "rollout", "retrieval", "models", "questions")
    } | {"seed": params.seed, "cold_start": cold_start}
    del config["distill"]["min_em"]  # judges the trained model: changing it continues, not restarts
    inputs = [CORRECT_EPISODES, INDEX, QUESTIONS]
    inputs += [Path(m) for m in (params.models.student, params.models.teacher) if Path(m).is_dir()]
    curves = PLOTS / f"distill-{cold_start}.csv"
    with stage(name, config=config, inputs=inputs, outputs=[out, curves]) as run:
        torch.manual_seed(params.seed)
        tokenizer = load_tokenizer(params.models.student)
        check_same_vocabulary(tokenizer, load_tokenizer(params.models.teacher))
        student = load_model(params.models.student, params.compute.device)
        teacher = load_model(params.models.teacher, params.compute.device)
        episodes = read_episodes(CORRECT_EPISODES)
        require_episodes(len(episodes), f"episodes in {CORRECT_EPISODES}")
        dev = DevEvaluator(
            params, agent_loop(params, student, tokenizer, retriever(params)), params.distill.dev_questions
        )
        latest = {"dev_em": 0.0}

        def report(step: int, steps: int, row: dict[str, float]) -> None:
            latest.update({k: v for k, v in row.items() if k == "dev_em"})
            run.progress(step, steps, loss=row["loss"], kl=row["kl"], dev_em=latest["dev_em"])
            run.metrics(step, row)

        distiller = Distiller(student, teacher, params.distill, params.compute, params.seed)
        rows = distiller.train(episodes, Checkpoint(run.state), dev, report)
        em = rows[-1]["dev_em"]
        if em < params.distill.min_em:
            raise UserError(
                f"{name}: validation EM {em:.3f} is below distill.min_em {params.distill.min_em}: "
                "the student is too weak for RL; train longer or lower the threshold"
            )
        save_model(student, tokenizer, out)
        write_curves(curves, rows)
        summary = {"episodes": len(episodes), "dev_em": em, "loss": rows[-1]["loss"], "kl": rows[-1]["kl"]}
        write_metrics(METRICS / f"distill-{cold_start}.json", summary)
        run.summary(summary)
        run.register_model(cold_start, out)


if __name__ == "__main__":
    main(lambda: distill(sys.argv[1]))
