"""A training stage in several processes: the stage starts them, waits, and ends as they do.

torch's elastic agent runs in the stage itself and starts this machine's processes; every other machine of the
hostfile gets an agent through ssh. A process that dies ends all, and so does the stage's end. The first
process is the one that writes (`parallel.leads`).
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dgpo_core.config.params import load_params
from dgpo_core.config.training import ComputeConfig
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.temporary import temporary_folder
from dgpo_core.training import parallel
from tasks.project.process import die_with_stage, is_worker

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

GRACE = 8  # seconds to clean up: whoever ends the stage waits about ten before SIGKILL
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE", "NCCL_SOCKET_IFNAME",
             "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
             "DVC_STAGE")  # fmt: skip


def in_processes(train: Callable[[], None]) -> None:
    """Run a training stage as `compute` says: here, or in every process that is started for it.

    Under a launcher (torchrun, Slurm with torchrun) each of its processes is a part of the stage.
    """
    compute = load_params().compute
    if compute.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    if is_worker():
        die_with_stage(GRACE)
        with parallel.group(compute.device):
            train()
    elif compute.spawns:
        _launch(compute, sys.orig_argv[1:])
    else:
        train()


def read_hosts(path: Path, processes: int) -> list[str]:
    """Read the machines of a hostfile, `name slots=n` a line; slots may be left out. Raise UserError."""
    if not path.is_file():
        raise UserError(f"compute.hostfile: {path}: no such file")
    hosts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, *options = line.split("#")[0].split() or [""]
        if not name:
            continue
        slots = [option.removeprefix("slots=") for option in options]
        if len(slots) > 1 or (slots and not slots[0].isdigit()):
            raise UserError(f"{path}:{number}: expected `name slots=n`, found {line.strip()!r}")
        if slots and int(slots[0]) < processes:
            raise UserError(f"{path}:{number}: {name} has {slots[0]} slots, compute.processes is {processes}")
        if name in hosts:
            raise UserError(f"{path}:{number}: {name} stands there twice")
        hosts.append(name)
    if not hosts:
        raise UserError(f"compute.hostfile: {path}: names no machine")
    return hosts


def _launch(compute: ComputeConfig, arguments: list[str]) -> None:
    """Start this Python with `arguments` in all processes. Raises SystemExit with the first failure's code,
    and InfrastructureError where a process was killed."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    hosts = read_hosts(Path(compute.hostfile), compute.processes) if compute.hostfile else ["127.0.0.1"]
    _environment(compute, alone=len(hosts) == 1)
    endpoint, run_id = f"{hosts[0]}:{_free_port()}", uuid.uuid4().hex
    with temporary_folder("launch") as logs, _elsewhere(hosts, endpoint, run_id, compute, arguments):
        config = LaunchConfig(
            min_nodes=len(hosts),
            max_nodes=len(hosts),
            nproc_per_node=compute.processes,
            run_id=run_id,
            rdzv_backend="static",
            rdzv_endpoint=endpoint,
            rdzv_configs={"rank": 0, "timeout": 900},
            max_restarts=0,
            local_addr=hosts[0],
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            _explain(error.failures, compute.processes * len(hosts))


def _explain(failures: dict[int, "ProcessFailure"], processes: int) -> None:
    """End the stage as its first process ended; raise InfrastructureError for one that was killed.

    The others have said themselves why they failed, in their output and in failure.json.
    """
    for rank, failure in failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            reason = " (out of memory?)" if name == "SIGKILL" else ""
            raise InfrastructureError(f"process {rank} of {processes} was ended by {name}{reason}")
    raise SystemExit(next(iter(failures.values())).exitcode)


def _environment(compute: ComputeConfig, alone: bool) -> None:
    """Set threads and network for the processes, unless somebody has."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // compute.processes)))
    if alone and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine's name need not resolve


@contextlib.contextmanager
def _elsewhere(
    hosts: list[str], endpoint: str, run_id: str, compute: ComputeConfig, arguments: list[str]
) -> Iterator[None]:
    """Run the other machines' processes, in the same folder there. When one machine fails, all end."""
    agents: list[subprocess.Popen[bytes]] = []
    failed: list[str] = []
    done = threading.Event()

    def watch(host: str, agent: subprocess.Popen[bytes]) -> None:
        if agent.wait() and not done.is_set():
            failed.append(host)
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        for node, host in enumerate(hosts[1:], 1):
            torchrun = ["-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node-rank={node}"]
            torchrun += [f"--nproc-per-node={compute.processes}", f"--rdzv-id={run_id}"]
            torchrun += [f"--rdzv-endpoint={endpoint}", "--rdzv-backend=static"]
            command = _remote_command([sys.executable, *torchrun, *arguments])
            # -tt: the other end is hung up, and ends, when this ssh is killed
            ssh = ["ssh", "-tt", "-o", "BatchMode=yes", host, command]
            agents.append(subprocess.Popen(ssh, stdin=subprocess.DEVNULL))
            threading.Thread(target=watch, args=(host, agents[-1]), daemon=True).start()
        yield
        for agent in agents:
            agent.wait()
    except SystemExit:
        if failed:
            raise InfrastructureError(
                f"{failed[0]}: training ended there; its reason stands above (machines of compute.hostfile "
                "need ssh without a password, and this folder and environment at the same place)"
            ) from None
        raise
    finally:
        done.set()
        for agent in agents:
            agent.terminate()
            agent.wait()


def _remote_command(program: list[str]) -> str:
    """Return a shell's command line that starts a program in this folder and environment elsewhere."""
    environment = [f"{name}={os.environ[name]}" for name in PASSED_ON if name in os.environ]
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *environment, *program])}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
