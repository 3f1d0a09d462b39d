"""A rehearsal's parameters: valid for every profile, and what stands in for what."""

from pathlib import Path
from typing import Any

import pytest

from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.rehearsal.settings import SMALL, scaled_down

PROFILES = sorted((Path(__file__).parents[3] / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipes", [None, ["all"]])
def test_every_profile_can_be_rehearsed(path: Path, recipes: list[str] | None) -> None:
    resolved = resolve_profile(path, recipes)
    small, _ = scaled_down(resolved, cuda=False)
    params = Params.model_validate(small)
    assert params.reinforce.steps == 1 and params.compute.device == "cpu"
    assert params.recipes == Params.model_validate(resolved).recipes
    assert params.compute.precision == resolved["compute"]["precision"]
    assert params.report.first == {} and params.models.student == SMALL["models"]["student"]


@pytest.mark.parametrize(
    ("retrieval", "note"),
    [
        ({"encoder": {"kind": "sentence-transformers", "model": "a/b"}}, "encoder a/b: a random one"),
        ({"location": "retriever+http://host:8000"}, "the index at retriever+http://host:8000: the embedded"),
        ({"location": "embedded:/srv/collection"}, "the index at embedded:/srv/collection: the embedded"),
    ],
)
def test_nothing_is_fetched_and_no_server_is_asked(retrieval: dict[str, Any], note: str) -> None:
    resolved = resolve_profile(next(path for path in PROFILES if path.stem == "tiny"))
    _, without = scaled_down(resolved, cuda=False)
    resolved["retrieval"] |= {"encoder": EncoderConfig().model_dump(), "vectors": ["hf://x"], **retrieval}
    small, notes = scaled_down(resolved, cuda=False)
    params = Params.model_validate(small).retrieval
    assert (params.encoder.kind, params.encoder.model) == ("dense", "models/encoder")
    assert (params.vectors, params.location) == ([], "embedded")
    (added,) = set(notes) - set(without)
    assert added.startswith(note)


def test_notes_say_what_stands_in() -> None:
    resolved = resolve_profile(next(path for path in PROFILES if path.stem == "paper-qwen-3b"))
    before = resolved["retrieval"]["location"]
    small, notes = scaled_down(resolved, cuda=False)
    assert small["retrieval"]["location"] == "embedded" and resolved["retrieval"]["location"] == before
    assert any("no GPU" in note for note in notes) and any(before in note for note in notes)
    with_gpu, fewer = scaled_down(resolved, cuda=True)
    assert with_gpu["compute"]["device"] == "cuda" and len(fewer) == len(notes) - 1
    resolved["compute"]["engine"] = "deepspeed-of-tomorrow"  # unknown here: left to the schema
    assert scaled_down(resolved, cuda=True)[0]["compute"]["engine"] == "deepspeed-of-tomorrow"
