"""A fragment for docs/results.md: the same tables and verdicts as text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting import formats as words
from dgpo_core.reporting.reproduction.verdicts import BEFORE_COLLAPSE, MEASUREMENT_LABELS, VERDICTS, signed
from dgpo_core.text import markdown_cell

Row = dict[str, Any]


def markdown(tables: Row, verdicts: Sequence[Row]) -> str:
    sections = [
        _opening(tables),
        "### Claims\n",
        _summary(verdicts),
        _table(["claim", "paper", "verdict", "evidence"], [_claim(row) for row in verdicts]),
        "### Exact match (table 2)\n",
        _exact_match(tables),
        f"{BEFORE_COLLAPSE}\n",
        "### Other models (table 3)\n",
        _model_pairs(tables),
        "### ARCap (table 5)\n",
        _arcap(tables),
        "### Ablations (table 6, figure 6)\n",
        _ablations(tables),
        "### Training (figures 4 and 6)\n",
        _stability(tables),
    ]
    return "\n".join(sections)


def _opening(tables: Row) -> str:
    return (
        f"## Reproduction, {seeds_text(tables['seeds'])}\n\n"
        "A cell: the mean over the seeds, question by question; its 95 % bootstrap interval over questions,\n"
        "stratified by data set; each seed's own mean; the paper's figure. A claim counts as reproduced only "
        f"when\nthe interval lies on its side and so does every seed.\n{_commits(tables['commits'])}"
    )


def _commits(commits: Mapping[str, str]) -> str:
    """Which code the seeds ran, where that is known."""
    if not commits:
        return ""
    several = len(set(commits.values())) > 1
    return f"\nCode: commit{'s' * several} {commits_text(commits)}.\n"


def commits_text(commits: Mapping[str, str]) -> str:
    """One commit, or each seed's."""
    if len(set(commits.values())) == 1:
        return next(iter(commits.values()))[:8]
    return ", ".join(f"seed {seed} {commit[:8]}" for seed, commit in sorted(commits.items()))


def seeds_text(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"one seed ({seeds[0]}): nothing is said of others"
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


def sizes_markdown(found: Row) -> str:
    """The table and the claims of `sizes`."""
    measured = [f"EM, {words.model_label(model)}" for model in found["models"]]
    heads = ["profile", "student", "teacher", *measured, "paper's pair", "code"]
    rows = [
        [
            pair["profile"],
            *(given_text(pair, role) for role in words.GIVEN),
            *(_cell(pair["exact_match"].get(model)) for model in found["models"]),
            pair["pair"],
            commits_text(pair["commits"]),
        ]
        for pair in found["pairs"]
    ]
    compared = f"On the seeds that all of them ran ({', '.join(map(str, found['seeds'])) or 'none'}):\n"
    verdicts = _table(["claim", "paper", "verdict", "evidence"], [_claim(row) for row in found["verdicts"]])
    return "\n".join(
        ["### Sizes and families (figure 3, table 3)\n", _table(heads, rows), compared, verdicts]
    )


def given_text(pair: Row, role: str) -> str:
    """Family and size of the pair's student or teacher."""
    family, count = pair["families"].get(role, ""), pair["parameters"].get(role)
    return f"{family} {'size not known' if count is None else f'{count / 1e6:,.2f} M'}".strip()


def _summary(verdicts: Sequence[Row]) -> str:
    counts = Counter(row["verdict"] for row in verdicts)
    return f"{', '.join(f'{counts[name]} {name}' for name in VERDICTS)}, of {len(verdicts)} claims.\n"


def _claim(row: Row) -> list[str]:
    return [row["statement"], row["source"], f"**{row['verdict']}**", row["evidence"]]


def _exact_match(tables: Row) -> str:
    sets = list(tables["mirrors"])
    heads = ["EM", *(f"{name} ({_paper_set(tables, name)})" for name in sets), AVERAGE]
    rows = [
        [words.model_label(model), *(_cell(own[name]) for name in [*sets, AVERAGE])]
        for model, own in tables["exact_match"].items()
    ]
    return _table(heads, rows)


def _paper_set(tables: Row, name: str) -> str:
    role = tables["mirrors"][name]
    return words.PAPER_DATASETS.get(role, str(role))


def _model_pairs(tables: Row) -> str:
    return _table(
        ["models", "recipe", "paper", "ours"],
        [
            [
                row["pair"],
                words.model_label(row["model"]),
                f"{row['paper']:.3f}",
                _cell(row["ours"] and row["ours"] | {"paper": None}),
            ]
            for row in tables["model_pairs"]
        ],
    )


def _arcap(tables: Row) -> str:
    names = [name for name in MEASUREMENT_LABELS if any(name in own for own in tables["arcap"].values())]
    rows = [
        [words.model_label(model), *(_cell(own.get(name)) for name in names)]
        for model, own in tables["arcap"].items()
    ]
    return _table(["ARCap", *(MEASUREMENT_LABELS[name] for name in names)], rows)


def _ablations(tables: Row) -> str:
    rows = []
    for row in tables["ablations"]:
        average = row["exact_match"] and row["exact_match"][AVERAGE]
        settings = [row["cold_start"], row["rl"], row["kl_penalty"], row["reported"]]
        difference = _cell(row["minus_dgpo"], signed) if row["recipe"] != "dgpo" else "–"
        rows.append([row["row"], *settings, _cell(average), difference])
    heads = ["row", "cold start", "RL", "KL penalty", "in the paper", "average EM", "minus DGPO"]
    return _table(heads, rows)


def _stability(tables: Row) -> str:
    rows = [
        [
            words.model_label(recipe),
            stability_text(row["seeds"]),
            f"{row['paper']['training']}: “{row['paper']['quote']}” ({row['paper']['source']})"
            if row["paper"]
            else "–",
        ]
        for recipe, row in tables["stability"].items()
    ]
    return _table(["recipe", "ours", "paper"], rows)


def stability_text(seeds: Row | None) -> str:
    if seeds is None:
        return "no training curve"
    return ", ".join(
        f"seed {seed}: {state['state']}"
        + (f" at step {state['step']}" if state["step"] is not None else "")
        + f" (EM {state['best']:.3f} at best, {state['last']:.3f} at the end of {state['steps']} steps"
        + (f"; {state['drift']})" if state["drift"] else ")")
        for seed, state in seeds.items()
    )


def _cell(entry: Row | None, form: Any = "{:.3f}".format) -> str:
    if not entry:
        return "not run"
    if entry["mean"] is None:
        return f"– ({entry['n']} questions)"
    low, high = entry["ci95"]
    interval = "" if low is None else f" [{form(low)}, {form(high)}]"
    seeds = ", ".join("–" if mean is None else form(mean) for mean in entry["seeds"].values())
    published = "" if entry["paper"] is None else f"; paper {form(entry['paper'])}"
    return f"**{form(entry['mean'])}**{interval}; seeds {seeds}{published}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(markdown_cell(cell) for cell in line)} |\n" for line in lines)
