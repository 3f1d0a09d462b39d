"""wiki-18, or a corpus in its format, from a plain or gzipped file: one passage at a time."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

from dgpo_core.config.published import PublishedConfig
from dgpo_core.datasets.published.catalogue import PASSAGES
from dgpo_core.datasets.published.places import Fetched
from dgpo_core.datasets.published.questions import check_count
from dgpo_core.datasets.records import Passage, read_corpus
from dgpo_core.errors import UserError

REPORT_EVERY = 20_000


def write_corpus(
    config: PublishedConfig,
    source: Fetched,
    target: Path,
    progress: Callable[[int, int], None],
    read: Callable[[Passage], None] = lambda _: None,
) -> int:
    """Check every line of `source` and write it to `target`, which appears complete; the number of passages.

    Memory does not grow with wiki-18's size. `progress` gets (passages so far, expected), `read` each
    passage. Raises UserError with file and line, and for a count that is not the paper's.
    """
    limit = config.limits.passages
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    count = 0
    with part.open("w", encoding="utf-8") as file:
        for count, passage in enumerate(itertools.islice(read_corpus(source.path), limit), 1):
            file.write(json.dumps(passage.to_json(), ensure_ascii=False) + "\n")
            read(passage)
            if count % REPORT_EVERY == 0:
                progress(count, limit or PASSAGES)
    if not count:
        raise UserError(f"{source.origin}: no passages in this file")
    if config.check_counts and count != limit:
        check_count("the corpus", count, PASSAGES, source.origin)
    progress(count, count)
    os.replace(part, target)
    return count
