"""Whether a GPU's memory is free for an engine, and who holds it if not (read from nvidia-smi)."""

import os
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from dgpo_core.errors import UserError


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
    rows = _nvidia_smi("--query-gpu=index,uuid,memory.total,memory.free")
    return [Gpu(index, uuid, float(total), float(free)) for index, uuid, total, free in rows]


def _visible(gpus: list[Gpu]) -> list[Gpu]:
    """In the order of CUDA_VISIBLE_DEVICES, which has indices or the beginnings of UUIDs."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    return [gpu for name in names for gpu in gpus if name == gpu.index or gpu.uuid.startswith(name)]


def _holders(gpu: Gpu) -> str:
    rows = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    found = [f"{_named(int(pid))} ({used} MiB)" for uuid, pid, used in rows if uuid == gpu.uuid]
    return ", ".join(found) or "processes that nvidia-smi does not show here (outside this container?)"


def _named(pid: int) -> str:
    if pid == os.getpid():
        return f"this stage, process {pid}"
    try:
        return f"process {pid}: {' '.join(psutil.Process(pid).cmdline())[:80]}"
    except psutil.Error:
        return f"process {pid}"


def _nvidia_smi(query: str) -> list[list[str]]:
    if not (program := shutil.which("nvidia-smi")):
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[field.strip() for field in line.split(",")] for line in lines if line.strip()]
