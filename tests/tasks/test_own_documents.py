"""A folder of documents through the stages `data` and `index`: what is found, and what was not read."""

import json
from pathlib import Path

from fpdf import FPDF

from dgpo_core.config.params import load_params
from tasks.stages.data import generate
from tasks.stages.index import index
from tasks.stages.inputs import retriever
from tests.tasks.miniature import change_params
from tests.tasks.test_own_questions import use_own_files


def test_documents_of_many_kinds_are_searched(workplace: Path) -> None:
    use_own_files(workplace)
    folder = workplace / "files"
    folder.mkdir()
    (folder / "moons.md").write_text("# Moons\n\n## Mars\n\nPhobos and Deimos orbit Mars.\n")
    (folder / "tea.html").write_text(
        "<title>Tea</title><body><h2>Green</h2><p>Brew sencha at 70 degrees.</p>"
    )
    (folder / "notes.txt").write_text("Die H\u00e4user am See sind rot.", encoding="utf-8")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    pdf = FPDF()
    pdf.set_font("helvetica")
    pdf.add_page()
    pdf.cell(text="The boiler holds 90 litres.")
    pdf.output(str(folder / "boiler.pdf"))
    encoder = {"kind": "bm25", "language": "german"}
    change_params(data={"files": {"corpus": ["files", "corpus.jsonl"]}}, retrieval={"encoder": encoder})
    generate()
    metrics = json.loads(Path("metrics/data.json").read_text())
    assert metrics["passages"] == 24
    assert metrics["not read files/photo.jpg"].startswith("a kind that is not read")
    index()
    searched = retriever(load_params())
    for query, place in {
        "who orbits Mars": "files/moons.md#passage=1",
        "sencha degrees": "files/tea.html#passage=1",
        "ein Haus": "files/notes.txt#passage=1",
        "boiler litres": "files/boiler.pdf#page=1&passage=1",
        "the mayor Person7": "7",
    }.items():
        assert searched.search([query], 1)[0][0].passage.id == place
