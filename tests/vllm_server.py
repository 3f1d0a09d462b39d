"""A real vLLM server on the CPU, started as docs/vllm.md says."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.conftest import free_port

STARTING = 1800  # seconds on a busy machine
OPTIONS = ["--dtype", "float32", "--max-model-len", "1024", "--logprobs-mode", "processed_logprobs"]
OPTIONS += ["--enable-scale-out", "--no-enable-chunked-prefill", "--enforce-eager"]
OPTIONS += ["--gpu-memory-utilization", "0.2"]


@contextmanager
def serving(model: str | Path, log: Path) -> Iterator[str]:
    """Start a server of `model`, which ends with the block; give its URL. What it says goes to `log`."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *OPTIONS]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + STARTING
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)
