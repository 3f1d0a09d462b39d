"""Clients of a service get what one client gets, and the table says so."""

from pathlib import Path

from benchmarks.serving import Load, load, report
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.serving.agent import Agent
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.serving.conftest import FLOAT32, PROTOCOL
from tests.dgpo_core.serving.service import serving

TEACHER = str(Path(__file__).resolve().parents[2] / "models" / "teacher")


def test_several_clients_get_the_answers_of_one() -> None:
    tokenizer = load_tokenizer(TEACHER)
    engine = TransformersEngine(load_model(TEACHER), tokenizer, FLOAT32)
    agent = Agent("teacher", engine, tokenizer, Answering(), PROTOCOL, 3)
    questions = [f"Where was {name} born?" for name in ("Ada", "Bel", "Ula")]
    with serving(agent, together=2) as client:
        alone, together = (load(client, "teacher", questions, clients) for clients in (1, 3))
    assert alone.answers == together.answers
    assert alone.tokens == together.tokens > 10
    assert len(together.latencies) == 3 and max(together.latencies) <= together.seconds


def test_the_table_has_ratios_of_a_round() -> None:
    def loads(*seconds: float) -> list[Load]:
        return [Load(["a", "b"], [s / 2, s / 2], 20, s) for s in seconds]

    rows = report({1: loads(4.0, 8.0, 6.0), 16: loads(1.0, 1.0, 1.0)}).split("\n")[2:]
    assert rows == [
        "| 1 | 0.3 | 3 | **1.00** | 3.00 | 4.00 | 100.0% |",
        "| 16 | 2.0 | 20 | **6.00** | 0.50 | 0.50 | 100.0% |",
    ]
