"""A real Prefect server for the flows' tests."""

import contextlib
import socket
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prefect server process of these tests' own."""
    from flows.server import local_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with local_server(port) as url:
            # By environment and before the first import: Prefect's background threads see no other settings,
            # and would start a server of their own.
            patch.setenv("PREFECT_API_URL", url)
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: url}):
                yield url
                drain_prefect()


def drain_prefect() -> None:
    """Send what is buffered while the server still runs; otherwise it is tried for a minute at exit."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with contextlib.suppress(RuntimeError):  # never started
        APILogWorker.instance().drain()
    EventsWorker.drain_all()
