"""Counts the cases: `make fuzz` says how many there were of each kind."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

CASES: Counter[str] = Counter()
settings.register_profile(
    "nightly",
    deadline=None,
    max_examples=6000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):  # type: ignore[no-untyped-def]
    """Count how often hypothesis calls a test."""
    handle = getattr(pyfuncitem.obj, "hypothesis", None)
    if handle is not None:
        inner, name = handle.inner_test, pyfuncitem.name

        def counted(*arguments: object, **values: object) -> object:
            CASES[name] += 1
            return inner(*arguments, **values)

        handle.inner_test = counted
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CASES:
        terminalreporter.write_line(f"{sum(CASES.values()):,} cases of {len(CASES)} kinds of input")
