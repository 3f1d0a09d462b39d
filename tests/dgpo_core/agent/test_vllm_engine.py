"""Left-over memory, as a program in place of nvidia-smi tells of it."""

import os
import sys
from pathlib import Path

import pytest

from dgpo_core.agent.vllm_engine import nvidia_smi, require_free_memory
from dgpo_core.errors import UserError

GPUS = """\
0, GPU-aaaa, 81920, 80000
1, GPU-bbbb, 81920, 20480
2, GPU-cccc, 81920, 81000
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    holders = f"GPU-bbbb, {os.getpid()}, 1000\nGPU-bbbb, {os.getppid()}, 60000\nGPU-aaaa, 1, 5\n"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"print({GPUS!r} if sys.argv[1].startswith('--query-gpu') else {holders!r}, end='')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("smi")
def test_who_holds_the_memory_is_named() -> None:
    require_free_memory(0.9, 1)
    require_free_memory(0.2, 3)
    with pytest.raises(UserError) as caught:
        require_free_memory(0.9, 2)
    message = str(caught.value)
    assert message.startswith(
        "GPU 1: 20.0 of 80.0 GiB are free, and rollout.vllm.gpu_memory_utilization asks for 90%"
    )
    assert f"this stage, process {os.getpid()} (1000 MiB)" in message
    assert f"process {os.getppid()}: " in message
    assert "(60000 MiB)" in message


@pytest.mark.usefixtures("smi")
@pytest.mark.parametrize("visible", ["2,0", "GPU-cccc,GPU-aaaa"])
def test_only_visible_gpus_count(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    require_free_memory(0.9, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{visible}")
    with pytest.raises(UserError, match="GPU 1"):
        require_free_memory(0.9, 1)


@pytest.mark.usefixtures("smi")
def test_without_nvidia_smi_nothing_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        require_free_memory(1.0, 3)
    (tmp_path / "nvidia-smi").unlink()
    assert nvidia_smi("--query-gpu=index") == ([], "nvidia-smi is not installed")
    require_free_memory(1.0, 3)
