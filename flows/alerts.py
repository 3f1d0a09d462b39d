"""Alerts: what people are told of our runs, by notification blocks of the Prefect server.

An automation for each kind sends it (`dgpo deploy --alert`). A run tells of a collapse and of a promotion by
events of its own; the other kinds are states that Prefect knows.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import EventTrigger, Posture, emit_event
from prefect.events.actions import SendNotification
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from dgpo_core.errors import UserError
from flows.work_pools import TAG
from tasks.stages.stage import COLLAPSE as NOTED

COLLAPSE, PROMOTION = "dgpo.collapse", "dgpo.promotion"
NOTE = re.compile(rf"\[(?P<stage>[^\]]+)\] (?P<said>{NOTED} of .*)")  # a line of a stage's output
ONCE = timedelta(minutes=2)  # a worker tells of a crash twice
PREFIX = "dgpo: tell people: "
RUN_PAGE = "{{ flow_run|ui_url or '' }}"  # empty where the server does not know its address (PREFECT_UI_URL)


@dataclass(frozen=True)
class Alert:
    """A kind of alert: the event of a flow run, and what is said of it (Jinja, as Prefect fills it in)."""

    name: str
    event: str
    said: str


STATE = "{{ flow_run.state.message or 'no message' }}"
PAYLOAD = "{{ event.payload.message }}"
ALERTS = (
    Alert("failed", "prefect.flow-run.Failed", STATE),
    Alert("crashed", "prefect.flow-run.Crashed", f"{STATE}; it starts again by itself"),
    Alert("collapsed", COLLAPSE, PAYLOAD),
    Alert("waiting for approval", "prefect.flow-run.Paused", "Its model meets every condition"),
    Alert("promoted", PROMOTION, PAYLOAD),
)


def notification_blocks(client: SyncPrefectClient, names: Sequence[str]) -> list[UUID]:
    """Return the ids of blocks, `<type>/<name>` each. Raises UserError for one that the server lacks."""
    found = []
    for name in names:
        kind, _, own = name.partition("/")
        try:
            found.append(client.read_block_document_by_name(own, kind).id)
        except ObjectNotFound:
            raise UserError(
                f"--alert {name}: this server has no such block; make one on its page Blocks, and name it by "
                "type and name, such as slack-webhook/team"
            ) from None
    return found


def alerts(
    client: SyncPrefectClient, blocks: Sequence[UUID], deployments: Iterable[UUID]
) -> list[Automation]:
    """Return the automations that tell the blocks of runs of these deployments.

    Without blocks those that an alert has stay its own, and an alert that there is not is not made.
    """
    related = runs_of(deployments)
    found = []
    for alert in ALERTS:
        name = PREFIX + alert.name
        if told := blocks or _told(client, name):
            found.append(_automation(name, alert, told, related))
    return found


def runs_of(deployments: Iterable[UUID]) -> dict[str, str | list[str]]:
    """Return what an event's related resources must be for it to be of a run of these deployments."""
    ids = sorted(f"prefect.deployment.{id_}" for id_ in deployments)
    return {"prefect.resource.id": ids, "prefect.resource.role": "deployment"}


def _automation(
    name: str, alert: Alert, blocks: Sequence[UUID], related: dict[str, str | list[str]]
) -> Automation:
    trigger = EventTrigger(
        expect={alert.event},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=related,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=ONCE,
    )
    subject = f"{{{{ flow.name }}}} {{{{ flow_run.name }}}}: {alert.name}"
    body = f"{alert.said}\n{RUN_PAGE}"
    return Automation(
        name=name,
        description="`dgpo deploy --alert` says whom",
        tags=[TAG],
        trigger=trigger,
        actions=[SendNotification(block_document_id=id_, subject=subject, body=body) for id_ in blocks],
    )


def _told(client: SyncPrefectClient, name: str) -> list[UUID]:
    """Return the blocks that the server's alert of this name tells."""
    found = client.read_automations_by_name(name)
    actions = found[0].actions if found else []
    return [action.block_document_id for action in actions if isinstance(action, SendNotification)]


def tell(event: str, message: str) -> None:
    """Emit an event about this flow run; alerts send it on."""
    emit_event(
        event, {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}"}, payload={"message": message}
    )


def teller_of_collapse() -> Callable[[str], None]:
    """Return a function that takes a stage's lines and tells of a collapse while the stage still trains.

    What collapses is decided in training (dgpo_core/training/watch.py). Lines come on another thread, which
    knows nothing of the run.
    """
    context = contextvars.copy_context()

    def read(line: str) -> None:
        if found := NOTE.match(line):
            with contextlib.suppress(Exception):  # a server that does not answer stops no stage
                context.run(tell, COLLAPSE, f"{found['stage']}: {found['said']}")

    return read
