"""What a pipeline's run says at its end, in a real sqlite store, with dvc.lock as DVC would leave it."""

import json
from pathlib import Path

import pytest
import yaml

from dgpo_core.config.params import resolve_profile
from tasks.stages.stage import stage
from tasks.tracking.runs import PIPELINE_RUN, Pipeline, connect
from tasks.tracking.summary import MAX_NOTE, StageSummary, averages, note, results
from tests.tasks.miniature import ROOT, run_of


def write_lock(**digests: str) -> None:
    """dvc.lock with one output `<stage>.txt` for each stage."""
    stages = {
        name: {"cmd": "x", "outs": [{"path": f"{name}.txt", "hash": "md5", "md5": md5}]}
        for name, md5 in digests.items()
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def run_pipeline(executed: dict[str, str], skipped: dict[str, str], fail: str | None = None) -> str:
    """A pipeline that executes some stages and skips others, with the digests of their outputs; its id."""
    pipeline = Pipeline("pipeline")
    assert pipeline.run_id
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PIPELINE_RUN, pipeline.run_id)
        for name in executed:
            if name == fail:
                with pytest.raises(RuntimeError), stage(name, config={}):
                    raise RuntimeError
            else:
                with stage(name, config={}):
                    pass
    write_lock(**{name: md5 for name, md5 in (skipped | executed).items() if name != fail})
    pipeline.close(fail is None, [*skipped, *executed])
    return pipeline.run_id


def made(run_id: str) -> dict[str, tuple[str, str | None]]:
    """{stage: (state, run)} of the pipeline's artifact."""
    path = connect().download_artifacts(run_id, "stages.json")
    rows = json.loads(Path(path).read_text())["stages"]
    return {row["stage"]: (row["state"], row["run_id"]) for row in rows}


def test_skipped_stages_point_to_the_run_that_made_their_output(workplace: Path) -> None:
    run_pipeline({"skip_a": "aa1", "skip_b": "bb1"}, {})
    first_a, first_b = run_of("skip_a"), run_of("skip_b")
    run_pipeline({"skip_b": "bb2"}, {"skip_a": "aa1"})
    # b's output is the first one again (from DVC's cache), c's was made where this store does not know of
    last = run_pipeline({"skip_d": "dd1"}, {"skip_a": "aa1", "skip_b": "bb1", "skip_c": "cc1"})
    assert made(last) == {
        "skip_a": ("unchanged", first_a),
        "skip_b": ("unchanged", first_b),
        "skip_c": ("unchanged", None),
        "skip_d": ("executed", run_of("skip_d")),
    }
    run = connect().get_run(last)
    assert run.data.tags["stages"] == "1 executed of 4"
    assert len(run.data.tags["dvc.lock"]) == 64
    table = run.data.tags["mlflow.note.content"].splitlines()
    assert f"[{first_a[:8]}](#/experiments/{run.info.experiment_id}/runs/{first_a})" in table[2]
    assert table[4] == "| skip_c | unchanged |  | unknown |"
    assert connect().get_run(first_a).data.tags["dvc.outputs.skip_a.txt"] == "aa1"


def test_a_failed_pipeline_says_so_and_has_no_results(workplace: Path) -> None:
    Path("reports").mkdir()
    Path("reports/results.json").write_text('{"kd": {"average": {"em": 0.5}}}')
    last = run_pipeline({"good": "gg1", "bad": "?"}, {"report": "rr1"}, fail="bad")
    assert made(last) == {
        "report": ("not executed", None),
        "good": ("executed", run_of("good")),
        "bad": ("failed", run_of("bad")),
    }
    run = connect().get_run(last)
    assert (run.info.status, run.data.metrics) == ("FAILED", {})
    assert "dvc.outputs.bad.txt" not in connect().get_run(run_of("bad")).data.tags


def test_results_settings_and_files_stand_in_the_run(workplace: Path) -> None:
    params = resolve_profile(ROOT / "profiles" / "tiny.yaml")
    params["reinforce"]["beta"] = 0.5
    params["seed"] = 3
    Path("params.yaml").write_text(yaml.safe_dump(params))
    Path("profiles").symlink_to(ROOT / "profiles")
    Path("reports").mkdir()
    cells = {"onehop": {"em": 0.25}, "hard": {"em": None}, "average": {"em": 0.5}}
    Path("reports/results.json").write_text(json.dumps({"dgpo": cells}))
    Path("reports/arcap.json").write_text('{"dgpo": {"query_hit_nq": {"mean": 0.75, "n": 4}}}')
    run = connect().get_run(run_pipeline({"report": "rr2"}, {}))
    assert run.data.metrics == {
        "em/dgpo/average": 0.5,
    }
    assert results(Path("reports")) == {
        "em/dgpo/onehop": 0.25,
        "em/dgpo/average": 0.5,
        "arcap/dgpo/query_hit_nq": 0.75,
    }
    assert run.info.run_name == "beta=0.5, seed 3"
    assert run.data.tags["changed"] == "seed=3 reinforce.beta=0.5"
    assert run.data.tags["recipes"] == "kd kd_long dgpo"
    assert run.data.params["reinforce.beta"] == "0.5" and run.data.params["distill.taid.start"] == "0.4"
    files = {file.path for file in connect().list_artifacts(run.info.run_id)}
    assert files == {"dvc.lock", "params.yaml", "stages.json"}
    child = connect().get_run(run_of("report")).data.tags
    assert (child["profile"], child["seed"]) == ("tiny", "3")


def test_another_working_copy_is_read(workplace: Path) -> None:
    other = workplace / "other"
    other.mkdir()
    (other / "params.yaml").write_text(yaml.safe_dump(resolve_profile(ROOT / "profiles" / "tiny.yaml")))
    pipeline = Pipeline("pipeline", root=other)
    assert pipeline.run_id
    assert connect().get_run(pipeline.run_id).info.run_name == "tiny, seed 0"
    pipeline.close(succeeded=True)


def test_no_report_means_no_results(workplace: Path) -> None:
    assert results(workplace) == {}


def test_a_runs_metrics_are_the_averages_the_methods_first() -> None:
    names = [
        f"em/{model}/{name}" for model in ("student", "kd", "dgpo", "mine") for name in ("nq", "average")
    ]
    found = averages(dict.fromkeys([*names, "arcap/dgpo/query_hit_nq"], 0.5))
    assert list(found) == [f"em/{model}/average" for model in ("dgpo", "mine", "kd", "student")]


def test_note_is_cut_to_what_mlflow_takes() -> None:
    stages = [StageSummary(f"stage@{number}", "executed", "0" * 32, "1", 61.0) for number in range(200)]
    text = note(stages)
    rows = sum(line.startswith("| stage@") for line in text.splitlines())
    assert len(text) <= MAX_NOTE
    assert "| 1m01s |" in text and text.endswith(f"{200 - rows} more: artifact `stages.json`")
