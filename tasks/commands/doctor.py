"""`dgpo doctor`: what would stop a run here, or leave it without a record, and what to do about it.

Each check returns its findings. None loads a model, changes anything, or waits long for the network.
"""

import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import httpx
import psutil
from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from tokenizers import Tokenizer

from dgpo_core.config.agent import RolloutConfig
from dgpo_core.config.params import PARAMS, Params, load_params, paper_recipes
from dgpo_core.config.recipes import STUDENT, TEACHER
from dgpo_core.config.retrieval import parse_location
from dgpo_core.datasets.published import SETTING, gold_addresses, hub_file, split_addresses
from dgpo_core.errors import InfrastructureError, UserError, without_credentials
from dgpo_core.hub import NEWEST, cached_file, hub_model
from dgpo_core.planning.workload import GIB, Device, Machine
from dgpo_core.vocabulary import check_same_vocabulary
from tasks.commands.preflight import VOCABULARY, model_file, preflight
from tasks.project import git
from tasks.project.dvc import Problem, problems, read_config
from tasks.tracking.store import (
    EXPERIMENT,
    complaint,
    condition,
    deleted_experiment,
    explained,
    local_path,
    require_answer,
    tracking_uri,
)

CPUINFO = Path("/proc/cpuinfo")  # avx512_bf16, amx_bf16; on ARM bf16
COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}
TIMEOUT = 4.0  # seconds for an answer from the network
OPEN_FILES = 4096  # Qdrant's segments, data loaders and sockets
BUSY = 0.05  # share of a GPU's memory in use from which it is worth telling
INSTALL = "make install (or pip install -c constraints/main.txt -e .)"


@dataclass(frozen=True)
class Finding:
    """The result of one check; `advice` says what to do and is empty where all is well."""

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str
    advice: str = ""


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
error = partial(Finding, "error")


def examine() -> Iterator[Finding]:
    """Yield all findings, one after another; of params.yaml only where it can be read."""
    yield from environment()
    try:
        params = load_params()
    except UserError as why:
        advice = "correct the file, or write a new one (`dgpo use <profile>`)"
        yield error("settings", str(why), advice)
        return
    yield ok("settings", f"{PARAMS}, profile {params.profile}")
    for check in (machine, hub, pair, servers, store, repository):
        yield from check(params)


def doctor(as_json: bool) -> int:
    """Print all findings. Return the exit code: 1 when there is an error."""
    found: list[Finding] = []
    console = Console(highlight=False, soft_wrap=True)
    for finding in examine():
        found.append(finding)
        if not as_json:
            colour = COLOURS[finding.level]
            console.print(
                f"[{colour}]{finding.level:8}[/] {escape(finding.subject)}: {escape(finding.message)}"
            )
            if finding.advice:
                console.print(f"           {escape(finding.advice)}")
    levels = Counter(finding.level for finding in found)
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        console.print(f"\n{levels['ok']} ok, {levels['warning']} warnings, {levels['error']} errors")
    return 1 if levels["error"] else 0


def environment() -> list[Finding]:
    """Check what is installed against pyproject.toml's ranges, and how many files may be open."""
    try:
        declared = [Requirement(text) for text in requires("dgpo") or []]
    except PackageNotFoundError:
        return [error("packages", "dgpo is not installed in this environment", INSTALL)]
    needed = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [trouble for requirement in needed if (trouble := _mismatch(requirement))]
    findings = [error("packages", trouble, INSTALL) for trouble in wrong]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < OPEN_FILES:
        higher = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        advice = f"ulimit -n {higher} in the shell that starts the run"
        findings.append(warning("open files", f"at most {soft}", advice))
    return findings or [ok("packages", f"{len(needed)} in their ranges")]


def _mismatch(requirement: Requirement) -> str | None:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{requirement.name} {installed} is installed, {requirement} is needed"


def machine(params: Params) -> list[Finding]:
    """Check GPUs and who holds their memory, and memory and disk against the plan for this machine."""
    from dgpo_core.agent.vllm_engine import nvidia_smi  # it imports torch

    rows, trouble = nvidia_smi("--query-gpu=name,memory.total,memory.used,driver_version")
    uses_gpus = params.compute.device != "cpu"
    findings = []
    for number, (name, total, used, driver) in enumerate(rows):
        free = float(total) - float(used)
        text = f"{name}, {free / 1024:.1f} of {float(total) / 1024:.1f} GiB free, driver {driver}"
        busy = uses_gpus and float(used) > BUSY * float(total)
        advice = "see the processes below; a run needs the memory that the plan says"
        findings.append(warning(f"GPU {number}", text, advice) if busy else ok(f"GPU {number}", text))
    if not rows and uses_gpus:
        advice = "install NVIDIA's driver, or use a profile for the processor (`dgpo use tiny`)"
        findings.append(error("GPUs", f"compute.device is {params.compute.device}; {trouble}", advice))
    findings += [] if uses_gpus else _narrow(params)
    return findings + holders() + _fit(params, rows if uses_gpus else [])


def _narrow(params: Params) -> list[Finding]:
    """Warn of bfloat16 where the processor does not have it, as far as Linux tells."""
    sections = {"compute": params.compute.precision, "rollout": params.rollout.precision}
    narrow = [f"{name}.precision" for name, precision in sections.items() if precision == "bfloat16"]
    if not narrow or not CPUINFO.is_file() or "bf16" in CPUINFO.read_text(encoding="utf-8"):
        return []
    text, advice = "bfloat16, which this processor does not have", "float32 is likely to be faster here"
    return [warning(" and ".join(narrow), text, advice)]


def holders() -> list[Finding]:
    """Name the processes that hold GPU memory; an engine whose parent has died is left over."""
    from dgpo_core.agent.vllm_engine import nvidia_smi

    rows, _ = nvidia_smi("--query-compute-apps=pid,used_memory")
    findings = []
    for pid, used in rows:
        command, parent = "not visible from here (another container or user)", None
        try:
            process = psutil.Process(int(pid))
            command, parent = " ".join([process.name(), *process.cmdline()]), process.ppid()
        except psutil.Error:
            pass
        text = f"process {pid} holds {used} MiB: {command[:80]}"
        # vLLM's engine process outlives a parent that was killed with SIGKILL
        if parent == 1 and any(word in command.lower() for word in ("vllm", "multiprocessing")):
            findings.append(error("GPU memory", f"{text}; its parent is gone", f"kill {pid}, if it is yours"))
        else:
            advice = "wait for it, or use other GPUs (CUDA_VISIBLE_DEVICES)"
            findings.append(warning("GPU memory", text, advice))
    return findings


def _fit(params: Params, rows: list[list[str]]) -> list[Finding]:
    """Say what the plan says does not fit; where all fits, disk and memory in figures."""
    from tasks.commands.plan import plan_for

    totals = [float(total) * 2**20 for _, total, *_ in rows]
    device = Device(rows[0][0], min(totals)) if rows else Device("processor", float("inf"))
    memory, disk = float(psutil.virtual_memory().total), float(shutil.disk_usage(Path()).free)
    try:
        plan = plan_for(params, Machine(len(rows), device, memory, disk, threads=os.cpu_count() or 1))
    except UserError as why:
        return [warning("plan", str(why), "without it memory and disk are not compared with the need")]
    if plan.problems:
        return [
            error(
                p.what, f"{p.stage} needs {p.amount(p.needed)}, there are {p.amount(p.available)}", p.advice
            )
            for p in plan.problems
        ]
    host = max(stage.host for stage in plan.stages)
    return [
        ok("disk", f"{disk / 1e9:.0f} GB free, the run needs {plan.disk / 1e9:.0f} GB"),
        ok("host memory", f"{memory / GIB:.0f} GiB, a stage needs up to {host / GIB:.1f} GiB"),
    ]


def hub(params: Params) -> list[Finding]:
    """Check every model and file of a data set that `params` name: here, in the hub's cache, or to be had."""
    models = {"models.student": params.models.student}
    if params.models.endpoint is None:
        models["models.teacher"] = params.models.teacher
    if params.retrieval.has_encoder:
        encoder = params.retrieval.encoder
        at = f"@{encoder.revision}" if encoder.revision else ""
        models["retrieval.encoder.model"] = encoder.model + at
    files = {"retrieval.vectors": params.retrieval.vectors} if params.retrieval.vectors else {}
    if params.data.source == "published":
        config, sets = params.data.published, params.questions
        named = {"questions": list(split_addresses(config, sets).values()), "corpus": [config.corpus]}
        named |= gold_addresses(config, sets)
        files |= {f"{SETTING}.{name}": places for name, places in named.items()}
    looks: list[Callable[[], Finding]] = [partial(_model, *item) for item in models.items()]
    looks += [partial(_files, *item) for item in files.items()]
    with ThreadPoolExecutor(len(looks)) as at_once:  # a hub that does not answer is waited for once
        return list(at_once.map(lambda look: look(), looks))


def _model(setting: str, source: str) -> Finding:
    if Path(source).is_dir():
        return ok(setting, f"{source}, a folder")
    name, revision = hub_model(source)
    if cached := cached_file(source, "config.json"):
        pin = f"; {name}@{cached.parent.name} pins what is here" if revision == NEWEST else ""
        return ok(setting, f"{source}, in the cache{pin}")
    if refusal := _refusal(name, "config.json", revision=revision):
        return error(setting, f"{source} is neither a folder nor in the cache: {refusal[0]}", refusal[1])
    download = f"hf download {name}" + ("" if revision == NEWEST else f" --revision {revision}")
    return warning(setting, f"{source} is not here yet", f"its stage downloads it; `{download}` does it now")


def _files(setting: str, places: list[str]) -> Finding:
    """Check the files of a data set; the first that cannot be had speaks for all."""
    absent = 0
    for place in places:
        try:
            wanted = hub_file(place, setting)
        except UserError as why:
            return error(setting, str(why).removeprefix(f"{setting}: "), "correct it in params.yaml")
        if wanted is None:
            if not Path(place).is_file():
                return error(setting, f"{place}: no such file", "see docs/data.md for its format")
            continue
        there = (wanted.id, wanted.path_in_repo)
        if isinstance(try_to_load_from_cache(*there, None, wanted.revision, "dataset"), str):
            continue
        if refusal := _refusal(*there, "dataset", wanted.revision):
            return error(setting, f"{place} is not in the cache: {refusal[0]}", refusal[1])
        absent += 1
    if absent:
        text = f"{absent} of {len(places)} files are not here yet"
        return warning(setting, text, "its stage downloads them")
    return ok(setting, f"{len(places)} files are here")


def _refusal(
    repository: str, file: str, repo_type: str = "model", revision: str | None = None
) -> tuple[str, str] | None:
    """Ask the hub about a file. Return why it cannot be had and what to do, or None."""
    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repository}"
    try:
        url = hf_hub_url(repository, file, repo_type=repo_type, revision=revision)
        get_hf_file_metadata(url, timeout=TIMEOUT)
    except HFValidationError:
        return "this is no name of the hub's", "see whether the name is right"
    except HfHubHTTPError as why:
        status = why.response.status_code
        if status not in (401, 403):
            return f"the hub answers {status}", "see whether the name is right"
        whose = "this token may not read it" if get_token() else "there is no token"
        login = f"accept the licence at {page}, then set HF_TOKEN (or `hf auth login`)"
        return f"it is gated ({status}), and {whose}", login
    except Exception as why:  # its HTTP client's errors, which differ between versions
        advice = f"make it reachable, or copy {constants.HF_HUB_CACHE} from where it is"
        return f"the hub is not reachable ({type(why).__name__})", advice
    return None


def pair(params: Params) -> list[Finding]:
    """Say what the configured student and teacher can and cannot do together, as far as both are here."""
    endpoint = [] if params.models.endpoint is None else [_endpoint(params)]
    return [*endpoint, _tokenizers(params), *_templates(params), *_contexts(params), _recipes(params)]


def _endpoint(params: Params) -> Finding:
    """Check that the teacher's server answers, takes the key and has the model."""
    from dgpo_core.endpoint import EndpointClient

    endpoint, subject = params.models.endpoint, "models.teacher"
    assert endpoint is not None
    config = params.teach.endpoint.model_copy(update={"timeout": TIMEOUT, "attempts": 1})
    try:
        with EndpointClient(endpoint, config) as client:
            known = client.models()
    except InfrastructureError as why:
        return warning(subject, str(why), "start it before the stage teach")
    except UserError as why:
        return error(subject, str(why), f"set the environment variable {config.key_variable}, or correct it")
    if endpoint.model not in known:
        return warning(subject, f"{endpoint.url} lists no {endpoint.model}", f"it has {', '.join(known[:5])}")
    return ok(subject, f"{endpoint.url} has {endpoint.model}: an endpoint, which gives text alone")


def _tokenizers(params: Params) -> Finding:
    subject = "tokenizers"
    if params.models.endpoint is not None:
        return ok(subject, "an endpoint's text is read in the student's tokens")
    try:
        preflight()
    except UserError as why:
        advice = (
            "choose models of one family (models.student, models.teacher), or recipes without a teacher; or "
            "serve the teacher and name it as an endpoint, for seqkd (docs/data.md)"
        )
        return error(subject, str(why), advice)
    same = _same_vocabulary(params)
    if same is None:
        return ok(subject, "not both are here: the stage teach compares them")
    agree = "agree" if same else "differ, which these recipes do not mind"
    return ok(subject, f"the student's and the teacher's {agree}")


def _same_vocabulary(params: Params) -> bool | None:
    """Return whether student and teacher have the same tokens; None where that is not known here."""
    models = (params.models.student, params.models.teacher)
    files = [file for source in models if (file := model_file(source, VOCABULARY))]
    if len(files) < len(models):
        return None
    try:
        check_same_vocabulary(*(Tokenizer.from_file(str(file)) for file in files))
    except UserError:
        return False
    return True


def _templates(params: Params) -> list[Finding]:
    """Compare the chat templates: the teacher's episodes begin with its own, the student's with the other."""
    subject, models = "chat templates", {"student": params.models.student}
    if not params.taught_by_text:
        models["teacher"] = params.models.teacher
    if any(model_file(source, VOCABULARY) is None for source in models.values()):
        return []
    found = {name: _template(source) for name, source in models.items()}
    if len(set(found.values())) == 1:
        has = "a template" if found["student"] else "none: the question stands alone"
        return [ok(subject, f"{' and '.join(found)}: {has}")]
    advice = "give both the same chat_template, or the student will read other prompts than it learns from"
    return [warning(subject, "the student's and the teacher's differ", advice)]


def _template(source: str) -> str | None:
    """Return a model's chat template, which has a file of its own or stands in its tokenizer's."""
    if file := model_file(source, "chat_template.jinja"):
        return file.read_text(encoding="utf-8")
    file = model_file(source, "tokenizer_config.json")
    found = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file else None
    return found if found is None else str(found)


def _contexts(params: Params) -> list[Finding]:
    """Compare the context of each model with the longest episode."""
    longest, findings = params.protocol.max_context, []
    for name in (STUDENT, TEACHER):
        file = model_file(getattr(params.models, name), "config.json")
        room = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings") if file else None
        if isinstance(room, int) and room < longest:
            text = f"{room} tokens, and protocol.max_context is {longest}"
            findings.append(error(f"context of the {name}", text, f"lower protocol.max_context to {room}"))
    return findings or [ok("context", f"episodes have up to {longest} tokens, no known model has fewer")]


def _recipes(params: Params) -> Finding:
    """Say which rows, of params.yaml and of the tables, this pair can train."""
    table = paper_recipes(["all", "variants"], params.recipes)
    rows, barred = {**table.all, **params.recipes.all}, set[str]()
    why = "the teacher gives distributions"
    if params.models.endpoint is not None:
        barred, why = set(table.with_distributions), "the teacher gives no distributions"
    elif _same_vocabulary(params) is False:
        imitating = [] if params.taught_by_text else table.distill
        barred, why = {*imitating, *table.with_distributions}, "the teacher's tokens are not the student's"
    while behind := {name for name, row in rows.items() if row.start in barred} - barred:
        barred |= behind
    subject, own = "recipes", params.recipes.all
    if wrong := [name for name in own if name in barred]:
        advice = (
            f"take them out (`dgpo use` with {', '.join(name for name in table.all if name not in barred)})"
        )
        return error(subject, f"not possible: {', '.join(wrong)}; {why}", advice)
    without = f"; not possible: {', '.join(name for name in rows if name in barred)}" if barred else ""
    return ok(subject, f"{', '.join(own) or 'none'}: possible; {why}{without}")


def servers(params: Params) -> list[Finding]:
    """Check that named servers answer: Prefect's must; those of params.yaml may be started later."""
    findings = []
    url = os.environ.get("PREFECT_API_URL") or ""
    if url.startswith("http"):
        advice = "start it (`dgpo up`), or unset PREFECT_API_URL"
        findings.append(_answer("PREFECT_API_URL", [url], "/health", error, advice))
    return [*findings, *_retrieval(params.retrieval.location), *_rollout(params.rollout)]


def _retrieval(location: str) -> list[Finding]:
    kind, url = parse_location(location)
    subject = "retrieval.location"
    if kind == "server":
        advice = f"start Qdrant there before the stage index (docs/paper-scale.md), or set {subject}"
        return [_answer(subject, [url], "/healthz", warning, advice)]
    if kind == "service":
        advice = f"start the service there (`dgpo retriever`), or set {subject}"
        known = (200, 404)  # Search-R1's server has no /health
        return [_answer(subject, [url], "/health", warning, advice, known)]
    return []


def _rollout(rollout: RolloutConfig) -> list[Finding]:
    """Check vLLM's servers: a finding for all copies of the student, and one for the teacher's."""
    if rollout.engine != "vllm-server":
        return []
    findings = []
    for model, urls in (("student", rollout.server.student), ("teacher", rollout.server.teacher)):
        subject = f"rollout.server.{model}"
        advice = "start vLLM there before the stages that generate (docs/paper-scale.md)"
        if urls:
            findings.append(_answer(subject, urls, "/health", warning, f"{advice}, or set rollout.engine"))
        else:
            findings.append(error(subject, "names no server", f"name its URLs, and {advice}"))
    return findings


def _answer(
    subject: str,
    urls: list[str],
    path: str,
    otherwise: Callable[[str, str, str], Finding],
    advice: str,
    known: tuple[int, ...] = (200,),
) -> Finding:
    """Return ok when each of `urls` answers GET `path` with a status that is `known`, else `otherwise`."""
    # neither a password nor a token in a report
    shown = [without_credentials(url.partition("?")[0]).rstrip("/") for url in urls]
    with ThreadPoolExecutor(len(shown)) as at_once:  # who does not answer is waited for together
        troubles = list(at_once.map(lambda url: _trouble(url + path, known), shown))
    wrong = [f"{url} {trouble}" for url, trouble in zip(shown, troubles, strict=True) if trouble]
    if wrong:
        return otherwise(subject, "; ".join(wrong), advice)
    return ok(subject, f"{', '.join(shown)} {'answers' if len(shown) == 1 else 'answer'}")


def _trouble(url: str, known: tuple[int, ...]) -> str | None:
    try:
        status = httpx.get(url, timeout=TIMEOUT, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as why:
        return f"does not answer ({str(why) or type(why).__name__})"
    return None if status in known else f"answers {status} to GET {httpx.URL(url).path}"


def store(_params: Params) -> list[Finding]:
    """Check that MLflow's store can be used and has our experiment: a run would go on without a record."""
    subject, uri = "MLflow", tracking_uri()
    path = local_path(uri)
    try:
        if path and condition(path) == "absent":
            folder = path.parent if path.parent.is_dir() else path.parent.parent
            if not os.access(folder, os.W_OK):
                return [error(subject, f"{folder} cannot be written", "change its owner")]
            return [ok(subject, f"{path} is made by the first run")]
        if path and (trouble := complaint(path)):
            return [error(subject, *trouble)]
        if path and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            return [error(subject, f"{path} cannot be written", "change the owner of file and folder")]
        require_answer(uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient

        experiment = MlflowClient(uri).get_experiment_by_name(EXPERIMENT)
        if experiment and experiment.lifecycle_stage != "active":
            raise deleted_experiment(str(experiment.experiment_id))
    except Exception as why:  # what MLflow, its database and the network raise
        message, _, advice = str(explained(why)).partition(": ")
        return [error(subject, message, advice)]
    shown = path or without_credentials(uri.partition("?")[0])
    state = "is active" if experiment else "is made by the first run"
    return [ok(subject, f"{shown}: its experiment {EXPERIMENT} {state}")]


def repository(params: Params) -> list[Finding]:
    """Check git and DVC, and for stages of another pool, which go through their remotes, these."""
    if git.ask("rev-parse", "--git-dir") is None:
        return [error("git", "this is no git repository", "clone the project; DVC and runs need git")]
    findings = [error("DVC", problem.message, problem.advice) for problem in problems()]
    config = read_config()
    remote = None if isinstance(config, Problem) else config["core"].get("remote")
    if remote and not isinstance(config, Problem) and remote not in config["remote"]:
        advice = "`dvc remote add --default NAME URL`, or `dvc config core.remote NAME` of one that there is"
        text = f"core.remote names {remote!r}, and there is no such remote"
        findings.append(error("DVC", text, advice))
    if params.workers.pool == "gpu":
        several = "several machines share stages through git's `origin` and DVC's default remote"
        if remote is None:
            findings.append(warning("DVC", "no default remote", f"dvc remote add --default ...: {several}"))
        if git.ask("remote", "get-url", "origin") is None:
            findings.append(warning("git", "no remote origin", f"git remote add origin ...: {several}"))
    return findings or [ok("git and DVC", f"usable; DVC's default remote: {remote}")]
