"""Peak memory of log-probabilities and KL over a real vocabulary: `python -m benchmarks.logprobs_memory`.

Forward and backward of `distillation_losses` at the shapes of Qwen2.5 (student 896 wide, teacher 2,048 wide,
151,936 words, bfloat16, or float32 with `--float32`): in chunks with recomputation, and with
[tokens x vocabulary] held as a whole. Every measurement is a process of its own. A batch of 64 episodes of
2,048 trained tokens is 131,072 tokens; other numbers of tokens can be given as arguments.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from dgpo_core.objectives.logprobs import CHUNK, distillation_losses

STUDENT, TEACHER, VOCABULARY = 896, 2048, 151_936
TOKENS = (1024, 2048, 4096, 16_384, 131_072)
WHOLE_UP_TO = 2048  # beyond this the whole does not fit into an ordinary machine


def measure(tokens: int, chunk: int, dtype: torch.dtype) -> dict[str, float]:
    """Measure a forward and backward pass: GiB above what weights and hidden states take, and seconds."""
    torch.manual_seed(0)
    head = torch.randn(VOCABULARY, STUDENT, dtype=dtype).mul_(0.02).requires_grad_()
    teacher_head = torch.randn(VOCABULARY, TEACHER, dtype=dtype).mul_(0.02)
    hidden = torch.randn(tokens, STUDENT, dtype=dtype).requires_grad_()
    teacher_hidden = torch.randn(tokens, TEACHER, dtype=dtype)
    targets = torch.randint(VOCABULARY, (tokens,))
    before, start = _peak(), time.perf_counter()
    cross_entropy, kl = distillation_losses(hidden, head, teacher_hidden, teacher_head, targets, chunk=chunk)
    (cross_entropy + kl).mean().backward()
    return {"gib": _peak() - before, "seconds": time.perf_counter() - start}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(sizes: list[int], options: list[str]) -> None:
    print("| tokens | in chunks: GiB | s | as a whole: GiB | s |\n|---|---|---|---|---|")
    for tokens in sizes:
        cells = []
        for chunk in (CHUNK, tokens):
            if chunk == tokens and tokens > WHOLE_UP_TO:
                cells.append("— | —")
                continue
            program = [sys.executable, "-m", "benchmarks.logprobs_memory", *options]
            command = [*program, "--chunk", str(chunk), str(tokens)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells.append(f"{result['gib']:.1f} | {result['seconds']:.0f}")
        print(f"| {tokens:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--float32", action="store_true", help="for processors that are slow in bfloat16")
    parser.add_argument("--chunk", type=int, help="one measurement only, in chunks of so many tokens")
    given = parser.parse_args()
    if given.chunk:
        precision = torch.float32 if given.float32 else torch.bfloat16
        print(json.dumps(measure(given.tokens[0], given.chunk, precision)))
    else:
        main(given.tokens, ["--float32"] * given.float32)
