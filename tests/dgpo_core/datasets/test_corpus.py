"""wiki-18 in both forms, its count, and constant memory."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from dgpo_core.datasets.published import DataFile, write_corpus
from dgpo_core.datasets.records import Passage, read_corpus
from dgpo_core.errors import UserError
from tests.samples import PASSAGES, SAMPLES, sample_config

WIKI = SAMPLES / "wiki-18.jsonl"
CONFIG = sample_config()


def fetched(path: Path) -> DataFile:
    return DataFile(path, str(path))


@pytest.mark.parametrize("packed", [False, True])
def test_both_forms_give_the_same_file(tmp_path: Path, packed: bool) -> None:
    source = WIKI
    if packed:
        source = tmp_path / "wiki-18.jsonl.gz"
        source.write_bytes(gzip.compress(WIKI.read_bytes()))
    seen: list[tuple[int, int]] = []
    target = tmp_path / "data/corpus.jsonl"
    count = write_corpus(CONFIG, fetched(source), target, lambda done, total: seen.append((done, total)))
    assert (count, seen) == (PASSAGES, [(PASSAGES, PASSAGES)])
    assert target.read_bytes() == WIKI.read_bytes()
    assert next(read_corpus(target)).title == "Marrowick"
    read: list[Passage] = []
    write_corpus(CONFIG, fetched(source), target, lambda *_: None, read.append)
    assert read == list(read_corpus(target))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: no passages"):
        write_corpus(CONFIG, fetched(tmp_path / "empty.jsonl"), tmp_path / "out.jsonl", lambda *_: None)
    assert not (tmp_path / "out.jsonl").exists()


def test_limit_and_count(tmp_path: Path) -> None:
    target = tmp_path / "corpus.jsonl"
    limited = sample_config(limits={"passages": 5}, check_counts=True)
    assert write_corpus(limited, fetched(WIKI), target, lambda *_: None) == 5
    assert len(target.read_text().splitlines()) == 5
    for config in (
        sample_config(check_counts=True),
        sample_config(limits={"passages": 50}, check_counts=True),
    ):
        with pytest.raises(UserError, match=r"the corpus has 24 records, but .* 21,015,324"):
            write_corpus(config, fetched(WIKI), tmp_path / "other.jsonl", lambda *_: None)
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "0", "contents": "\\"T\\"\\ntext"}', "id '0' was used on an earlier line"),
        ('{"id": "24", "contents": "no title"}', "has no line break"),
        ('{"id": "24", "contents": "\\"T\\"\\n\\ud800"}', "surrogates not allowed"),
        ('{"id": "24", "contents": ', "not JSON: Expecting value"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "wiki.jsonl"
    source.write_text(WIKI.read_text() + line + "\n")
    with pytest.raises(UserError) as caught:
        write_corpus(CONFIG, fetched(source), tmp_path / "corpus.jsonl", lambda *_: None)
    assert str(caught.value).startswith(f"{source}:25: ")
    assert message in str(caught.value)
    assert not (tmp_path / "corpus.jsonl").exists()


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: packed[:400] + b"x" * 200])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: object) -> None:
    source = tmp_path / "wiki.jsonl.gz"
    source.write_bytes(damage(gzip.compress(WIKI.read_bytes())))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"wiki\.jsonl\.gz:\d+: not readable as gzip from here on"):
        write_corpus(CONFIG, fetched(source), tmp_path / "corpus.jsonl", lambda *_: None)


def peak(source: Path, target: Path) -> int:
    tracemalloc.start()
    try:
        write_corpus(CONFIG, fetched(source), target, lambda *_: None)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Four times the passages, the same peak (the ids alone would take a megabyte)."""
    peaks = []
    for count in (100, 3_000, 12_000):  # the first fills what Python keeps of patterns and modules
        source = tmp_path / f"{count}.jsonl.gz"
        with gzip.open(source, "wt", compresslevel=1) as file:
            for i in range(count):
                file.write(json.dumps({"id": str(i), "contents": f'"T {i}"\n{i} ' + "text " * 20}) + "\n")
        peaks.append(peak(source, tmp_path / "corpus.jsonl"))
    assert peaks[2] < 1.1 * peaks[1]
