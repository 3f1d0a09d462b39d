"""vLLM in this process (its workers are processes of their own): the one file that imports vllm, and lazily.

What matters to the method: token ids in and out, log-probabilities at the sampling temperature, prefix
caching (a turn computes only what is new since the last one), and weights whose version every answer carries.
How requests are asked and answers are read is the same for vLLM's servers (`vllm_server.py`).
"""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from dgpo_core.agent.engine import Finished, FinishReason, Generation, Request, StopCriteria, Weights, eos_ids
from dgpo_core.agent.loop import stable_seed
from dgpo_core.config.agent import RolloutConfig, Sampling
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.hub import hub_model
from dgpo_core.temporary import temporary_folder

UNTOUCHED = "default"  # vLLM's name of the weights it was started with
INSTALL = "needs vLLM in this environment: see docs/vllm.md"
# Log-probabilities at the sampling temperature, as the loop records them; vLLM's default is raw ones.
LOGPROBS_MODE = "processed_logprobs"
NEVER = -1e9  # added to a logit: no probability, whatever the logit is
_NUMBERS = itertools.count()  # of requests: their names must be new ones in an engine
SMI_TIMEOUT = 30.0  # seconds that nvidia-smi may take


class VllmEngine:
    """Runs the model of a folder or hub name with vLLM on this machine's GPUs (or its CPU)."""

    def __init__(self, source: str, tokenizer: Any, config: RolloutConfig, max_context: int) -> None:
        """Start vLLM; `max_context`: tokens of the longest prompt with what is generated after it.

        Raises UserError when vLLM is not installed, refuses the settings, or the GPU's memory is taken, and
        InfrastructureError when it does not start.
        """
        self._config = config
        self.stop_criteria = load_stop_criteria(source, tokenizer)
        self._version, self._refreshes = UNTOUCHED, 0
        self._asleep = False
        self._sender: Transfer | None = None
        self._llm = self._start(source, max_context)

    def _start(self, source: str, max_context: int) -> Any:
        config = self._config
        require_free_memory(config.vllm.gpu_memory_utilization, config.vllm.tensor_parallel)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        options: dict[str, Any] = {}
        if config.refresh == "transfer":
            # handles of GPU memory are sent to our own workers as pickled objects
            os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
            options["weight_transfer_config"] = {"backend": "ipc"}
        if not torch.cuda.is_available():
            # a prompt in pieces draws and takes back a random number, which CPU generators cannot
            options["enable_chunked_prefill"] = False
        name, revision = hub_model(source)
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"rollout.engine: vllm {INSTALL} ({error})") from error
        try:
            return LLM(
                model=name,
                revision=revision,
                tokenizer_revision=revision,
                dtype=config.precision,
                max_model_len=max_context,
                tensor_parallel_size=config.vllm.tensor_parallel,
                gpu_memory_utilization=config.vllm.gpu_memory_utilization,
                enforce_eager=config.vllm.eager,
                enable_sleep_mode=config.vllm.sleep,
                enable_prefix_caching=True,
                logprobs_mode=LOGPROBS_MODE,
                seed=0,
                **options,
            )
        except ValueError as error:
            raise UserError(f"rollout.vllm: vLLM cannot run {source} so: {error}") from error
        except (RuntimeError, OSError) as error:
            raise InfrastructureError(f"vLLM does not start with {source}: {error}") from error

    @property
    def lane(self) -> int | None:
        """Return None: vLLM wants all requests at once."""
        return None

    def session(self, stop: tuple[str, ...]) -> "VllmSession":
        """Return a session whose requests fail when vLLM does, or has other weights."""
        return VllmSession(
            self._llm.llm_engine,
            lambda request, answer: self._read(request, answer, stop),
            stop,
            self.stop_criteria,
        )

    def _read(self, request: Request, answer: Any, stop: tuple[str, ...]) -> Generation:
        require_version([span.version for span in answer.weight_versions or ()], self._version)
        ids = list(answer.token_ids)
        logprobs = [step[token].logprob for step, token in zip(answer.logprobs, ids, strict=True)]
        return read_generation(request, ids, logprobs, answer.finish_reason, self.stop_criteria, stop)

    def refresh(self, weights: Weights) -> None:
        with _failures("take new weights"):
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            if self._config.refresh == "transfer":
                self._send(weights)
            else:
                self._reload(weights)
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            self._refreshes += 1
            self._version = f"refresh-{self._refreshes}"
            self._llm.update_weight_version(self._version)
            forgotten = self._llm.reset_prefix_cache()
        if not forgotten:
            raise InfrastructureError("vLLM keeps prefixes that it has computed with old weights")

    def sleep(self) -> None:
        """Free the GPU's memory until the next refresh, where `rollout.vllm.sleep` asks for it."""
        if self._config.vllm.sleep and not self._asleep:
            with _failures("sleep"):
                self._llm.sleep(level=2)  # drops weights and cache: the next refresh brings new ones
            self._asleep = True

    def _reload(self, weights: Weights) -> None:
        with weights_in_folder(weights, self._config) as folder:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    def _send(self, weights: Weights) -> None:
        if self._sender is None:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            client, dtype = InProcessClient(self._llm), getattr(torch, self._config.precision)
            self._sender = Transfer(IPCTrainerInitInfo(rank=0), client, dtype)
        self._sender.send(weights)


class VllmSession:
    """Requests in vLLM's own continuous batch."""

    paced = False

    def __init__(
        self,
        engine: Any,
        read: Callable[[Request, Any], Generation],
        stop: tuple[str, ...],
        criteria: StopCriteria,
    ) -> None:
        self._engine, self._read, self._stop, self._criteria = engine, read, stop, criteria
        self._under_way: dict[str, Request] = {}
        self._failed: list[Finished] = []

    def add(self, requests: list[Request], sampling: Sampling) -> None:
        from vllm import SamplingParams

        for request in requests:
            params = SamplingParams(**sampling_fields(request, sampling, self._stop, self._criteria))
            name = f"dgpo-{next(_NUMBERS)}"
            try:
                with _failures("take a request"):
                    self._engine.add_request(name, {"prompt_token_ids": request.token_ids}, params)
            except InfrastructureError as error:
                self._failed.append((request, error))
            else:
                self._under_way[name] = request

    def advance(self) -> list[Finished]:
        """Let vLLM do a step. When it fails, so do all requests."""
        finished, self._failed = self._failed, []
        try:
            with _failures("generate"):
                outputs = self._engine.step() if self._under_way else []
        except InfrastructureError as error:
            finished += [(request, error) for request in self._under_way.values()]
            self._under_way = {}
            return finished
        for output in outputs:
            if output.finished and (request := self._under_way.pop(output.request_id, None)):
                try:
                    finished.append((request, self._read(request, output.outputs[0])))
                except InfrastructureError as error:
                    finished.append((request, error))
        return finished

    def close(self) -> None:
        """End what is under way."""
        if self._under_way:
            with contextlib.suppress(InfrastructureError), _failures("end requests"):
                self._engine.abort_request(list(self._under_way))


@contextlib.contextmanager
def _failures(doing: str) -> Iterator[None]:
    """Turn what goes wrong inside vLLM into an InfrastructureError: neither a right nor a wrong answer."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError, RuntimeError, OSError) as error:
        raise InfrastructureError(f"vLLM cannot {doing}: {error or type(error).__name__}") from error


def load_stop_criteria(source: str, tokenizer: Any) -> StopCriteria:
    """Return the criteria for generations of the model in a folder or on the hub."""
    name, revision = hub_model(source)
    config = AutoConfig.from_pretrained(name, revision=revision)
    try:
        settings = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # a model without generation_config.json
        settings = GenerationConfig.from_model_config(config)
    return StopCriteria(tokenizer, eos_ids(tokenizer, settings), config.get_text_config().vocab_size)


def sampling_fields(
    request: Request, sampling: Sampling, stop: tuple[str, ...], criteria: StopCriteria
) -> dict[str, Any]:
    """Return the fields of vLLM's SamplingParams; none is left to defaults that a model's folder may set.

    A request has its own random numbers. So it samples the same whatever shares its batch, but for rounding:
    other batches may add up in another order, which changes a token where two are about equally likely.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "seed": stable_seed(*request.seed),
        "max_tokens": request.max_new_tokens,
        "stop": list(stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": sorted(criteria.eos),
        # vLLM takes at most 1,024 ids here, and no more as allowed ones
        "logit_bias": dict.fromkeys(criteria.unknown, NEVER) or None,
        "skip_special_tokens": False,  # a tag may be a special token
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # of the sampled token only
    }


def read_generation(
    request: Request,
    ids: list[int],
    logprobs: list[float],
    reason: str | None,
    criteria: StopCriteria,
    stop: tuple[str, ...],
) -> Generation:
    """Return the sampled tokens up to the one that ended the generation.

    vLLM looks for stop strings in text that it decodes as tokens arrive, and holds back a character of which
    bytes are missing: tokens behind a stop string are cut off here.

    Raises InfrastructureError for a broken answer.
    """
    if reason not in ("stop", "length") or not ids or len(ids) != len(logprobs):
        raise InfrastructureError(
            f"vLLM ended a request with {reason!r}: {len(ids)} tokens, {len(logprobs)} log-probabilities"
        )
    count, finish = criteria.first_finish(ids, request.max_new_tokens, stop)
    if finish is None:
        finish = FinishReason.LENGTH if reason == "length" else FinishReason.STOP
    return Generation(ids[:count], logprobs[:count], finish)


def require_version(found: Sequence[str], expected: str) -> None:
    """Raise InfrastructureError when tokens were sampled with other weights than the last refresh's."""
    if strange := sorted(set(found) - {expected}):
        raise InfrastructureError(
            f"vLLM sampled with weights {', '.join(strange)} instead of {expected}: it was started again, or "
            "another stage uses it"
        )


@contextlib.contextmanager
def weights_in_folder(weights: Weights, config: RolloutConfig) -> Iterator[str]:
    """Write weights in `rollout.precision` to a folder below `weights_folder`; yield its absolute path."""
    home = Path(config.weights_folder).resolve()
    home.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.precision)
    with temporary_folder("weights", home) as folder:
        folder.chmod(0o755)  # a server may run as another user
        # copies: a tied head and its embedding share memory, which the format does not have
        tensors = {
            name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in weights()
        }
        save_file(tensors, folder / "model.safetensors")
        yield str(folder)


class InProcessClient:
    """The interface that vLLM's weight transfer expects of an engine, for the one of this process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


class Transfer:
    """The trainer's end of vLLM's weight transfer; weights are sent in `dtype`."""

    def __init__(self, init_info: Any, client: Any, dtype: torch.dtype) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        transfer = self

        class Source(WeightSource):  # type: ignore[misc]
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, dtype, tuple(tensor.shape)) for name, tensor in transfer._weights()]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return ((name, tensor.detach().to(dtype)) for name, tensor in transfer._weights())

        self._weights: Weights = dict[str, torch.Tensor]().items
        self._sender = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=Source())

    def send(self, weights: Weights) -> None:
        """Send weights to all workers, and return when they have loaded them."""
        self._weights = weights
        self._sender.send_weights()


def server_transfer(url: str, world_size: int, dtype: torch.dtype) -> Transfer:
    """Return a transfer to a server's `world_size` workers, over NCCL. Raises UserError without vLLM here."""
    try:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise UserError(f"rollout.refresh: transfer {INSTALL}; or set it to file ({error})") from error
    address, port = _own_address(url)
    info = NCCLTrainerInitInfo(address, port, world_size + 1, rank=0)
    return Transfer(info, HTTPVLLMWeightSyncClient(url), dtype)


def _own_address(url: str) -> tuple[str, int]:
    """Return our address as the server sees it, and a free port of ours."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=30) as connection:
        address: str = connection.getsockname()[0]
    with socket.create_server((address, 0)) as listening:
        return address, listening.getsockname()[1]


@dataclass(frozen=True)
class Gpu:
    """One GPU's total and free memory, in MiB."""

    index: str
    uuid: str
    total: float
    free: float


def require_free_memory(share: float, gpus: int) -> None:
    """Raise UserError when one of the first `gpus` visible GPUs has less than `share` of its memory free.

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
    """Return GPUs in the order of CUDA_VISIBLE_DEVICES, which has indices or the beginnings of UUIDs."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    return [gpu for name in names for gpu in gpus if name == gpu.index or gpu.uuid.startswith(name)]


def _holders(gpu: Gpu) -> str:
    rows, _ = nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    found = [f"{_process_name(int(pid))} ({used} MiB)" for uuid, pid, used in rows if uuid == gpu.uuid]
    return ", ".join(found) or "processes that nvidia-smi does not show here (outside this container?)"


def _process_name(pid: int) -> str:
    if pid == os.getpid():
        return f"this stage, process {pid}"
    try:
        return f"process {pid}: {' '.join(psutil.Process(pid).cmdline())[:80]}"
    except psutil.Error:
        return f"process {pid}"


def nvidia_smi(query: str) -> tuple[list[list[str]], str]:
    """Return the rows of nvidia-smi's answer, and why there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "nvidia-smi is not installed"
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as why:
        return [], f"nvidia-smi: {why}"
    if done.returncode:
        return [], (done.stdout + done.stderr).strip().split("\n")[0] or "nvidia-smi fails"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return [[field.strip() for field in line.split(",")] for line in lines], ""
