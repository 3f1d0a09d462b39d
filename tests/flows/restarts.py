"""Flow runs that have crashed before, on a real Prefect server."""

from typing import Any


def restarted(flow: Any, restarts: int, parameters: dict[str, Any]) -> Any:
    """Run one that crashed after its start and all restarts but the last; return its final state."""
    from prefect import State, get_client
    from prefect.flow_engine import run_flow
    from prefect.states import Crashed, Running, Scheduled

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(flow, parameters=parameters)
        for _ in range(restarts):
            crash: list[State[Any]] = [Running(), Crashed(), Scheduled()]
            for state in crash:
                client.set_flow_run_state(run.id, state, force=True)
        run = client.read_flow_run(run.id)
    assert run.run_count == restarts
    return run_flow(flow, flow_run=run, parameters=flow.validate_parameters(parameters), return_type="state")
