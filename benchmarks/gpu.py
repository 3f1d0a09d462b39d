"""What a GPU makes of a DGPO step, in at most 8 minutes: `python -m benchmarks.gpu --out FOLDER`.

A student of 0.5B with its critic, a teacher of 3B, random weights and 512 episodes (benchmarks/dgpo_step.py):
the split of a step, rollouts, and what else its parts could be made of: attention kernels, losses, compiled
passes, precisions of the teacher. Every part is a process with a time limit of its own, so that one that
fails or hangs loses nothing of the others; after each, `gpu.json` and `gpu.md` are written anew. `--smoke`
runs all of it on a processor, with tiny shapes.

Needs torch, transformers, numpy and pyarrow, and 11 MB more, which a machine without a network gets in a
folder on its PYTHONPATH: `pip install --target FOLDER --python-version 3.12 --only-binary=:all: pydantic
jaxtyping ruamel.yaml`. What is optional (Liger, flash-attn) is left out where it is missing, and the table
says so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from transformers import PreTrainedModel

from benchmarks.dgpo_step import Settings, make_episodes, random_model, roll_out, run, shape_of
from dgpo_core.config.training import ComputeConfig
from dgpo_core.errors import first_line
from dgpo_core.objectives.logprobs import token_logprobs
from dgpo_core.planning.shapes import Architecture
from dgpo_core.planning.workload import DEVICES, GIB
from dgpo_core.training.batches import TokenBatch, TokenModel, collate, model_sequence, policy_function
from dgpo_core.training.engines import FrozenModel
from dgpo_core.training.parallel import autocast

SMOKE = Settings(
    episodes=6, mini_batch=3, micro_batch_tokens=256, steps=1, device="cpu", shrink=16, scale=0.05
)
REPETITIONS = 3


@dataclass(frozen=True)
class Row:
    """One measurement. `tokens` and `flops` (model FLOPs) are those of `seconds`; `left_out` says why not."""

    what: str
    seconds: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    memory: float | None = None  # bytes at the peak, of tensors
    left_out: str = ""


def timed(what: str, function: Callable[[], object], tokens: float, flops: float = 0.0) -> Row:
    """Run once to warm up, and take the median of a few runs. What cannot run here is left out."""
    cuda = torch.cuda.is_available()
    seconds = []
    try:
        function()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(REPETITIONS):
            started = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    except (RuntimeError, ImportError, ValueError, AttributeError) as error:
        return Row(what, left_out=first_line(error) or type(error).__name__)
    memory = float(torch.cuda.max_memory_allocated()) if cuda else None
    return Row(what, statistics.median(seconds), tokens, flops, memory)


# --- parts


def step(settings: Settings) -> list[Row]:
    """Split a whole step, without its rollouts."""
    found = run(settings)
    tokens, flops, peak = found["tokens"], found["model_flops"], found["peak_memory_gib"]
    rows = [
        Row(part, seconds, tokens * (found["gated"] if part == "teacher" else 1), flops[part])
        for part, seconds in found["seconds"].items()
        if part in flops
    ]
    whole = next(row for row in rows if row.what == "step")
    name = f"step, passes of {found['micro_batch_tokens']} tokens"
    return [row for row in rows if row is not whole] + [replace(whole, what=name, memory=peak and peak * GIB)]


def rollout(settings: Settings) -> list[Row]:
    """Generate all turns of all episodes with the default engine, without searches."""
    student = random_model(settings.student, settings)
    episodes = make_episodes(settings, student.config.vocab_size)
    found = roll_out(settings, student, episodes)
    written = found["seconds"] * found["written_tokens_per_second"]
    return [Row("rollouts, tokens written", found["seconds"], written)]


def teacher(settings: Settings) -> list[Row]:
    """Compare the frozen model as it is held (float32 under autocast) with one held in bfloat16."""
    model = random_model(settings.teacher, settings)
    shape = Architecture.from_config(shape_of(settings.teacher, settings))
    rows = []
    for precision in ("float32", "bfloat16"):
        torch.nn.Module.to(model, getattr(torch, precision))
        frozen = FrozenModel(model, _compute(settings))
        for tokens in (settings.micro_batch_tokens, 4 * settings.micro_batch_tokens):
            batch, lengths = _batch(settings, model, tokens)
            run_it = partial(frozen, batch, policy_function(batch))
            name = f"teacher, weights in {precision}, passes of {tokens} tokens"
            rows.append(timed(name, run_it, sum(lengths), _forward(shape, batch, lengths)))
    return rows


def attention(settings: Settings) -> list[Row]:
    """Compare the kernels of the student's forward and backward pass."""
    model = random_model(settings.student, settings)
    gradient, tokens, flops = _gradient(settings, model)

    def with_kernel(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            gradient()

    def with_package() -> None:
        model.set_attn_implementation("flash_attention_2")
        gradient()

    rows = [timed("attention: as torch chooses", gradient, tokens, flops)]
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, name)
        rows.append(timed(f"attention: SDPA, {name}", partial(with_kernel, backend), tokens, flops))
    rows.append(timed("attention: package flash-attn", with_package, tokens, flops))
    return rows


def loss(settings: Settings) -> list[Row]:
    """Compare losses of counted tokens with their backward pass: ours in chunks, whole, compiled; Liger's."""
    shape = Architecture.from_config(shape_of(settings.student, settings))
    count, device = settings.micro_batch_tokens // 4, settings.device
    torch.manual_seed(0)
    hidden = torch.randn(count, shape.hidden, device=device, requires_grad=True)
    head = torch.randn(shape.vocabulary, shape.hidden, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(shape.vocabulary, (count,), device=device)

    def ours(chunk: int) -> None:
        with autocast(_compute(settings)):
            logprobs, entropy = token_logprobs(hidden, head, targets, chunk=chunk)
        (-logprobs.mean() - 0.001 * entropy.mean()).backward()

    def whole() -> None:
        with autocast(_compute(settings)):
            logprobs = linear(hidden, head).float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        (-logprobs.gather(-1, targets[:, None]).mean() - 0.001 * entropy.mean()).backward()

    def liger() -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        with autocast(_compute(settings)):
            LigerFusedLinearCrossEntropyLoss()(head, hidden, targets).backward()

    flops = 6.0 * count * shape.embedding
    rows = [timed(f"loss: ours, chunks of {n}", partial(ours, n), count, flops) for n in (1024, 4096)]
    rows.append(timed("loss: all logits at a time", whole, count, flops))
    rows.append(timed("loss: the same, compiled", _compiled(settings, whole), count, flops))
    rows.append(timed("loss: Liger's cross-entropy, no entropy", liger, count, flops))
    return rows


def compiled(settings: Settings) -> list[Row]:
    """Compare the student's forward and backward pass with its compiled backbone."""
    model = random_model(settings.student, settings)
    gradient, tokens, flops = _gradient(settings, model)
    rows = [timed("passes: eager", gradient, tokens, flops)]
    started = time.perf_counter()
    gradient, tokens, flops = _gradient(settings, model, _compiled(settings, model.base_model))
    rows.append(timed("passes: compiled", gradient, tokens, flops))
    once = time.perf_counter() - started - REPETITIONS * rows[-1].seconds
    return [*rows, replace(rows[-1], what="passes: compiling", seconds=once, tokens=0, flops=0)]


PARTS: dict[str, tuple[Callable[[Settings], list[Row]], float]] = {  # with seconds that it may take
    "step": (step, 150),
    "rollout": (rollout, 100),
    "teacher": (teacher, 50),
    "attention": (attention, 50),
    "loss": (loss, 40),
    "compiled": (compiled, 80),
}


def _compute(settings: Settings) -> ComputeConfig:
    keys = ("device", "precision", "micro_batch_tokens")
    return ComputeConfig.model_validate({key: getattr(settings, key) for key in keys})


def _batch(settings: Settings, model: PreTrainedModel, tokens: int) -> tuple[TokenBatch, list[int]]:
    """Return a micro-batch of at most so many padded tokens, and its episodes' lengths."""
    episodes = sorted(make_episodes(settings, model.config.vocab_size), key=lambda e: len(e.token_ids))
    middle = episodes[len(episodes) // 2 :]
    count = max(1, tokens // len(middle[0].token_ids))
    while count > 1 and count * len(middle[min(count, len(middle)) - 1].token_ids) > tokens:
        count -= 1
    chosen = [model_sequence(episode) for episode in middle[:count]]
    return collate(chosen, torch.device(settings.device)), [len(sequence.ids) for sequence in chosen]


def _forward(shape: Architecture, batch: TokenBatch, lengths: list[int]) -> float:
    return shape.flops(sum(lengths), sum(n**2 for n in lengths) / 2, len(batch.targets))


def _gradient(
    settings: Settings, model: PreTrainedModel, backbone: Any = None
) -> tuple[Callable[[], None], float, float]:
    """Return the policy's forward and backward pass over a micro-batch, its tokens and model FLOPs."""
    batch, lengths = _batch(settings, model, settings.micro_batch_tokens)
    policy = TokenModel(model)
    if backbone is not None:
        policy.backbone = backbone
    shape = Architecture.from_config(shape_of(settings.student, settings))

    def gradient() -> None:
        with autocast(_compute(settings)):
            logprobs, entropy = policy(batch, policy_function(batch))
        (-logprobs.mean() - 0.001 * entropy.mean()).backward()
        policy.zero_grad(set_to_none=True)

    return gradient, sum(lengths), 3 * _forward(shape, batch, lengths)


def _compiled(settings: Settings, function: Any) -> Any:
    """Compile; in a smoke test without making code."""
    backend = "inductor" if settings.device.startswith("cuda") else "eager"
    return torch.compile(function, backend=backend, dynamic=True)


# --- all parts, each in a process


def run_part(command: list[str], limit: float) -> list[Row]:
    """Return the rows that a command prints as JSON on its last line, or one that says what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return [Row("all of it", left_out=f"not done in {limit:g} s")]
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return [Row("all of it", left_out=lines[-1] if lines else f"exit code {done.returncode}")]
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def peak_flops(device: str) -> float | None:
    """Return a GPU's dense bfloat16 FLOPs a second by its data sheet, None where it is not known."""
    names = sorted(DEVICES, key=len, reverse=True)
    fitting = (name for name in names if all(word in device.lower() for word in name.split("-")))
    return next((DEVICES[name].flops for name in fitting), None)


def report(results: dict[str, list[Row]], device: str) -> str:
    """Return all rows as a Markdown table, with what the teacher adds to a step."""
    peak = peak_flops(device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"{device}, {versions}; utilisation is of model FLOPs, bfloat16's peak.", ""]
    lines += ["| part | seconds | tokens a second | TFLOPs a second | utilisation | memory, GiB |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in (row for rows in results.values() for row in rows):
        if row.left_out:
            lines.append(f"| {row.what} | left out: {row.left_out} | | | | |")
            continue
        speed = row.flops / row.seconds
        cells = [
            f"{row.seconds:.3f}",
            f"{row.tokens / row.seconds:,.0f}" if row.tokens else "",
            f"{speed / 1e12:.3g}" if speed else "",
            f"{speed / peak:.1%}" if speed and peak else "",
            f"{row.memory / GIB:.1f}" if row.memory else "",
        ]
        lines.append(f"| {row.what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_teacher_cost(results), ""])


def _teacher_cost(results: dict[str, list[Row]]) -> list[str]:
    """Return a line for what the teacher adds to a step without one, rollouts included, where both ran."""
    rows = {
        row.what.split(",")[0]: row.seconds for part in ("step", "rollout") for row in results.get(part, [])
    }
    if not {"teacher", "step", "rollouts"} <= rows.keys():
        return []
    whole = rows["step"] + rows["rollouts"]
    return [
        f"The teacher adds {rows['teacher'] / (whole - rows['teacher']):.1%} to a step with its rollouts."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = SMOKE if given.smoke else Settings(micro_batch_tokens=16_384)
    if given.part:
        print(json.dumps([asdict(row) for row in PARTS[given.part][0](settings)]))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "processor"
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Row]] = {}
    for name, (_, limit) in PARTS.items():
        words = ["-m", "benchmarks.gpu", "--part", name, *["--smoke"] * given.smoke]
        results[name] = run_part([sys.executable, *words], limit)
        content = {part: [asdict(row) for row in rows] for part, rows in results.items()}
        (given.out / "gpu.json").write_text(json.dumps({"device": device} | content, indent=2))
        (given.out / "gpu.md").write_text(report(results, device))
    print(report(results, device))


if __name__ == "__main__":
    main()
