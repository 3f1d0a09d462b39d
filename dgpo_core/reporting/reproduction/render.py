"""Tables, claims and curves of a reproduction, written as Markdown and as self-contained HTML.

Both show the same tables: a `Table` is made once, of cells that know both forms.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby
from math import inf, sqrt
from typing import Any, ClassVar

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting.budget import Budgets, figures
from dgpo_core.reporting.curves import Curve, seed_panels
from dgpo_core.reporting.episodes import compact_json
from dgpo_core.reporting.formats import (
    COLOURS,
    DASH,
    GIVEN,
    asset,
    colour_of,
    model_label,
    own_scale,
    part_played,
    signed,
    template,
)
from dgpo_core.reporting.reproduction.claims import CLAIMS, INVALID_RISE, LENGTH_DRIFT, NEAR_ZERO, PROFILED
from dgpo_core.reporting.reproduction.power import SEEDS, charts
from dgpo_core.reporting.reproduction.verdicts import (
    MEASUREMENT_LABELS,
    REPRODUCED,
    VERDICTS,
    numbers_text,
    seeds_interval_text,
)
from dgpo_core.text import markdown_cell

SHARE_LIMIT, COUNT_LIMIT = 0.3, 3.0  # differences beyond stand at the edge of their track
HOLDS = {True: "correct", False: "wrong", None: "failed"}  # classes of the style sheet
CLASSES = dict(zip(VERDICTS, HOLDS.values(), strict=True))
STATE_CLASSES = {"stable": "correct", "collapsed": "wrong", "fell": "wrong"}
SCRIPTS = ("theme.js", "charts.js", "reproduction.js")
# the curves of figures 4 and 6
FIGURES = ("ppo", "grpo", "dgpo", "dgpo_grpo", "no_cold_start", "gkd", "kd_gkd")
BEFORE_COLLAPSE = (  # sections B.3 and 5.6
    "The paper reports PPO at step 200 and DGPO without cold start just before their collapse; "
    "ours are the models that the runs evaluated."
)
POWER_NOTE = (
    "The difference of seed s on question q is modelled as effect + a(s) + b(q) + e(s, q), so the mean over "
    "S seeds and Q questions has the variance V = var(a)/S + var(b)/Q + var(e)/(S Q). The power is that of "
    "the two-sided 5 % t test with S − 1 degrees of freedom, noncentral by effect/√V (crossed random "
    "factors: Westfall, Kenny and Judd, 2014). The last columns: how many questions give the measured effect "
    "the power 0.8; never: the seeds differ too much. The effect is uncertain, and so are these numbers."
)
Row = dict[str, Any]


# --- tables: cells that Markdown and page both show ---------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A row's head; `colour` is that of a model."""

    label: str
    colour: int | None = None
    notes: tuple[str, ...] = ()
    kind: ClassVar = "head"

    @property
    def plain(self) -> str:
        return _with_notes(self.label, self.notes)


@dataclass(frozen=True)
class Words:
    """A text with small print below it; `css` is its class in the style sheet."""

    text: str
    notes: tuple[str, ...] = ()
    css: str = ""
    bold: bool = False
    kind: ClassVar = "words"

    @property
    def plain(self) -> str:
        return ": ".join(filter(None, [self.text, ", ".join(self.notes)]))


@dataclass(frozen=True)
class Figure:
    """An entry of the JSON files: mean, interval, every seed and the paper. None: it was not run.

    `places` are the page's decimals (Markdown has three); `published` replaces the entry's own figure of the
    paper.
    """

    entry: Row | None
    places: int = 3
    is_signed: bool = False
    published: str = ""
    best: bool = False
    kind: ClassVar = "figure"

    @property
    def value(self) -> str:
        return "not run" if self.entry is None else self._form(self.entry["mean"])

    @property
    def interval(self) -> str:
        low, high = self.entry["ci95"] if self.entry else (None, None)
        between = "to" if self.is_signed else DASH
        return "" if low is None else f"{self._form(low)} {between} {self._form(high)}"

    @property
    def seeds(self) -> str:
        return " · ".join(map(self._form, self.entry["seeds"].values())) if self.entry else ""

    @property
    def over_seeds(self) -> str:
        """Return the t interval over the seeds, of what is compared."""
        return seeds_interval_text(self.entry) if self.entry and self.is_signed else ""

    @property
    def paper(self) -> str:
        known = self.entry and self.entry["paper"] is not None
        return self.published or (self._form(self.entry["paper"]) if self.entry and known else "")

    @property
    def plain(self) -> str:
        if self.entry is None:
            return f"not run{f'; paper {self.published}' if self.published else ''}"
        if self.entry["mean"] is None:
            return f"{DASH} ({self.entry['n']} questions)"
        exact = replace(self, places=3)
        low, high = self.entry["ci95"]
        interval = "" if low is None else f" [{exact._form(low)}, {exact._form(high)}]"
        seeds = ", ".join(map(exact._form, self.entry["seeds"].values()))
        notes = filter(None, [f"seeds {seeds}", self.over_seeds, exact.paper and f"paper {exact.paper}"])
        return f"**{exact.value}**{interval}; {'; '.join(notes)}"

    def _form(self, value: float | None) -> str:
        return DASH if value is None else signed(value) if self.is_signed else f"{value:.{self.places}f}"


@dataclass(frozen=True)
class Chips:
    """States of trainings as coloured marks."""

    states: tuple[str, ...]
    otherwise: ClassVar = "no training curve"
    kind: ClassVar = "chips"

    @property
    def marks(self) -> list[tuple[str, str]]:
        return [(state, STATE_CLASSES.get(state, "failed")) for state in self.states]

    @property
    def plain(self) -> str:
        return ", ".join(self.states) or self.otherwise


@dataclass(frozen=True)
class Strip:
    """A number drawn around zero: on the page only."""

    track: Row
    kind: ClassVar = "strip"
    plain: ClassVar = ""


Cell = Head | Words | Figure | Chips | Strip


@dataclass(frozen=True)
class Column:
    """The head of a column; `drawn`: the page alone has it."""

    label: str
    notes: tuple[str, ...] = ()
    css: str = ""
    drawn: bool = False


@dataclass(frozen=True)
class Table:
    """What Markdown and page show in rows and columns."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """Write the table as Markdown, without what only a page can draw."""
        heads = [_with_notes(column.label, column.notes) for column in self.columns]
        lines = [heads, ["---"] * len(heads), *([cell.plain for cell in row] for row in self.rows)]
        shown = [not column.drawn for column in self.columns]
        return "".join(f"| {' | '.join(map(markdown_cell, compress(line, shown)))} |\n" for line in lines)


def _with_notes(text: str, notes: Sequence[str]) -> str:
    return f"{text} ({', '.join(notes)})" if notes else text


def _head(model: str, models: Iterable[str] = ()) -> Head:
    """`models` are those of the report: recipes that the paper does not have may be among them."""
    return Head(model_label(model), colour_of(model, models))


def exact_match_table(tables: Row) -> Table:
    """Make table 2; the best trained recipe of each data set is marked."""
    own, columns, best = tables["exact_match"], [Column("Recipe")], {}
    for name in (*tables["mirrors"], AVERAGE):
        plays = "over the sets" if name == AVERAGE else part_played(tables["mirrors"][name])
        asked = f"{next(iter(own.values()))[name]['n']:,} questions"
        columns.append(Column(name, (plays, asked) if plays else (asked,)))
        means = [entries[name]["mean"] for model, entries in own.items() if model not in GIVEN]
        best[name] = max((mean for mean in means if mean is not None), default=inf)
    rows: list[list[Cell]] = []
    for model, entries in own.items():
        trained = model not in GIVEN
        cells = [Figure(entries[name], best=trained and entries[name]["mean"] == best[name]) for name in best]
        rows.append([_head(model, own), *cells])
    return Table(columns, rows)


def model_pairs_table(tables: Row) -> Table:
    """Make table 3: a row for each recipe, a column for each pair of models."""
    rows: dict[str, list[Cell]] = {}
    for row in tables["model_pairs"]:
        cells = rows.setdefault(row["model"], [_head(row["model"])])
        cells.append(Figure(row["ours"], published=f"{row['paper']:.3f}"))
    pairs = dict.fromkeys(row["pair"] for row in tables["model_pairs"])
    return Table([Column("Average EM"), *map(Column, pairs)], list(rows.values()))


def arcap_table(tables: Row) -> Table:
    """Make table 5."""
    names = _measurements(tables)
    rows: list[list[Cell]] = []
    for model, own in tables["arcap"].items():
        figures = [Figure(own[name], 2 if "searches" in name else 3) for name in names]
        rows.append([_head(model, tables["arcap"]), *figures])
    return Table([Column("Recipe"), *(Column(MEASUREMENT_LABELS[name]) for name in names)], rows)


def _measurements(tables: Row) -> list[str]:
    return [name for name in MEASUREMENT_LABELS if any(name in own for own in tables["arcap"].values())]


def ablations_table(tables: Row) -> Table:
    """Make table 6 with the variants of figure 6."""
    rows: list[list[Cell]] = []
    for row in tables["ablations"]:
        recipe, difference = row["recipe"], row["minus_dgpo"]
        track = _track([(difference, f"m{COLOURS[recipe]}")], -SHARE_LIMIT, SHARE_LIMIT)
        rows.append(
            [
                _head(recipe),
                Words(row["row"], (row["reported"],), "text"),
                *(Words(row[setting]) for setting in ("cold_start", "rl", "kl_penalty")),
                Figure(row["exact_match"] and row["exact_match"][AVERAGE]),
                Figure(difference, is_signed=True) if recipe != "dgpo" else Words(""),
                Strip(track),
            ]
        )
    settings = map(Column, ("Cold start", "RL", "KL penalty", "Average EM", "Minus DGPO"))
    columns = [Column("Recipe"), Column("In the paper", css="text"), *settings, Column("±0.3", drawn=True)]
    return Table(columns, rows)


def power_table(tables: Row) -> Table:
    """Make the table of DGPO against every other recipe, and of what would show each difference."""
    rows: list[list[Cell]] = []
    for row in tables["power"]:
        needed = (row["needed"][str(seeds)] for seeds in SEEDS)
        spreads = (sqrt(row["variances"][name]) for name in ("a", "b", "e"))
        rows.append(
            [
                _head(row["recipe"], tables["exact_match"]),
                Figure(row["difference"], is_signed=True),
                *(Words(f"{spread:.3f}") for spread in spreads),
                Words(f"{row['power']:.2f}"),
                *(Words("never" if count is None else f"{count:,}") for count in needed),
            ]
        )
    spread = [Column("Seeds", ("sd of a",)), Column("Questions", ("sd of b",)), Column("Both", ("sd of e",))]
    questions = [Column(f"{seeds} seeds", ("questions",)) for seeds in SEEDS]
    columns = [Column("DGPO minus"), Column("Average EM"), *spread, Column("Power", ("as run",)), *questions]
    return Table(columns, rows)


def stability_table(tables: Row) -> Table:
    """Make the table of how every training ended."""
    rows: list[list[Cell]] = []
    for recipe, own in tables["stability"].items():
        seeds, paper = own["seeds"] or {}, own["paper"]
        evidence = tuple(_ending(seed, state) for seed, state in seeds.items())
        reported = Words(DASH, css="wide")
        if paper:
            quote = f"“{paper['quote']}” ({paper['source']})"
            reported = Words(paper["training"], (quote,), "wide", bold=True)
        states = Chips(tuple(state["state"] for state in seeds.values()))
        rows.append([_head(recipe, tables["exact_match"]), states, Words("", evidence, "wide"), reported])
    columns = [Column(label, css="text") for label in ("Each seed", "Evidence", "Paper")]
    return Table([Column("Recipe"), *columns], rows)


def sizes_table(found: Row) -> Table:
    """Make the table of all pairs of models."""
    rows: list[list[Cell]] = [
        [
            Head(pair["profile"], notes=(f"as {pair['pair']}",)),
            *(Words(given_text(pair, role)) for role in GIVEN),
            *(Figure(pair["exact_match"].get(model)) for model in found["models"]),
            Words(commits_text(pair["commits"]), css="text"),
        ]
        for pair in found["pairs"]
    ]
    measured = [Column(f"EM, {model_label(model)}") for model in found["models"]]
    given = [Column("Profile"), Column("Student"), Column("Teacher")]
    return Table([*given, *measured, Column("Code", css="text")], rows)


def _ending(seed: str, state: Row) -> str:
    """Say how one seed's training ended."""
    where = f" at step {state['step']}" if state["step"] is not None else ""
    drift = f"; {state['drift']}" if state["drift"] else ""
    levels = f"EM {state['best']:.3f} at best, {state['last']:.3f} at the end of {state['steps']} steps"
    return f"seed {seed}: {state['state']}{where} ({levels}{drift})"


def given_text(pair: Row, role: str) -> str:
    """Say family and size of the pair's student or teacher."""
    family, count = pair["families"].get(role, ""), pair["parameters"].get(role)
    return f"{family} {'size not known' if count is None else f'{count / 1e6:,.2f} M'}".strip()


def commits_text(commits: Mapping[str, str]) -> str:
    """Say the one commit, or each seed's."""
    if len(set(commits.values())) == 1:
        return next(iter(commits.values()))[:8]
    return ", ".join(f"seed {seed} {commit[:8]}" for seed, commit in sorted(commits.items()))


def seeds_text(seeds: Sequence[int]) -> str:
    """Say which seeds there are, and what a single one leaves open."""
    if len(seeds) == 1:
        return f"one seed ({seeds[0]}): nothing is said of others"
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


TABLES = {
    "exact_match": ("Exact match (table 2)", exact_match_table),
    "model_pairs": ("Other models (table 3)", model_pairs_table),
    "arcap": ("ARCap (table 5)", arcap_table),
    "ablations": ("Ablations (table 6, figure 6)", ablations_table),
    "power": ("What would show a difference", power_table),
    "stability": ("Training (figures 4 and 6)", stability_table),
}


# --- Markdown: fragments for docs/results.md ----------------------------------------------------------------


def markdown(tables: Row, verdicts: Sequence[Row]) -> str:
    """Write the tables and verdicts of one pair of models."""
    counts = Counter(row["verdict"] for row in verdicts)
    summary = ", ".join(f"{counts[name]} {name}" for name in VERDICTS)
    commits = tables["commits"]
    code = f"\nCode: commit{'s' * (len(set(commits.values())) > 1)} {commits_text(commits)}.\n"
    sections = [
        f"## Reproduction, {seeds_text(tables['seeds'])}\n\n"
        "A cell: the mean over the seeds, question by question; its 95 % bootstrap interval over questions,\n"
        "stratified by data set; each seed's own mean; the paper's figure. A claim counts as reproduced only "
        f"when\nthe interval lies on its side and so does every seed.\n{code if commits else ''}",
        f"### Claims\n\n{summary}, of {len(verdicts)} claims.\n",
        _claims_table(verdicts).markdown(),
    ]
    for name, (heading, make_table) in TABLES.items():
        if (table := make_table(tables)).rows:
            note = {"exact_match": BEFORE_COLLAPSE, "power": POWER_NOTE}.get(name)
            sections += [f"### {heading}\n", table.markdown(), *([f"{note}\n"] if note else [])]
    return "\n".join(sections)


def sizes_markdown(found: Row) -> str:
    """Write the table and the claims about all pairs of models."""
    seeds = ", ".join(map(str, found["seeds"])) or "none"
    sections = [
        "### Sizes and families (figure 3, table 3)\n",
        sizes_table(found).markdown(),
        f"On the seeds that all of them ran ({seeds}):\n",
        _claims_table(found["verdicts"]).markdown(),
    ]
    return "\n".join(sections)


def _claims_table(verdicts: Sequence[Row]) -> Table:
    rows = [
        list(map(Words, (row["statement"], row["source"], f"**{row['verdict']}**", row["evidence"])))
        for row in verdicts
    ]
    return Table(list(map(Column, ("claim", "paper", "verdict", "evidence"))), rows)


# --- pages: one file each, no network, the same bytes for the same tables -----------------------------------


def page(
    tables: Row, verdicts: Sequence[Row], curves: dict[str, list[Curve]], runs: Sequence[Budgets]
) -> str:
    """Write the page of one pair of models; `runs` are the budgets of each seed."""
    drawn, power = seed_panels(curves), charts(tables["power"])
    budget_figures = figures(runs, curves)
    recipes = list(dict.fromkeys(trace["model"] for panel in drawn for trace in panel["traces"]))
    counts = Counter(row["verdict"] for row in verdicts)
    data = {
        "models": [_model(name, tables["exact_match"]) for name in tables["exact_match"]],
        "figures": [name for name in recipes if name in FIGURES],
        "charts": power
        | budget_figures
        | {f"curve-{index}": {"traces": panel["traces"]} for index, panel in enumerate(drawn)},
        "radars": {},
    }
    by_name = {row["claim"]: row for row in verdicts}
    return template("reproduction.html.j2").render(
        title=f"{counts[REPRODUCED]} of {len(verdicts)} claims reproduced at our scale",
        seeds=seeds_text(tables["seeds"]),
        counts=[(name, CLASSES[name], counts[name]) for name in VERDICTS],
        groups=[
            {"title": title, "claims": [_claim(by_name[claim.name]) for claim in claims]}
            for title, claims in groupby(CLAIMS, lambda claim: claim.group)
        ],
        pair=tables["pair"],
        own_scale=own_scale(tables["mirrors"]),
        bars_rows=_bars({model: own[AVERAGE] for model, own in tables["exact_match"].items()}),
        **{name: make_table(tables) for name, (_, make_table) in TABLES.items()},
        arcap_cards=[
            {
                "title": MEASUREMENT_LABELS[name],
                "bars": _bars({m: own[name] for m, own in tables["arcap"].items() if m in PROFILED}),
            }
            for name in _measurements(tables)
        ],
        panels=drawn,
        recipes=[_model(name, tables["exact_match"]) for name in recipes],
        invalid_rise=INVALID_RISE,
        length_drift=LENGTH_DRIFT,
        near_zero=NEAR_ZERO,
        before_collapse=BEFORE_COLLAPSE,
        power_note=POWER_NOTE,
        budget_figures=budget_figures,
        power_figures={name: model_label(chart["recipe"]) for name, chart in power.items()},
        data=Markup(compact_json(data)),
        css=asset("page.css") + asset("reproduction.css"),
        scripts=[Markup(get_plotlyjs()), *map(asset, SCRIPTS)],
    )


def sizes_page(found: Row) -> str:
    """Write the page of all pairs of models: a card for each recipe, a bar for each pair."""
    pairs = found["pairs"]
    top = _top(entry for pair in pairs for entry in pair["exact_match"].values())
    cards = []
    for name in found["models"]:
        colour, role = colour_of(name, found["models"]), "teacher" if name == "teacher" else "student"
        bars = [
            _bar(f"{pair['profile']} · {given_text(pair, role)}", colour, pair["exact_match"][name], top)
            for pair in pairs
            if name in pair["exact_match"]
        ]
        cards.append({"title": model_label(name), "bars": bars})
    seeds = ", ".join(map(str, found["seeds"])) or "none"
    return template("sizes.html.j2").render(
        pairs=len(pairs),
        table=sizes_table(found),
        cards=cards,
        claims=[_claim(row) for row in found["verdicts"]],
        compared=f"On the seeds that all pairs ran: {seeds}.",
        css=asset("page.css") + asset("reproduction.css"),
        theme=asset("theme.js"),
    )


def _model(name: str, models: Iterable[str]) -> Row:
    return {"name": name, "label": model_label(name), "colour": colour_of(name, models)}


def _claim(row: Row) -> Row:
    tests = [test | {"class": HOLDS[test["holds"]]} for test in row["tests"]]
    shown = []
    for test in tests if len(tests) > 1 else ():
        text = numbers_text(test["numbers"]) if test["numbers"] else test["evidence"]
        shown.append(test | {"track": _tests_track([test]), "text": text})
    return row | {"class": CLASSES[row["verdict"]], "track": _tests_track(tests), "tests": shown}


def _tests_track(tests: Sequence[Row]) -> Row | None:
    numbers = [(test["numbers"], test["class"]) for test in tests if test["numbers"]]
    limit = COUNT_LIMIT if any("searches" in test["label"] for test in tests) else SHARE_LIMIT
    return _track(numbers, -limit, limit) if numbers else None


def _bars(entries: Mapping[str, Row]) -> list[Row]:
    top = _top(entries.values())
    return [_bar(model_label(name), colour_of(name, entries), own, top) for name, own in entries.items()]


def _bar(label: str, colour: int, entry: Row, top: float) -> Row:
    track = _track([(entry, f"m{colour}")], 0.0, top)
    return {"label": label, "colour": colour, "track": track, "cell": Figure(entry)}


def _top(entries: Iterable[Row]) -> float:
    """Return the end of a common scale from zero, somewhat beyond the highest value."""
    values: list[float] = [
        value
        for entry in entries
        for value in (entry["mean"], entry["ci95"][1], entry["paper"], *entry["seeds"].values())
        if value is not None
    ]
    return 1.02 * max([0.1, *values])


def _track(entries: Sequence[tuple[Row | None, str]], start: float, end: float) -> Row:
    """Place each entry's mean, interval, seeds and figure of the paper in percent of a track.

    The second of each pair is the mark's class in the style sheet: its colour.
    """

    def place(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, (value - start) / (end - start))):.2f}"

    marks = []
    for entry, css in entries:
        if entry is None or entry["mean"] is None:
            continue
        low, high = (None if bound is None else place(bound) for bound in entry["ci95"])
        marks.append(
            {
                "class": css,
                "mean": place(entry["mean"]),
                "low": low,
                "width": None if low is None or high is None else f"{float(high) - float(low):.2f}",
                "seeds": [place(mean) for mean in entry["seeds"].values() if mean is not None],
                "paper": None if entry["paper"] is None else place(entry["paper"]),
            }
        )
    return {"zero": place(0.0), "marks": marks}
