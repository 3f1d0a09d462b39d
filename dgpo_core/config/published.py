"""Where corpus and questions come from: the embedded world or the published data sets."""

from typing import Literal

from pydantic import Field, PositiveInt

from dgpo_core.config.base import Section


class Limits(Section):
    """Parts of the published data, for trials; null: all of it."""

    train: PositiveInt | None = Field(None, description="first so many training questions of each set")
    test: PositiveInt | None = Field(None, description="first so many test questions of each set")
    passages: PositiveInt | None = Field(None, description="first so many passages of the corpus")


class PublishedConfig(Section):
    """The paper's data sets (docs/data.md).

    Each place is a local path or `hf://datasets/<owner>/<name>[@<revision>]/<path>`; the corpus
    and the files of MuSiQue and NQ may end in .gz.
    """

    questions: str = Field(
        "hf://datasets/RUC-NLPIR/FlashRAG_datasets",
        description="folder with `<set>/<split>.jsonl`, in FlashRAG's format",
    )
    corpus: str = Field(
        "hf://datasets/PeterJinGo/wiki-18-corpus/wiki-18.jsonl.gz", description="wiki-18, or in its format"
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


class DataConfig(Section):
    """What the stage `data` writes."""

    source: Literal["published", "world"] = Field(
        "published", description="the published data sets, or the embedded world (section world)"
    )
    published: PublishedConfig = PublishedConfig()
