"""What the tests of the loop let a model write, and how they run it."""

from collections.abc import Iterable

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.retrieval.ranking import Retriever
from dgpo_core.world.pretraining import build_tokenizer
from tests.dgpo_core.agent.scripted import ScriptedEngine
from tests.dgpo_core.making import question

SEARCH = "<think> I need it. </think>\n<search> birthplace of Ada </search>"
ANSWER = "<think> yes. </think>\n<answer> Paris </answer>"
BABBLE = "I know nothing.<|im_end|>"
TOKENIZER = build_tokenizer()


def scripted(scripts: list[list[str]]) -> ScriptedEngine:
    """An engine that writes the script whose number is a task's seed; its last text again and again."""
    return ScriptedEngine(TOKENIZER, lambda seed, t: scripts[seed[0]][min(t, len(scripts[seed[0]]) - 1)])


def paris_or_rome(seed: tuple[int, ...], turn: int) -> str:
    return f"<answer> {'Paris' if seed[0] % 2 else 'Rome'} </answer>"


def tasks(numbers: Iterable[int]) -> list[Task]:
    return [Task(question(name=f"q{i}"), "onehop", seed=(i,)) for i in numbers]


def run_all(
    engine: ScriptedEngine, retriever: Retriever, numbers: Iterable[int], **limits: int
) -> list[Episode]:
    loop = AgentLoop(engine, TOKENIZER, retriever, ProtocolConfig.model_validate(limits), 3)
    return loop.run(tasks(numbers), GREEDY)


def pieces(episode: Episode) -> list[tuple[Owner, str]]:
    """The episode as (owner, text) of its runs of tokens."""
    runs: list[tuple[Owner, list[int]]] = []
    for token, owner in zip(episode.token_ids, episode.owners, strict=True):
        if not runs or runs[-1][0] != owner:
            runs.append((Owner(owner), []))
        runs[-1][1].append(token)
    return [(owner, str(TOKENIZER.decode(ids))) for owner, ids in runs]
