"""Files from outside are read, or refused in a line that names file, line or key."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.agent.episode import Episode, read_episodes, read_metadata, write_episodes
from dgpo_core.config.endpoint import endpoint_of
from dgpo_core.config.params import load_params, resolve_profile, validated
from dgpo_core.config.yaml_text import as_text
from dgpo_core.datasets.question_files import read_question_files
from dgpo_core.datasets.records import Passage, read_corpus, read_questions, write_jsonl
from dgpo_core.errors import UserError
from dgpo_core.evaluation.promotion import read_setup
from dgpo_core.evaluation.results import read_metrics
from dgpo_core.files import PART
from dgpo_core.models import load_tokenizer
from dgpo_core.retrieval.shards import MANIFEST, read_manifest
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.state_files import CHECKSUMS, TENSORS, VALUES
from dgpo_core.training.teacher_cache import CERTIFICATE, TeacherCache
from dgpo_core.world.pretraining import build_tokenizer
from tests.conftest import ROOT
from tests.dgpo_core.making import random_episode
from tests.fuzz.inputs import (
    JSON,
    TEXTS,
    as_json,
    cases,
    changed,
    changed_bytes,
    damaged,
    json_lines,
    read_or_refused,
)

PASSAGES = [
    {"id": "0", "contents": '"Ada"\nAda was born in 1815.'},
    {"_id": 1, "title": "Bel", "text": "Bel lies on the Aro."},
]
QUESTIONS = [
    {"id": "a", "question": "Who is Ada?", "golden_answers": ["a mathematician"], "metadata": {"x": [1]}},
    {"question": "Where is Bel?", "answer": "['Aro', 'on the Aro']"},
    {"_id": "h", "question": "Both?", "answer": "yes", "context": [["Ada", ["s1", "s2"]]],
     "supporting_facts": [["Ada", 0]]},
    {"id": 4, "question": "M?", "answer": "m", "answer_aliases": ["n"],
     "paragraphs": [{"title": "T", "paragraph_text": "p", "is_supporting": True}]},
]  # fmt: skip
TABLE = b'id,question,answers\n1,"Who, then?","[""a"", ""b""]"\n2,Where?,here\n'
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
PARAMS = resolve_profile(ROOT / "profiles/tiny.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples, which write the same names."""
    return tmp_path_factory.mktemp("files")


@cases()
@given(content=json_lines(*PASSAGES))
def test_corpora(folder: Path, content: bytes) -> None:
    """What is read can be written, and read again."""
    path = folder / "corpus.jsonl"
    path.write_bytes(content)
    passages = read_or_refused(lambda: list(read_corpus(path)), f"{path}:")
    if passages:
        again = folder / "again.jsonl"
        write_jsonl(again, passages)
        assert [passage.id for passage in read_corpus(again)] == [passage.id for passage in passages]


@cases()
@given(content=json_lines(*PASSAGES).flatmap(lambda content: changed_bytes(gzip.compress(content, mtime=0))))
def test_packed_corpora(folder: Path, content: bytes) -> None:
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(content)
    read_or_refused(lambda: list(read_corpus(path)), f"{path}:")


@cases()
@given(content=json_lines(*QUESTIONS))
def test_questions(folder: Path, content: bytes) -> None:
    path = folder / "questions.jsonl"
    path.write_bytes(content)
    questions = read_or_refused(lambda: read_questions(path), path)
    if questions:
        again = folder / "again.jsonl"
        write_jsonl(again, questions)
        assert read_questions(again) == [replace(one, metadata=one.metadata) for one in questions]


LISTED = changed(QUESTIONS).map(as_json)
FORMS = st.one_of(
    st.tuples(st.just("own.jsonl"), json_lines(*QUESTIONS)),
    st.tuples(st.just("own.json"), LISTED | damaged(as_json(QUESTIONS))),
    st.tuples(st.just("own.csv"), damaged(TABLE)),
    st.tuples(st.just("own.tsv"), damaged(TABLE.replace(b",", b"\t"))),
    st.tuples(st.just("own.csv.gz"), damaged(gzip.compress(TABLE, mtime=0))),
)


@cases()
@given(form=FORMS)
def test_questions_of_ones_own(folder: Path, form: tuple[str, bytes]) -> None:
    path = folder / form[0]
    path.write_bytes(form[1])
    read_or_refused(lambda: read_question_files("own", [path]), path)


@cases()
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"id": JSON, "question": TEXTS, "answers": JSON})))
def test_questions_in_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "own.parquet"
    try:
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        return  # no table can hold them
    read_or_refused(lambda: read_question_files("own", [path]), path)


@cases()
@given(content=changed(PARAMS))
def test_parameters(content: Any) -> None:
    if isinstance(content, dict):
        read_or_refused(lambda: validated(content), "params.yaml")


@cases()
@given(
    content=damaged(
        as_text(PARAMS).encode(), b"a: &x [1]\nb: *x\n", b"? [a]\n: !!python/object:os.system {}\n"
    )
)
def test_parameter_files(folder: Path, content: bytes) -> None:
    path = folder / "params.yaml"
    path.write_bytes(content)
    read_or_refused(lambda: load_params(path), path)


@cases()
@given(content=st.sampled_from(PROFILES).flatmap(lambda file: changed_bytes(file.read_bytes())))
def test_profiles(folder: Path, content: bytes) -> None:
    for profile in PROFILES:
        if not (folder / profile.name).exists():
            shutil.copyfile(profile, folder / profile.name)
    path = folder / "changed.yaml"
    path.write_bytes(content)
    read_or_refused(lambda: resolve_profile(path), folder, "recipes")


@cases()
@given(source=TEXTS | TEXTS.map("openai:m@http://h/".__add__) | st.text(max_size=8).map("http".__add__))
def test_addresses_of_endpoints(source: str) -> None:
    try:
        endpoint_of(source)
    except ValueError as error:
        assert "is no endpoint" in str(error)


@pytest.fixture(scope="module")
def episodes(folder: Path) -> Path:
    path = folder / "episodes.parquet"
    write_episodes(path, [random_episode(0), random_episode(1)], {"tokenizer": "x"})
    return path


@cases()
@given(data=st.data())
def test_episodes(folder: Path, episodes: Path, data: st.DataObject) -> None:
    path = folder / "changed.parquet"
    path.write_bytes(data.draw(damaged(episodes.read_bytes())))
    read_or_refused(lambda: read_episodes(path), path)
    read_or_refused(lambda: read_metadata(path), path)


@cases()
@given(data=st.data())
def test_episodes_of_other_values(folder: Path, data: st.DataObject) -> None:
    """A table of the right columns, with values that no episode has."""
    row = vars(random_episode(0)) | {"searches": []}
    name = data.draw(st.sampled_from(sorted(row)))
    path = folder / "values.parquet"
    write_episodes(path, [])
    schema = pq.read_schema(path)
    try:
        pq.write_table(pa.Table.from_pylist([row | {name: data.draw(JSON)}], schema=schema), path)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError, AttributeError):
        return
    found = read_or_refused(lambda: read_episodes(path), path)
    assert found is None or isinstance(found[0], Episode)


KEPT = {
    "collection": "c", "digest": "d", "passages": 2, "average_words": 5.5, "dense_size": None,
    "encoder": {"kind": "bm25"}, "shards": ["0.parquet"],
}  # fmt: skip
SETUP = {"model": "x", "index": "y", "settings": {"a.b": 1}, "code": {"c.py": "z"}}


@pytest.mark.parametrize(
    ("name", "valid", "read"),
    [
        (MANIFEST, KEPT, lambda folder: read_manifest(folder).encoder_config),
        ("made.json", SETUP, read_setup),
        ("metrics/filter.json", {"kept": 1, "raw": 2.5}, lambda folder: read_metrics(folder / "metrics")),
    ],
)
@cases()
@given(data=st.data())
def test_what_stages_keep(
    folder: Path, name: str, valid: dict[str, Any], read: Callable[[Path], Any], data: st.DataObject
) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.draw(changed(valid).map(as_json) | damaged(as_json(valid))))
    read_or_refused(lambda: read(folder), path)


@cases()
@given(content=damaged(as_json({"tokenizer": "x", "top_k": 3})) | changed({"tokenizer": "x"}).map(as_json))
def test_certificates_of_distributions(folder: Path, content: bytes) -> None:
    cache = folder / "distributions"
    cache.mkdir(exist_ok=True)
    (cache / CERTIFICATE).write_bytes(content)
    with pytest.raises(UserError, match="distributions"):
        TeacherCache(cache, None)


@cases()
@given(data=st.data(), signed=st.booleans())
def test_checkpoints(folder: Path, data: st.DataObject, signed: bool) -> None:
    """What is damaged is said, also where its checksums are right; nothing in a file is run."""
    state, whole = folder / "checkpoints" / "000001", folder / "whole-checkpoint"
    checkpoint = Checkpoint(folder, note=lambda _: None)
    if not whole.exists():
        checkpoint.save({"step": 3, "weights": {"a": torch.arange(4.0)}, "episodes": [random_episode(0)]})
        shutil.copytree(state, whole)
    shutil.rmtree(state)
    shutil.copytree(whole, state)
    file = state / data.draw(st.sampled_from([TENSORS, VALUES, CHECKSUMS]))
    content = damaged(file.read_bytes())
    if file.name == VALUES:
        content |= changed(json.loads(file.read_bytes())).map(as_json)
    file.write_bytes(data.draw(content))
    if signed:
        sums = [f"{sha256((state / name).read_bytes()).hexdigest()}  {name}" for name in (TENSORS, VALUES)]
        (state / CHECKSUMS).write_text("\n".join(sums) + "\n")
    read_or_refused(checkpoint.load, checkpoint.folder)
    assert not list(folder.rglob(f"*{PART}"))


@pytest.fixture(scope="module")
def tokenizer_files(folder: Path) -> list[Path]:
    build_tokenizer().save_pretrained(folder / "whole")
    return sorted((folder / "whole").iterdir())


@cases(0.1)  # each takes a tenth of a second
@given(data=st.data())
def test_tokenizers(folder: Path, tokenizer_files: list[Path], data: st.DataObject) -> None:
    own = folder / "model"
    own.mkdir(exist_ok=True)
    for file in tokenizer_files:
        shutil.copyfile(file, own / file.name)
    file = data.draw(st.sampled_from(tokenizer_files))
    content = damaged(file.read_bytes())
    if file.suffix == ".json":
        content |= changed(json.loads(file.read_bytes())).map(as_json)
    (own / file.name).write_bytes(data.draw(content))
    read_or_refused(lambda: load_tokenizer(str(own)), own)


def test_a_passage_that_was_read_can_be_written() -> None:
    passage = Passage.from_json({"id": 1, "contents": '"A"\r\nb'})
    assert passage == Passage("1", "A", "b")
