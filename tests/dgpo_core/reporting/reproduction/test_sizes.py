"""Pairs of models of several sizes and families side by side."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.errors import UserError
from dgpo_core.reporting.paper import DEFAULT_PAIR
from dgpo_core.reporting.reproduction.claims import PROFILED
from dgpo_core.reporting.reproduction.seeds import RECORD, keep
from dgpo_core.reporting.reproduction.sizes import write_sizes
from tests.browser import CHROMIUM, browse
from tests.dgpo_core.reporting.reproduction.synthetic import coin, make_runs, record

GROWS = {"student": 0.0, "teacher": 0.9, "ppo": 0.2, "kd": 0.4, "dgpo": 0.7}
SMALL = {"student": 0.0, "teacher": 0.9, "ppo": 0.0, "kd": 0.4, "dgpo": 0.6}
NEAR = {"student": 0.0, "teacher": 0.9, "ppo": 0.2, "kd": 0.5, "dgpo": 0.95}


def reproduced(
    folder: Path,
    profile: str,
    sizes: tuple[int, int],
    levels: dict[str, float],
    seeds: tuple[int, ...] = (0, 1),
    **other: Any,
) -> None:
    """What `dgpo reproduce` keeps of a profile."""
    models = [model for model in PROFILED if model in levels]
    runs = make_runs(folder.parent / f"runs-{profile}", list(seeds), models, coin(levels), coin(levels), 40)
    runs.save()
    for seed, root in runs.roots.items():
        own = record(seed, **{"profile": profile, "commit": "c" * 40, "models": models} | other)
        path = keep(root, folder / profile / "seeds", own) / RECORD
        counts = {"student": sizes[0], "teacher": sizes[1]}
        known = {"parameters": counts, "families": dict.fromkeys(counts, "qwen2")}
        path.write_text(own.model_copy(update=known | other).model_dump_json())


def verdicts(folder: Path) -> dict[str, str]:
    return {
        row["claim"]: row["verdict"] for row in json.loads((folder / "sizes.json").read_text())["verdicts"]
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "reproduction"


def test_smallest_student_first_with_what_was_run(folder: Path) -> None:
    reproduced(folder, "large", (4_000_000, 9_000_000), GROWS, (0, 1, 2))
    reproduced(folder, "small", (1_000_000, 9_000_000), {"student": 0.0, "kd": 0.4}, (1,))
    assert write_sizes(folder, folder) == ["small", "large"]
    header, rule, *rows = (folder / "sizes.md").read_text().splitlines()[2:6]
    assert header.count("|") == rule.count("|") == rows[0].count("|")
    assert rows[0].startswith(
        f"| small (as {DEFAULT_PAIR}) | qwen2 1.00 M | qwen2 9.00 M | **0.000** [0.000, "
    )
    assert "not run" in rows[0] and "; seeds 0.000; paper 0.006" in rows[0]
    assert rows[1].startswith(f"| large (as {DEFAULT_PAIR}) | qwen2 4.00 M |") and "; paper 0.298" in rows[1]
    assert rows[1].endswith(f"| {'c' * 8} |")
    page = (folder / "sizes.html").read_text()
    assert page.index("small · qwen2 1.00 M") < page.index("large · qwen2 4.00 M")
    assert "On the seeds that all pairs ran: 1." in page


def test_claims_across_pairs(folder: Path) -> None:
    reproduced(folder, "small", (1, 9), SMALL)
    reproduced(folder, "large", (4, 9), GROWS)
    reproduced(folder, "near", (4, 6), NEAR)
    write_sizes(folder, folder)
    assert verdicts(folder) == {
        "dgpo_best_everywhere": "reproduced at our scale",
        "rl_lifts_every_size": "not reproduced",  # not the small one
        "rl_small_behind_large": "reproduced at our scale",
        "smaller_gap_better": "reproduced at our scale",
    }
    row = json.loads((folder / "sizes.json").read_text())["verdicts"][3]
    assert row["tests"][0]["label"] == "DGPO (near) − DGPO (large) · average EM"
    assert row["tests"][0]["numbers"]["mean"] == pytest.approx(0.25, abs=0.06)
    assert row["tests"][0]["numbers"]["paper"] is None  # both stand for one pair of the paper's


def test_paper_compares_profiles_that_stand_for_two_of_its_pairs(folder: Path) -> None:
    reproduced(folder, "near", (4, 6), NEAR)
    reproduced(folder, "far", (4, 9), GROWS, pair="qwen2.5-7b-to-0.5b")
    write_sizes(folder, folder)
    row = json.loads((folder / "sizes.json").read_text())["verdicts"][3]
    assert row["tests"][0]["numbers"]["paper"] == pytest.approx(0.329 - 0.323)


def test_the_smaller_teacher_must_be_the_better_one(folder: Path) -> None:
    reproduced(folder, "near", (4, 9), NEAR)
    reproduced(folder, "large", (4, 6), GROWS)
    write_sizes(folder, folder)
    assert verdicts(folder)["smaller_gap_better"] == "not reproduced"
    assert verdicts(folder)["rl_small_behind_large"] == "not tested"  # one student


def test_other_families_are_not_compared_by_size(folder: Path) -> None:
    reproduced(folder, "small", (1, 9), SMALL)
    llama = {"student": "llama", "teacher": "llama"}
    reproduced(folder, "large", (4_000_000, 9_000_000), GROWS, families=llama, pair="llama3-8b-to-1b")
    write_sizes(folder, folder)
    assert verdicts(folder)["rl_small_behind_large"] == "not tested"
    assert "| llama 4.00 M |" in (folder / "sizes.md").read_text()


def test_sizes_that_no_record_has_are_the_papers(folder: Path) -> None:
    unknown: dict[str, Any] = {"parameters": {}, "families": {}}
    reproduced(folder, "far", (0, 0), GROWS, pair="qwen2.5-7b-to-0.5b", **unknown)
    reproduced(folder, "near", (0, 0), NEAR, pair=DEFAULT_PAIR, **unknown)
    write_sizes(folder, folder)
    assert f"| near (as {DEFAULT_PAIR}) | size not known |" in (folder / "sizes.md").read_text()
    assert verdicts(folder)["rl_small_behind_large"] == "not tested"  # both are the 0.5B


def test_pairs_without_a_seed_in_common_are_shown_and_not_compared(folder: Path) -> None:
    reproduced(folder, "small", (1, 9), SMALL, (0,))
    reproduced(folder, "large", (4, 9), GROWS, (1,))
    assert write_sizes(folder, folder) == ["small", "large"]
    assert set(verdicts(folder).values()) == {"not tested"}
    assert "ran (none)" in (folder / "sizes.md").read_text()


def test_one_profile_is_a_table(folder: Path) -> None:
    reproduced(folder, "large", (4, 9), GROWS)
    assert write_sizes(folder, folder) == ["large"]
    assert set(verdicts(folder).values()) == {"not tested"}


def test_what_cannot_be_compared_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no record\.json"):
        write_sizes(folder, folder)
    reproduced(folder, "large", (4, 9), GROWS)
    path = folder / "large/seeds/1/record.json"
    path.write_text(path.read_text().replace('"seed":1', '"seed":0'))
    with pytest.raises(UserError, match=r"seed 0 is in .*seeds/0 too"):
        write_sizes(folder, folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"seeds/1/record\.json"):
        write_sizes(folder, folder)
    assert not (folder / "sizes.md").exists()


def test_a_record_that_is_being_copied_is_none(folder: Path) -> None:
    """Of a run side by side, or of one that was killed: the finished record is beside it."""
    reproduced(folder, "large", (4, 9), GROWS)
    shutil.copytree(folder / "large/seeds/1", folder / "large/seeds/1.part")
    assert write_sizes(folder, folder) == ["large"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 420])
def test_bars_stay_in_their_cards(folder: Path, tmp_path: Path, width: int) -> None:
    """With labels as long as those of the profiles that there are."""
    reproduced(folder, "tiny-student-small", (1, 9), SMALL)
    reproduced(folder, "tiny-student-large", (4, 9), GROWS)
    write_sizes(folder, folder)
    profile = tmp_path / "chromium"
    profile.mkdir()
    with browse(profile) as page:
        page.resize(width, 900)
        page.open((folder / "sizes.html").resolve().as_uri())
        cards = "[...document.querySelectorAll('.cards .card')]"
        beyond = page.evaluate(f"{cards}.map((card) => card.scrollWidth - card.clientWidth)")
        assert beyond == [0] * len(PROFILED)
        grounds = []
        for theme in ("light", "dark"):
            page.evaluate("document.getElementById('theme').click()")
            assert page.evaluate("document.getElementById('theme').textContent") == f"Theme: {theme}"
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds == ["rgb(246, 247, 249)", "rgb(17, 21, 27)"]
        assert page.errors == []
