"""GPUs and who holds their memory, the host's memory, and free disk space."""

import shutil
from pathlib import Path

import psutil

from dgpo_core.agent.vllm_engine import nvidia_smi
from dgpo_core.config.params import Params
from dgpo_core.errors import UserError
from dgpo_core.planning.machine import GIB, Device, Machine
from dgpo_core.planning.plan import Plan
from tasks.commands.checks.finding import Finding, error, ok, warning
from tasks.commands.plan import ENCODER, plan_for

BUSY = 0.05  # share of a GPU's memory in use from which it is worth telling
MIB = 2**20


def machine(params: Params) -> list[Finding]:
    """GPUs as `params` need them, and memory and disk against the plan for this machine."""
    rows, trouble = nvidia_smi("--query-gpu=name,memory.total,memory.used,driver_version")
    findings = _devices(rows, trouble, params) + holders()
    try:
        plan = plan_for(params, _machine(rows if params.compute.device != "cpu" else []))
    except UserError as why:
        return [
            *findings,
            warning("plan", str(why), "without it memory and disk are not compared with the need"),
        ]
    if assumed := plan.assumptions.get(ENCODER):
        advice = "without its shape memory and disk of the index are a guess"
        findings.append(warning("plan", f"{ENCODER}: {assumed}", advice))
    return findings + _fit(plan)


def _devices(rows: list[list[str]], trouble: str, params: Params) -> list[Finding]:
    wants = params.compute.device != "cpu"
    if not rows:
        if wants:
            advice = "install NVIDIA's driver, or use a profile for the processor (`dgpo use tiny`)"
            return [error("GPUs", f"compute.device is {params.compute.device}; {trouble}", advice)]
        return [ok("GPUs", "none, and none is needed (compute.device: cpu)")]
    findings = []
    for number, (name, total, used, driver) in enumerate(rows):
        free = float(total) - float(used)
        text = f"{name}, {free / 1024:.1f} of {float(total) / 1024:.1f} GiB free, driver {driver}"
        busy = float(used) > BUSY * float(total)
        advice = "see the processes below; a run needs the memory that the plan says"
        findings.append(
            warning(f"GPU {number}", text, advice) if busy and wants else ok(f"GPU {number}", text)
        )
    return findings


def holders() -> list[Finding]:
    """Processes that hold GPU memory; an engine whose parent has died is left over."""
    rows, _ = nvidia_smi("--query-compute-apps=pid,used_memory")
    findings = []
    for pid, used in rows:
        text = f"process {pid} holds {used} MiB: {_described(int(pid))}"
        if _left_over(int(pid)):
            findings.append(error("GPU memory", f"{text}; its parent is gone", f"kill {pid}, if it is yours"))
        else:
            findings.append(
                warning("GPU memory", text, "wait for it, or use other GPUs (CUDA_VISIBLE_DEVICES)")
            )
    return findings


def _described(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:80] or psutil.Process(pid).name()
    except psutil.Error:
        return "not visible from here (another container or user)"


def _left_over(pid: int) -> bool:
    """vLLM's engine process outlives a parent that was killed with SIGKILL."""
    try:
        process = psutil.Process(pid)
        command = " ".join([process.name(), *process.cmdline()]).lower()
        return process.ppid() == 1 and ("vllm" in command or "multiprocessing" in command)
    except psutil.Error:
        return False


def _machine(rows: list[list[str]]) -> Machine:
    totals = [float(total) * MIB for _, total, *_ in rows]
    device = Device(rows[0][0], min(totals)) if rows else Device("processor", float("inf"))
    return Machine(
        len(rows), device, float(psutil.virtual_memory().total), float(shutil.disk_usage(Path()).free)
    )


def _fit(plan: Plan) -> list[Finding]:
    """What the plan says does not fit; disk and memory in figures where they do."""
    there = plan.machine
    findings = [
        error(p.what, f"{p.stage} needs {p.amount(p.needed)}, there are {p.amount(p.available)}", p.advice)
        for p in plan.problems
    ]
    wrong = {problem.what for problem in plan.problems}
    if "disk" not in wrong and there.disk is not None:
        findings.append(ok("disk", f"{there.disk / 1e9:.0f} GB free, the run needs {plan.disk / 1e9:.0f} GB"))
    if "host memory" not in wrong and there.memory is not None:
        most = max(stage.host for stage in plan.stages)
        findings.append(
            ok("host memory", f"{there.memory / GIB:.0f} GiB, a stage needs up to {most / GIB:.1f} GiB")
        )
    return findings
