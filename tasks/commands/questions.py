"""`dgpo questions`: questions that a model behind an endpoint writes from the corpus, checked one by one."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from dgpo_core.config.endpoint import EndpointConfig, endpoint_of
from dgpo_core.datasets.question_writing import (
    Attempt,
    AttemptLog,
    QuestionWriter,
    estimate,
    one_hop,
    two_hops,
    write_questions,
)
from dgpo_core.datasets.records import Question, read_corpus, write_jsonl
from dgpo_core.endpoint import EndpointClient
from dgpo_core.errors import UserError
from dgpo_core.files import replacement
from tasks.project.progress import Reporter

LONGEST_REPLY = 200  # tokens
KINDS = {"onehop": one_hop, "twohop": two_hops}


@dataclass(frozen=True)
class Order:
    """What is to be written: counts of each kind, checks, and what a million tokens cost."""

    wanted: dict[str, int]
    seed: int
    closed_book: bool
    price_in: float
    price_out: float


def questions(
    source: str, corpus: Path, out: Path, order: Order, settings: EndpointConfig, confirmed: bool
) -> None:
    """Tell what it will take, ask whether to go on, and write; a run that was ended goes on."""
    try:
        endpoint = endpoint_of(source)
    except ValueError as error:
        raise UserError(str(error)) from None
    if endpoint is None:
        raise UserError(f"{source}: no endpoint, such as openai:qwen2.5-7b@http://127.0.0.1:8000/v1")
    passages = list(read_corpus(corpus))
    out.parent.mkdir(parents=True, exist_ok=True)
    log = AttemptLog(out.with_suffix(".attempts.jsonl"))
    console = Console(highlight=False, soft_wrap=True)
    forecast = estimate(passages, order.wanted, order.closed_book)
    console.print(
        f"{len(passages):,} passages; about {forecast.attempts:,} attempts, {forecast.requests:,} requests, "
        f"{forecast.prompt_tokens:,} tokens read and {forecast.completion_tokens:,} written"
        f"{_cost(forecast.cost(order.price_in, order.price_out))}; {len(log.known):,} attempts are there"
    )
    if not confirmed:
        typer.confirm("Write them?", abort=True)
    with EndpointClient(endpoint, settings) as client:
        writer = QuestionWriter(
            lambda text: client.chat(
                [{"role": "user", "content": text}], max_tokens=LONGEST_REPLY, temperature=0.0
            ),
            endpoint.model,
            order.closed_book,
        )
        found: list[Question] = []
        tried: list[Attempt] = []
        for kind, count in order.wanted.items():
            reporter = Reporter(kind)
            new, attempts = write_questions(
                KINDS[kind](passages, order.seed),
                count,
                writer,
                log,
                settings.concurrency,
                lambda done, made, count=count, reporter=reporter: reporter.update(  # type: ignore[misc]
                    done, count, attempts=made
                ),
            )
            reporter.close()
            found += new
            tried += attempts
            if len(new) < count:
                console.print(
                    f"{kind}: {len(new)} of {count} after {len(attempts):,} attempts; "
                    "the same command goes on where passages are left"
                )
    _finish(out, found, tried, order, console)


def _finish(out: Path, found: list[Question], tried: list[Attempt], order: Order, console: Console) -> None:
    read, written = (
        sum(getattr(each, name) for each in tried) for name in ("prompt_tokens", "completion_tokens")
    )
    spent = (read * order.price_in + written * order.price_out) / 1e6
    refused = Counter(each.refused for each in tried if each.refused)
    for why, count in refused.most_common():
        reply = next((each.reply for each in tried if each.refused == why and each.reply), "")
        console.print(f"{count:6} refused: {why}" + (f"; one was: {reply!r}" if reply else ""))
    if not found:
        raise UserError(f"no question of {len(tried)} attempts is good: take a larger model")
    with replacement(out) as part:
        write_jsonl(part, found)
    tokens = f"{read:,} tokens read and {written:,} written{_cost(spent)}"
    console.print(f"{len(found):6} questions in {out}; {tokens}")


def _cost(cost: float) -> str:
    return f", {cost:.2f} in the prices' currency" if cost else ""
