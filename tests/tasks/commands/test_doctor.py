"""`dgpo doctor`, and each of its checks on real files and servers, and with a program like nvidia-smi."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing
from email.message import Message
from pathlib import Path

import pytest
from huggingface_hub import constants

from dgpo_core.config.params import Params, load_params, resolve_profile
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.config.yaml_text import as_text
from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.index import index_passages
from dgpo_core.retrieval.service import RetrieverService, make_app
from tasks.commands import doctor
from tasks.commands.doctor import Finding, ok
from tasks.tracking.runs import connect
from tests.endpoint import endpoint
from tests.tasks.commands.test_preflight import other_vocabulary
from tests.tasks.miniature import ROOT, change_params, make_project
from tests.tasks.tracking.test_store import server
from tests.tasks.web import answering
from tests.web import served

NOWHERE = "http://127.0.0.1:9"


def profile(name: str, **changes: Mapping[str, object]) -> Params:
    """The parameters of a profile with other settings in some sections."""
    content = Params.model_validate(resolve_profile(ROOT / f"profiles/{name}.yaml")).model_dump(mode="json")
    for section, settings in changes.items():
        content[section] |= settings
    return Params.model_validate(content)


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def said(finding: Finding) -> str:
    return f"{finding.level} {finding.message} {finding.advice}"


def test_packages_and_the_number_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.level for finding in doctor.environment()] == ["ok"]
    declared = ["pydantic<1", "nothing-of-ours", "numpy; extra == 'x'"]
    monkeypatch.setattr(doctor, "requires", lambda name: declared)
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 1024))
    older, missing, files = doctor.environment()
    assert older.level == "error" and "pydantic<1 is needed" in older.message
    assert missing.level == "error" and missing.message == "nothing-of-ours is missing"
    assert "ulimit -n 1024" in files.advice


def nvidia_smi(folder: Path, patch: pytest.MonkeyPatch, gpus: str, processes: str = "") -> None:
    """Put a program of that name first in the path."""
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in *compute-apps*) printf "{processes}" ;; *) printf "{gpus}" ;; esac\n'
    )
    script.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_that_are_free_or_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA H200, 143771, 20, 580.1\\nNVIDIA H200, 143771, 90000, 580.1\\n")
    found = by_subject(doctor.machine(profile("paper-qwen-3b")))
    assert found["GPU 0"].level == "ok" and "driver 580.1" in found["GPU 0"].message
    assert found["GPU 1"].level == "warning" and "52.5 of 140.4 GiB free" in found["GPU 1"].message
    assert "GPU memory" not in found


def test_a_profile_that_does_not_fit_says_which_setting_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA A100, 40960, 20, 580.1\\n")
    findings = doctor.machine(profile("paper-qwen-3b"))
    wrong = [f for f in findings if f.level == "error" and f.subject == "GPU memory"]
    assert any("reinforce@dgpo needs" in f.message for f in wrong)
    assert any("compute.micro_batch_tokens: " in f.advice for f in wrong)


def test_a_left_over_engine_is_named_by_its_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess, sys\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(300)', 'vllm']\n"
        "print(subprocess.Popen(child, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    parent = [sys.executable, "-c", code]
    done = subprocess.run(parent, capture_output=True, text=True, check=True, timeout=60)
    orphan = int(done.stdout)
    try:
        nvidia_smi(tmp_path, monkeypatch, "", f"{orphan}, 70000\\n")
        (found,) = doctor.holders()
        assert f"process {orphan} holds 70000 MiB" in found.message
        if (
            Path(f"/proc/{orphan}/stat").read_text().split()[3] == "1"
        ):  # a subreaper may have taken it instead
            assert found.level == "error" and found.advice.startswith(f"kill {orphan}")
    finally:
        subprocess.run(["kill", "-9", str(orphan)], check=True)


def statuses(known: dict[str, int], otherwise: int = 401) -> AbstractContextManager[str]:
    """A server that answers each path that a pattern of `known` matches with its status.

    A gated model's is 200 for the token `good` alone.
    """

    def answer(path: str, headers: Message) -> tuple[int, bytes]:
        status = next((status for pattern, status in known.items() if re.search(pattern, path)), otherwise)
        opened = status == 403 and headers.get("Authorization") == "Bearer good"
        return 200 if opened else status, b""

    return answering(answer)


def use_hub(patch: pytest.MonkeyPatch, url: str) -> None:
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        patch.delenv(name, raising=False)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        patch.setattr(constants, name, "/nonexistent")


@pytest.fixture
def known_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that knows everything but `unknown`, and meta-llama's models for those with a token."""
    with statuses({"unknown": 404, "meta-llama": 403}, otherwise=200) as url:
        use_hub(monkeypatch, url)
        yield


def on_hub(params: Params) -> dict[str, Finding]:
    return by_subject(doctor.hub(params))


def test_models_on_the_hub(known_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    student = on_hub(profile("paper-qwen-3b"))["models.student"]
    assert student.level == "warning" and "hf download Qwen/Qwen2.5-0.5B-Instruct" in student.advice
    pinned = profile("paper-qwen-3b", models={"student": "Qwen/Qwen2.5-0.5B-Instruct@abc"})
    assert "Qwen2.5-0.5B-Instruct --revision abc" in on_hub(pinned)["models.student"].advice
    llama = profile("paper-llama-8b")
    gated = on_hub(llama)["models.teacher"]
    assert gated.level == "error" and "there is no token" in gated.message
    assert "accept the licence" in gated.advice and "HF_TOKEN" in gated.advice
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert "this token may not read it" in on_hub(llama)["models.student"].message
    monkeypatch.setenv("HF_TOKEN", "good")
    assert all(finding.level != "error" for finding in on_hub(llama).values())
    for name, why in (("un/unknown", "404"), ("a/b/c/d", "no name of the hub's")):
        wrong = on_hub(profile("paper-qwen-3b", models={"student": name}))["models.student"]
        assert wrong.level == "error" and why in wrong.message
    assert {finding.message for finding in on_hub(profile("tiny")).values()} == {
        "models/student, a folder",
        "models/teacher, a folder",
    }


def test_bfloat16_on_a_processor_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    smol = profile("smol")

    def subjects(params: Params, flags: str) -> set[str]:
        doctor.CPUINFO.write_text(f"processor : 0\nflags : {flags}\n")
        return by_subject(doctor.machine(params)).keys() & {"compute.precision and rollout.precision"}

    assert subjects(smol, "fpu avx512f")
    assert not subjects(smol, "fpu avx512f avx512_bf16")
    assert not subjects(profile("tiny"), "fpu avx512f")
    doctor.CPUINFO.unlink()
    assert not {"compute.precision and rollout.precision"} & by_subject(doctor.machine(smol)).keys()


def test_a_model_of_the_cache_can_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    for place, text in (("refs/main", "1f2e"), ("snapshots/1f2e/config.json", "{}")):
        (repository / place).parent.mkdir(parents=True)
        (repository / place).write_text(text)
    for name, message in (("some/model", "; some/model@1f2e pins what is here"), ("some/model@1f2e", "")):
        found = on_hub(profile("tiny", models={"student": name}))["models.student"]
        assert (found.level, found.message) == ("ok", f"{name}, in the cache{message}")


def test_data_sets_on_the_hub_and_here(known_hub: None, tmp_path: Path) -> None:
    params = profile("paper-qwen-3b")

    def with_data(**published: object) -> dict[str, Finding]:
        changed = params.data.published.model_copy(update=published)
        return on_hub(
            params.model_copy(update={"data": params.data.model_copy(update={"published": changed})})
        )

    found = with_data()
    assert found["data.published.questions"].message == "9 of 9 files are not here yet"
    assert found["data.published.musique"].level == found["data.published.corpus"].level == "warning"
    assert "data.published.nq" not in found  # none is given
    refused = with_data(corpus="hf://datasets/un/unknown/corpus.jsonl")["data.published.corpus"]
    assert refused.level == "error" and "404" in refused.message
    local = with_data(corpus="hf://un/known/corpus.jsonl", nq=[str(tmp_path / "none.jsonl")])
    assert "must be hf://datasets" in local["data.published.corpus"].message
    assert "no such file" in local["data.published.nq"].message
    (tmp_path / "corpus.jsonl").write_text("")
    assert with_data(corpus=str(tmp_path / "corpus.jsonl"))["data.published.corpus"].level == "ok"


def test_encoders_and_published_indexes_on_the_hub(known_hub: None) -> None:
    encoder = {"kind": "sentence-transformers", "model": "somebody/an-encoder"}
    parts = [f"hf://datasets/PeterJinGo/wiki-18-e5-index/part_{name}" for name in ("aa", "ab")]
    found = on_hub(profile("paper-qwen-3b", retrieval={"encoder": encoder, "vectors": parts}))
    assert "somebody/an-encoder is not here yet" in found["retrieval.encoder.model"].message
    assert found["retrieval.vectors"].message == "2 of 2 files are not here yet"
    for without in ({"encoder": {"kind": "bm25"}}, {"location": "retriever+http://retriever:8000"}):
        assert (
            not {"retrieval.encoder.model", "retrieval.vectors"}
            & on_hub(profile("paper-qwen-3b", retrieval=without)).keys()
        )


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, NOWHERE)
    found = on_hub(profile("paper-qwen-3b"))
    assert "the hub is not reachable" in found["models.student"].message
    assert "is not in the cache" in found["data.published.questions"].message
    assert {found[name].level for name in ("models.student", "data.published.corpus")} == {"error"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in on_hub(profile("paper-qwen-3b"))["models.student"].message


def test_what_a_pair_can_do(workplace: Path) -> None:
    make_project(workplace)
    found = by_subject(doctor.pair(load_params()))
    assert {finding.level for finding in found.values()} == {"ok"}
    assert "agree" in found["tokenizers"].message
    assert found["recipes"].message == "kd, dgpo: possible; the teacher gives distributions"
    other_vocabulary(workplace)
    found = by_subject(doctor.pair(load_params()))
    differ = said(found["tokenizers"])
    assert "error" in differ and "different tokenizers" in differ and "models.student" in differ
    assert "error not possible: kd, dgpo" in said(found["recipes"])
    assert "sft_ppo" not in found["recipes"].advice and "ppo" in found["recipes"].advice  # it needs seqkd
    (workplace / "params.yaml").write_text(as_text(resolve_profile(ROOT / "profiles/tiny.yaml", ["seqkd"])))
    change_params(teach={"policy": "expert"})
    found = by_subject(doctor.pair(load_params()))
    assert {finding.level for finding in found.values()} == {"ok"}
    assert "differ, which these recipes do not mind" in found["tokenizers"].message
    assert "not possible: " in found["recipes"].message and "kd_gkd" in found["recipes"].message


def test_contexts_and_chat_templates_of_a_pair(workplace: Path) -> None:
    make_project(workplace)
    own = workplace / "own"
    shutil.copytree(ROOT / "models/student", own)
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 512}))
    (own / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    change_params(models={"student": "own"})
    found = by_subject(doctor.pair(load_params()))
    assert said(found["context of the student"]).startswith("error 512 tokens, and protocol.max_context is")
    assert found["chat templates"].level == "warning"
    change_params(models={"teacher": "own"}, protocol={"max_context": 512})
    found = by_subject(doctor.pair(load_params()))
    assert found["chat templates"].message == "student and teacher: a template"
    assert found["context"].level == "ok"


def test_a_teacher_behind_an_endpoint(workplace: Path) -> None:
    make_project(workplace, ["sft_ppo"])
    with endpoint(lambda body: "") as server:
        change_params(models={"teacher": server.source}, compare=["student"])
        found = by_subject(doctor.pair(load_params()))
        assert {finding.level for finding in found.values()} == {"ok"}
        assert "gives text alone" in found["models.teacher"].message
        assert "seqkd, sft_ppo: possible; the teacher gives no distributions" in found["recipes"].message
        assert "dgpo" in found["recipes"].message.partition("not possible")[2]
        change_params(models={"teacher": server.source.replace("some/model", "other")})
        assert "it has some/model" in said(by_subject(doctor.pair(load_params()))["models.teacher"])
    assert by_subject(doctor.pair(load_params()))["models.teacher"].level == "warning"  # it may start later
    assert "models.teacher" not in on_hub(load_params())


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def with_location(location: str) -> list[Finding]:
    return doctor.servers(profile("tiny", retrieval={"location": location}))


def test_the_environments_server_must_answer_and_passwords_are_not_shown(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://me:" + "secret@127.0.0.1:9/?token=secret")
    (found,) = doctor.servers(profile("tiny"))
    assert found.subject == "PREFECT_API_URL" and found.level == "error"
    assert "http://127.0.0.1:9 does not answer" in found.message and "secret" not in found.message
    with statuses({"/health": 200}) as url:  # everything else wants a password
        monkeypatch.setenv("PREFECT_API_URL", url.replace("//", "//me:" + "secret@"))
        assert doctor.servers(profile("tiny"))[0] == ok("PREFECT_API_URL", f"{url} answers")


def test_a_retriever_service_is_asked_for_its_health(no_variables: None) -> None:
    loading = RetrieverService(top_k=3)
    with served(make_app(loading)) as url:
        (early,) = with_location(f"retriever+{url}")
        assert early.level == "warning" and "answers 503 to GET /health" in early.message
        loading.open(index_passages([Passage("1", "A", "text")], EncoderConfig(kind="bm25")), 1)
        assert with_location(f"retriever+{url}/") == [ok("retrieval.location", f"{url} answers")]
        loading.close()
    with statuses({"/health": 404}) as url:  # Search-R1's
        assert with_location(f"retriever+{url}")[0].level == "ok"
    (absent,) = with_location(f"retriever+{NOWHERE}")
    assert absent.level == "warning" and "dgpo retriever" in absent.advice


def test_a_qdrant_server_may_be_started_after_this_command(no_variables: None) -> None:
    (absent,) = with_location(NOWHERE)
    assert absent.level == "warning" and "paper-scale.md" in absent.advice
    with statuses({"/healthz": 200}) as url:
        assert with_location(url)[0].level == "ok"
    assert with_location("embedded") == []


def test_every_server_of_vllm_is_looked_at(no_variables: None) -> None:
    def with_servers(**servers: list[str]) -> list[Finding]:
        rollout = {"server": servers}
        return doctor.servers(profile("paper-qwen-3b", rollout=rollout, retrieval={"location": "embedded"}))

    with statuses({"/health": 200}) as one, statuses({"/health": 200}) as two:
        student, teacher = with_servers(student=[one, two], teacher=[one, NOWHERE])
        assert student == ok("rollout.server.student", f"{one}, {two} answer")
        assert teacher.subject == "rollout.server.teacher" and teacher.level == "warning"
        assert NOWHERE in teacher.message and one not in teacher.message
        assert "start vLLM there" in teacher.advice
    none, _ = with_servers(teacher=[NOWHERE])
    assert none.level == "error" and none.message == "names no server"


def of_mlflow() -> Finding:
    (finding,) = doctor.store(profile("tiny"))
    return finding


def test_a_store_that_is_there_and_one_that_is_not(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(of_mlflow()).startswith("ok") and "is active" in said(of_mlflow())
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    before = list(own_store.iterdir())
    assert "ok" in said(of_mlflow()) and "made by the first run" in said(of_mlflow())
    assert list(own_store.iterdir()) == before, "a doctor changes nothing"


def test_what_was_deleted_or_broken_has_its_cure(own_store: Path) -> None:
    database = own_store.parent / "mlflow.db"
    connect().delete_experiment("1")
    assert "error" in said(of_mlflow()) and said(of_mlflow()).endswith("mlflow experiments restore -x 1")
    for change, cure in (
        ("UPDATE alembic_version SET version_num = 'c1d2e3f4a5b6'", "mlflow db upgrade"),
        ("DELETE FROM experiments", f"rm {database}"),
    ):
        with closing(sqlite3.connect(database)) as opened, opened:
            opened.execute(change)
        assert of_mlflow().level == "error" and cure in of_mlflow().advice


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, {"experiment": {"experiment_id": "7", "lifecycle_stage": "active"}}, "ok.* is active"),
        (200, {"experiment": {"experiment_id": "7", "lifecycle_stage": "deleted"}}, "error.*restore -x 7"),
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}, "ok.*made by the first run"),
        (403, {"error_code": "PERMISSION_DENIED", "message": "no"}, "error.*MLFLOW_TRACKING_PASSWORD"),
        (404, "a page", "error.*is .* an MLflow server"),
    ],
)
def test_a_servers_experiment(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: object, expected: str
) -> None:
    with server(status, body) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("//", "//me:" + "secret@"))
        finding = of_mlflow()
    assert re.search(expected, said(finding)) and "secret" not in json.dumps(finding.__dict__)


def test_a_tracking_server_that_is_silent(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    assert "error" in said(of_mlflow()) and "does not answer" in said(of_mlflow())


def test_repository(dvc_repository: Path) -> None:
    far, near = profile("paper-qwen-3b"), profile("tiny")
    assert [finding.level for finding in doctor.repository(far)] == ["warning", "warning"]
    (alone,) = doctor.repository(near)
    assert alone.level == "ok"
    config = dvc_repository / ".dvc/config.local"
    config.write_text("[core]\n    remote = team\n['remote \"team\"']\n    url = s3://b/x\n")
    assert "git remote add origin" in said(*doctor.repository(far))
    assert doctor.repository(near)[0].message.endswith("team")


def test_outside_of_a_repository(workplace: Path) -> None:
    (found,) = doctor.repository(profile("tiny"))
    assert found.level == "error" and found.subject == "git"


@pytest.fixture
def project(dvc_repository: Path, no_variables: None) -> Path:
    make_project(dvc_repository)
    return dvc_repository


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Finding]]:
    """The exit code, and the findings as they are printed."""
    code = doctor.doctor(as_json=True)
    printed = json.loads(capsys.readouterr().out)["findings"]
    return code, by_subject([Finding(**finding) for finding in printed])


def test_the_embedded_world_needs_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examined(capsys)
    assert code == 0, found
    assert {finding.level for finding in found.values()} == {"ok"}
    assert {"disk", "host memory", "models.student", "MLflow", "git and DVC"} < found.keys()
    assert doctor.doctor(as_json=False) == 0
    assert f"{len(found)} ok, 0 warnings, 0 errors" in capsys.readouterr().out


def test_the_papers_profile_without_a_gpu_and_without_a_network(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "params.yaml").write_text(as_text(resolve_profile(ROOT / "profiles/paper-llama-8b.yaml")))
    use_hub(monkeypatch, NOWHERE)
    code, found = examined(capsys)
    assert code == 1
    assert found["GPUs"].level == "error" and "dgpo use tiny" in found["GPUs"].advice
    for name in ("models.student", "models.teacher", "retrieval.encoder.model"):
        assert found[name].level == "error" and "the hub is not reachable" in found[name].message
    servers = ("retrieval.location", "rollout.server.student", "rollout.server.teacher")
    assert [found[name].level for name in servers] == ["warning"] * 3  # started later, none is up


def test_a_broken_file_of_settings_is_the_last_finding(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (project / "params.yaml").open("a") as file:
        file.write("sed: 1\n")
    code, found = examined(capsys)
    assert code == 1 and "sed: unknown key" in found["settings"].message
    assert list(found)[-1] == "settings" and found["packages"]
