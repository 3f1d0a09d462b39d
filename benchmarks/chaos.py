"""Kills every stage of a miniature at random instants, starts it again, and compares bytes: `make chaos`.

    python -m benchmarks.chaos --kills 200

All stages run once undisturbed. Then each case copies what a stage reads, disturbs the stage once to four
times, lets it finish, and compares what it wrote. Instants are drawn (`--seed`) in processor time, so that
another load of the machine hits the same places. What was done is in `<out>/cases.jsonl`; started again, it
goes on. The folder of a case that failed stays.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dgpo_core.files import remove, write_json
from flows.server import API_URL, server_command
from tasks.project.files import content_hash
from tasks.project.process import exit_on_signals
from tests.tasks.miniature import ROOT, change_params, make_project

Variables = dict[str, str]  # of the environment
Limit = tuple[int, int]  # what is limited (resource.RLIMIT_...), bytes

GRACE = 10.0  # seconds after SIGTERM in which a stage should end, on a machine that has time for it
HUNG = 900.0  # seconds
MOUNTS = "DGPO_CHAOS_MOUNTS"  # environment: mounts are this process's own
FAKETIME = ROOT / ".venv-faketime/libfaketime/vendor/libfaketime/src/libfaketime.so.1"
# an index that is kept on disk is loaded once; a kill in between must not leave half of it to be searched
LOAD = """
import json
from pathlib import Path
from dgpo_core.config.params import load_params
from dgpo_core.files import write_json
from tasks.project.process import run_program
from tasks.stages.inputs import retriever, validation_questions

def load():
    params = load_params()
    retrieval = params.retrieval.model_copy(update={"location": "embedded:collection"})
    params = params.model_copy(update={"retrieval": retrieval})
    found = retriever(params).search(validation_questions(params), params.retrieval.top_k)
    write_json(Path("hits.json"), [[repr(hit) for hit in hits] for hits in found])

run_program(load)
"""
# two stages under DVC and Prefect
GRAPH = """
stages:
  filter:
    cmd: exec python -m tasks.stages.filter
    deps: [data/teacher]
    outs: [data/correct]
    metrics: [metrics/filter.json]
  report:
    cmd: exec python -m tasks.stages.report
    deps: [data/correct, evaluation]
    outs: [reports]
"""
SMALLER: dict[str, dict[str, Any]] = {
    "retrieval": {"shard_size": 60},
    "teach": {"chunk": 8},
    "distributions": {"chunk": 4},
    "distill": {"dev_questions": 4},
    "evaluate": {"chunk": 6, "questions": 2, "split_questions": 4, "counterfactual_questions": 1},
    "base_models": {
        "world": {"passages": 150},
        "worlds": 1,
        "expert_episodes": 12,
        "models": {
            "small": {
                "shape": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16},
                "phases": [
                    {"kind": "reading", "steps": 250, "batch_size": 2, "warmup_steps": 1},
                    {"kind": "protocol", "steps": 150, "batch_size": 2, "warmup_steps": 1},
                ],
            }
        },
    },
}


@dataclass(frozen=True)
class Work:
    """A program, and what it writes."""

    arguments: tuple[str, ...]  # of python
    outputs: tuple[str, ...]


def _stage(name: str, *outputs: str) -> Work:
    module, *argument = name.split("@")
    written = (*outputs, f"metrics/{name.replace('@', '-')}.json")
    return Work(("-m", f"tasks.stages.{module.replace('-', '_')}", *argument), written)


# `reports/index.html` says when it was made, and `plots/processor_time` has times: these are not compared
TABLES = ("results", "comparisons", "arcap", "arcap_comparisons", "diagnosis", "search_use")
REPORT = tuple(f"reports/{name}.json" for name in TABLES)
WORKS = {  # in the order in which they can run
    "base-model": Work(("-m", "tasks.stages.base_model", "small"), ("models/small",)),
    "given": Work(("-m", "tasks.stages.given", "student"), ("models/given/student",)),
    "data": _stage("data", "data/corpus.jsonl", "data/questions"),
    "index": _stage("index", "data/index"),
    "index load": Work(("-c", LOAD), ("hits.json",)),
    "audit": _stage("audit", "data/audit"),
    "teach": _stage("teach", "data/teacher"),
    "filter": _stage("filter", "data/correct"),
    "distributions": _stage("distributions", "data/distributions"),
    "distill": _stage("distill@kd", "models/kd", "plots/distill-kd.csv"),
    "reinforce": _stage("reinforce@dgpo", "models/dgpo", "plots/reinforce-dgpo.csv"),
    "evaluate": _stage("evaluate@dgpo", "evaluation/dgpo"),
    "report": Work(("-m", "tasks.stages.report"), REPORT),
    "export": Work(("-m", "tasks.commands.cli", "export", "dgpo", "--to", "hf", "--out", "out"), ("out",)),
    "flow": Work(("-m", "flows.pipeline"), ("data/correct", *REPORT)),
}


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of a program: what it took, and the hash of each output."""

    processor_seconds: float
    address_space: int  # bytes, at the peak
    written: int  # bytes of all outputs
    largest: int  # bytes of the largest file
    hashes: dict[str, str]


@dataclass
class Case:
    """One case: `kills` are the times that the program, or the server beside it, did not end by itself."""

    number: int
    work: str
    fault: str
    kills: int = 0
    wrong: str = ""  # what differed; empty where all is as it should be
    codes: list[int | None] = field(default_factory=list)
    slowest_end: float = 0.0  # seconds from SIGTERM to the end


@dataclass
class Process:
    """A running program, with its processor time and largest address space so far."""

    popen: "subprocess.Popen[bytes]"

    def measures(self) -> tuple[float, int]:
        """Return processor seconds and bytes; zeros when it has ended."""
        try:
            stat = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{self.popen.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0, 0
        peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmPeak")), "0")
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"), int(peak) * 1024

    def wait(self) -> int:
        """Wait until it ends; return its exit code. Kill it, and raise TimeoutExpired, where it hangs."""
        try:
            return self.popen.wait(HUNG)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise

    def wait_until(self, seconds: float) -> bool:
        """Wait until it has used so much processor time; return False where it ended before."""
        while self.popen.poll() is None:
            if self.measures()[0] >= seconds:
                return True
            time.sleep(0.01)
        return False


class Chaos:
    """Runs cases in `out`, each decided by the seed and its number."""

    def __init__(self, out: Path, seed: int, works: list[str], faults: list[str]) -> None:
        self.out, self.seed = out.resolve(), seed
        self.log = self.out / "cases.jsonl"
        self.references: dict[str, Reference] = {}
        self._pairs = [(work, fault) for work in works for fault in faults if possible(work, fault)]
        self._disk = self.out / "disk"
        self.running: Process | None = None
        self._environment = environment(self.out)

    def start(self) -> None:
        """Run once, undisturbed, what is to be disturbed and all before it, unless that was done."""
        kept, folder = self.out / "references.json", self.out / "reference"
        if not kept.is_file():
            remove(folder)
            folder.mkdir(parents=True)
            make_project(folder, None, **SMALLER)
            change_params(folder, compare=["dgpo"])
            write_json(kept, {})
        known = {name: Reference(**entry) for name, entry in json.loads(kept.read_text()).items()}
        last = max(list(WORKS).index(work) for work, _ in self._pairs)
        for name in [name for name in list(WORKS)[: last + 1] if name not in known]:
            known[name] = self._undisturbed(name, folder)
            write_json(kept, {each: asdict(reference) for each, reference in known.items()})
            print(f"undisturbed: {name}: {known[name].processor_seconds:.1f} s", flush=True)
        self.references = known

    def cases(self) -> list[Case]:
        """Return the cases that were run."""
        if not self.log.is_file():
            return []
        return [Case(**json.loads(line)) for line in self.log.read_text().splitlines()]

    def run(self, kills: int, report: Callable[[Case, int], None]) -> None:
        """Run cases until there were so many kills."""
        done = self.cases()
        number, total = len(done), sum(case.kills for case in done)
        while total < kills:
            case = self.play(number)
            with self.log.open("a") as file:
                file.write(json.dumps(asdict(case)) + "\n")
            number, total = number + 1, total + case.kills
            report(case, total)

    def drawn(self, number: int) -> tuple[str, str]:
        """Return program and fault of a case: all pairs come in turn, in an order that is drawn."""
        cycle, place = divmod(number, len(self._pairs))
        pairs = self._pairs[:]
        random.Random(f"chaos-{self.seed}-{cycle}").shuffle(pairs)
        return pairs[place]

    def play(self, number: int) -> Case:
        """Run the case of this number."""
        case, rng = Case(number, *self.drawn(number)), random.Random(f"chaos-{self.seed}-{number}")
        on_disk = case.fault == "full disk"
        folder = self._disk if on_disk else self.out / f"case-{number}"
        with small_disk(self._disk) if on_disk else nullcontext():
            self._prepare(case.work, folder)
            try:
                for _ in range(rng.randint(1, 4)):
                    if self._disturb(case, folder, rng):
                        break  # it ended by itself
                    case.wrong = case.wrong or self._compare(case.work, folder, complete=False)
                self._finish(case, folder)
            except subprocess.TimeoutExpired:
                case.wrong = "it hung"
            if case.wrong and on_disk:
                shutil.copytree(folder, self.out / f"case-{number}", symlinks=True, dirs_exist_ok=True)
            if not case.wrong and not on_disk:
                remove(folder)
        return case

    def _undisturbed(self, name: str, folder: Path) -> Reference:
        work, seconds, peak = WORKS[name], 0.0, 0
        if name == "flow":  # in a repository, which no other program is in
            folder = self.out / "repository"
            self._prepare(name, folder)
        with self._server(name) as (_, variables):
            process = self._start(work, folder, variables)
            while process.popen.poll() is None:
                now = process.measures()
                seconds, peak = max(seconds, now[0]), max(peak, now[1])
                time.sleep(0.02)
        if process.popen.returncode:
            raise SystemExit(f"error: undisturbed {name} ended with {process.popen.returncode}")
        files = [file for name in work.outputs for file in _files(folder / name)]
        sizes = [file.stat().st_size for file in files]
        hashes = {name: content_hash(folder / name) for name in work.outputs}
        return Reference(seconds, peak, sum(sizes), max(sizes), hashes)

    def _prepare(self, work: str, folder: Path) -> None:
        """Copy the undisturbed project, without what the program writes."""
        if not folder.is_mount():
            remove(folder)  # of a case that was killed with the harness
        shutil.copytree(self.out / "reference", folder, symlinks=True, dirs_exist_ok=True)
        for name in (".state", "runs", "collection", *WORKS[work].outputs):
            remove(folder / name)
        if work == "flow":
            make_repository(folder)

    @contextmanager
    def _server(
        self, work: str, fault: str = ""
    ) -> "Iterator[tuple[subprocess.Popen[bytes] | None, Variables]]":
        """Give the server that a program has beside it, if it has one, and the environment that names it."""
        if work == "flow":
            port = free_port()
            command, variables = server_command(port)
            variables |= {"PREFECT_HOME": str(self.out / "prefect"), API_URL: f"http://127.0.0.1:{port}/api"}
            health = f"{variables[API_URL]}/health"
        elif fault == "MLflow's server":
            port, place = free_port(), self.out
            command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
            command += ["--backend-store-uri", self._environment["MLFLOW_TRACKING_URI"]]
            command += ["--artifacts-destination", str(place / "mlruns")]
            variables = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
            health = f"{variables['MLFLOW_TRACKING_URI']}/health"
        else:
            yield None, {}
            return
        with (self.out / "servers.log").open("ab") as log:
            environment = self._environment | variables
            server = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for(health, server)
            yield server, variables
        finally:
            end(server)

    def _disturb(self, case: Case, folder: Path, rng: random.Random) -> bool:
        """Run the program once under the case's fault; return whether it ended by itself, with 0."""
        reference, work = self.references[case.work], WORKS[case.work]
        instant = rng.uniform(0.0, 1.05) * reference.processor_seconds
        match case.fault:
            case "SIGTERM" | "SIGKILL":
                with self._server(case.work) as (_, variables):
                    process = self._start(work, folder, variables)
                    if process.wait_until(instant):
                        self._signal(process, case)
                    process.wait()
            case "file size":
                limit = int(reference.largest ** rng.uniform(0.5, 1.0))
                process = self._start(work, folder, limit=(resource.RLIMIT_FSIZE, limit))
            case "memory":
                limit = int(reference.address_space * rng.uniform(0.1, 0.9))
                process = self._start(work, folder, limit=(resource.RLIMIT_AS, limit))
            case "full disk":
                ballast = folder / "ballast"
                free = int(rng.uniform(0.0, 1.5) * reference.written)
                fill(ballast, free)
                process = self._start(work, folder)
                process.wait()
                ballast.unlink()
            case "clock":
                process = self._set_back(case, folder, instant, rng)
            case _:  # a server beside it
                with self._server(case.work, case.fault) as (server, variables):
                    process = self._start(work, folder, variables)
                    if server and process.wait_until(instant):
                        end(server)
                        case.kills += 1
                    code = process.wait()
                if code and case.work != "flow":
                    case.wrong = f"it ended with {code} without {case.fault}"
        code = process.wait()
        case.codes.append(code)
        case.kills += int(code != 0 and not case.fault.endswith("server"))
        return code == 0

    @staticmethod
    def _signal(process: Process, case: Case) -> None:
        """Send the case's signal, and measure how long the program takes to end."""
        process.popen.send_signal(signal.Signals[case.fault])
        began = time.monotonic()
        process.wait()
        if case.fault == "SIGTERM":
            case.slowest_end = max(case.slowest_end, time.monotonic() - began)

    def _set_back(self, case: Case, folder: Path, instant: float, rng: random.Random) -> Process:
        """Set the clock of a program back by hours; in every other case kill it some time later."""
        clock = folder / "clock"
        clock.write_text("+0")
        variables = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock)}
        variables |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        variables["FAKETIME_FORCE_MONOTONIC_FIX"] = "0"  # else each wait for Python's lock ends at once
        process = self._start(WORKS[case.work], folder, variables)
        if process.wait_until(instant):
            clock.write_text(f"-{rng.randint(1, 48)}h")
            later = rng.uniform(instant, self.references[case.work].processor_seconds)
            if rng.random() < 0.5 and process.wait_until(later):
                process.popen.kill()
        return process

    def _finish(self, case: Case, folder: Path) -> None:
        """Let the program finish, and say what is wrong with what it has written."""
        if not case.codes or case.codes[-1] != 0:
            with self._server(case.work) as (_, variables):
                code = self._start(WORKS[case.work], folder, variables).wait()
            if code:
                case.wrong = case.wrong or f"started again it ended with {code}"
        case.wrong = case.wrong or self._compare(case.work, folder, complete=True)
        if left := sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part")):
            case.wrong = case.wrong or f"left behind: {', '.join(left)}"

    def _compare(self, work: str, folder: Path, complete: bool) -> str:
        """Name the outputs that are not those of the undisturbed run; absent ones only where all must be."""
        expected = self.references[work].hashes
        wrong = []
        for name, digest in expected.items():
            if (folder / name).exists():
                if content_hash(folder / name) != digest:
                    wrong.append(f"{name} differs")
            elif complete:
                wrong.append(f"{name} is missing")
        return ", ".join(wrong)

    def _start(
        self, work: Work, folder: Path, variables: Variables | None = None, limit: Limit | None = None
    ) -> Process:
        # a limit on files is for the program's, not for this one's log
        quiet = limit is not None and limit[0] == resource.RLIMIT_FSIZE
        output = Path(os.devnull) if quiet else self.out / "output.log"
        with output.open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, *work.arguments],
                cwd=folder,
                env=self._environment | (variables or {}),
                stdout=log,
                stderr=log,
                preexec_fn=partial(resource.setrlimit, limit[0], (limit[1], limit[1])) if limit else None,
            )
        self.running = Process(popen)
        return self.running


FAULTS = [
    "SIGTERM",
    "SIGKILL",
    "file size",
    "full disk",
    "memory",
    "clock",
    "MLflow's server",
    "Prefect's server",
]
TRACKED = ("filter", "distill", "reinforce", "evaluate")


def possible(work: str, fault: str) -> bool:
    """Return whether a fault can be made here, and says something about the program."""
    if work == "flow" or fault == "Prefect's server":
        return work == "flow" and fault in ("SIGTERM", "SIGKILL", "Prefect's server")
    match fault:
        case "clock":
            return FAKETIME.is_file()
        case "full disk":
            return may_mount()
        case "MLflow's server":
            return work in TRACKED
    return True


def environment(out: Path) -> dict[str, str]:
    """Return the environment of the programs: these sources, one thread, a store of the harness's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CEILING_DIRECTORIES": str(out),  # a project is in no repository, as one on a disk of its own
        "DVC_NO_ANALYTICS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{out / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
    }


def may_mount() -> bool:
    """Return whether a file system may be mounted for this process alone (`main` has asked for that)."""
    return MOUNTS in os.environ


def unshares() -> bool:
    """Return whether a process may have mounts of its own here."""
    alone = ["unshare", "--mount", "true"]
    return bool(shutil.which("unshare")) and not subprocess.run(alone, stderr=subprocess.DEVNULL).returncode


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """Mount a file system of 512 MiB in memory at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(ballast: Path, free: int) -> None:
    """Write a file that leaves so many bytes of its file system."""
    room = shutil.disk_usage(ballast.parent).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, room - free))


def make_repository(folder: Path) -> None:
    """Make a git and DVC repository of two stages, neither of which has run."""
    (folder / "dvc.yaml").write_text(GRAPH)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def end(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Wait until a server answers."""
    end = time.monotonic() + 300
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no answer from {url}")


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def told(case: Case) -> str:
    """Return a case in a line."""
    ends = ", ".join(map(str, case.codes))
    said = case.wrong or "identical"
    return f"case {case.number}: {case.work}, {case.fault}: {case.kills} kills, exit codes {ends}: {said}"


def table(cases: list[Case]) -> str:
    """Return kills by program and fault, with the cases whose bytes differed."""
    faults = [fault for fault in FAULTS if any(case.fault == fault for case in cases)]
    head = f"| stage | {' | '.join(faults)} | kills | cases | identical |"
    lines = [head, "|---" * (len(faults) + 4) + "|"]
    kills = Counter[tuple[str, str]]()
    for case in cases:
        kills[case.work, case.fault] += case.kills
    for work in [*WORKS, "all"]:
        own = [case for case in cases if work in (case.work, "all")]
        cells = [sum(case.kills for case in own if case.fault == fault) for fault in faults]
        same = sum(not case.wrong for case in own)
        lines.append(f"| {work} | {' | '.join(map(str, cells))} | {sum(cells)} | {len(own)} | {same} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="end when there were so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--stage", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--fault", nargs="+", choices=FAULTS, default=FAULTS)
    given = parser.parse_args()
    if not may_mount() and unshares():
        os.environ[MOUNTS] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:]])
    exit_on_signals()
    chaos = Chaos(given.out, given.seed, given.stage, given.fault)

    def report(case: Case, total: int) -> None:
        print(f"{total} kills; {told(case)}", flush=True)

    try:
        chaos.start()
        chaos.run(given.kills, report)
    finally:  # not every program ends with its parent
        if chaos.running and chaos.running.popen.poll() is None:
            chaos.running.popen.kill()
    cases = chaos.cases()
    print(table(cases))
    wrong = [case for case in cases if case.wrong]
    print(*map(told, wrong), sep="\n")
    ends = [case.slowest_end for case in cases if case.slowest_end]
    late = sum(end > GRACE for end in ends)
    print(
        f"ends after SIGTERM: slowest {max(ends, default=0.0):.1f} s, {late} of {len(ends)} above {GRACE:g} s"
    )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
