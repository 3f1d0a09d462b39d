"""Whether a GPU's memory is free for an engine, and who holds it if not (read from nvidia-smi)."""

import os
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from dgpo_core.errors import UserError

TIMEOUT = 30.0  # seconds that nvidia-smi may take


@dataclass(frozen=True)
class Gpu:
    """Memory in MiB."""

    index: str
    uuid: str
    total: float
    free: float


def require_free_memory(share: float, gpus: int) -> None:
    """Raises UserError when one of the first `gpus` visible GPUs has less than `share` of its memory free.

    An engine that was killed with SIGKILL leaves its processes behind, and they hold the memory. Without
    nvidia-smi nothing is checked.
    """
    for gpu in _visible(_gpus())[:gpus]:
        if gpu.free < share * gpu.total:
            raise UserError(
                f"GPU {gpu.index}: {gpu.free / 1024:.1f} of {gpu.total / 1024:.1f} GiB are free, and "
                f"rollout.vllm.gpu_memory_utilization asks for {share:.0%}; in use by {_holders(gpu)}. End "
                "what was left behind (an engine outlives a stage that was killed with SIGKILL), or lower it"
            )


def _gpus() -> list[Gpu]:
    rows, _ = nvidia_smi("--query-gpu=index,uuid,memory.total,memory.free")
    return [Gpu(index, uuid, float(total), float(free)) for index, uuid, total, free in rows]


def _visible(gpus: list[Gpu]) -> list[Gpu]:
    """In the order of CUDA_VISIBLE_DEVICES, which has indices or the beginnings of UUIDs."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    return [gpu for name in names for gpu in gpus if name == gpu.index or gpu.uuid.startswith(name)]


def _holders(gpu: Gpu) -> str:
    rows, _ = nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    found = [f"{_named(int(pid))} ({used} MiB)" for uuid, pid, used in rows if uuid == gpu.uuid]
    return ", ".join(found) or "processes that nvidia-smi does not show here (outside this container?)"


def _named(pid: int) -> str:
    if pid == os.getpid():
        return f"this stage, process {pid}"
    try:
        return f"process {pid}: {' '.join(psutil.Process(pid).cmdline())[:80]}"
    except psutil.Error:
        return f"process {pid}"


def nvidia_smi(query: str) -> tuple[list[list[str]], str]:
    """Rows of nvidia-smi's answer, and why there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "nvidia-smi is not installed"
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as why:
        return [], f"nvidia-smi: {why}"
    if done.returncode:
        return [], (done.stdout + done.stderr).strip().split("\n")[0] or "nvidia-smi fails"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return [[field.strip() for field in line.split(",")] for line in lines], ""
