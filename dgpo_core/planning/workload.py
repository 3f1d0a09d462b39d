"""How much there is to do: questions, passages, episode lengths, and how many episodes are wrong."""

from dataclasses import dataclass

from dgpo_core.config.params import Params
from dgpo_core.datasets.published import PASSAGES, TEST_QUESTIONS, TRAIN_QUESTIONS
from dgpo_core.errors import UserError
from dgpo_core.planning.episodes import EpisodeLengths

PASSAGE_WORDS = 100.0  # of wiki-18, by its making
TOKENS_A_WORD = 1.4  # English in vocabularies of 30,000 and more
PASSAGE_BYTES = 680.0  # of wiki-18 with id and title as JSON, on average


@dataclass(frozen=True)
class Workload:
    """`train` and `test`: questions of each set. `correct`: share of the teacher's episodes that are kept;
    `gated`: share of the student's whose gate is open under selective guidance. `sources` says where from."""

    train: dict[str, int]
    test: dict[str, int]
    passages: int
    words: float
    lengths: EpisodeLengths
    correct: float
    gated: float
    sources: dict[str, str]

    @property
    def teach(self) -> int:
        """Training questions in use."""
        return sum(self.train.values())


def expected_counts(params: Params) -> tuple[dict[str, int], dict[str, int], int]:
    """Training and test questions of each set and passages, before any stage has run: the published ones, or
    the embedded world's. Raises UserError for a set that is neither."""
    names = [*params.questions.train, *params.questions.test]
    if all(name in TEST_QUESTIONS for name in names):
        train = {name: TRAIN_QUESTIONS.get(name, 0) for name in params.questions.train}
        return train, {name: TEST_QUESTIONS[name] for name in params.questions.test}, PASSAGES
    world = params.world.questions
    if any(name in TEST_QUESTIONS for name in names):
        raise UserError("questions: the sets are partly published ones and partly the embedded world's")
    train = dict.fromkeys(params.questions.train, world.train)
    test = {name: world.hard if name == "hard" else world.test for name in params.questions.test}
    return train, test, params.world.passages
