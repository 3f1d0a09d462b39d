"""Shards are encoded and written: on every GPU, one process each, or in this process on the CPU."""

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.encoders import Encoder, Tell

WAIT = 0.2  # seconds between two looks at the workers


@dataclass(frozen=True)
class Job:
    """A shard to write: `first` is the place of its first passage in the corpus."""

    path: Path
    first: int
    passages: list[Passage]


def visible_devices() -> list[str]:
    """Every GPU that this process sees (CUDA_VISIBLE_DEVICES chooses), or the CPU."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def write_shard(path: Path, passages: list[Passage], vectors: pa.Array) -> None:
    """The shard appears complete or not at all."""
    table = pa.table(
        {
            "id": [passage.id for passage in passages],
            "title": [passage.title for passage in passages],
            "text": [passage.text for passage in passages],
            "vector": vectors,
        }
    )
    temporary = path.with_suffix(".part")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def encode_shards(
    jobs: Iterator[Job], make: Callable[[str], Encoder], devices: list[str], tell: Tell
) -> None:
    """Write the shards of `jobs`, with an encoder made by `make(device)` for each of `devices`.

    What a shard holds does not depend on the number of devices. With several, `make` is pickled for their
    processes, and at most two jobs a device are in memory. Raises InfrastructureError when a process ends
    before its work.
    """
    if len(devices) == 1:
        encoder = make(devices[0])
        for job in jobs:
            _encode(job, encoder, tell)
        return
    context = multiprocessing.get_context("spawn")
    todo, told = context.Queue(maxsize=len(devices)), context.Queue()
    workers = {
        device: context.Process(target=_work, args=(make, device, todo, told), daemon=True)
        for device in devices
    }
    try:
        for worker in workers.values():
            worker.start()
        for task in chain(jobs, repeat(None, len(devices))):
            _hand_over(task, todo, lambda: _listen(workers, told, tell))
        for worker in workers.values():
            while worker.is_alive():
                worker.join(WAIT)
                _listen(workers, told, tell)
        _listen(workers, told, tell)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()


def _encode(job: Job, encoder: Encoder, tell: Tell) -> None:
    column = encoder.passage_column([passage.contents for passage in job.passages], tell)
    write_shard(job.path, job.passages, column)


def _hand_over(job: Job | None, todo: Any, listen: Callable[[], None]) -> None:
    while True:
        listen()
        try:
            todo.put(job, timeout=WAIT)
            return
        except queue.Full:
            continue


def _listen(workers: dict[str, Any], told: Any, tell: Tell) -> None:
    """Pass on what the workers tell; raise what went wrong in them."""
    while True:
        try:
            news = told.get_nowait()
        except queue.Empty:
            break
        if isinstance(news, UserError):
            raise news
        if isinstance(news, Exception):
            raise InfrastructureError(f"encoding failed: {news}") from news
        tell(news)
    for device, worker in workers.items():
        if worker.exitcode:
            raise InfrastructureError(f"the process that encodes on {device} ended with {worker.exitcode}")


def _work(make: Callable[[str], Encoder], device: str, todo: Any, told: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        encoder = make(device)
        while (job := todo.get()) is not None:
            _encode(job, encoder, told.put)
    except Exception as error:
        told.put(error)


def _end_with_parent() -> None:
    """A parent that was killed ends nobody; without it, this process would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
