"""What is worth another try, and what is not: with real errors of the hub's client, from a real server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.hub import HTTP_ERROR, HubModel, cached_file, hub_model, unreachable
from dgpo_core.models import load_model
from dgpo_core.retrieval.dense_encoders import _errors_with_model
from tests.conftest import ROOT, run_python
from tests.web import Handler, handled

LOAD = """
from dgpo_core.models import load_model, load_tokenizer
for load in (load_tokenizer, load_model):
    try:
        load("samples/model")
    except Exception as error:
        print(type(error).__name__, error)
"""


LOAD_REVISIONS = """
from dgpo_core.agent.vllm_engine import load_stop_criteria
from dgpo_core.models import load_model, load_tokenizer
for source in ("samples/model", "samples/model@main", "samples/model@222", "samples/model@refs/pr/1"):
    tokenizer = load_tokenizer(source)
    known = load_stop_criteria(source, tokenizer).known
    print(load_model(source).config.hidden_size, known == len(tokenizer))
"""


class Hub(Handler):
    status, code = 404, "RepoNotFound"

    def do_GET(self) -> None:
        self.answer(self.status, {"X-Error-Code": self.code})

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    with handled(Hub) as url:
        yield url


def failure(endpoint: str, cache: Path) -> Exception:
    with pytest.raises(Exception) as caught:
        hf_hub_download("samples/model", "config.json", endpoint=endpoint, cache_dir=cache)
    return caught.value


@pytest.mark.parametrize(
    ("status", "code"), [(404, "RepoNotFound"), (403, "GatedRepo"), (404, "EntryNotFound")]
)
def test_what_the_hub_refuses_stays_refused(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    monkeypatch.setattr(Hub, "status", status)
    monkeypatch.setattr(Hub, "code", code)
    error = failure(hub, tmp_path)
    assert isinstance(error, HfHubHTTPError) and not unreachable(error)


@pytest.mark.thorough
def test_nobody_there(tmp_path: Path) -> None:
    error = failure("http://127.0.0.1:9", tmp_path)
    assert isinstance(error, LocalEntryNotFoundError) and unreachable(error)


def test_wrapped_errors_and_others() -> None:
    """As transformers tells them: an OSError, raised from the hub's."""
    wrapped = OSError("We could not connect")
    wrapped.__cause__ = HTTP_ERROR("the connection broke")
    assert unreachable(wrapped)
    assert not unreachable(OSError("no space left"))
    for error, kind in ((wrapped, InfrastructureError), (OSError("no config.json"), UserError)):
        with (
            pytest.raises(kind, match=r"retrieval\.encoder\.model: cannot load"),
            _errors_with_model(EncoderConfig()),
        ):
            raise error


@pytest.mark.thorough
@pytest.mark.parametrize(("endpoint", "expected"), [("none", "InfrastructureError"), ("hub", "UserError")])
def test_models_on_the_hub(hub: str, tmp_path: Path, endpoint: str, expected: str) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    offline = "1" if endpoint == "none" else "0"
    done = run_python(LOAD, HF_HUB_OFFLINE=offline, HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [expected] * 2, done.stdout + done.stderr
    assert all("samples/model: cannot load a " in line for line in lines)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub's cache with two commits of a model: 111, the newest, and 222, which is also refs/pr/1."""
    repository = tmp_path / "hub/models--samples--model"
    for commit, name in (("111", "student"), ("222", "teacher")):
        shutil.copytree(ROOT / "models" / name, repository / "snapshots" / commit)
    for reference, commit in (("main", "111"), ("refs/pr/1", "222")):
        file = repository / "refs" / reference
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)
    return tmp_path


@pytest.mark.thorough
def test_a_revision_is_what_is_loaded(cache: Path) -> None:
    done = run_python(LOAD_REVISIONS, HF_HUB_OFFLINE="1", HF_HOME=str(cache))
    widths = [load_model(str(ROOT / "models" / name)).config.hidden_size for name in ("student", "teacher")]
    expected = [f"{widths[0]} True"] * 2 + [f"{widths[1]} True"] * 2
    assert done.stdout.splitlines() == expected, done.stderr


def test_files_of_a_revision_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    commits = {"samples/model": "111", "samples/model@222": "222", "samples/model@refs/pr/1": "222"}
    for source, commit in commits.items():
        found = cached_file(source, "config.json")
        assert found is not None and found.parent.name == commit
    assert cached_file("samples/model@333", "config.json") is None
    assert cached_file("no name of the hub", "config.json") is None


def test_names_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mail@home").mkdir()
    assert hub_model("mail@home") == HubModel("mail@home")
    assert hub_model("owner/name@v1.0") == HubModel("owner/name", "v1.0")
    for wrong in ("owner/name@", "@v1"):
        with pytest.raises(UserError, match="write owner/name@revision"):
            hub_model(wrong)
