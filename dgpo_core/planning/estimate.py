"""What each stage of a run needs on a machine: memory, disk, tokens, FLOPs and time."""

import math
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple

from dgpo_core.config.agent import slot_room
from dgpo_core.config.params import Params
from dgpo_core.config.recipes import STUDENT, TEACHER, Distillation, Reinforcement
from dgpo_core.config.retrieval import RetrievalConfig, parse_location
from dgpo_core.datasets.published import HUB
from dgpo_core.planning.shapes import (
    CACHE_WIDTH,
    LOGIT_COPIES,
    Architecture,
    Parts,
    Training,
    frozen,
    width_of,
)
from dgpo_core.planning.workload import PASSAGE_BYTES, TOKENS_A_WORD, EpisodeLengths, Machine, Workload

PROCESS = 0.7e9  # bytes of a stage's program with its libraries, and of a CUDA context
FRAGMENTATION = 1.1  # of what is allocated and freed, over what is in use
EPISODE_BYTES = 6.0  # a token in a table of episodes: id and log-probability, compressed
VLLM_ROWS = 256.0  # sequences that vLLM decodes side by side
VLLM_TOKENS = 8192.0  # tokens that it reads in one pass
# Of a Qdrant server, by benchmarks/retrieval.py at 100 words a passage: bytes of a passage's id, of its words
IDS = 22.0
TEXT, SPARSE_VECTORS, SPARSE_INDEX = 6.09, 5.24, 5.03
QUANTISED = {"none": 2.0, "int8": 1.0, "binary": 1 / 8}  # bytes a dimension of what every query touches
OFFSET = 5.0  # bytes of an int8 vector beside its numbers


@dataclass(frozen=True)
class StageCost:
    """One stage. `memory`: bytes on each GPU at the peak, part by part; `host`: bytes of all its processes;
    `disk`: bytes of its outputs, with DVC's copy, of its checkpoints, and of an index that it downloads;
    `tokens`: through a model, reading and writing; `seconds`: nan where the device's speed is unknown."""

    stage: str
    gpus: int = 0
    memory: Parts = field(default_factory=dict)
    host: float = PROCESS
    disk: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def device_memory(self) -> float:
        """Return the bytes on each GPU: the parts, what is lost between them, and the context."""
        return FRAGMENTATION * sum(self.memory.values()) + PROCESS if self.memory else 0.0


class Generation(NamedTuple):
    """Episodes from an engine: `seconds` on one device, `searching` those of retrieval, which all share."""

    tokens: float
    flops: float
    seconds: float
    memory: Parts
    searching: float


def in_process(retrieval: RetrievalConfig) -> bool:
    """Tell whether a stage's own memory holds the index."""
    return parse_location(retrieval.location).kind in ("memory", "embedded", "folder")


def servers(params: Params) -> int:
    """Count the GPUs that the student's servers hold during training."""
    return len(params.rollout.server.student) if params.rollout.engine == "vllm-server" else 0


@dataclass(frozen=True)
class Planner:
    """Estimates the stages of an experiment; `encoder` is None with BM25 or a retriever service."""

    params: Params
    student: Architecture
    teacher: Architecture
    encoder: Architecture | None
    work: Workload
    machine: Machine

    def stages(self) -> list[StageCost]:
        """Estimate all stages of `dvc repro`, in an order in which they can run."""
        params, asked = self.params, self.work.teach
        teach = StageCost("teach", disk=2 * self._episode_bytes(asked))  # of text: nothing is computed here
        if not params.taught_by_text:
            made = self._generate(self.teacher, asked, chunk=params.teach.chunk)
            teach = self._generating("teach", TEACHER, made, asked)
        distributions = params.distill.teacher == "cache" and params.models.endpoint is None
        return [
            StageCost("data", disk=2 * self.work.passages * PASSAGE_BYTES),
            self._index(),
            teach,
            StageCost("filter", disk=2 * self.work.correct * self._episode_bytes(asked)),
            *([self._distributions()] if distributions else []),
            *(self._distill(name, recipe) for name, recipe in params.recipes.distill.items()),
            *(self._reinforce(name, recipe) for name, recipe in params.recipes.reinforce.items()),
            *(self._evaluate(model) for model in params.compare),
            StageCost("report"),
        ]

    def models_disk(self) -> float:
        """Return the bytes of the given models in bfloat16, as the hub has them."""
        return sum(2.0 * shape.parameters for shape in (self.student, self.teacher, self.encoder) if shape)

    def shape_of(self, model: str) -> Architecture:
        """Return the shape of `student`, `teacher` or a recipe's model, which is a student."""
        return self.teacher if model == TEACHER else self.student

    # --- retrieval

    def server(self) -> dict[str, float] | None:
        """Estimate the corpus in a Qdrant server, all replicas: bytes of `memory` that every query touches,
        and of `disk` (while it indexes, up to twice as much). None where the location is no server.

        A passage in the HNSW graph has at most 2 m edges in the lowest layer and m in each above, which has
        1 / m of the nodes; an edge has the bits of a number (Malkov and Yashunin 2016, arXiv:1603.09320).
        """
        retrieval, passages, words = self.params.retrieval, self.work.passages, self.work.words
        if parse_location(retrieval.location).kind != "server":
            return None
        config = retrieval.qdrant
        memory, disk = IDS, IDS + TEXT * words
        if self.encoder:
            dimensions, m = self.encoder.hidden, config.hnsw_m
            searched = QUANTISED[config.quantization] * dimensions + OFFSET * (config.quantization == "int8")
            graph = (2 * m + m / max(1, m - 1)) * math.ceil(math.log2(max(2, passages))) / 8
            memory += searched + graph
            disk += 2.0 * dimensions + graph + (searched if config.quantization != "none" else 0)
        if retrieval.hybrid or not self.encoder:
            memory += SPARSE_INDEX * words
            disk += (SPARSE_VECTORS + SPARSE_INDEX) * words
        copies = float(passages * config.replicas)
        return {"memory": memory * copies, "disk": disk * copies}

    def _index(self) -> StageCost:
        """Vectors in float16, twice on disk (DVC's cache), and in memory where Qdrant runs in the process.
        Each GPU encodes shards of its own; nothing is encoded by BM25, or where vectors are given."""
        retrieval, passages, encoder = self.params.retrieval, self.work.passages, self.encoder
        if parse_location(retrieval.location).kind == "service":
            return StageCost("index")  # nothing is made: the service has it
        text = PASSAGE_BYTES * passages
        # float16; of BM25 an index and a weight for each different word
        vectors = (2.0 * encoder.hidden if encoder else 8.0 * 0.7 * self.work.words) * passages
        gpus, tokens, flops, seconds = 0, 0.0, 0.0, 0.0
        if encoder and not retrieval.vectors:
            gpus = self.machine.gpus
            each = min(self.work.words * TOKENS_A_WORD, retrieval.encoder.max_tokens)
            tokens = each * passages
            flops = encoder.flops(tokens, each**2 * passages)
            seconds = self._seconds(flops, max(1, gpus))
        shard = min(retrieval.shard_size, passages)
        # a shard's vectors in float32 and as they are stored; each GPU has a process with a shard of its own
        host = max(1, gpus) * (PROCESS + (3 * vectors / passages + 2 * PASSAGE_BYTES) * shard)
        if in_process(retrieval):
            host += (2 if encoder else 1) * vectors + text  # dense ones in float32
        # a published index has float32, and stays in the hub's cache
        downloaded = 2 * vectors if any(place.startswith(HUB) for place in retrieval.vectors) else 0.0
        disk = 2 * (vectors + 0.4 * text) + downloaded
        return StageCost("index", gpus, {}, host, disk, tokens, flops, seconds)

    # --- generation

    def _generate(
        self,
        shape: Architecture,
        episodes: float,
        lengths: EpisodeLengths | None = None,
        together: float = inf,
        chunk: float = inf,
    ) -> Generation:
        """Estimate episodes: prefill of what is new in each turn, a decoding step a token, and a search after
        each turn but the last one.

        `together`: episodes that are under way at a time on one device, as in a step of reinforcement
        learning, whose end waits for the longest; `chunk`: those that are asked for at a time. Both engines
        keep the prefixes of earlier turns. transformers has `rollout.slots`, whose room doubles as it must.
        """
        lengths, rollout, vllm = lengths or self.work.lengths, self.params.rollout, self._vllm
        read, written = lengths.total - lengths.model, lengths.model
        reading, writing = shape.flops(read, lengths.square), shape.flops(written, 0, written)
        room = lengths.total + (0 if vllm else self.params.protocol.max_new_tokens)
        rows = VLLM_ROWS if vllm else float(rollout.slots * self.machine.batches)
        rows = min(rows, max(1.0, together), max(1.0, chunk))
        allotted = room if vllm else float(slot_room(math.ceil(room)))
        pass_tokens = VLLM_TOKENS if vllm else min(float(rollout.batch_tokens), rows * room)
        width = 4 if vllm else CACHE_WIDTH[rollout.precision]  # of a key's and a value's channel together
        memory = {
            "key-value cache": rows * allotted * shape.layers * shape.keys * width,
            "activations of generation": shape.passing(pass_tokens, rollout.precision),
            # of sampling: float32 and float64, twice each
            "logits of generation": 24.0 * rows * shape.vocabulary,
        }
        steps = episodes / rows * written * (1 if vllm and together == inf else lengths.spread)
        step = self._decoding(shape, rows, rows * lengths.total / 2 * shape.layers * shape.keys * width)
        return Generation(
            episodes * lengths.total,
            episodes * (reading + writing),
            self._seconds(reading * episodes) + steps * step,
            memory,
            episodes * max(0.0, lengths.turns - 1) / self.machine.assumptions.queries,
        )

    def _decoding(self, shape: Architecture, rows: float, cached: float) -> float:
        """Return the seconds of one step for `rows` sequences: it reads all weights and the batch's cache, so
        it takes as long as the memory needs, or the matrices where the batch is large (Pope et al. 2022,
        arXiv:2211.05102), and what the host needs to start it."""
        device, assumed = self.machine.device, self.machine.assumptions
        weights = shape.matrices + shape.embedding
        read = width_of(self.params.rollout.precision) * weights + cached
        busy = max(read / (device.bandwidth * assumed.decoding), self._seconds(2 * rows * weights))
        return busy + (assumed.scheduling if self._vllm else assumed.launch * shape.layers)

    def _evaluate(self, model: str) -> StageCost:
        """Estimate the test sets, for ARCap two episodes of one turn a question of NQ and MuSiQue, and of the
        questions asked again one of one turn (closed book) and three whole ones (other passages)."""
        shape, lengths, config = self.shape_of(model), self.work.lengths, self.params.evaluate
        asked = {name: min(count, config.questions or count) for name, count in self.work.test.items()}
        given = [self.params.questions.playing(role) for role in ("nq", "musique")]
        again = sum(min(count, config.counterfactual_questions) for count in asked.values())
        every = sum(asked.values()) + 3 * again
        extra = 2 * sum(asked[name] for name in given if name) + again
        single = replace(lengths, model=lengths.model / lengths.turns, turns=1.0)
        sets = self._generate(shape, every, chunk=config.chunk)
        arcap = self._generate(shape, extra, single, chunk=config.chunk)
        both = sets._replace(
            tokens=sets.tokens + arcap.tokens,
            flops=sets.flops + arcap.flops,
            seconds=sets.seconds + arcap.seconds,
        )
        return self._generating(f"evaluate@{model}", model, both, every + extra)

    def _generating(self, stage: str, model: str, made: Generation, episodes: float) -> StageCost:
        shape, gpus = self.shape_of(model), self.engine_gpus(model)
        half = {"weights": 2.0 * shape.parameters}
        memory = (half if self._vllm else shape.loaded("", self.params.rollout.precision)) | made.memory
        seconds = made.seconds / max(1, gpus) + made.searching
        disk = 2 * self._episode_bytes(episodes)
        return StageCost(stage, gpus, memory, PROCESS, disk, made.tokens, made.flops, seconds)

    def engine_gpus(self, model: str) -> int:
        """Count the GPUs that generate a model's episodes at a time, where it is not being trained."""
        rollout = self.params.rollout
        urls = rollout.server.teacher if model == TEACHER else rollout.server.student
        engines = {"transformers": 1, "vllm": rollout.vllm.tensor_parallel, "vllm-server": len(urls)}
        return min(max(1, engines[rollout.engine]), self.machine.gpus)

    # --- training

    def _distributions(self) -> StageCost:
        """One pass of the teacher over its episodes; the likeliest tokens of each of its own."""
        episodes, lengths, config = self.work.teach, self.work.lengths, self.params.distributions
        flops = episodes * self._reading(self.teacher)
        each = 2 * 8.0 * (config.top_k or self.student.vocabulary) * lengths.model
        models = (("", self.teacher), ("student ", self.student))
        precision = self.params.compute.precision
        memory = {
            part: size for name, shape in models for part, size in shape.loaded(name, precision).items()
        }
        return StageCost(
            "distributions",
            min(1, self.machine.gpus),
            memory | self._pass(self.teacher),
            PROCESS + each * min(config.chunk, episodes),  # a file in the making
            each * episodes,
            episodes * lengths.total,
            flops,
            self._seconds(flops),
        )

    def _distill(self, name: str, recipe: Distillation) -> StageCost:
        config, student = self.params.for_recipe(name).distill, self._training()
        looks, chunk = config.epochs, float(config.dev_questions)
        episodes = config.epochs * (self.work.teach * (1.0 if recipe.keep == "all" else self.work.correct))
        generated = 0.5 * episodes if recipe.episodes == "mixed" else 0.0
        if recipe.episodes == "student":
            episodes = generated = float(config.on_policy.steps * config.on_policy.batch_size)
            looks = config.on_policy.steps // config.on_policy.dev_every
            chunk = config.on_policy.batch_size / self._processes
        made = self._generate(self.student, generated + looks * config.dev_questions, chunk=chunk)
        live = recipe.objective != "ce" and (config.teacher == "live" or recipe.episodes != "teacher")
        parts, each = student.states(), self._learning()
        if live:
            parts |= frozen(self.teacher, "teacher ", self.params.compute)
            each += self._reading(self.teacher)
        tokens = episodes * self.work.lengths.total * (2 if live else 1)
        phases = [student.passes(*self._micro_batch), self._rollout(made)]
        return self._trained(f"distill@{name}", parts, phases, tokens, episodes * each, made)

    def _reinforce(self, name: str, recipe: Reinforcement) -> StageCost:
        """A step: episodes, log-probabilities of the policy and, of gated episodes, of the reference, values,
        then an update of actor and critic over all episodes (Updater: one after the other)."""
        config, student = self.params.for_recipe(name).reinforce, self._training()
        episodes, ppo = float(config.steps * config.batch_size), recipe.algorithm == "ppo"
        asked = episodes + config.steps // config.dev_every * config.dev_questions
        made = self._generate(self.student, asked, together=config.batch_size / self._processes)
        wrong = self.work.gated
        shares = {"none": 0.0, "uniform": 1.0, "selective": wrong, "teachable": wrong * self.work.correct}
        gated = shares[recipe.guidance]
        audited = (1 - gated) * min(1.0, config.audit_episodes / config.batch_size)
        again = 1.0 if config.old_logprobs == "trainer" else 0.0
        each, times = again * self._reading(self.student, student.rank) + self._learning(), again + 1
        parts, phases = student.states(), [student.passes(*self._micro_batch), self._rollout(made)]
        if ppo:
            parts |= self._training(critic=True).states()
        if config.overlap:
            parts["weights of a step ago"] = 4.0 * student.weights
        if recipe.reference != "none":
            reference = self.shape_of(recipe.reference)
            each += (gated + audited) * self._reading(reference)
            times += gated + audited
            parts |= frozen(reference, "reference ", self.params.compute)
            phases.append(self._pass(reference))
        if ppo:
            each += self._reading(self.student, student.rank, head=False) + self._learning(head=False)
            times += 2
        tokens = episodes * self.work.lengths.total * times
        flops = episodes * each
        return self._trained(f"reinforce@{name}", parts, phases, tokens, flops, made, ppo, config.overlap)

    def _trained(
        self,
        stage: str,
        parts: Parts,
        phases: list[Parts],
        tokens: float,
        flops: float,
        made: Generation,
        critic: bool = False,
        overlap: bool = False,
    ) -> StageCost:
        """On disk: the model in float32, and its checkpoints (what is trained and AdamW's moments): those
        that are kept, and the one being written."""
        processes, engine, weights = self._processes, self.params.rollout.engine, self.student.parameters
        models = [self._training(), *([self._training(critic=True)] if critic else [])]
        memory = max((parts | phase for phase in phases), key=lambda phase: sum(phase.values()))
        gpus = processes if self.machine.gpus else 0
        checkpoints = 1 + self.params.compute.keep_last
        disk = 2 * 4.0 * weights + checkpoints * 12.0 * sum(model.parameters for model in models)
        host = PROCESS * processes + sum(model.offloaded() for model in models)
        engines = processes if engine == "transformers" else max(1, self.engine_gpus(STUDENT))
        training, rolling = self._seconds(flops, processes), made.seconds / engines + made.searching
        # each its own GPUs, and neither waits for the other; on the same GPUs they share its time
        beside = overlap and engine == "vllm-server"
        seconds = max(training, rolling) if beside else training + rolling
        if engine == "vllm":  # beside the model in training; servers have GPUs of their own
            memory["engine's weights"] = 2.0 * weights / engines
        if engine == "vllm-server":
            gpus = min(gpus + engines, self.machine.gpus)
        return StageCost(stage, gpus, memory, host, disk, tokens + made.tokens, flops + made.flops, seconds)

    @property
    def _vllm(self) -> bool:
        return self.params.rollout.engine != "transformers"

    @property
    def _processes(self) -> int:
        return max(1, min(self.params.compute.processes, self.machine.gpus or 1))

    @property
    def _micro_batch(self) -> tuple[float, float]:
        """Padded tokens of the passes under way, in each of which at least one episode of full length fits,
        and those that have logits: all but the prompt's share."""
        lengths = self.work.lengths
        tokens = max(float(self.params.compute.micro_batch_tokens), lengths.total) * self.machine.batches
        return tokens, tokens * lengths.model / lengths.total

    def _training(self, critic: bool = False) -> Training:
        return Training(self.student, self.params.compute, critic)

    def _reading(self, shape: Architecture, rank: int = 0, head: bool = True) -> float:
        """Count the FLOPs of one episode forward, with logits of the model's tokens."""
        lengths = self.work.lengths
        return shape.flops(lengths.total, lengths.square, lengths.model if head else 0.0, rank)

    def _learning(self, head: bool = True) -> float:
        lengths = self.work.lengths
        return self._training().flops(lengths.total, lengths.square, lengths.model if head else 0.0)

    def _pass(self, shape: Architecture) -> Parts:
        """Return a micro-batch forward, without gradients: of logits three copies."""
        tokens, counted = self._micro_batch
        activations = shape.passing(tokens, self.params.compute.precision)
        return {"activations": activations, "logits": 3 / LOGIT_COPIES * shape.logits(counted)}

    def _rollout(self, made: Generation) -> Parts:
        """Return the student's episodes in training, by itself where no other engine generates."""
        own = {} if self._vllm else self._training().cast(self.params.rollout.precision)
        return made.memory | own

    def _seconds(self, flops: float, devices: int = 1) -> float:
        """Return the time of `devices` for `flops`."""
        return flops / (self.machine.device.flops * self.machine.assumptions.efficiency) / devices

    def _episode_bytes(self, episodes: float) -> float:
        return EPISODE_BYTES * self.work.lengths.total * episodes
