"""The published data sets: files here and on a hub, question sets, validation questions, the corpus."""

import gzip
import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.config.data import PAPER_SETS, TRAINING_SETS, QuestionSetsConfig
from dgpo_core.datasets.published import (
    PASSAGES,
    TEST_QUESTIONS,
    TEST_SPLITS,
    TRAIN_QUESTIONS,
    DataFile,
    _commit,
    fetch,
    fetch_questions,
    hold_out,
    load_questions,
    write_corpus,
)
from dgpo_core.datasets.records import Question, read_corpus
from dgpo_core.errors import UserError
from dgpo_core.text import letters
from tests.conftest import run_python
from tests.samples import PASSAGES as SAMPLE_PASSAGES
from tests.samples import SAMPLES, sample_config
from tests.web import Handler, handled

ALL = QuestionSetsConfig()
CONFIG = sample_config()
WIKI = SAMPLES / "wiki-18.jsonl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import json, sys
from dgpo_core.datasets.published import fetch
for address in sys.argv[1:]:
    try:
        found = fetch(address, "data.published.corpus")
        print(json.dumps({"origin": found.origin, "text": found.path.read_text()}))
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


class Hub(Handler):
    """The repository samples/wiki with wiki-18.jsonl at COMMIT, which is also main."""

    downloads = 0
    cut = False  # half of the body, and an end to the connection

    def do_GET(self) -> None:
        prefix, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        headers = {"X-Repo-Commit": COMMIT}
        if prefix != "datasets/samples/wiki":
            self.answer(404, headers | {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.answer(404, headers | {"X-Error-Code": "RevisionNotFound"})
        elif name != "wiki-18.jsonl":
            self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        else:
            content = WIKI.read_bytes()
            headers |= {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Content-Length": str(len(content)),
            }
            type(self).downloads += self.command == "GET"
            self.answer(200, headers, content[: len(content) // 2] if self.cut else content)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.downloads, Hub.cut = 0, False
    with handled(Hub) as url:
        yield url


def fetched(home: Path, endpoint: str, *addresses: str) -> list[dict[str, str]]:
    """What a fresh process fetches (the hub's client reads its environment when it is imported)."""
    places = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    done = run_python(FETCH, *addresses, HF_HUB_OFFLINE="0", HF_TOKEN="", **places)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.thorough
def test_hub(hub: str, tmp_path: Path) -> None:
    """Downloaded once, with the commit; mistakes name the setting; without a hub the cache serves."""
    pinned = f"hf://datasets/samples/wiki@{COMMIT}/wiki-18.jsonl"
    names = ("wiki/wiki-18.jsonl", "wiki/other.jsonl", "wiki@v9/wiki-18.jsonl", "none/wiki-18.jsonl")
    first, *wrong = [f"hf://datasets/samples/{name}" for name in names]
    answers = fetched(tmp_path, hub, first, pinned, *wrong)
    for answer in answers[:2]:
        assert answer == {"origin": pinned, "text": (SAMPLES / "wiki-18.jsonl").read_text()}
    assert Hub.downloads == 1
    for answer, place in zip(answers[2:], ("other.jsonl", "wiki@v9", "samples/none"), strict=True):
        assert answer["error"] == "UserError"
        assert answer["message"].startswith("data.published.corpus: hf://datasets/")
        assert place in answer["message"]
    gone = "http://127.0.0.1:9"
    offline = fetched(tmp_path, gone, pinned, "hf://datasets/samples/wiki/other.jsonl")
    assert offline[0]["origin"] == pinned
    assert offline[1]["error"] == "InfrastructureError"
    assert "cannot reach the hub" in offline[1]["message"]


@pytest.mark.thorough
def test_a_broken_download_is_nobodys_fault_and_can_be_tried_again(hub: str, tmp_path: Path) -> None:
    address = "hf://datasets/samples/wiki/wiki-18.jsonl"
    Hub.cut = True
    (broken,) = fetched(tmp_path, hub, address)
    assert broken["error"] == "InfrastructureError" and "the download failed" in broken["message"]
    Hub.cut = False
    (again,) = fetched(tmp_path, hub, address)
    assert again["text"] == (SAMPLES / "wiki-18.jsonl").read_text()


def test_the_commit_is_read_below_the_hubs_own_folder() -> None:
    """The cache may lie anywhere."""
    cached = f"/mnt/snapshots/datasets--x/hub/datasets--a--b/snapshots/{COMMIT}/nq/test.jsonl"
    assert _commit(Path(cached)) == COMMIT


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    assert fetch(str(path), "x") == DataFile(path, str(path))
    with pytest.raises(UserError, match=r"data\.published\.nq: .*b\.jsonl: no such file"):
        fetch(str(tmp_path / "b.jsonl"), "data.published.nq")
    with pytest.raises(UserError, match=r"corpus: .* a folder, .* your own .* need data\.source: files"):
        fetch(str(tmp_path), "data.published.corpus")


@pytest.mark.parametrize("address", ["hf://models/a/b/c", "hf://datasets/a/b", "hf://datasets/a/b@", "hf://"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(UserError, match=r"x: hf://.*: must be hf://datasets/<owner>/<name>"):
        fetch(address, "x")


def load(**changes: Any) -> tuple[dict[tuple[str, str], list[Question]], dict[str, int]]:
    config = sample_config(**changes)
    return load_questions(config, fetch_questions(config, ALL))


def test_the_catalogue_has_every_set_of_the_paper() -> None:
    """Table 9's columns: 169,615 training and 51,713 test questions."""
    assert (tuple(TEST_QUESTIONS), tuple(TRAIN_QUESTIONS)) == (PAPER_SETS, TRAINING_SETS)
    assert set(TEST_SPLITS) == set(PAPER_SETS)
    assert (sum(TRAIN_QUESTIONS.values()), sum(TEST_QUESTIONS.values())) == (169_615, 51_713)
    assert PASSAGES == 21_015_324


def test_all_sets_of_the_samples() -> None:
    questions, joins = load()
    sizes = {f"{name}/{split}": len(items) for (name, split), items in questions.items()}
    assert sizes == {
        "nq/train": 6, "nq/dev": 2, "nq/test": 5, "hotpotqa/train": 4, "hotpotqa/dev": 2, "hotpotqa/test": 3,
        "triviaqa/test": 2, "popqa/test": 2, "2wikimultihopqa/test": 2, "musique/test": 4,
        "bamboogle/test": 2,
    }  # fmt: skip
    assert joins["musique_gold_joined"] == 3
    assert joins["nq_gold_not_found"] == 1
    assert all(q.metadata == {} for q in questions["hotpotqa", "train"] + questions["popqa", "test"])
    assert questions["triviaqa", "test"][0].golden_answers[0] == "Ilsa Thornevald"


def test_limits_and_sets_without_gold() -> None:
    questions, joins = load(limits={"train": 3, "test": 2}, musique=[], nq=[])
    assert len(questions["nq", "train"]) == 3
    assert len(questions["nq", "dev"]) == 2
    assert len(questions["nq", "test"]) == 2
    assert joins == {}


def test_a_count_that_is_not_the_papers_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        load(check_counts=True)
    assert "nq/train has 8 records, but the paper (table 9) has 79,168" in str(caught.value)
    assert "data.published.check_counts: false" in str(caught.value)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.published\.questions: .*nq/train\.jsonl: no such file"):
        load(questions=str(tmp_path))
    shutil.copytree(SAMPLES / "flashrag", tmp_path / "flashrag")
    damaged = tmp_path / "flashrag/hotpotqa/dev.jsonl"
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([lines[0], lines[1].replace('"golden_answers"', '"solutions"'), lines[2]]))
    with pytest.raises(
        UserError, match=r'hotpotqa/dev\.jsonl:2: key "golden_answers" is missing; its keys are'
    ):
        load(questions=str(tmp_path / "flashrag"))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=40), st.integers(1, 35), st.randoms())
def test_held_out_questions_do_not_depend_on_the_files_order(
    texts: list[int], count: int, random: Any
) -> None:
    questions = [Question(str(i), f"question {text}", ("x",)) for i, text in enumerate(texts)]
    if count >= len(set(texts)):
        with pytest.raises(UserError, match=r"data\.published\.dev_questions: .* held out of nq"):
            hold_out("nq", questions, count)
        return
    train, dev = hold_out("nq", questions, count)
    assert sorted(train + dev, key=lambda q: int(q.id)) == questions
    assert len({q.question for q in dev}) == count
    assert not {q.question for q in dev} & {q.question for q in train}
    shuffled = random.sample(questions, len(questions))
    assert {q.id for q in hold_out("nq", shuffled, count)[1]} == {q.id for q in dev}
    larger = hold_out("nq", [*questions, Question("new", "a new one", ("x",))], count)[1]
    assert len({q.question for q in dev} - {q.question for q in larger}) <= 1, "a new text displaces one"


@given(
    st.sets(
        st.text(st.characters(categories=["Lu", "Ll", "Nd", "Zs"], max_codepoint=0x7F), min_size=1),
        min_size=3,
    )
)
def test_files_without_variants_are_split_as_ever(texts: set[str]) -> None:
    """By the hash of the text alone, so that the published sets keep their validation questions."""
    questions = [Question(str(i), text, ("x",)) for i, text in enumerate(texts) if letters(text) == text]
    if len(questions) < 3:
        return
    _, dev = hold_out("nq", questions, 2)
    digests = {q.question: hashlib.sha256(f"nq\n{q.question}".encode()).digest() for q in questions}
    assert {q.question for q in dev} == set(sorted(digests, key=digests.__getitem__)[:2])


@given(st.integers(1, 5))
def test_variants_of_a_question_are_on_one_side(count: int) -> None:
    forms = ("who is the mayor of town {}", "WHO IS THE MAYOR OF TOWN {}?", "Who is the  mayor of Town {} ?")
    questions = [
        Question(f"{i}-{n}", form.format(i), ("x",)) for n, form in enumerate(forms) for i in range(6)
    ]
    train, dev = hold_out("nq", questions, count)
    assert len(dev) == count * len(forms)
    assert not {letters(q.question) for q in train} & {letters(q.question) for q in dev}


def test_empty_golden_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "flashrag", tmp_path / "flashrag")
    changed = tmp_path / "flashrag/triviaqa/test.jsonl"
    rows = [json.loads(line) for line in changed.read_text().splitlines()]
    rows[0]["golden_answers"] = ["", *rows[0]["golden_answers"], " \u200b"]
    changed.write_text("\n".join(map(json.dumps, rows)))
    questions, counts = load(questions=str(tmp_path / "flashrag"))
    assert questions["triviaqa", "test"] == load()[0]["triviaqa", "test"]
    assert counts["triviaqa_test_empty_answers"] == 2
    assert "nq_test_empty_answers" not in counts


def local(path: Path) -> DataFile:
    return DataFile(path, str(path))


@pytest.mark.parametrize("packed", [False, True])
def test_both_forms_give_the_same_file(tmp_path: Path, packed: bool) -> None:
    source = WIKI
    if packed:
        source = tmp_path / "wiki-18.jsonl.gz"
        source.write_bytes(gzip.compress(WIKI.read_bytes()))
    seen: list[tuple[int, int]] = []
    target = tmp_path / "data/corpus.jsonl"
    count = write_corpus(CONFIG, local(source), target, lambda done, total: seen.append((done, total)))
    assert (count, seen) == (SAMPLE_PASSAGES, [(SAMPLE_PASSAGES, SAMPLE_PASSAGES)])
    assert target.read_bytes() == WIKI.read_bytes()
    assert next(read_corpus(target)).title == "Marrowick"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: no passages"):
        write_corpus(CONFIG, local(tmp_path / "empty.jsonl"), tmp_path / "out.jsonl", lambda *_: None)
    assert not (tmp_path / "out.jsonl").exists()


def test_limit_and_count(tmp_path: Path) -> None:
    target = tmp_path / "corpus.jsonl"
    limited = sample_config(limits={"passages": 5}, check_counts=True)
    assert write_corpus(limited, local(WIKI), target, lambda *_: None) == 5
    assert len(target.read_text().splitlines()) == 5
    for config in (
        sample_config(check_counts=True),
        sample_config(limits={"passages": 50}, check_counts=True),
    ):
        with pytest.raises(UserError, match=r"the corpus has 24 records, but .* 21,015,324"):
            write_corpus(config, local(WIKI), tmp_path / "other.jsonl", lambda *_: None)
    assert not (tmp_path / "other.jsonl").exists()


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    source = tmp_path / "wiki.jsonl"
    source.write_text(WIKI.read_text() + '{"id": "24", "contents": "no title"}\n')
    with pytest.raises(UserError, match=r"wiki\.jsonl:25: .*has no line break"):
        write_corpus(CONFIG, local(source), tmp_path / "corpus.jsonl", lambda *_: None)
    assert not (tmp_path / "corpus.jsonl").exists()


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: packed[:400] + b"x" * 200])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: object) -> None:
    source = tmp_path / "wiki.jsonl.gz"
    source.write_bytes(damage(gzip.compress(WIKI.read_bytes())))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"wiki\.jsonl\.gz:\d+: not readable as gzip from here on"):
        write_corpus(CONFIG, local(source), tmp_path / "corpus.jsonl", lambda *_: None)


def peak(source: Path, target: Path) -> int:
    tracemalloc.start()
    try:
        write_corpus(CONFIG, local(source), target, lambda *_: None)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Of 9,000 more passages nothing is kept: an object has 16 bytes at least, an id 50."""
    peaks = []
    for count in (100, 3_000, 12_000):  # the first fills what Python keeps of patterns and modules
        source = tmp_path / f"{count}.jsonl.gz"
        with gzip.open(source, "wt", compresslevel=1) as file:
            for i in range(count):
                file.write(json.dumps({"id": str(i), "contents": f'"T {i}"\n{i} ' + "text " * 20}) + "\n")
        # the least of three: threads of other tests, and what measures coverage, allocate too
        peaks.append(min(peak(source, tmp_path / "corpus.jsonl") for _ in range(3)))
    assert peaks[2] - peaks[1] < 8 * 9_000
