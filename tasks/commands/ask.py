"""`dgpo ask`: one question to the agent, in the terminal, while its episode unfolds."""

import shlex
import sys
import unicodedata
from contextlib import nullcontext
from typing import NoReturn

from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from dgpo_core.agent.episode import Ending
from dgpo_core.config.params import Params, load_params
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.serving.events import AgentRequest, Delta, EpisodeRecord, Event, Notice, SearchResult
from dgpo_core.serving.unknown_words import unknown_note
from tasks.commands.agent import EngineName, example_questions, open_agent, require_index, resolve_model

STYLES = {
    "think": "magenta",
    "search": "bold blue",
    "information": "dim",
    "answer": "bold green",
    "notice": "red",
    "forged": "yellow",  # an information block that the model wrote itself
    "text": "default",
}
WIDTH = max(map(len, STYLES)) + 1
NO_ANSWER = {
    Ending.BUDGET: "it has no turn left",
    Ending.LENGTH: "its context is full (protocol.max_context)",
}


def ask(
    model: str | None,
    request: AgentRequest,
    as_json: bool,
    colour: bool,
    engine: EngineName = "transformers",
) -> None:
    """Print the episode as it unfolds, then answer and sources; or, `as_json`, its record alone.

    Raises UserError; ends the process with 1 when the retriever fails.
    """
    request.check()
    params = load_params()
    require_index()
    source = resolve_model(params, model)
    notes = Console(stderr=True, color_system="auto" if colour else None, markup=False)
    screen = Screen(Console(color_system="auto" if colour else None, highlight=False))
    try:
        with notes.status(f"loading {source} and the index") if notes.is_terminal else nullcontext():
            agent = open_agent(params, source, model, engine)
        record = agent.ask(request, (lambda event: None) if as_json else screen.show, lambda: False)
    except InfrastructureError as error:
        _fail(error)
    if as_json:
        print(record.model_dump_json(indent=2))
    else:
        screen.close(record)
        doubtful = record.failure is None and (record.answer is None or record.unknown_words)
        if doubtful and (proposed := _proposed(params)):
            print("It answers questions such as", *proposed, sep="\n")
    if record.failure is not None:
        _fail(record.failure)


def print_examples() -> None:
    """Print questions that can be asked. Raise UserError where none are known."""
    require_index()
    if not (proposed := _proposed(load_params())):
        raise UserError('what do you want to know? dgpo ask "..."')
    print("What do you want to know? For example:", *proposed, sep="\n")


def _proposed(params: Params) -> list[str]:
    return [f"    dgpo ask {shlex.quote(printable(question))}" for question in example_questions(params)]


class Screen:
    """Prints events; each kind begins a paragraph of its own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._paragraph: tuple[str, int] | None = None  # kind and turn
        self._started = False  # the paragraph has text
        self._space = ""  # held back: none stands at either end of a paragraph

    def show(self, event: Event) -> None:
        match event:
            case Delta():
                self._delta(event)
            case SearchResult():
                self._begin("information", event.turn)
                self._write(f"\n{' ' * WIDTH}".join(self._lines(event)), "information")
            case Notice():
                self._begin("notice", event.turn)
                self._write(printable(event.text), "notice")

    def close(self, record: EpisodeRecord) -> None:
        """Print the answer and its sources, or why there is none."""
        self._end()
        if record.failure is not None:
            return
        self._write("\n", "text")
        if record.answer is None:
            self._write(f"No answer: {NO_ANSWER.get(record.ending, 'it gave none')}.\n", "notice")
            self._note(record)
            return
        self._write(f"{printable(record.answer)}\n", "answer")
        if record.sources:
            self._write("Contained in\n", "dim")
        for source in record.sources:
            self._write(f"[{source.number}] {printable(source.title)}\n", "text")
        if not record.sources:
            self._write("No retrieved passage contains this answer.\n", "notice")
        self._note(record)

    def _note(self, record: EpisodeRecord) -> None:
        """Say what the index does not know of the question."""
        if note := unknown_note(record.unknown_words):
            self._write(f"But {printable(note)}.\n", "notice")

    def _lines(self, event: SearchResult) -> list[str]:
        """Return a line for each passage, cut to the width of a terminal."""
        texts = [f"{passage.title}: {passage.text}" for passage in event.passages]
        lines = [" ".join(printable(text).split()) for text in texts] or ["nothing found"]
        room = max(20, self._console.width - WIDTH) if self._console.is_terminal else None
        return [chop_cells(line, room)[0] if room else line for line in lines]

    def _delta(self, event: Delta) -> None:
        if self._paragraph != (event.kind, event.turn):
            if not event.text.strip():
                return
            self._begin(event.kind, event.turn)
        text = self._space + printable(event.text)
        text = text if self._started else text.lstrip()
        written = text.rstrip()
        self._space = text[len(written) :]
        if written:
            self._started = True
            self._write(written, event.kind)

    def _begin(self, kind: str, turn: int) -> None:
        self._end()
        self._paragraph, self._space, self._started = (kind, turn), "", False
        self._write(f"{kind:<{WIDTH}}", "dim")

    def _end(self) -> None:
        if self._paragraph is not None:
            self._write("\n", "text")
        self._paragraph = None

    def _write(self, text: str, style: str) -> None:
        self._console.print(Text(text, STYLES.get(style, style)), end="", soft_wrap=True)


def printable(text: str) -> str:
    """Replace control sequences of models and documents, which a terminal would obey."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t"
        else c
        for c in text
    )


def _fail(error: InfrastructureError | str) -> NoReturn:
    reason = " ".join(printable(str(error)).split())  # a server's words too
    print(f"error: no answer, because the retriever failed: {reason}", file=sys.stderr)
    raise SystemExit(1)
