"""What people are told of runs: a real Prefect server, whose notifications a webhook of the test receives."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dgpo_core.training.watch import Watch
from tasks.project.progress import Reporter
from tasks.stages.stage import COLLAPSE
from tests.flows.conftest import drain_prefect, prefect_server
from tests.flows.test_deploy import program

pytestmark = pytest.mark.thorough


class Receiver(ThreadingHTTPServer):
    """Keeps the subjects and bodies that it is sent."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), Receiver.Handler)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert isinstance(self.server, Receiver)
            self.server.received.append((told["subject"], told["body"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    def wait(self, subject: str) -> str:
        """Return what was told under a subject."""
        for _ in range(600):
            for own, body in self.received:
                if own == subject:
                    return body
            time.sleep(0.1)
        pytest.fail(f"nobody was told {subject!r}, only {self.received}")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def client(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server whose alerts go to the receiver."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        from prefect import get_client
        from prefect.blocks.notifications import CustomWebhookNotificationBlock
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            block = CustomWebhookNotificationBlock(
                name="team",
                url=f"http://127.0.0.1:{receiver.server_port}",
                json_data={"subject": "{{subject}}", "body": "{{body}}"},
            )
            block.save("team")
            done = program("flows.deploy", "--alert", "custom-webhook/team")
            assert done.returncode == 0, done.stderr
            assert "2 automations, 5 alerts" in done.stdout
            time.sleep(3)  # the server loads its automations every other second
            yield client
            drain_prefect()


def start(client: Any, name: str) -> Any:
    """Make a run of our deployment, which no worker takes."""
    deployment = client.read_deployment_by_name("pipeline/on-demand")
    return client.create_flow_run_from_deployment(deployment.id, name=name)


def run_as(client: Any, name: str, body: Callable[[], None]) -> None:
    """Run a function as a run of our deployment, as a worker's process would."""
    from prefect import flow
    from prefect.flow_engine import run_flow

    run_flow(flow(name="pipeline")(body), flow_run=client.read_flow_run(start(client, name).id))


def test_states_of_our_runs_and_of_nobody_elses(client: Any, receiver: Receiver) -> None:
    from prefect import flow
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Cancelled, Crashed, Failed

    @flow(name="etl")
    def other() -> None: ...

    foreign = client.create_flow_run(other, name="theirs")
    client.set_flow_run_state(foreign.id, Failed(message="theirs"), force=True)
    cancelled = start(client, "unwanted")
    client.set_flow_run_state(cancelled.id, Cancelled(), force=True)
    failed = start(client, "calm-otter")
    client.set_flow_run_state(failed.id, Failed(message="reinforce@dgpo: user: no"), force=True)
    died = start(client, "brave-cat")
    for _ in range(2):  # as a worker tells it
        client.set_flow_run_state(died.id, Crashed(message="exit code -9"), force=True)
    waiting = start(client, "shy-elk")
    client.set_flow_run_state(waiting.id, State(type=StateType.PAUSED, name="Paused"), force=True)

    said = receiver.wait("pipeline calm-otter: failed")
    assert said.startswith("reinforce@dgpo: user: no\n") and str(failed.id) in said
    assert receiver.wait("pipeline brave-cat: crashed").startswith("exit code -9; it starts again")
    assert receiver.wait("pipeline shy-elk: waiting for approval").startswith("Its model meets every")
    assert sorted(subject for subject, _ in receiver.received) == [
        "pipeline brave-cat: crashed",
        "pipeline calm-otter: failed",
        "pipeline shy-elk: waiting for approval",
    ]


def test_a_collapse_and_a_promotion(client: Any, receiver: Receiver, tmp_path: Path) -> None:
    """A collapse is told from the stage's own lines, which come on another thread, while it runs."""
    from flows.alerts import PROMOTION, tell, teller_of_collapse

    rows = [{"step": float(step), "em": 0.4 if step < 20 else 0.02} for step in range(40)]
    printed = io.StringIO()
    console = Reporter("reinforce@dgpo", Console(file=printed))
    for step in range(1, 41):
        for figure, said in Watch().new_alarms(rows[:step]).items():
            console.note(f"{COLLAPSE} of {figure} at step {step}: {said}")
        console.update(step, 40, em=rows[step - 1]["em"])

    def body() -> None:
        read = teller_of_collapse()
        thread = threading.Thread(target=lambda: [read(line) for line in printed.getvalue().splitlines()])
        thread.start()
        thread.join()
        tell(PROMOTION, "version 2 (dgpo) is the champion")

    before = len(receiver.received)
    run_as(client, "red-fox", body)
    said = receiver.wait("pipeline red-fox: collapsed")
    assert said.startswith("reinforce@dgpo: collapse of em at step 2") and "em 0.4 -> 0.1" in said
    assert receiver.wait("pipeline red-fox: promoted").startswith("version 2 (dgpo) is the champion\n")
    assert len(receiver.received) == before + 2


def test_deployed_again_without_a_block_they_go_where_they_went(client: Any) -> None:
    def told() -> dict[str, list[str]]:
        found = client.read_automations()
        return {
            each.name: [str(action.block_document_id) for action in each.actions]
            for each in found
            if each.name.startswith("dgpo: tell people")
        }

    before = told()
    assert len(before) == 5
    assert "5 alerts" in program("flows.deploy").stdout
    assert told() == before
    done = program("flows.deploy", "--alert", "slack-webhook/nobody")
    assert (
        done.returncode == 2 and "--alert slack-webhook/nobody: this server has no such block" in done.stderr
    )
