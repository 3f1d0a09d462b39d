"""The data report: what the audit found, as a page of its own and as Markdown for a dashboard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dgpo_core.datasets.audit import Audit, SplitAudit
from dgpo_core.reporting.formats import DASH, asset, template
from dgpo_core.text import markdown_cell

Figures = Callable[[SplitAudit], list[str]]


@dataclass(frozen=True)
class Table:
    """Figures of every split: heads with their meaning, and (set, split, figures) a row."""

    title: str
    heads: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, str, Sequence[str]]]
    note: str


ANSWERS = (
    ("Questions", ""),
    ("In the corpus", "some passage has an answer"),
    ("In the gold passages", "where they are known"),
    ("In the top k", "of the question as query"),
)
TWICE = (
    ("Repeated", "in the same split"),
    ("In training", "the same letters and digits"),
    ("Answers of training", "share of questions"),
    ("Wordless answers", "compared as written"),
)
LENGTHS = (
    ("Longest prompt", "tokens"),
    ("Too long", "no room for a turn"),
    ("Results cut", "longer than max_information"),
    ("Scripts", "of most letters"),
)
READING = (
    "More than the share in the corpus no model can answer by reading. The gap to the top k is what better "
    "queries, several searches or another encoder can win. Yes and no count as there."
)
SAME = (
    "Test questions are compared with those of training and validation, those of validation with training's. "
    "That answers of training return is usual; `disjoint: answer` keeps them apart where a set is split here."
)


def tables(found: Audit) -> list[Table]:
    """Return the page's tables: can it be answered and found, what stands twice, lengths and scripts."""
    return [
        _table("Can it be answered, and found", ANSWERS, found, _answers, READING),
        _table("What stands twice", TWICE, found, _twice, SAME),
        _table("Lengths and scripts", LENGTHS, found, _lengths, f"{_corpus(found)}."),
    ]


def _table(title: str, heads: Sequence[tuple[str, str]], found: Audit, figures: Figures, note: str) -> Table:
    rows = [(name, split, figures(own)) for (name, split), own in found.splits.items()]
    return Table(title, heads, rows, note)


def _answers(own: SplitAudit) -> list[str]:
    return [f"{own.questions:,}", *map(_share, (own.answerable, own.in_gold, own.in_top_k))]


def _twice(own: SplitAudit) -> list[str]:
    leaked = DASH if own.in_train is None else f"{own.in_train:,}"
    return [f"{own.repeated:,}", leaked, _share(own.answers_in_train), f"{own.wordless_answers:,}"]


def _lengths(own: SplitAudit) -> list[str]:
    return [
        f"{own.prompt_tokens:,}",
        _share(own.long_questions),
        _share(own.cut_results),
        _scripts(own.scripts),
    ]


def _corpus(found: Audit) -> str:
    size = (
        f"{found.passages:,} passages of {found.average_words:.0f} words on average, {found.longest_words:,}"
    )
    return f"The corpus: {size} at most; {_scripts(found.scripts)}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _scripts(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:3]) or DASH


def headline(found: Audit, stops: Sequence[str]) -> str:
    """Say whether the pipeline may go on."""
    if stops:
        return f"The data stop the pipeline: {len(stops)} figures beyond their limits"
    return "The data are within their limits"


def render(found: Audit, stops: Sequence[str]) -> str:
    """Write the page: one file, no network."""
    return template("data.html.j2").render(
        title=headline(found, stops),
        corpus=_corpus(found),
        stops=stops,
        remarks=found.remarks,
        tables=tables(found),
        css=asset("page.css"),
        script=asset("theme.js"),
    )


def markdown(found: Audit, stops: Sequence[str]) -> str:
    """Write the same as Markdown."""
    lines = [f"**{headline(found, stops)}.** {_corpus(found)}."]
    lines += ["", *(f"- {markdown_cell(line)}" for line in (*stops, *found.remarks))]
    for table in tables(found):
        lines += ["", f"### {table.title}", ""]
        lines.append(f"| set | split | {' | '.join(label for label, _ in table.heads)} |")
        lines.append("| --- | --- |" + " --- |" * len(table.heads))
        lines += [f"| {name} | {split} | {' | '.join(cells)} |" for name, split, cells in table.rows]
    return "\n".join(lines) + "\n"
