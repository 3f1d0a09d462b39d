"""The text of one document with its headings and pages, whatever kind of file it is.

HTML and Word become Markdown (markdownify, mammoth), whose headings markdown-it-py finds; PDF has pages
(pypdf) and no headings. All but markdown-it-py are the extra `documents`; docs/data.md says why these.
"""

import codecs
import hashlib
import importlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from dgpo_core.errors import UserError, first_line
from dgpo_core.text import canonical, trimmed

INSTALL = "pip install -c constraints/main.txt -e '.[documents]'"
LIBRARIES = ("beautifulsoup4", "mammoth", "markdown-it-py", "markdownify", "pypdf")
BESIDE_TEXT = ("script", "style", "template", "nav", "footer", "aside", "img")  # of a page of HTML
UNFORMATTED = ("a", "b", "strong", "i", "em", "u")  # elements of which the words alone count
_FRONT = re.compile(r"\A---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class Unreadable(Exception):
    """Says why nothing can be read from a file."""


@dataclass(frozen=True)
class Section:
    """A stretch of a document below one heading or on one page."""

    headings: tuple[str, ...]  # from the outermost to its own
    page: int | None
    text: str


@dataclass(frozen=True)
class Document:
    """The text of a file. `title` is empty where it names none; `gaps` says which parts have no text."""

    title: str
    sections: tuple[Section, ...]
    gaps: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Document":
        sections = (Section(tuple(s["headings"]), s["page"], s["text"]) for s in row["sections"])
        return cls(row["title"], tuple(sections), tuple(row["gaps"]))


def extract(path: Path, content: bytes) -> Document:
    """Extract the text of a file whose kind is in KINDS.

    Raise Unreadable with the reason, UserError where the library for its kind is not installed.
    """
    try:
        document = KINDS[path.suffix.lower()][1](content)
    except (Unreadable, UserError):
        raise
    except Exception as error:  # a broken file fails in any way, deep in a library
        raise Unreadable(f"broken? {type(error).__name__}: {first_line(error)[:200]}") from error
    if not document.sections:
        raise Unreadable("; ".join(document.gaps) or "no text in it")
    return document


def extraction_key(path: Path, content: bytes) -> str:
    """Compute a name for what `extract` returns: another file, source or library gives another one."""
    digest = hashlib.sha256(content)
    for part in (path.suffix.lower(), Path(__file__).read_text(encoding="utf-8"), *map(_version, LIBRARIES)):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def library(name: str) -> Any:
    """Import a library of the extra `documents`. Raise UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed, which reading documents needs: {INSTALL}") from error


def _plain(content: bytes) -> Document:
    text = trimmed(_decoded(content))
    return Document("", (Section((), None, text),) if text else ())


def _decoded(content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not in UTF-8, save the file so: {error}") from error
    return canonical(text.replace("\r\n", "\n").replace("\r", "\n"))


def _markdown(content: bytes) -> Document:
    text = _decoded(content)
    front = _FRONT.match(text)
    named = _FRONT_TITLE.search(front[1]) if front else None
    title = named[1].strip("\"'") if named else ""
    body = f"{front[1]}\n{text[front.end() :]}" if front else text  # without the lines around it
    return _by_headings(body, title)


def _by_headings(text: str, title: str) -> Document:
    """Cut Markdown at its headings. A document's only heading of the first level is its title."""
    found = list(_headings(text))
    first = [heading for _, _, level, heading in found if level == 1]
    title = first[0] if len(first) == 1 else title
    lines = text.split("\n")
    sections: list[Section] = []
    above: list[tuple[int, str]] = []  # (level, heading) of the sections around this one
    bounds = [(0, 0, 0, ""), *found, (len(lines), len(lines), 0, "")]
    for (_, start, level, heading), (end, _, following, _) in pairwise(bounds):
        if level:
            above = [entry for entry in above if entry[0] < level]
            above.append((level, heading))
        body = trimmed("\n".join(lines[start:end]))
        if not body and heading and following <= level:
            body = heading  # a heading that nothing follows is text
        path = tuple(name for _, name in above if name and name != title)
        if body:
            sections.append(Section(path, None, body))
    return Document(title, tuple(sections))


def _headings(text: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield (its first line, the line behind it, level, words) of each heading; code has none."""
    tokens = MarkdownIt("commonmark").parse(text)
    for number, token in enumerate(tokens):
        if token.type == "heading_open" and token.level == 0 and token.map:
            parts = tokens[number + 1].children or []
            words = "".join(part.content or " " for part in parts)
            yield token.map[0], token.map[1], int(token.tag[1]), " ".join(words.split())


def _html(content: bytes) -> Document:
    page = library("bs4").BeautifulSoup(content, "html.parser")
    title = " ".join(page.title.get_text().split()) if page.title else ""
    for element in page(["title", *BESIDE_TEXT]):
        element.decompose()
    markdown = (
        library("markdownify")
        .MarkdownConverter(
            heading_style="ATX",
            strip=UNFORMATTED,
            escape_asterisks=False,
            escape_underscores=False,
            escape_misc=False,
        )
        .convert_soup(page)
    )
    return _by_headings(canonical(markdown), canonical(title))


def _word(content: bytes) -> Document:
    return _html(library("mammoth").convert_to_html(io.BytesIO(content)).value.encode())


def _pdf(content: bytes) -> Document:
    reader = library("pypdf").PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("locked with a password")
    texts = [_printed(page.extract_text()) for page in reader.pages]
    missing = [str(number) for number, text in enumerate(texts, 1) if not text]
    gaps = (f"no text on page {', '.join(missing)}: a scan needs OCR first",) if missing else ()
    title = _printed(str((reader.metadata and reader.metadata.title) or ""))
    return Document(title, tuple(Section((), n, text) for n, text in enumerate(texts, 1) if text), gaps)


def _printed(text: str) -> str:
    """Return the text of a PDF, which may have halves of surrogate pairs, as files can hold it."""
    return trimmed(canonical(text.encode("utf-8", errors="replace").decode()))


KINDS: dict[str, tuple[str, Callable[[bytes], Document]]] = {
    **dict.fromkeys((".md", ".markdown"), ("Markdown", _markdown)),
    **dict.fromkeys((".txt", ".text"), ("text", _plain)),
    **dict.fromkeys((".html", ".htm", ".xhtml"), ("HTML", _html)),
    ".docx": ("Word", _word),
    ".pdf": ("PDF", _pdf),
}
