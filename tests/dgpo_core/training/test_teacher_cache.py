"""The teacher's kept distributions: equal to the live teacher's, or off by what the certificate says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.config.recipes import Distillation
from dgpo_core.config.training import ComputeConfig, DistillConfig
from dgpo_core.errors import UserError
from dgpo_core.training.batches import model_sequence
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes
from dgpo_core.training.teacher_cache import (
    CERTIFICATE,
    DISTRIBUTIONS,
    Certificate,
    TeacherCache,
    keep_distributions,
)
from tests.dgpo_core.making import random_episode, tiny_model

EPISODES = [random_episode(seed) for seed in range(8)]
COMPUTE = ComputeConfig(device="cpu", precision="float32", micro_batch_tokens=60)


@pytest.fixture
def models(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student, and a teacher that is surer of itself than random weights are."""
    teacher = tiny_model(tokenizer, 2)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(6)
    return tiny_model(tokenizer, 1), teacher


def keep(
    folder: Path,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    top_k: int | None,
) -> Certificate:
    student, teacher = models
    return keep_distributions(
        folder, EPISODES, teacher, student, tokenizer, top_k, 100, COMPUTE, lambda *_: None
    )


def distiller(
    models: tuple[PreTrainedModel, PreTrainedModel], cache: TeacherCache | None, objective: str = "kd"
) -> Distiller:
    recipe = Distillation.model_validate({"start": "student", "objective": objective})
    config = DistillConfig(ce_weight=0.0)
    source = TeacherEpisodes(EPISODES, config, seed=0)
    student, teacher = models
    return Distiller(student, None if cache else teacher, recipe, config, COMPUTE, source, cache)


def result(made: Distiller) -> tuple[float, list[torch.Tensor]]:
    row = made._accumulate([made._sequence(episode) for episode in EPISODES])
    gradients = [p.grad.clone() for p in made.student.parameters() if p.grad is not None]
    made.student.zero_grad()
    return row["divergence"], gradients


@pytest.mark.parametrize("objective", ["kd", "taid", "skew_kl", "reverse_kl"])
def test_whole_vocabulary_is_the_live_teacher(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    objective: str,
) -> None:
    certificate = keep(tmp_path, models, tokenizer, None)
    assert certificate.kl_error_max == pytest.approx(0, abs=1e-5)
    assert certificate.rest_max == pytest.approx(0, abs=1e-5)
    cached = result(distiller(models, TeacherCache(tmp_path, tokenizer), objective))
    live = result(distiller(models, None, objective))
    assert cached[0] == pytest.approx(live[0], rel=1e-4)
    torch.testing.assert_close(cached[1], live[1], rtol=1e-3, atol=1e-6)


def test_few_tokens_are_off_by_what_the_certificate_says(
    models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = result(distiller(models, None))[0]
    errors = []
    for k in (4, 64, 256):
        certificate = keep(tmp_path, models, tokenizer, k)
        assert certificate.top_k == k and certificate.sample_tokens == sum(e.model_tokens for e in EPISODES)
        cached = result(distiller(models, TeacherCache(tmp_path, tokenizer)))[0]
        assert live - cached == pytest.approx(certificate.kl_error_mean, rel=1e-2, abs=1e-6)
        assert certificate.kl_full_mean == pytest.approx(live, rel=1e-4)
        assert 0 < certificate.kl_error_mean <= certificate.kl_error_max
        errors.append(certificate.kl_error_mean)
    assert errors[0] > 5 * errors[1] > 10 * errors[2]


def test_kept_are_the_likeliest(
    models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    keep(tmp_path, models, tokenizer, 5)
    episode = EPISODES[3]
    top = TeacherCache(tmp_path, tokenizer).get(episode)
    assert top is not None
    with torch.no_grad():
        table = models[1](torch.tensor([episode.token_ids])).logits[0].log_softmax(-1)
    for row, position in enumerate(model_sequence(episode).positions):
        values, ids = table[position - 1].topk(5)
        assert top.ids[row].tolist() == ids.tolist()
        torch.testing.assert_close(top.logprobs[row], values, rtol=1e-4, atol=1e-5)


def test_what_does_not_belong_together_is_refused(
    models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="run the stage distributions first"):
        TeacherCache(tmp_path, tokenizer)
    keep(tmp_path, models, tokenizer, 4)
    cache = TeacherCache(tmp_path, tokenizer)
    assert cache.get(random_episode(99)) is None
    with pytest.raises(UserError, match=r"teacher's episode of onehop q99 .* distill\.teacher: live"):
        distiller(models, cache)._sequence(random_episode(99))
    tokenizer.save_pretrained(tmp_path / "other")
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path / "other")
    other.add_tokens(["<extra>"])
    with pytest.raises(UserError, match="another tokenizer"):
        TeacherCache(tmp_path, other)
    (tmp_path / CERTIFICATE).write_text(json.dumps({"teacher": "live"}))
    with pytest.raises(UserError, match="no kept distributions"):
        TeacherCache(tmp_path, tokenizer)
    keep(tmp_path, models, tokenizer, 4)
    (tmp_path / DISTRIBUTIONS).write_text("broken")
    with pytest.raises(UserError, match="no kept distributions"):
        TeacherCache(tmp_path, tokenizer)
