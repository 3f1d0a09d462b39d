"""`dgpo corpus`: the passages that documents make, before the pipeline takes them."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dgpo_core.datasets.documents import find_documents, read_documents
from dgpo_core.datasets.records import write_jsonl
from dgpo_core.files import replacement
from tasks.project.paths import EXTRACTED


def corpus(places: Sequence[str], out: Path | None, words: int) -> None:
    """Print counts and what could not be read; with `out`, write the passages in wiki-18's format."""
    reading = read_documents(find_documents(places, "dgpo corpus"), words, EXTRACTED)
    counts = reading.counts
    table = Table("", "files", box=None)
    for kind, files in sorted(reading.kinds.items()):
        table.add_row(kind, f"{files:,}")
    Console().print(table)
    print(f"{counts['passages']:,} passages of {counts['words'] / counts['passages']:.0f} words on average")
    if counts["repeated_passages"]:
        print(f"{counts['repeated_passages']:,} passages are like another one, word for word")
    if counts["renamed_ids"]:
        print(f"{counts['renamed_ids']:,} ids were another file's too: the file stands before them now")
    for remark in reading.remarks:
        print(remark)
    if out:
        with replacement(out) as part:
            write_jsonl(part, reading.passages)
        print(out)
