"""vLLM, in this process and as a server, against the transformers engine: real models, real vLLM, on the CPU.

Run by `make test-vllm`, in an environment of its own; skipped where vLLM is missing.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent import prompts
from dgpo_core.agent.engine import FinishReason, Request, SeparateEngine, StopCriteria, generate, weights_of
from dgpo_core.agent.loop import STOP, AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.agent.vllm_engine import InProcessClient, Transfer, VllmEngine
from dgpo_core.agent.vllm_server import VllmServerEngine
from dgpo_core.config.agent import (
    GREEDY,
    ProbeConfig,
    ProtocolConfig,
    RolloutConfig,
    Sampling,
    ServerConfig,
    VllmConfig,
)
from dgpo_core.config.training import ComputeConfig
from dgpo_core.datasets.records import Question
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.models import load_model, load_tokenizer, save_model
from dgpo_core.retrieval.index import Index
from dgpo_core.training.weight_sync import EngineSync, SyncedLoop
from dgpo_core.world.facts import World
from dgpo_core.world.questions import Article, write_questions
from tests.dgpo_core.agent.scripted import forward_logprobs, own_logprobs
from tests.dgpo_core.making import padded
from tests.vllm_server import serving

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM has an environment of its own"),
]

TEACHER = str(Path(__file__).resolve().parents[3] / "models" / "teacher")
PROTOCOL = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=64, max_information=320)
COMPUTE = ComputeConfig(device="cpu", precision="float32")
PROBE = ProbeConfig(prompts=3, tokens=16, tolerance=1e-3)
WARM = Sampling(temperature=0.7)
NEVER = ("never written",)


def config(folder: Path, **changes: Any) -> RolloutConfig:
    settings = VllmConfig(gpu_memory_utilization=0.2, eager=True)
    return RolloutConfig(precision="float32", weights_folder=str(folder), vllm=settings, **changes)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(TEACHER)
    return tokenizer


@pytest.fixture
def teacher() -> PreTrainedModel:
    """Each test has its own, to train it if it wants."""
    return load_model(TEACHER)


@pytest.fixture(scope="module")
def in_process(words: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> VllmEngine:
    register_memory_transfer()
    return VllmEngine(TEACHER, words, config(tmp_path_factory.mktemp("w"), refresh="transfer"), 1024)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the teacher."""
    with serving(TEACHER, tmp_path_factory.mktemp("server") / "log") as address:
        yield address


def connect(url: str, source: str, words: PreTrainedTokenizerFast, folder: Path) -> VllmServerEngine:
    settings = config(folder, server=ServerConfig(teacher=[url], concurrency=16, attempts=2))
    return VllmServerEngine([url], source, words, settings, 1024)


@pytest.fixture(params=["in-process", "server"])
def engine(
    request: pytest.FixtureRequest, words: PreTrainedTokenizerFast, teacher: PreTrainedModel, tmp_path: Path
) -> SeparateEngine:
    """With the teacher's weights, whatever an earlier test has given it."""
    if request.param == "server":
        return connect(request.getfixturevalue("url"), TEACHER, words, tmp_path)
    made: VllmEngine = request.getfixturevalue("in_process")
    made._config = config(tmp_path)  # refreshes through a folder
    made.refresh(weights_of(teacher))
    return made


@pytest.fixture
def reference(teacher: PreTrainedModel, words: PreTrainedTokenizerFast) -> TransformersEngine:
    return TransformersEngine(teacher, words, RolloutConfig(precision="float32", batch_tokens=16_384))


@pytest.fixture(scope="module")
def questions(world: World, articles: list[Article]) -> list[Question]:
    made = write_questions(world, articles)
    return [question for part in made.values() for question in part]


def requests(words: PreTrainedTokenizerFast, count: int = 8, new: int = 40) -> list[Request]:
    """The protocol's prompt with questions of several lengths."""
    texts = [f"Where was {'the employer of ' * (i % 4)}person {i} born" for i in range(count)]
    ids = [
        words.encode(prompts.prompt_text(text, "short", words), add_special_tokens=False) for text in texts
    ]
    return [Request(prompt, new, (i, 0)) for i, prompt in enumerate(ids)]


def close(first: list[float], second: list[float]) -> None:
    assert first == pytest.approx(second, abs=1e-3)


def test_same_greedy_episodes(
    engine: SeparateEngine,
    reference: TransformersEngine,
    words: PreTrainedTokenizerFast,
    index: Index,
    questions: list[Question],
    request: pytest.FixtureRequest,
) -> None:
    """All turns of 200 teacher episodes (24 over HTTP), token by token."""
    count = 200 if request.node.callspec.params["engine"] == "in-process" else 24
    chosen = [questions[11 * i % len(questions)] for i in range(count)]  # of all kinds
    tasks = [Task(question, "d", seed=(i,)) for i, question in enumerate(chosen)]
    loops = [AgentLoop(each, words, index, PROTOCOL, 3) for each in (engine, reference)]
    own, expected = (loop.run(tasks, GREEDY) for loop in loops)
    for first, second in zip(own, expected, strict=True):
        assert first.token_ids == second.token_ids
        assert (first.owners, first.ending, first.searches) == (second.owners, second.ending, second.searches)
        close(first.logprobs, second.logprobs)
    assert sum(len(episode.searches) for episode in own) > count
    assert sum(episode.correct for episode in own) > 0.2 * count


def test_logprobs_are_those_at_the_temperature(
    engine: SeparateEngine, teacher: PreTrainedModel, words: PreTrainedTokenizerFast
) -> None:
    for sampling in (WARM, Sampling(temperature=1.5), GREEDY):
        asked = requests(words, 4, 12)
        for request, answer in zip(asked, generate(engine, asked, sampling, NEVER), strict=True):
            close(answer.logprobs, own_logprobs(teacher, request, answer.token_ids, sampling))


def test_endings(
    engine: SeparateEngine,
    reference: TransformersEngine,
    words: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tags, a stop string that ends inside a token, EOS, the limit: the very tokens of the other engine."""
    asked = requests(words)
    whole = generate(reference, asked, GREEDY, NEVER)[0].token_ids
    texts = [str(words.decode(token)).strip() for token in whole]
    inside = next(text for text in texts if len(text) > 3)[:-1]
    for stop in (STOP, (inside,), NEVER):
        own, expected = (generate(each, asked, GREEDY, stop) for each in (engine, reference))
        assert [(a.token_ids, a.finish) for a in own] == [(a.token_ids, a.finish) for a in expected]
        if stop != NEVER:
            assert FinishReason.STOP in {answer.finish for answer in own}
    cut = [Request(request.token_ids, 3, request.seed) for request in asked]
    assert {(len(a.token_ids), a.finish) for a in generate(engine, cut, GREEDY, STOP)} == {
        (3, FinishReason.LENGTH)
    }
    ending = StopCriteria(words, {whole[5]}, len(words))  # as if this token were the model's EOS
    monkeypatch.setattr(engine, "stop_criteria", ending)
    (answer,) = generate(engine, asked[:1], GREEDY, NEVER)
    assert (answer.token_ids, answer.finish) == (whole[: whole.index(whole[5]) + 1], FinishReason.EOS)


def test_samples_belong_to_the_request(engine: SeparateEngine, words: PreTrainedTokenizerFast) -> None:
    asked = requests(words, 12, 16)
    together = generate(engine, asked, Sampling(), NEVER)
    (alone,) = generate(engine, [asked[5]], Sampling(), NEVER)
    assert alone.token_ids == together[5].token_ids
    backwards = generate(engine, asked[::-1], Sampling(), NEVER)[::-1]
    assert [answer.token_ids for answer in backwards] == [answer.token_ids for answer in together]
    again = [Request(asked[5].token_ids, 16, (seed,)) for seed in range(5)]
    assert (
        len({tuple(answer.token_ids) for answer in generate(engine, again, Sampling(temperature=2.0), NEVER)})
        == 5
    )


def test_samples_follow_the_distribution(
    engine: SeparateEngine, teacher: PreTrainedModel, words: PreTrainedTokenizerFast
) -> None:
    """First tokens of 1,500 requests at temperature 2, likely ones apart and the others together."""
    prompt, count, sampling = requests(words, 1)[0].token_ids, 1500, Sampling(temperature=2.0)
    with torch.inference_mode():
        chances = (teacher(torch.tensor([prompt])).logits[0, -1] / sampling.temperature).softmax(-1)
    answers = generate(engine, [Request(prompt, 1, (i, 0)) for i in range(count)], sampling, NEVER)
    sampled = torch.tensor([answer.token_ids[0] for answer in answers])
    likely = torch.nonzero(chances * count > 10)[:, 0]
    expected = [*(chances[likely] * count).tolist()]
    found = [int((sampled == token).sum()) for token in likely]
    rest = count - sum(expected)
    if rest > 5:
        expected, found = [*expected, rest], [*found, count - sum(found)]
    scale = sum(found) / sum(expected)
    assert len(found) > 1
    assert chisquare(found, [value * scale for value in expected]).pvalue > 1e-4


def train_a_step(model: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([words.encode("Tavi was born in Paris . " * 5)])
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def test_refresh_after_a_training_step(
    engine: SeparateEngine, reference: TransformersEngine, words: PreTrainedTokenizerFast
) -> None:
    """The same prompts before and after, so that prefixes kept from the old weights would show."""
    model = reference.model
    sync = EngineSync(engine, model, [request.token_ids for request in requests(words, 3)], PROBE, COMPUTE)
    assert sync.probe()["engine_gap_max"] < 1e-3
    train_a_step(model, words)
    assert sync.probe()["engine_gap_mean"] > 0.01, "the engine has the old weights still"
    sync.refresh()
    assert sync.probe()["engine_gap_max"] < 1e-3
    asked = requests(words)
    own, expected = (generate(each, asked, GREEDY, STOP) for each in (engine, reference))
    assert [answer.token_ids for answer in own] == [answer.token_ids for answer in expected]


def test_loop_of_a_model_in_training(
    engine: SeparateEngine,
    reference: TransformersEngine,
    words: PreTrainedTokenizerFast,
    index: Index,
    questions: list[Question],
) -> None:
    model = reference.model
    sync = EngineSync(engine, model, [request.token_ids for request in requests(words, 3)], PROBE, COMPUTE)
    loop = SyncedLoop(sync, words, index, PROTOCOL, 3)
    train_a_step(model, words)
    tasks = [Task(question, "d") for question in questions[:6]]
    expected = AgentLoop(reference, words, index, PROTOCOL, 3).run(tasks, GREEDY)
    assert [episode.token_ids for episode in loop.run(tasks, GREEDY)] == [e.token_ids for e in expected]


def test_server_gets_the_weights_of_the_stage(
    url: str,
    teacher: PreTrainedModel,
    reference: TransformersEngine,
    words: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    train_a_step(teacher, words)
    save_model(teacher, words, tmp_path / "trained")
    asked = requests(words)
    first = connect(url, str(tmp_path / "trained"), words, tmp_path)
    expected = [answer.token_ids for answer in generate(reference, asked, GREEDY, STOP)]
    assert [answer.token_ids for answer in generate(first, asked, GREEDY, STOP)] == expected
    connect(url, TEACHER, words, tmp_path)
    with pytest.raises(InfrastructureError, match="another stage uses it"):
        generate(first, asked, GREEDY, STOP)


def test_librarys_weight_transfer(
    in_process: VllmEngine, reference: TransformersEngine, words: PreTrainedTokenizerFast
) -> None:
    """Its whole handshake; memory of this process stands in for CUDA's, which a CPU does not have."""
    model = reference.model
    in_process._config = in_process._config.model_copy(update={"refresh": "transfer"})
    client = InProcessClient(in_process._llm)
    in_process._sender = Transfer(memory_init_info(), client, torch.float32)
    for _ in range(2):
        train_a_step(model, words)
        asked = [request.token_ids for request in requests(words, 3)]
        sync = EngineSync(in_process, model, asked, PROBE, COMPUTE)
        sync.refresh()
        assert sync.probe()["engine_gap_max"] < 1e-3


@pytest.mark.usefixtures("in_process")
def test_what_vllm_refuses_is_the_users_to_fix(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.vllm: vLLM cannot run .*teacher so: "):
        VllmEngine(TEACHER, words, config(tmp_path), 10_000_000)


SHARED: dict[str, torch.Tensor] = {}


def memory_init_info() -> Any:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo

    class MemoryInitInfo(TrainerInitInfo):  # type: ignore[misc]
        backend = "memory"

    return MemoryInitInfo(rank=0)


def register_memory_transfer() -> None:
    """Both ends of a transfer through SHARED; the worker's takes the place of the CUDA one."""
    from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    class Receiver(IPCWeightTransferEngine):  # type: ignore[misc]
        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.model.load_weights([(name, SHARED[name]) for name in update_info["names"]])

    class Sender(TrainerWeightTransferEngine):  # type: ignore[misc]
        @classmethod
        def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> "Sender":
            client.init_weight_transfer_engine({"packed": False})
            return cls(client=client, source=source)

        def send_weights(self) -> None:
            self.client.start_weight_update()
            names = [entry.name for entry in self.source.metadata()]
            SHARED.update((name, tensor.clone()) for name, tensor in self.source)
            self.client.update_weights({"names": names})
            self.client.finish_weight_update()

    WeightTransferEngineFactory._registry["ipc"] = lambda: Receiver
    WeightTransferTrainerFactory.register_engine("memory", Sender)


# The last one: an engine of this process that goes takes vLLM's groups of processes along, others' too.
@pytest.mark.parametrize("where", ["in-process", "server"])
def test_rows_without_a_token_are_never_sampled(
    where: str, reference: TransformersEngine, words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of a head with 70 likely ones more: tokens and log-probabilities are as without them."""
    wider, asked = str(tmp_path / "wider"), requests(words, 4, 12)
    save_model(padded(reference.model, 70), words, Path(wider))
    with contextlib.ExitStack() as open_servers:
        if where == "server":
            url = open_servers.enter_context(serving(wider, tmp_path / "log"))
            engine: SeparateEngine = connect(url, wider, words, tmp_path)
        else:
            engine = VllmEngine(wider, words, config(tmp_path), 1024)
        for sampling in (GREEDY, WARM):
            for request, answer in zip(asked, generate(engine, asked, sampling, NEVER), strict=True):
                ids = answer.token_ids
                close(answer.logprobs, own_logprobs(reference.model, request, ids, sampling))
                if sampling == GREEDY:
                    table = forward_logprobs(reference.model, request, ids, sampling)
                    assert ids == table.argmax(-1).tolist()
