"""`dgpo rehearse`: the same stages as DVC's, and a whole rehearsal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.agent.episode import read_episodes
from dgpo_core.config.params import paper_recipes, resolve_profile
from dgpo_core.config.yaml_text import as_text
from tasks.commands.rehearse import programs, rehearse
from tasks.project import paths
from tests.tasks.miniature import ROOT


@pytest.mark.parametrize(("profile", "first"), [("tiny", "index"), ("paper-qwen-3b", "data")])
def test_it_runs_the_stages_of_the_graph_in_order(tmp_path: Path, profile: str, first: str) -> None:
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    params = resolve_profile(ROOT / f"profiles/{profile}.yaml", ["all"])
    (tmp_path / "params.yaml").write_text(as_text(params))
    found = programs(tmp_path)
    order = [name for name, _ in found]
    recipes = paper_recipes(["all"])
    kinds = {name: "distill" if name in recipes.distill else "reinforce" for name in recipes.all}
    place = {name: order.index(f"{kind}@{name}") for name, kind in kinds.items()}
    assert (order[0], order[-1]) == (first, "report")
    for name, row in recipes.all.items():
        assert row.start == "student" or place[row.start] < place[name]
    assert dict(found)["evaluate@kd"] == "exec python -m tasks.stages.evaluate kd"


@pytest.mark.slow
def test_the_papers_profile_in_miniature(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(workplace))
    monkeypatch.setattr("tempfile.tempdir", None)
    (workplace / "profiles").symlink_to(ROOT / "profiles")
    assert rehearse("paper-qwen-7b", keep=True, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in printed["stages"]} == {"ok"}
    (folder,) = workplace.glob("dgpo-rehearsal-*")
    episodes = read_episodes(folder / paths.TEACHER_EPISODES)
    assert any(episode.correct for episode in episodes) and all(episode.searches for episode in episodes)
    assert (folder / "models/dgpo/model.safetensors").is_file()
    assert (folder / paths.REPORTS / "index.html").is_file()


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_leaves_no_folder_but_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    def interrupted(folder: Path, resolved: dict[str, Any]) -> list[str]:
        (folder / "models").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tasks.commands.rehearse.prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rehearse("tiny", keep=keep, as_json=False)
    assert len(list(tmp_path.iterdir())) == keep
