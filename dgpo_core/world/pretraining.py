"""Build one of the embedded base models: its tokenizer, and its training, phase by phase, with Muon.

Every model is taught to read, then the protocol, from expert episodes: a student a little, a teacher well.
"""

import math
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen2Tokenizer

from dgpo_core.agent import prompts
from dgpo_core.config.agent import ProtocolConfig
from dgpo_core.config.data import BaseModelsConfig, PhaseConfig
from dgpo_core.models import build_model, save_model
from dgpo_core.training import optimizer as optim
from dgpo_core.training.checkpoint import Checkpoint, require_finite, training_step
from dgpo_core.world.facts import (
    COMPARISONS,
    DISTRACTORS,
    GENRES,
    INDUSTRIES,
    OCCUPATIONS,
    PRONOUNS,
    RELATIONS,
    SUFFIXES,
    SYLLABLES,
    TYPES,
)
from dgpo_core.world.lessons import SORTED_STEPS, Example, ReadingDrill, expert_examples

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of https://github.com/KellerJordan/muon, as in torch.optim.Muon
ITERATIONS, EPSILON = 5, 1e-7
CHECKPOINT_EVERY = 100  # steps
# Examples in one pass: the attention of more fills the processor's caches, and is up to three times slower.
AT_A_TIME = {"reading": 16, "protocol": 4}

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACE, NEWLINE = "Ġ", "Ċ"  # how byte-level BPE writes a space and a line break
EXTRA_WORDS = "I need is than earlier"  # of the expert's thoughts and the reading drill
LINE_STARTS = ("Doc", "(Title", "Answer", "My", "user", "assistant")  # written without a space before
PUNCTUATION = ((".", NEWLINE), ("?", NEWLINE), (NEWLINE, NEWLINE), (SPACE, "("), (")", ")"))

Report = Callable[[str, int, dict[str, float]], None]  # phase, its step, metrics


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the embedded models' tokenizer: Qwen2's, with a small vocabulary made by hand instead of trained.

    It is byte-level BPE with Qwen2's own splitting, so that `AutoTokenizer` loads it as what it is. The
    merges make syllables of names first, and then chain the pieces of each word that the encyclopedia's texts
    use, from the left. No chain can begin inside a name, so a name always has the same tokens wherever it
    stands after a space.
    """
    merges: dict[tuple[str, str], None] = {}  # ordered: earlier merges are applied first
    for syllable in SYLLABLES:
        merges[syllable[0], syllable[1]] = None
        merges[syllable[0].upper(), syllable[1]] = None
        merges[SPACE, syllable.capitalize()] = None
    for word in sorted(set(re.findall(r"[A-Za-z]+", _static_text()))):
        _chain(SPACE + word, merges)
    merges.update(dict.fromkeys(PUNCTUATION))
    for word in (*LINE_STARTS, *TYPES):  # last: some could begin inside other words
        _chain(word, merges)
    vocabulary = [*sorted(ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=list(merges),  # type: ignore[arg-type]
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
    )
    tokenizer.add_tokens([AddedToken(TURN_START, special=True)])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in prompts.TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _chain(word: str, merges: dict[tuple[str, str], None]) -> None:
    """Add the merges that join `word`'s pieces from left to right into one token."""
    pieces = _syllabify(word)
    left = pieces[0]
    for piece in pieces[1:]:
        merges.setdefault((left, piece))
        left += piece


def _syllabify(word: str) -> list[str]:
    """Split a word as the merges for names leave it: into syllables, and other characters one by one."""
    syllables = {*SYLLABLES, *(syllable.capitalize() for syllable in SYLLABLES)}
    starts = {SPACE + syllable.capitalize() for syllable in SYLLABLES}
    pieces, position = [], 0
    while position < len(word):
        size = 3 if word[position : position + 3] in starts else 2
        if size == 2 and word[position : position + 2] not in syllables:
            size = 1
        pieces.append(word[position : position + size])
        position += size
    return pieces


def _static_text() -> str:
    """Return every word that templates and prompts put into a text, in the case in which they do."""
    parts: list[str] = [EXTRA_WORDS, prompts.SHORT_INSTRUCTION, prompts.INVALID_ACTION]
    parts += [*OCCUPATIONS, *INDUSTRIES, *GENRES, *PRONOUNS.values(), *TYPES, "It The the"]
    for relation in RELATIONS:
        parts += [relation.noun, *relation.statements, *relation.questions, *relation.other_questions]
    parts += [template for templates in DISTRACTORS.values() for template, _ in templates]
    parts += [text for texts in (*COMPARISONS.values(), *SUFFIXES.values()) for text in texts]
    return re.sub(r"\{\w*\}|<[^>]*>", " ", " ".join(parts))


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, Nesterov momentum and a `dtype`.

    torch's always orthogonalises in bfloat16, which takes longer than the model itself on processors without
    instructions for it. With `dtype=torch.bfloat16` both give the same weights.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closures here
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, group)

    def _update(self, matrix: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        gradient = matrix.grad
        assert gradient is not None
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalised(gradient.lerp(mean, group["momentum"]), self._dtype)
        rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))  # an update as large as AdamW's
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-rate)


def orthogonalised(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return nearly U V^T of the singular value decomposition, in `dtype`: [m, n], singular values about 1.

    Newton-Schulz iterations with coefficients for speed: the values end between 0.5 and 1.5 (Jordan, 2024).
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=EPSILON))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def train_on_examples(
    model: PreTrainedModel,
    config: PhaseConfig,
    batch: Callable[[int], list[Example]],
    checkpoint: Checkpoint,
    report: Callable[[int, dict[str, float]], None],
    rows: int,
    precision: str,
) -> None:
    """Train `model` in place for `config.steps` steps; `batch(step)` gives the examples of a step.

    `rows` examples at a time go through the model: the same gradient as all at once, in less memory.
    Compute is in `precision`, "float32" or "bfloat16"; the weights are float32. When it continues from a
    checkpoint, the last finished step is reported again. Raises NotFinite at the first step whose loss or
    gradient is no number.
    """
    stepper = optim.Stepper(
        *_optimizers(model, config, precision),
        schedule=optim.trapezoid(config.steps, config.warmup_steps),
        max_grad_norm=1.0,
    )
    first = 0
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        stepper.load_state_dict(state["stepper"])
        first = state["step"]
        report(first, state["metrics"])
    model.train()
    for step in range(first, config.steps):
        with training_step(step + 1, lambda _: "learning_rate or matrix_learning_rate of this phase"):
            metrics = {"loss": _backward(model, batch(step), rows, precision), "grad_norm": stepper.step()}
            require_finite(metrics)
        report(step + 1, metrics)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.steps:
            checkpoint.save(
                {
                    "model": model.state_dict(),
                    "stepper": stepper.state_dict(),
                    "step": step + 1,
                    "metrics": metrics,
                }
            )
    model.eval()


def _optimizers(model: PreTrainedModel, config: PhaseConfig, precision: str) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the layers, and AdamW for the embeddings and vectors.

    With AdamW alone, copying a value out of a passage takes several times as many steps to learn.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        Muon(
            matrices,
            config.matrix_learning_rate,
            weight_decay=0.01,
            dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.0),
    ]


def _backward(model: PreTrainedModel, examples: list[Example], rows: int, precision: str) -> float:
    """Add the gradient of the weighted loss of all `examples`, and return that loss."""
    total, loss = _weight(examples), 0.0
    for part in (examples[i : i + rows] for i in range(0, len(examples), rows)):
        share = weighted_loss(model, part, precision) * (_weight(part) / total)
        share.backward()
        loss += share.item()
    return loss


def _weight(examples: list[Example]) -> float:
    """Return the examples' weight in the loss, without their first tokens: nothing predicts those."""
    return sum(sum(example.weights[1:]) for example in examples)


def weighted_loss(model: PreTrainedModel, examples: list[Example], precision: str) -> torch.Tensor:
    """Compute the cross-entropy of each next token, averaged with the examples' weights; scalar, nats."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
    device = model.device
    ids, weights = ids.to(device), weights.to(device)[:, 1:]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        counted = weights > 0
        logits = model.get_output_embeddings()(hidden[counted])
    losses = cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


class BaseModelBuilder:
    """Builds models from a seed; phases keep their progress under `state`, so a killed build continues."""

    def __init__(
        self,
        config: BaseModelsConfig,
        protocol: ProtocolConfig,
        top_k: int,
        state: Path,
        report: Report,
    ) -> None:
        self._config, self._world, self._protocol, self._top_k = config, config.world, protocol, top_k
        self._state, self._report = state, report
        self._tokenizer = build_tokenizer()
        self._worlds = range(config.first_world_seed, config.first_world_seed + config.worlds)

    def build(self, name: str, folder: Path) -> None:
        """Write model `name` of the configuration to `folder`.

        With one thread, so that the number of the machine's cores does not show in the weights; models so
        small gain more from being built side by side.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            plan = self._config.models[name]
            torch.manual_seed(self._config.seed)
            model = build_model(plan.shape, self._tokenizer)
            model.set_attn_implementation("eager")  # for short texts on a CPU its backward is twice as fast
            drill = ReadingDrill(self._world, self._worlds, self._tokenizer)
            for number, phase in enumerate(plan.phases):
                # the draws of a phase are those of the nth phase of its kind
                seed = self._config.seed + [p.kind for p in plan.phases[:number]].count(phase.kind)
                reads, label = phase.kind == "reading", f"{number}-{phase.kind}"
                batch = self._reading(drill, phase, seed) if reads else self._protocol_batches(phase, seed)
                checkpoint, report = Checkpoint(self._state / label), partial(self._report, label)
                rows = phase.micro_batch_size or AT_A_TIME[phase.kind]
                train_on_examples(model, phase, batch, checkpoint, report, rows, plan.precision)
            save_model(model, self._tokenizer, folder)
        finally:
            torch.set_num_threads(threads)

    def _reading(self, drill: ReadingDrill, phase: PhaseConfig, seed: int) -> Callable[[int], list[Example]]:
        return lambda step: drill.batch(seed, step, phase.batch_size, phase.passages(step))

    def _protocol_batches(self, phase: PhaseConfig, seed: int) -> Callable[[int], list[Example]]:
        examples = self._experts(phase.expansions)
        lengths = [len(example.ids) for example in examples]
        batches = _batches_by_length(lengths, phase.steps, phase.batch_size, seed)
        return lambda step: [examples[i] for i in batches[step]]

    def _experts(self, expansions: float) -> list[Example]:
        each = self._config.expert_episodes // self._config.worlds
        return [
            example
            for seed in self._worlds
            for example in expert_examples(
                self._config.expert_world or self._world,
                seed,
                each,
                self._tokenizer,
                self._protocol,
                self._top_k,
                expansions,
            )
        ]


def _batches_by_length(lengths: list[int], steps: int, size: int, seed: int) -> list[list[int]]:
    """Return the indices of each step's examples: shuffled epochs, of which SORTED_STEPS steps share a draw.

    As in the reading drill, a draw is cut by length, so that little of a batch is padding.
    """
    rng = random.Random(f"base-models-{seed}")
    order: list[int] = []
    while len(order) < (steps + SORTED_STEPS) * size:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        order += epoch
    batches = []
    for start in range(0, steps * size, SORTED_STEPS * size):
        group = sorted(order[start : start + SORTED_STEPS * size], key=lambda i: lengths[i])
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches[:steps]
