"""Sections about data: corpus and question sets, published or of the embedded world, and its base models."""

import re
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dgpo_core.config.base import Section


class Limits(Section):
    """Parts of the published data, for trials; null: all of it."""

    train: PositiveInt | None = Field(None, description="first so many training questions of each set")
    test: PositiveInt | None = Field(None, description="first so many test questions of each set")
    passages: PositiveInt | None = Field(None, description="first so many passages of the corpus")


class PublishedConfig(Section):
    """The paper's data sets (docs/data.md).

    Each is a local path or `hf://datasets/<owner>/<name>[@<revision>]/<path>`; the corpus and the files of
    MuSiQue and NQ may end in .gz.
    """

    questions: str = Field(
        "hf://datasets/RUC-NLPIR/FlashRAG_datasets@bcafb8dd07d453be3cbeeeb3f78be1841bddf92c",
        description="folder with `<set>/<split>.jsonl`, in FlashRAG's format",
    )
    corpus: str = Field(
        "hf://datasets/PeterJinGo/wiki-18-corpus@69c1c00ffe7c5554c68d8548355cb22e46aabc51/wiki-18.jsonl.gz",
        description="wiki-18, or in its format",
    )
    musique: list[str] = Field(
        [
            "hf://datasets/dgslibisey/MuSiQue@c8f4f8c9465fb69d31a8eae894c3fd509c4ca321/musique_ans_v1.0_dev.jsonl"
        ],
        description="MuSiQue's own file, whose supporting paragraphs ARCap needs; empty: without them",
    )
    nq: list[str] = Field(
        [], description="NQ's own development file(s), whose long answers ARCap needs; empty: without them"
    )
    dev_questions: PositiveInt = Field(500, description="validation questions held out of each training set")
    check_counts: bool = Field(
        True, description="refuse files whose counts are not those of the paper's table 9"
    )
    limits: Limits = Limits()


class SplitShares(Section):
    """How a list of questions is split; what is left is trained on."""

    dev: float = Field(0.1, gt=0, lt=1, description="share of validation questions")
    test: float = Field(0.2, gt=0, lt=1, description="share of test questions")
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.dev + self.test >= 1:
            raise ValueError("dev and test are shares: together below 1, the rest is trained on")
        return self


class QuestionFilesConfig(Section):
    """A set of your own: files of questions by split, or in one list (docs/data.md has the forms)."""

    train: list[str] = Field([], description="files, folders and globs, as in the others")
    dev: list[str] = Field([], description="empty: held out of `train`, as many as split.dev says")
    test: list[str] = Field([], description="needed where questions.test names the set")
    all: list[str] = Field([], description="instead of the three: questions that are split here")
    split: SplitShares = SplitShares()
    disjoint: Literal["question", "answer"] = Field(
        "question", description="splits never share a question; `answer`: nor a golden answer"
    )
    columns: dict[Literal["id", "question", "answers"], str | PositiveInt] = Field(
        {}, description="names that are not the usual ones; numbers, from 1, where a table has no head"
    )
    duplicate_ids: Literal["refuse", "rename"] = "refuse"

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.all and (self.train or self.dev or self.test):
            raise ValueError("all: is split here, so it cannot stand beside train, dev or test")
        if not (self.all or self.train or self.test):
            raise ValueError("name its files: train, dev and test, or all")
        return self


class FilesConfig(Section):
    """Your own documents and questions (docs/data.md)."""

    corpus: list[str] = Field(
        [], description="documents: files, folders and globs; those of a folder are read in all depths"
    )
    passage_words: int = Field(100, ge=10, description="of a passage, at most; fewer where a section ends")
    questions: dict[str, QuestionFilesConfig] = Field(
        {}, description="sets of any name, which `questions` says how to use"
    )


class DataConfig(Section):
    """The source of corpus and questions."""

    source: Literal["published", "world", "files"] = Field(
        "published",
        description="the published data sets, the embedded world (section world), or your own files",
    )
    published: PublishedConfig = PublishedConfig()
    files: FilesConfig = FilesConfig()

    @model_validator(mode="after")
    def _has_documents(self) -> Self:
        if self.source == "files" and not self.files.corpus:
            raise ValueError("files.corpus: name your documents: files, folders or globs")
        return self


PAPER_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
TRAINING_SETS = ("nq", "hotpotqa")  # those that the paper trains on
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # becomes part of paths and of metrics' names


class QuestionSetsConfig(Section):
    """The question sets that are trained and tested on."""

    train: list[str] = Field(["nq", "hotpotqa"], min_length=1)
    test: dict[str, str | None] = Field(
        {name: name for name in PAPER_SETS},
        min_length=1,
        description="set -> the paper's data set whose part it plays; null: none's",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := set(filter(None, self.test.values())) - set(PAPER_SETS):
            raise ValueError(f"{sorted(unknown)} are none of the paper's data sets {list(PAPER_SETS)}")
        if len(set(self.train)) < len(self.train):
            raise ValueError("train: a set stands there twice")
        if odd := [name for name in (*self.train, *self.test) if not NAME.fullmatch(name)]:
            raise ValueError(f"{odd[0]!r} is no name of a set: letters, digits, _ and - only")
        return self

    def playing(self, role: str) -> str | None:
        """Return the set that plays the part of the paper's data set `role`, if any."""
        return next((name for name, part in self.test.items() if part == role), None)


class AuditConfig(Section):
    """What the data report may find; beyond it the pipeline stops before a model runs (docs/data.md)."""

    min_answerable: float = Field(
        0.05, ge=0, le=1, description="share of a split's questions of which some passage has an answer"
    )
    max_in_train: float = Field(
        0.5, ge=0, le=1, description="share of validation or test questions that training asks too"
    )
    max_long_questions: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of questions after which protocol.max_context has no room for a whole turn",
    )
    searched: PositiveInt = Field(200, description="questions of each split that are searched for, at most")


class QuestionCounts(Section):
    """Questions per set and split."""

    train: PositiveInt = 1000
    dev: PositiveInt = 100
    test: PositiveInt = 200
    hard: PositiveInt = 125


class WorldConfig(Section):
    """The generated encyclopedia (`dgpo_core.world`)."""

    seed: NonNegativeInt = 1
    passages: int = Field(2000, ge=100, description="about how many passages")
    ambiguity: float = Field(
        0.3, ge=0, le=1, description="chance that a book, city or university has the name of another entity"
    )
    rare_share: float = Field(0.25, ge=0, lt=1, description="share of entities with a single passage")
    distractors: NonNegativeInt = Field(1, description="sentences a passage that answer no question")
    facts_per_passage: PositiveInt | None = Field(
        None, description="of an article with several passages; null: half of its facts"
    )
    asides: NonNegativeInt = Field(
        0, description="further passages of an article with several, which answer no question"
    )
    indirect: float = Field(
        0.0, ge=0, lt=1, description="share of facts that a passage states by naming who has the same value"
    )
    asked: list[Literal["name", "word", "year"]] = Field(
        ["name", "word", "year"],
        min_length=1,
        description="kinds of values that chains of facts may ask for; comparisons always need years",
    )
    comparison_share: float = Field(0.2, ge=0, le=1, description="comparisons in the two-hop sets")
    questions: QuestionCounts = QuestionCounts()


class ModelShape(Section):
    """Architecture of an embedded base model."""

    architecture: Literal["qwen2", "llama"] = "qwen2"
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    intermediate_size: PositiveInt

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be divisible by twice the number of heads (rotary halves)")
        return self


class PhaseConfig(Section):
    """One phase of building a base model, with a learning-rate cycle of its own."""

    kind: Literal["reading", "protocol"] = Field(
        description="the reading drill, or scripted episodes of the protocol"
    )
    steps: PositiveInt
    batch_size: PositiveInt = Field(64, description="sequences a step")
    micro_batch_size: PositiveInt | None = Field(
        None, description="sequences in one pass; it shows in speed and rounding. null: 16, of the protocol 4"
    )
    learning_rate: PositiveFloat = Field(3e-3, description="of embeddings and vectors (AdamW)")
    matrix_learning_rate: PositiveFloat = Field(0.01, description="of the layers' matrices (Muon)")
    warmup_steps: NonNegativeInt = 50
    one_passage: float = Field(
        0.4, ge=0, le=1, description="reading: share of the steps with one passage, first"
    )
    two_passages: float = Field(
        0.4, ge=0, le=1, description="reading: share with two, then; the rest has three"
    )
    expansions: float = Field(
        0.0,
        ge=0,
        le=1,
        description="protocol: share of the expert's first queries that have all words in which texts state "
        "the fact; they find it more often than the others do",
    )

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.one_passage + self.two_passages > 1:
            raise ValueError("one_passage and two_passages are shares: together at most 1")
        return self

    def passages(self, step: int) -> int:
        """Return how many passages a reading example of `step` has; steps count from 0."""
        if step < self.one_passage * self.steps:
            return 1
        return 2 if step < (self.one_passage + self.two_passages) * self.steps else 3


class BaseModelConfig(Section):
    """One model to build."""

    shape: ModelShape
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of compute; weights are fp32. bfloat16 is slow where the processor has no instructions",
    )
    phases: list[PhaseConfig] = Field(min_length=1)


class BaseModelsConfig(Section):
    """Building the embedded student, a reader that has seen the protocol, and teacher, which follows it."""

    seed: NonNegativeInt = 0
    world: WorldConfig = Field(
        WorldConfig(), description="of the training worlds, but for seed and questions"
    )
    expert_world: WorldConfig | None = Field(
        None,
        description="of the expert's episodes: where searching is as in the evaluated world; null: `world`",
    )
    worlds: PositiveInt = Field(24, description="training worlds; none is the evaluated one")
    first_world_seed: PositiveInt = 1000
    expert_episodes: PositiveInt = Field(9600, description="scripted episodes that teach the protocol")
    models: dict[str, BaseModelConfig] = Field({}, description="built into models/<name>")
