"""What each stage of a run needs on a machine (see `passes` for the formulas and their sources)."""

from dataclasses import dataclass, field, replace
from functools import partial

from dgpo_core.config.params import Params
from dgpo_core.config.recipes import STUDENT, TEACHER, Distillation, Reinforcement
from dgpo_core.config.retrieval import RetrievalConfig, parse_location
from dgpo_core.datasets.published import HUB
from dgpo_core.planning import passes
from dgpo_core.planning.architectures import Architecture
from dgpo_core.planning.generation import Generation, Generator, Parts, added, shared
from dgpo_core.planning.holding import Holding, loaded, trained_parameters
from dgpo_core.planning.machine import Machine, computing
from dgpo_core.planning.server import Server, qdrant_server
from dgpo_core.planning.workload import PASSAGE_BYTES, TOKENS_A_WORD, Workload

PROCESS = 0.7e9  # bytes of a stage's program with its libraries, and of a CUDA context
FRAGMENTATION = 1.1  # of what is allocated and freed, over what is in use
EPISODE_BYTES = 6.0  # a token in a table of episodes: id and log-probability, compressed


def in_process(retrieval: RetrievalConfig) -> bool:
    """Whether a stage's own memory holds the index."""
    return parse_location(retrieval.location).kind in ("memory", "embedded", "folder")


@dataclass(frozen=True)
class Estimate:
    """One stage. `memory`: bytes on each GPU at the peak, part by part; `host`: bytes of all its
    processes; `disk`: bytes of its outputs, with DVC's copy, of its checkpoints, and of an index that it
    downloads; `tokens`: through a model, reading and writing; `seconds`: None where the device's speed is
    unknown."""

    stage: str
    gpus: int = 0
    memory: Parts = field(default_factory=dict)
    host: float = PROCESS
    disk: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float | None = 0.0

    @property
    def device_memory(self) -> float:
        """Bytes on each GPU: the parts, what is lost between them, and the context."""
        return FRAGMENTATION * sum(self.memory.values()) + PROCESS if self.memory else 0.0


@dataclass(frozen=True)
class Planner:
    params: Params
    student: Architecture
    teacher: Architecture
    encoder: Architecture | None  # None: BM25, or a retriever service's
    work: Workload
    machine: Machine

    def stages(self) -> list[Estimate]:
        """All stages of `dvc repro`, in an order in which they can run."""
        recipes = self.params.recipes
        return [
            self._data(),
            self._index(),
            self._teach(),
            Estimate("filter", disk=2 * self.work.correct * self._episode_bytes(self.work.teach)),
            *([self._distributions()] if self.params.distill.teacher == "cache" else []),
            *(self._distill(name, row) for name, row in recipes.distill.items()),
            *(self._reinforce(name, row) for name, row in recipes.reinforce.items()),
            *(self._evaluate(model) for model in self.params.compare),
            Estimate("report"),
        ]

    def server(self) -> Server | None:
        """The Qdrant server of the corpus, None where the location is none."""
        retrieval = self.params.retrieval
        if parse_location(retrieval.location).kind != "server":
            return None
        hidden = self.encoder.hidden if self.encoder else 0
        return qdrant_server(retrieval, self.work.passages, self.work.words, hidden)

    @property
    def _generator(self) -> Generator:
        return Generator(self.params, self.work.lengths, self.machine, self.params.rollout.engine)

    @property
    def _holding(self) -> Holding:
        return Holding(self.params.compute)

    def shape_of(self, model: str) -> Architecture:
        """Of `student`, `teacher` or a recipe's model, which is a student."""
        return self.teacher if model == TEACHER else self.student

    def models_disk(self) -> float:
        """The given models in bfloat16, as the hub has them."""
        shapes = [self.student, self.teacher, *([self.encoder] if self.encoder else [])]
        return sum(2.0 * shape.parameters for shape in shapes)

    # --- stages without a language model

    def _data(self) -> Estimate:
        return Estimate("data", disk=2 * self.work.passages * PASSAGE_BYTES)

    def _index(self) -> Estimate:
        """Vectors in float16, twice on disk (DVC's cache), and in memory where Qdrant runs in the process."""
        retrieval, passages = self.params.retrieval, self.work.passages
        if parse_location(retrieval.location).kind == "service":
            return Estimate("index")  # nothing is made: the service has it
        text = PASSAGE_BYTES * passages
        if self.encoder:
            vectors = 2.0 * self.encoder.hidden * passages  # float16
        else:
            vectors = 8.0 * 0.7 * self.work.words * passages  # an index and a weight for each different word
        gpus = self.machine.gpus if self.encoder and not retrieval.vectors else 0
        shard = min(retrieval.shard_size, passages)
        # a shard's vectors in float32 and as they are stored; each GPU has a process with a shard of its own
        host = max(1, gpus) * (PROCESS + (3 * vectors / passages + 2 * PASSAGE_BYTES) * shard)
        if in_process(retrieval):
            host += (2 if self.encoder else 1) * vectors + text  # dense ones in float32
        # a published index has float32, and stays in the hub's cache
        downloaded = 2 * vectors if any(place.startswith(HUB) for place in retrieval.vectors) else 0.0
        disk = 2 * (vectors + 0.4 * text) + downloaded
        return Estimate("index", gpus, {}, host, disk, *self._encoding())

    def _encoding(self) -> tuple[float, float, float | None]:
        """Tokens, FLOPs and seconds of the passages through the encoder, which each GPU does for shards of
        its own; nothing where none is asked: BM25, or vectors that are there."""
        retrieval = self.params.retrieval
        if self.encoder is None or retrieval.vectors:
            return 0.0, 0.0, 0.0
        each = min(self.work.words * TOKENS_A_WORD, retrieval.encoder.max_tokens)
        tokens = each * self.work.passages
        flops = passes.forward_flops(self.encoder, tokens, each**2 * self.work.passages)
        return tokens, flops, self._compute(flops, max(1, self.machine.gpus))

    # --- generation

    def _teach(self) -> Estimate:
        made = self._generator.generate(self.teacher, self.work.teach, chunk=self.params.teach.chunk)
        return self._generating("teach", TEACHER, made, self._episode_bytes(self.work.teach))

    def _evaluate(self, model: str) -> Estimate:
        """The test sets, and ARCap's extra episodes: two of one turn for each question of NQ and MuSiQue."""
        shape, test = self.shape_of(model), self.work.test
        limit = self.params.evaluate.questions
        asked = {name: min(count, limit or count) for name, count in test.items()}
        given = [self.params.questions.playing(role) for role in ("nq", "musique")]
        extra = 2 * sum(asked[name] for name in given if name)
        lengths = self.work.lengths
        generate = partial(self._generator.generate, shape, chunk=self.params.evaluate.chunk)
        single = replace(lengths, model=lengths.model / lengths.turns, turns=1.0, histories=None)
        sets, arcap = generate(sum(asked.values())), generate(extra, single)
        both = Generation(
            sets.tokens + arcap.tokens,
            sets.flops + arcap.flops,
            added(sets.seconds, arcap.seconds),
            sets.memory,
            sets.searching,
        )
        episodes = self._episode_bytes(sum(asked.values()) + extra)
        return self._generating(f"evaluate@{model}", model, both, episodes)

    def engine_gpus(self, model: str) -> int:
        """GPUs that generate a model's episodes at a time, where it is not being trained."""
        rollout = self.params.rollout
        servers = rollout.server.teacher if model == TEACHER else rollout.server.student
        engines = {"transformers": 1, "vllm": rollout.vllm.tensor_parallel, "vllm-server": len(servers)}
        return min(max(1, engines[self.params.rollout.engine]), self.machine.gpus)

    def _generating(self, stage: str, model: str, made: Generation, episodes: float) -> Estimate:
        shape, vllm, gpus = self.shape_of(model), self._generator.vllm, self.engine_gpus(model)
        seconds = added(shared(made.seconds, gpus), made.searching)
        weights = (
            {"weights": 2.0 * shape.parameters} if vllm else loaded(shape, "", self.params.rollout.precision)
        )
        return Estimate(
            stage, gpus, weights | made.memory, PROCESS, 2 * episodes, made.tokens, made.flops, seconds
        )

    # --- training

    def _distributions(self) -> Estimate:
        """One pass of the teacher over its episodes; the likeliest tokens of each of its own."""
        episodes, lengths = self.work.teach, self.work.lengths
        flops = episodes * self._reading(self.teacher)
        config = self.params.distributions
        kept = config.top_k or self.student.vocabulary
        precision = self.params.compute.precision
        memory = loaded(self.teacher, "", precision) | loaded(self.student, "student ", precision)
        return Estimate(
            "distributions",
            min(1, self.machine.gpus),
            memory | self._pass(self.teacher),
            PROCESS + 2 * 8.0 * kept * lengths.model * min(config.chunk, episodes),  # a file in the making
            2 * 8.0 * kept * lengths.model * episodes,
            episodes * lengths.total,
            flops,
            self._compute(flops, 1),
        )

    def _distill(self, name: str, recipe: Distillation) -> Estimate:
        config, lengths = self.params.distill, self.work.lengths
        on_policy = recipe.episodes == "student"
        if on_policy:
            steps, batch = config.on_policy.steps, config.on_policy.batch_size
            episodes, generated = float(steps * batch), float(steps * batch)
        else:
            kept = self.work.teach * (self.work.correct if recipe.correct_only else 1.0)
            episodes = config.epochs * kept
            generated = 0.5 * episodes if recipe.episodes == "mixed" else 0.0
        looks = config.on_policy.steps // config.on_policy.dev_every if on_policy else config.epochs
        chunk = config.on_policy.batch_size / self._processes if on_policy else config.dev_questions
        made = self._generator.generate(self.student, generated + looks * config.dev_questions, chunk=chunk)
        live = recipe.objective != "ce" and (config.teacher == "live" or recipe.episodes != "teacher")
        flops = episodes * (self._learning(self.student) + (self._reading(self.teacher) if live else 0))
        parts = self._holding.trained(self.student)
        if live:
            parts |= self._holding.frozen(self.teacher, "teacher ")
        peak = _largest(parts | self._update(self.student), parts | self._rollout(made))
        tokens = episodes * lengths.total * (2 if live else 1)
        return self._trained(f"distill@{name}", peak, tokens, flops, made)

    def _reinforce(self, name: str, recipe: Reinforcement) -> Estimate:
        """A step: episodes, log-probabilities of the policy and, of gated episodes, of the reference, values,
        then an update of actor and critic over all episodes (Updater: one after the other)."""
        config, lengths = self.params.reinforce, self.work.lengths
        shape, episodes = self.student, float(config.steps * config.batch_size)
        asked = episodes + config.steps // config.dev_every * config.dev_questions
        made = self._generator.generate(shape, asked, together=config.batch_size / self._processes)
        ppo = recipe.algorithm == "ppo"
        gated = {"none": 0.0, "uniform": 1.0, "selective": self.work.gated}[recipe.guidance]
        audited = (1 - gated) * min(1.0, config.audit_episodes / config.batch_size)
        again = 1.0 if config.old_logprobs == "trainer" else 0.0
        reference = None if recipe.reference == "none" else self.shape_of(recipe.reference)
        adapted = passes.rank(self.params.compute)
        each = again * self._reading(shape, adapted) + self._learning(shape)
        times = again + 1
        if reference:
            each += (gated + audited) * self._reading(reference)
            times += gated + audited
        if ppo:
            each += self._reading(shape, adapted, head=False) + self._learning(shape, head=False)
            times += 2
        parts = self._holding.trained(shape)
        if ppo:
            parts |= self._holding.trained(shape, critic=True)
        if reference:
            parts |= self._holding.frozen(reference, "reference ")
        phases = [parts | self._update(shape), parts | self._rollout(made)]
        if reference:
            phases.append(parts | self._pass(reference))
        tokens = episodes * lengths.total * times
        return self._trained(
            f"reinforce@{name}", _largest(*phases), tokens, episodes * each, made, critic=ppo
        )

    def _trained(
        self, stage: str, memory: Parts, tokens: float, flops: float, made: Generation, critic: bool = False
    ) -> Estimate:
        """On disk: the model in float32, and its checkpoint (what is trained and AdamW's moments), of which
        two exist while one is replaced."""
        processes, compute = self._processes, self.params.compute
        gpus = processes if self.machine.gpus else 0
        weights = self.student.parameters
        parts = (False, True) if critic else (False,)
        disk = 2 * 4.0 * weights
        disk += 2 * 12.0 * sum(trained_parameters(self.student, compute, part) for part in parts)
        host = PROCESS * processes + sum(self._holding.offloaded(self.student, part) for part in parts)
        engines = processes if self.params.rollout.engine == "transformers" else self.engine_gpus(STUDENT)
        seconds = added(self._compute(flops, processes), shared(made.seconds, engines))
        seconds = added(seconds, made.searching)
        if (
            self.params.rollout.engine == "vllm"
        ):  # beside the model in training; servers have GPUs of their own
            memory = memory | {"engine's weights": 2.0 * weights / engines}
        if self.params.rollout.engine == "vllm-server":
            gpus = min(gpus + engines, self.machine.gpus)
        return Estimate(stage, gpus, memory, host, disk, tokens + made.tokens, flops + made.flops, seconds)

    @property
    def _processes(self) -> int:
        return max(1, min(self.params.compute.processes, self.machine.gpus or 1))

    def _reading(self, shape: Architecture, rank: int = 0, head: bool = True) -> float:
        """FLOPs of one episode forward, with the output embedding on the model's tokens."""
        lengths = self.work.lengths
        own = passes.head_flops(shape, lengths.model) if head else 0.0
        return passes.forward_flops(shape, lengths.total, lengths.square, rank) + own

    def _learning(self, shape: Architecture, head: bool = True) -> float:
        lengths, compute = self.work.lengths, self.params.compute
        own = passes.head_training_flops(shape, lengths.model, compute) if head else 0.0
        return passes.training_flops(shape, lengths.total, lengths.square, compute) + own

    def _update(self, shape: Architecture) -> Parts:
        """Forward and backward pass of one micro-batch; all of its tokens but the prompt's share have
        logits."""
        tokens, compute, holding = self._micro_batch(), self.params.compute, self._holding
        counted = tokens * self.work.lengths.model / self.work.lengths.total
        passing = {
            "activations": passes.update_bytes(shape, tokens, compute),
            "logits": passes.head_bytes(shape, counted),
        }
        return holding.cast(shape, compute.precision) | holding.gathered(shape) | passing

    def _rollout(self, made: Generation) -> Parts:
        """Episodes of the student in training, by itself where no other engine generates."""
        if self._generator.vllm:
            return made.memory
        return made.memory | self._holding.cast(self.student, self.params.rollout.precision)

    def _pass(self, shape: Architecture) -> Parts:
        """A micro-batch forward, without gradients."""
        tokens, precision = self._micro_batch(), self.params.compute.precision
        counted = tokens * self.work.lengths.model / self.work.lengths.total
        return {
            "activations": passes.passing_bytes(shape, tokens, precision),
            "logits": 3 / passes.HEAD_COPIES * passes.head_bytes(shape, counted),
        }

    def _micro_batch(self) -> float:
        """Padded tokens of a pass: at least one episode of full length fits in."""
        return max(float(self.params.compute.micro_batch_tokens), self.work.lengths.total)

    def _compute(self, flops: float, devices: int) -> float | None:
        return shared(computing(self.machine, flops), devices)

    def _episode_bytes(self, episodes: float) -> float:
        return EPISODE_BYTES * self.work.lengths.total * episodes


def _largest(*phases: Parts) -> Parts:
    return max(phases, key=lambda phase: sum(phase.values()))
