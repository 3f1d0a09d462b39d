"""Documents of every kind become passages; what cannot be read is named, and nothing else is lost."""

import codecs
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from docx import Document as WordFile
from fpdf import FPDF
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.datasets import documents
from dgpo_core.datasets.documents import Cutter, Reading, count_words, find_documents, read_documents
from dgpo_core.datasets.extraction import Document, extract
from dgpo_core.datasets.records import Passage, read_corpus, write_jsonl
from dgpo_core.errors import UserError

HANDBOOK = """# Staff handbook

Everyone has 30 days of leave.

## Travel

Trains are paid in second class.

```
# no heading, but code
```

### Abroad

Ask first.

## Appendix
"""
PAGE = """<html><head><meta charset="utf-8"><title>Handbook | ACME</title></head><body>
<nav><a href="/">Home</a></nav><main><p>Caf\u00e9 is <b>free</b>.</p><h2>Travel</h2>
<table><tr><th>City</th><th>Limit</th></tr><tr><td>Oslo</td><td>snake_case 120</td></tr></table>
</main><footer>Imprint</footer><script>var x;</script></body></html>"""


def read(*paths: Path, words: int = 100, cache: Path | None = None) -> Reading:
    return read_documents(find_documents([str(path) for path in paths]), words, cache)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pdf(path: Path, pages: list[str], title: str = "") -> Path:
    file = FPDF()
    file.set_title(title)
    file.set_font("helvetica", size=12)
    for text in pages:
        file.add_page()
        file.multi_cell(0, text=text)
    file.output(str(path))
    return path


def word(path: Path) -> Path:
    file = WordFile()
    file.add_heading("Safety rules", level=1)
    file.add_paragraph("Wear a helmet.")
    file.add_heading("Fire", level=2)
    table = file.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "Exit", "North"
    file.save(str(path))
    return path


@pytest.fixture(autouse=True)
def _in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_markdown_knows_its_headings() -> None:
    found = read(written(Path("handbook.md"), HANDBOOK)).passages
    assert [(p.title, p.text) for p in found] == [
        ("Staff handbook", "Everyone has 30 days of leave."),
        (
            "Staff handbook > Travel",
            "Trains are paid in second class.\n\n```\n# no heading, but code\n```",
        ),
        ("Staff handbook > Travel > Abroad", "Ask first."),
        ("Staff handbook > Appendix", "Appendix"),
    ]
    assert [p.id for p in found] == [f"handbook.md#passage={number}" for number in (1, 2, 3, 4)]


def test_front_matter_names_the_title() -> None:
    found = read(written(Path("note.md"), '---\ntitle: "Two moons"\ntags: mars\n---\n## A\nx\n## B\ny\n'))
    assert [p.title for p in found.passages] == ["Two moons", "Two moons > A", "Two moons > B"]
    assert "tags: mars" in found.passages[0].text


def test_html_is_read_without_menus_and_scripts() -> None:
    found = read(written(Path("page.html"), PAGE)).passages
    assert [(p.title, p.text.split()) for p in found] == [
        ("Handbook | ACME", ["Café", "is", "free."]),
        (
            "Handbook | ACME > Travel",
            "| City | Limit | | --- | --- | | Oslo | snake_case 120 |".split(),
        ),
    ]


def test_word_files_have_headings_and_tables() -> None:
    found = read(word(Path("rules.docx"))).passages
    assert [p.title for p in found] == ["Safety rules", "Safety rules > Fire"]
    assert found[0].text == "Wear a helmet."
    assert "Exit" in found[1].text and "North" in found[1].text


def test_passages_of_a_pdf_know_their_page() -> None:
    found = read(pdf(Path("manual.pdf"), ["Press start.", "", "Press stop."], title="Manual"))
    assert [(p.id, p.title, p.text) for p in found.passages] == [
        ("manual.pdf#page=1&passage=1", "Manual, page 1", "Press start."),
        ("manual.pdf#page=3&passage=2", "Manual, page 3", "Press stop."),
    ]
    assert found.unread == {"manual.pdf": "no text on page 2: a scan needs OCR first"}


def test_a_pdf_without_a_title_has_its_files_name() -> None:
    assert read(pdf(Path("manual.pdf"), ["Press start."])).passages[0].title == "manual, page 1"


@pytest.mark.parametrize(
    "content",
    [
        "Zürich lies on a lake.\r\nIt is old.\r\n".encode(),
        codecs.BOM_UTF8 + b"Zu\xcc\x88rich lies on a lake.\nIt is old.",  # a combining letter
        codecs.BOM_UTF16_LE + "Zürich lies on a la\u00adke.\nIt is old.\n\n".encode("utf-16-le"),
    ],
)
def test_text_is_read_in_one_spelling(content: bytes) -> None:
    found = read(written(Path("zurich.txt"), content)).passages
    assert [(p.title, p.text) for p in found] == [("zurich", "Zürich lies on a lake.\nIt is old.")]


def test_rows_are_passages_under_the_usual_names(tmp_path: Path) -> None:
    wiki = {"id": "7", "contents": '"Town"\nIt lies on a river.'}
    other = {"docid": 8, "title": "Village", "text": "It lies\r\non a hill."}
    lines = "\n\n".join(json.dumps(row) for row in (wiki, other))
    written(Path("a.jsonl"), codecs.BOM_UTF8 + lines.encode())
    written(Path("b.csv"), "Title;Text\r\nHamlet;It is small.\r\n;Nameless.\r\nEmpty;\r\n")
    pq.write_table(pa.table({"_id": ["9"], "text": ["A city."]}), "c.parquet")
    found = read(tmp_path)
    folder = tmp_path.as_posix()
    assert found.passages == [
        Passage("7", "Town", "It lies on a river."),
        Passage("8", "Village", "It lies\non a hill."),
        Passage(f"{folder}/b.csv#row=1", "Hamlet", "It is small."),
        Passage(f"{folder}/b.csv#row=2", "b", "Nameless."),
        Passage("9", "c", "A city."),
    ]
    assert list(found.unread) == [f"{folder}/b.csv:4"]
    assert found.kinds == {"JSON": 1, "CSV": 1, "Parquet": 1}


def test_ids_of_two_files_stay_apart() -> None:
    for name in ("a", "b"):
        written(Path(f"{name}.jsonl"), json.dumps({"id": 0, "title": "T", "text": f"Same or {name}."}))
    found = read(Path("a.jsonl"), Path("b.jsonl"))
    assert [p.id for p in found.passages] == ["0", "b.jsonl#id=0"]
    assert found.counts["renamed_ids"] == 1


def test_equal_passages_stay_and_are_counted() -> None:
    written(
        Path("a.jsonl"), "\n".join(json.dumps({"id": n, "title": "T", "text": "Same."}) for n in range(4))
    )
    counts = read(Path("a.jsonl")).counts
    assert (counts["passages"], counts["repeated_passages"]) == (4, 3)


def test_a_long_row_is_cut_and_keeps_its_id() -> None:
    text = " ".join(f"w{n}" for n in range(250))
    written(Path("a.jsonl"), json.dumps({"id": 5, "title": "T", "text": text}))
    found = read(Path("a.jsonl")).passages
    assert [p.id for p in found] == ["5", "5#passage=2", "5#passage=3"]
    assert " ".join(p.text for p in found) == text


def test_what_cannot_be_read_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    written(Path("good.txt"), "Fine.")
    written(Path("empty.md"), " \n")
    written(Path("latin.txt"), "Zürich".encode("latin-1"))
    written(Path("broken.pdf"), "%PDF-1.7 and no more")
    written(Path("broken.docx"), "no archive")
    written(Path("photo.jpg"), b"\xff\xd8")
    written(Path("twice.jsonl"), '{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}')
    written(Path(".hidden"), "x")
    found = read(tmp_path)
    assert [p.text for p in found.passages] == ["Fine."]
    reasons = {Path(place).name: why for place, why in found.unread.items()}
    assert reasons.keys() == {
        "empty.md", "latin.txt", "broken.pdf", "broken.docx", "photo.jpg", "twice.jsonl",
    }  # fmt: skip
    assert reasons["empty.md"] == "no text in it"
    assert reasons["latin.txt"].startswith("not in UTF-8, save the file so")
    assert reasons["photo.jpg"].startswith("a kind that is not read, as .md")
    assert "id '1' was used before" in reasons["twice.jsonl"]
    assert len(found.remarks) == found.counts["unread"] == 6


def test_places_with_one_reason_share_a_line() -> None:
    for number in range(7):
        written(Path(f"{number}.jpg"), "")
    (remark,) = read(written(Path("a.txt"), "x"), *map(Path, ("0.jpg", "6.jpg"))).remarks
    assert remark.startswith("not read: 0.jpg, 6.jpg: a kind that is not read")
    (remark,) = read(Path()).remarks
    assert "4.jpg and 2 more: a kind" in remark


def test_nothing_that_can_be_read_is_an_error() -> None:
    with pytest.raises(UserError, match=r"nothing could be read; not read: a\.txt: no text in it"):
        read(written(Path("a.txt"), ""))
    with pytest.raises(UserError, match=r"data\.files\.corpus: \*\.md: no such file"):
        find_documents(["*.md"])


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    file = pdf(Path("a.pdf"), ["Text."])
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(UserError, match=r"pypdf is not installed.*pip install .*\[documents\]"):
        read(file)


def test_unchanged_files_are_not_extracted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = written(Path("a.html"), PAGE), Path("cache")
    extracted: list[Path] = []

    def counted(path: Path, content: bytes) -> Document:
        extracted.append(path)
        return extract(path, content)

    monkeypatch.setattr(documents, "extract", counted)
    first = read(file, cache=cache).passages
    assert read(file, cache=cache).passages == first
    assert len(extracted) == 1
    for kept in cache.iterdir():  # broken, it is made anew
        kept.write_text("{")
    assert read(file, cache=cache).passages == first
    written(file, PAGE.replace("Oslo", "Bergen"))
    assert "Bergen" in read(file, cache=cache).passages[1].text
    assert len(extracted) == 3


def test_places_are_files_folders_and_globs() -> None:
    for name in ("a/b/c.md", "a/d.txt", "a/.git/e.md", "f.md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        written(Path(name), "x")
    assert [p.as_posix() for p in find_documents(["a", "*.md", "a/d.txt"])] == ["a/b/c.md", "a/d.txt", "f.md"]
    assert [p.as_posix() for p in find_documents(["a/**/*.md"])][-1] == "a/b/c.md"


def test_passages_are_written_as_wiki_18_has_them() -> None:
    found = read(written(Path("handbook.md"), HANDBOOK)).passages
    write_jsonl(Path("out.jsonl"), found)
    assert list(read_corpus(Path("out.jsonl"))) == found


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C", "M")), min_size=1, max_size=12)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", "\n", "\n\n", ". ", "  "])), min_size=1, max_size=120)


@given(pieces=TEXTS, words=st.integers(10, 40))
def test_no_word_is_lost_and_none_stands_twice(pieces: list[tuple[str, str]], words: int) -> None:
    text = "".join(word + space for word, space in pieces)
    parts = Cutter(words).cut(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part.strip() and count_words(part) <= words for part in parts) or not text.strip()


def test_japanese_is_cut_at_its_sentences() -> None:
    sentence = "東京は日本の首都であり、人口が世界で最も多い都市の一つとして知られている。"
    parts = Cutter(50).cut(sentence * 10)
    assert "".join(parts) == sentence * 10
    assert len(parts) > 3 and all(part.endswith("。") for part in parts)
