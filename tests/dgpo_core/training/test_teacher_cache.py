"""The teacher's kept distributions: equal to the live teacher's, or off by what the certificate says."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from dgpo_core.config.training import ComputeConfig, DistillConfig, DistributionsConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.training.batches import model_sequence
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes
from dgpo_core.training.teacher_cache import CERTIFICATE, Certificate, TeacherCache, build_cache
from tests.dgpo_core.making import distillation, exact, gradients, padded, random_episode, tiny_model

Models = tuple[PreTrainedModel, PreTrainedModel]  # student, teacher
EPISODES = [random_episode(seed) for seed in range(8)]
COMPUTE = exact(60)


@pytest.fixture
def models(tokenizer: Tokenizer) -> Models:
    """Student, and a teacher that is surer of itself than random weights are."""
    teacher = tiny_model(tokenizer, 2)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(6)
    return tiny_model(tokenizer, 1), teacher


Keep = Callable[..., Certificate]


@pytest.fixture
def keep(models: Models, tokenizer: Tokenizer, tmp_path: Path) -> Keep:
    """Return a function that keeps `top_k` distributions of all episodes in a folder of `tmp_path`."""

    def run(
        top_k: int | None,
        folder: str = "",
        sample: int = 100,
        compute: ComputeConfig = COMPUTE,
        models: Models = models,
    ) -> Certificate:
        student, teacher = models
        config, place = DistributionsConfig(top_k=top_k, sample=sample), tmp_path / folder
        return build_cache(place, EPISODES, teacher, student, tokenizer, config, compute, lambda *_: None)

    return run


def distiller(models: Models, cache: TeacherCache | None, objective: str = "kd") -> Distiller:
    recipe = distillation(objective)
    config = DistillConfig(ce_weight=0.0)
    source = TeacherEpisodes(EPISODES, config, seed=0)
    student, teacher = models
    return Distiller(student, None if cache else teacher, recipe, config, COMPUTE, source, cache)


def result(made: Distiller) -> tuple[float, list[torch.Tensor]]:
    row = made._gradient([made._sequence(episode) for episode in EPISODES])
    return row["divergence"], gradients(made.student)


@pytest.mark.parametrize("objective", ["kd", "taid", "skew_kl", "reverse_kl"])
def test_whole_vocabulary_is_the_live_teacher(
    keep: Keep, models: Models, tokenizer: Tokenizer, tmp_path: Path, objective: str
) -> None:
    certificate = keep(None)
    assert certificate.kl_error_max == pytest.approx(0, abs=1e-5)
    assert certificate.rest_max == pytest.approx(0, abs=1e-5)
    cached = result(distiller(models, TeacherCache(tmp_path, tokenizer), objective))
    live = result(distiller(models, None, objective))
    assert cached[0] == pytest.approx(live[0], rel=1e-4)
    torch.testing.assert_close(cached[1], live[1], rtol=1e-3, atol=1e-6)


def test_few_tokens_are_off_by_what_the_certificate_says(
    keep: Keep, models: Models, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    live = result(distiller(models, None))[0]
    errors = []
    for k in (4, 64, 256):
        certificate = keep(k, str(k))
        assert certificate.top_k == k and certificate.sample_tokens == sum(e.model_tokens for e in EPISODES)
        cached = result(distiller(models, TeacherCache(tmp_path / str(k), tokenizer)))[0]
        assert live - cached == pytest.approx(certificate.kl_error_mean, rel=1e-2, abs=1e-6)
        assert certificate.kl_full_mean == pytest.approx(live, rel=1e-4)
        assert 0 < certificate.kl_error_mean <= certificate.kl_error_max
        errors.append(certificate.kl_error_mean)
    assert errors[0] > 5 * errors[1] > 10 * errors[2]


def test_kept_are_the_likeliest(keep: Keep, models: Models, tokenizer: Tokenizer, tmp_path: Path) -> None:
    keep(5)
    episode = EPISODES[3]
    top = TeacherCache(tmp_path, tokenizer).get(episode)
    assert top is not None
    with torch.no_grad():
        table = models[1](torch.tensor([episode.token_ids])).logits[0].log_softmax(-1)
    for row, position in enumerate(model_sequence(episode).positions):
        values, ids = table[position - 1].topk(5)
        assert top.ids[row].tolist() == ids.tolist()
        torch.testing.assert_close(top.logprobs[row], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_the_certificate_is_measured_on_the_sample_however_batches_are_cut(keep: Keep, tokens: int) -> None:
    certificate = keep(5, sample=3, compute=exact(tokens))
    tokens_of = [episode.model_tokens for episode in EPISODES]
    assert certificate.sample_tokens in {sum(drawn) for drawn in itertools.combinations(tokens_of, 3)}
    assert certificate.sample_tokens != sum(tokens_of[:3]), "episodes lie data set after data set"
    assert certificate.episodes == len(EPISODES)


def test_an_interrupted_run_goes_on_behind_its_last_file(
    keep: Keep, models: Models, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """And the files of several chunks are what one file is."""
    whole = keep(5, "whole")
    done: list[int] = []

    def kill(so_far: int, _: int) -> None:
        done.append(so_far)
        if so_far == 6 and done[-2:] == [6, 6]:  # the second file is written
            raise KeyboardInterrupt

    student, teacher = models
    config = DistributionsConfig(top_k=5, sample=100, chunk=3)
    arguments = (EPISODES, teacher, student, tokenizer, config, COMPUTE)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "cut", *arguments, kill)
    assert done[:2] != [3, 3], "told after every pass, not after every file"
    first = (tmp_path / "cut/00000000.arrow").stat().st_mtime_ns
    (tmp_path / "cut/00000006.part").write_text("half")
    certificate = build_cache(tmp_path / "cut", *arguments, lambda *_: None)
    assert (tmp_path / "cut/00000000.arrow").stat().st_mtime_ns == first
    figures, expected = ({**vars(made), "tokenizer": 0} for made in (certificate, whole))
    assert figures == pytest.approx(expected, rel=1e-4)
    cut, one = (TeacherCache(tmp_path / name, tokenizer) for name in ("cut", "whole"))
    for episode in EPISODES:
        here, there = cut.get(episode), one.get(episode)
        assert here is not None and there is not None and torch.equal(here.ids, there.ids)
        torch.testing.assert_close(here.logprobs, there.logprobs, rtol=1e-4, atol=1e-5)


def test_what_does_not_belong_together_is_refused(
    keep: Keep, models: Models, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="run the stage distributions first"):
        TeacherCache(tmp_path, tokenizer)
    keep(4)
    cache = TeacherCache(tmp_path, tokenizer)
    assert cache.get(random_episode(99)) is None
    with pytest.raises(UserError, match=r"teacher's episode of onehop q99 .* distill\.teacher: live"):
        distiller(models, cache)._sequence(random_episode(99))
    tokenizer.save_pretrained(tmp_path / "other")
    other = Tokenizer.from_pretrained(tmp_path / "other")
    other.add_tokens(["<extra>"])
    with pytest.raises(UserError, match="another tokenizer"):
        TeacherCache(tmp_path, other)
    (tmp_path / CERTIFICATE).write_text(json.dumps({"teacher": "live"}))
    with pytest.raises(UserError, match="no kept distributions"):
        TeacherCache(tmp_path, tokenizer)
    keep(4)
    (tmp_path / "00000000.arrow").write_text("broken")
    with pytest.raises(UserError, match="no kept distributions"):
        TeacherCache(tmp_path, tokenizer)


def test_the_certificate_says_what_taid_reads(
    keep: Keep, models: Models, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """From few tokens and a bucket TAID's divergence is another one, and by how much is written."""
    live = result(distiller(models, None, "taid"))[0]
    for k in (4, 64):
        certificate = keep(k, str(k))
        cached = result(distiller(models, TeacherCache(tmp_path / str(k), tokenizer), "taid"))[0]
        assert certificate.taid_full_mean == pytest.approx(live, rel=1e-4)
        assert live - cached == pytest.approx(certificate.taid_error_mean, rel=1e-2, abs=1e-6)
        assert certificate.taid_error_max >= abs(certificate.taid_error_mean) > 0


def test_rows_without_a_token_are_not_kept(keep: Keep, models: Models, tokenizer: Tokenizer) -> None:
    plain = keep(5, "plain")
    wider = keep(5, "wider", models=(padded(models[0], 128), padded(models[1], 64)))
    assert wider.vocabulary == len(tokenizer)
    assert wider.tokenizer == plain.tokenizer
    assert list(vars(wider).values())[1:] == pytest.approx(list(vars(plain).values())[1:], rel=1e-3, abs=1e-5)


def test_a_teacher_that_gives_no_numbers_is_not_kept(keep: Keep, models: Models, tmp_path: Path) -> None:
    with torch.no_grad():
        models[1].get_output_embeddings().weight[7, 7] = torch.nan
    with pytest.raises(NotFinite, match="the teacher's log-probability is not a number"):
        keep(5)
    assert not list(tmp_path.iterdir())
