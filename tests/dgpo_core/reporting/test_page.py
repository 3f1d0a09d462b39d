"""The page as a file: self-contained, safe, the same bytes each time, and honest in its words."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo_core.errors import UserError
from dgpo_core.evaluation import arcap, search_use
from dgpo_core.reporting.episodes import compact_json
from dgpo_core.reporting.formats import comparison, comparison_numbers, signed_cell
from dgpo_core.reporting.page import CHECK_COLUMNS, FAILURE_COLUMNS, Origin
from dgpo_core.reporting.paper import paper_arcap, paper_exact_match
from dgpo_core.reporting.search_use import NAMES
from tests.browser import CHROMIUM, browse
from tests.dgpo_core.reporting.synthetic import HOSTILE, MIRRORS, MODELS, Run, make_run

Reported = tuple[Run, Path]


class Page(HTMLParser):
    """Start tags with their attributes, the ids, the text outside scripts, and the scripts' texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(reported: Reported) -> Page:
    return Page((reported[1] / "index.html").read_text(encoding="utf-8"))


def test_page_needs_no_network(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = [own["content"] for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy"]
    assert (policy[0] or "").startswith("default-src 'none'")


def test_page_is_below_8_mb(reported: Reported) -> None:
    assert (reported[1] / "index.html").stat().st_size < 8_000_000


def test_hostile_text_stays_text(page: Page, reported: Reported) -> None:
    assert len(page.scripts) == 5  # data, plotly, theme, charts, reader: nothing of the models became one
    assert HOSTILE in page.text  # a metric, escaped
    predictions = [
        episode["prediction"]
        for question in page.data["questions"]
        for episode in question["episodes"].values()
    ]
    assert f"Ostrel {HOSTILE}" in predictions
    html = (reported[1] / "index.html").read_text(encoding="utf-8")
    assert "alert('x')</script>" not in html
    assert "<img src=x" not in html


def test_compact_json_survives_and_is_safe() -> None:
    text = compact_json([HOSTILE, "<!--", "é"])
    assert not set(text) & set("<>&")
    assert json.loads(text) == [HOSTILE, "<!--", "é"]


def test_same_inputs_give_the_same_bytes_whatever_the_order_of_rows(tmp_path: Path) -> None:
    outs = []
    for name in ("one", "two"):
        run = make_run(tmp_path / name, questions=5)
        tables = [
            *run.rows.values(), *run.arcap.values(), *run.counts.values(), *run.diagnoses.values()
        ]  # fmt: skip
        for rows in tables if name == "two" else []:
            random.Random(3).shuffle(rows)
        run.save()
        outs.append(run.report(tmp_path / name / "reports"))
    names = sorted(path.name for path in outs[0].iterdir())
    assert names == [
        "arcap.json", "arcap_comparisons.json", "comparisons.json", "diagnosis.json", "index.html",
        "results.json", "search_use.json", "search_use_comparisons.json",
    ]  # fmt: skip
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_tables_show_ours_beside_the_papers(page: Page) -> None:
    figures = [*paper_exact_match()["dgpo"].values(), paper_arcap()["kd"]["query_hit_nq"]]
    for figure in figures:
        assert f"paper {figure:.3f}" in page.text
    assert "The scales differ" in page.text
    assert f"KD {len(MIRRORS)}, DGPO {len(MIRRORS)}" in page.text


def test_metrics_stand_in_the_order_of_the_stages(reported: Reported) -> None:
    html = (reported[1] / "index.html").read_text(encoding="utf-8").partition('id="provenance"')[2]
    titles = re.findall(r'<div class="card"><h3>(.*?)</h3>', html)
    assert titles == ["teach", "filter", "distill-kd", "reinforce-dgpo"]


def test_every_chart_has_its_data_and_the_radar_no_counts(page: Page) -> None:
    places = {own["id"] for _, own in page.tags if "chart" in (own.get("class") or "").split()}
    assert places == {*page.data["charts"], *page.data["radars"]}
    assert len(page.data["charts"]) == 5 + 11 + 2
    for radar in page.data["radars"].values():
        assert not any("searches" in axis for axis in radar["axes"])
        assert all(len(line["values"]) == len(radar["axes"]) for line in radar["lines"])
    assert len(page.data["radars"]["radar-own"]["axes"]) == 7


def test_the_first_screen_says_at_what_budget_and_who_learnt_by_heart(page: Page) -> None:
    """300 steps of 16 episodes and half a second, then 80 of 128 and 6 seconds: 15,040, 2.5 + 8 minutes."""
    screen = page.text.partition("Exact match, average over the data sets")
    assert "DGPO has cost 15,040 episodes and 10.5 processor minutes." in screen[0]
    beside = screen[2].partition("Diagnosis")[0]
    assert "No control" in beside and "With kd_long in compare" in beside
    assert "learnt by heart: KD by 0.400" in beside and "4,800 in KD" in beside and "2.5 in KD" in beside


def test_what_tells_runs_apart_stands_under_the_title_and_what_was_changed_is_listed(run: Run) -> None:
    origin = Origin(["tiny", "seed 3", f"commit {HOSTILE}"], {"reinforce.beta": "0.05"})
    run.report_with(run.folder / "reports", origin=origin)
    page = Page((run.folder / "reports" / "index.html").read_text(encoding="utf-8"))
    head, provenance = page.text.partition("95 % interval")[0], page.text.partition("Changed from")[2]
    assert f"tiny \N{MIDDLE DOT} seed 3 \N{MIDDLE DOT} commit {HOSTILE}" in head
    assert provenance.lstrip().startswith("the profile") and "reinforce.beta0.05" in provenance


def test_what_is_worse_is_said_under_the_headline(run: Run) -> None:
    """DGPO beats KD, but guesses 30 of its 60 correct answers, KD 1 of as many."""
    for model, guesses in (("kd", 1), ("dgpo", 30)):
        for number, row in enumerate(run.rows[model]):
            row |= {"outcome": "correct" if number % 12 < (6 if model == "kd" else 11) else "wrong"}
            row["em"] = row["outcome"] == "correct"
        answered = 0
        for row, scores in zip(run.diagnoses[model], run.rows[model], strict=True):
            right = scores["em"]
            row |= {"outcome": scores["outcome"], "first_failure": None if right else "bad_query"}
            row["without_evidence"] = answered < guesses if right else None
            answered += right
    run.save()
    page = Page((run.report(run.folder / "reports") / "index.html").read_text(encoding="utf-8"))
    head = page.text.partition("Exact match, average")[0]
    assert "DGPO beats KD by 0.417 EM" in head and re.search(r"But DGPO is worse in \d+ of \d+ other", head)
    assert f"answer without evidence {30 / 77:.3f} (KD {1 / 42:.3f})" in head


def test_nothing_is_bold_where_nobody_leads(run: Run) -> None:
    for model in ("kd", "dgpo"):
        for row in run.rows[model]:
            row |= {"outcome": "wrong", "em": False}
    run.save()
    page = Page((run.report(run.folder / "reports") / "index.html").read_text(encoding="utf-8"))
    assert not [
        own for tag, own in page.tags if tag == "td" and own.get("class") == "best" and not own.get("title")
    ]


def test_the_curves_that_matter_come_first_and_the_others_are_folded(page: Page) -> None:
    training = page.text.partition("Reinforcement learning")[2].partition("ARCap")[0]
    first, _, others = training.partition(" more: ")
    for title in (
        "Exact match",
        "Reward",
        "KL divergence, gated",
        "Response length",
        "Entropy of the policy",
    ):
        assert title in first and title not in others
    assert "Clipped ratios" in others


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_phone_gets_dots_for_radars_and_every_chart_without_scrolling(
    reported: Reported, tmp_path: Path
) -> None:
    shown = "[...document.querySelectorAll('.chart')].filter((each) => !each.closest('details:not([open])'))"
    with browse(tmp_path) as browser:
        browser.resize(390, 844)
        browser.open((reported[1] / "index.html").as_uri())
        browser.wait_for(f"{shown}.every((each) => each.querySelector('.main-svg'))")
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        assert browser.evaluate("document.querySelectorAll('.radar .polar').length") == 0
        browser.resize(1280, 900)
        browser.wait_for("document.querySelectorAll('.radar .polar').length === 2")
        browser.evaluate("document.querySelector('#curves details').open = true")
        browser.wait_for("document.querySelector('#curves details .chart .main-svg')")
        assert browser.errors == []


def test_first_failures_are_drawn_and_listed(page: Page, reported: Reported) -> None:
    diagnosis = json.loads((reported[1] / "diagnosis.json").read_text())
    titles = [own.get("title") or "" for tag, own in page.tags if tag == "span"]
    for model, own in diagnosis.items():
        for name, label, _ in FAILURE_COLUMNS:
            mean = own["first_failures"][name]["mean"]
            assert f"{mean:.3f}" in page.text
            assert not mean or f"{label} {mean:.3f}" in titles, model
        for check, label, _ in CHECK_COLUMNS:
            assert label in page.text and f"{own['hacking'][check]['mean']:.3f}" in page.text
    assert f"Failed episodes, left out: {2 * len(MIRRORS)}." in page.text


def test_the_reader_can_name_every_diagnosis(page: Page) -> None:
    episodes = [own for question in page.data["questions"] for own in question["episodes"].values()]
    assert {own["first"] for own in episodes} - {None} == set(page.data["labels"]["failures"])
    assert {check for own in episodes for check in own["checks"]} == set(page.data["labels"]["checks"])
    assert all((own["first"] is None) == (own["outcome"] != "wrong") for own in episodes)


def test_paired_differences_of_arcap_are_listed_with_signs(page: Page, reported: Reported) -> None:
    found = json.loads((reported[1] / "arcap_comparisons.json").read_text())
    assert "DGPO \N{MINUS SIGN} KD" in page.text
    for pair in found.values():
        for name, entry in pair.items():
            text = f"{entry['mean']:+.{2 if 'searches' in name else 3}f}"
            text = text[1:] if float(text) == 0 else text  # nothing has no sign
            assert text.replace("-", "\N{MINUS SIGN}") in page.text


def test_the_use_of_search_has_a_row_a_measurement(page: Page, reported: Reported) -> None:
    found = json.loads((reported[1] / "search_use.json").read_text())
    paired = json.loads((reported[1] / "search_use_comparisons.json").read_text())
    assert tuple(NAMES) == search_use.MEASUREMENTS
    for key, (name, meaning) in NAMES.items():
        assert name in page.text and meaning in page.text
        for own in found.values():
            assert f"{own[key]['mean']:.3f}" in page.text
        for own in paired.values():
            assert signed_cell(own[key], 3)["value"] in page.text


def test_models_without_counts_leave_the_section_out(run: Run) -> None:
    for model in MODELS:
        (run.folder / "evaluation" / model / "search_use.parquet").unlink()
    html = (run.report(run.folder / "reports") / "index.html").read_text(encoding="utf-8")
    assert "Use of search" not in html and "Paired differences" in html


def test_own_scale_is_only_claimed_for_data_sets_that_mirror(run: Run) -> None:
    for rows in [*run.rows.values(), *run.diagnoses.values()]:
        rows[:] = [row for row in rows if row["dataset"] == "onehop"]
    run.save()
    run.report_with(run.folder / "reports", mirrors={"onehop": "onehop"})
    assert "The scales differ" not in (run.folder / "reports" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("datasets", [["rare"], ["onehop", "rare"]])
def test_sets_that_play_no_part_have_no_figure_of_the_paper_beside_them(
    run: Run, datasets: list[str]
) -> None:
    """One set or several, none of which ARCap or the paper's tables know: the rest of the page is as ever."""
    for rows in [*run.rows.values(), *run.diagnoses.values()]:
        rows[:] = [row for row in rows if row["dataset"] in datasets]
    run.save()
    for model in MODELS:
        pq.write_table(arcap.as_table([]), run.folder / "evaluation" / model / "arcap.parquet")
    run.report_with(run.folder / "reports", mirrors=dict.fromkeys(datasets))
    page = (run.folder / "reports" / "index.html").read_text(encoding="utf-8")
    assert "The scales differ" not in page and "The data sets are the paper's" not in page
    assert "play no part of the paper's" in page and "Not measured: no test set" in page
    assert 'class="paper"' not in page and "as None" not in page
    results = json.loads((run.folder / "reports" / "results.json").read_text())
    assert list(results["dgpo"]) == [*datasets, "average"]
    assert json.loads((run.folder / "reports" / "arcap.json").read_text()) == {model: {} for model in MODELS}


@pytest.mark.parametrize(
    ("mean", "ci95", "expected"),
    [
        (0.05, [0.02, 0.08], "DGPO beats KD by 0.050 EM"),
        (-0.05, [-0.08, -0.02], "DGPO is behind KD by 0.050 EM"),
        (0.05, [-0.01, 0.11], "No clear difference between DGPO and KD"),
        (0.0, [0.0, 0.0], "No clear difference between DGPO and KD"),
        (1.0, [None, None], "Too few questions to compare DGPO with KD"),
        (None, [None, None], "Too few questions to compare DGPO with KD"),
    ],
)
def test_verdict_says_no_more_than_the_interval(mean: float, ci95: list[float], expected: str) -> None:
    entry = {"mean": mean, "ci95": ci95, "n": 100}
    assert comparison("dgpo-kd", entry) == expected
    includes = None not in ci95 and ci95[0] <= 0 <= ci95[1]
    assert ("includes 0" in comparison_numbers(entry)) == includes


MISSING = [
    "evaluation/kd/questions.parquet",
    "evaluation/dgpo/episodes.parquet",
    "evaluation/student/arcap.parquet",
    "evaluation/teacher/diagnosis.parquet",
]


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_text("no table")])
def test_missing_or_broken_file_is_named_and_nothing_is_written(run: Run, name: str, spoil: Any) -> None:
    spoil(run.folder / name)
    with pytest.raises(UserError, match=re.escape(str(run.folder / name))):
        run.report(run.folder / "reports")
    assert not (run.folder / "reports").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "not the questions that student was asked"),
        (lambda rows: rows[0].update(outcome="lost"), "outcome"),
        (lambda rows: rows[0].update(dataset="elsewhere"), "elsewhere"),
        (lambda rows: rows[3].update(em=None, outcome="wrong"), "no value for em"),
        (lambda rows: rows[3].update(f1=float("nan"), outcome="wrong"), "nan for f1"),
        (lambda rows: rows.append(dict(rows[0])), "twice"),
        (lambda rows: [row.pop("f1") for row in rows], "lacks the columns f1"),
        (lambda rows: rows.__setitem__(slice(None), [r for r in rows if r["dataset"] != "rare"]), "rare"),
    ],
)
def test_malformed_questions_are_refused(run: Run, change: Any, message: str) -> None:
    rows = run.rows["kd"]
    change(rows)
    path = run.folder / "evaluation" / "kd" / "questions.parquet"
    names = min((list(row) for row in rows), key=len)
    pq.write_table(pa.Table.from_pylist(rows).select(names), path)
    with pytest.raises(UserError, match=f"kd/questions.parquet.*{message}"):
        run.report(run.folder / "reports")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "not the questions of questions.parquet"),
        (lambda rows: rows[2].update(outcome="correct", first_failure="bad_query"), "wrong answers alone"),
        (lambda rows: rows[2].update(outcome="wrong", first_failure=None), "wrong answers alone"),
        (lambda rows: rows[2].update(outcome="wrong", first_failure="bad_luck"), "unknown .* 'bad_luck'"),
    ],
)
def test_malformed_diagnoses_are_refused(run: Run, change: Any, message: str) -> None:
    change(run.diagnoses["kd"])
    run.save()
    with pytest.raises(UserError, match=f"kd/diagnosis.parquet.*{message}"):
        run.report(run.folder / "reports")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "thinking_searches_musique: not the questions that student was asked"),
        (lambda rows: rows.append(dict(rows[0])), "source_em_nq: a question stands there twice"),
        (lambda rows: rows[3].update(value=float("nan")), "a row without a value"),
    ],
)
def test_malformed_measurements_are_refused(run: Run, change: Any, message: str) -> None:
    change(run.arcap["kd"])
    run.save()
    with pytest.raises(UserError, match=f"kd/arcap.parquet: .*{message}"):
        run.report(run.folder / "reports")


@pytest.mark.parametrize("content", ["[1, 2]", '{"nested": {"a": 1}}', "{"])
def test_malformed_metrics_are_refused(run: Run, content: str) -> None:
    (run.folder / "metrics" / "teach.json").write_text(content)
    with pytest.raises(UserError, match=r"teach\.json"):
        run.report(run.folder / "reports")


def test_impossible_pair_data_set_and_measurement_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match="gpt"):
        run.report_with(run.folder / "reports", pair="gpt")
    with pytest.raises(UserError, match="average"):
        run.report_with(run.folder / "reports", mirrors={"average": "nq"})
    run.arcap["kd"][0]["measurement"] = "cooking"
    run.save()
    with pytest.raises(UserError, match=r"arcap\.parquet: unknown measurements: cooking"):
        run.report(run.folder / "reports")
