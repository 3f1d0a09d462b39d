"""Progress lines and bars."""

import io

import pytest
from rich.console import Console

from tasks.project.progress import Reporter, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests set: `clock[0]` is now, in seconds."""
    now = [0.0]
    monkeypatch.setattr("tasks.project.progress.time.monotonic", lambda: now[0])
    return now


def test_lines_are_few_and_tell_the_time_left(clock: list[float]) -> None:
    output = io.StringIO()
    reporter = Reporter("train", Console(file=output))
    for step in range(101):
        clock[0] = step * 1.0
        reporter.update(step, 100, em=step / 100, note="x")
    lines = output.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[0] == "[train] 0/100 em=0 note=x "
    assert lines[2] == "[train] 10/100 em=0.1 note=x 1m30s left"
    assert lines[-1] == "[train] 100/100 em=1 note=x done"


def test_a_new_phase_measures_its_own_speed(clock: list[float]) -> None:
    output = io.StringIO()
    reporter = Reporter("evaluate", Console(file=output))
    for done, when in [(0, 0.0), (10, 1.0), (0, 1.0), (1, 11.0)]:
        clock[0] = when
        reporter.update(done, 10)
    assert output.getvalue().splitlines()[-1] == "[evaluate] 1/10 1m30s left"


def test_speed_in_units_and_large_numbers(clock: list[float]) -> None:
    output = io.StringIO()
    reporter = Reporter("index", Console(file=output))
    for done, when in [(0, 0.0), (12_500, 10.0), (21_015_324, 20.0)]:
        clock[0] = when
        reporter.update(done, 21_015_324, unit="passages")
    lines = output.getvalue().splitlines()
    assert lines[1] == "[index] 12500/21015324 1,250 passages/s 4h40m left"
    assert lines[2].startswith("[index] 21015324/21015324 1,050,766 passages/s done")


def test_terminal_gets_a_bar() -> None:
    output = io.StringIO()
    reporter = Reporter("train", Console(file=output, force_terminal=True, width=100))
    reporter.update(1, 2, em=0.5)
    reporter.update(2, 2, em=0.75)
    reporter.close()
    assert "train" in output.getvalue()
    assert "em=0.75 done" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_note_is_a_line_of_its_own(terminal: bool) -> None:
    output = io.StringIO()
    reporter = Reporter("train", Console(file=output, force_terminal=terminal, width=40))
    reporter.update(1, 2)
    reporter.note("step 1: [something] that is worth more than forty characters of a line")
    reporter.close()
    assert "[train] step 1: [something] that is worth more than forty characters of a line\n" in (
        output.getvalue()
    )


def test_a_closed_output_does_not_end_the_work() -> None:
    output = io.StringIO()
    reporter = Reporter("train", Console(file=output))
    output.close()
    reporter.update(1, 2)
    reporter.note("nobody reads")
    reporter.close()
    with pytest.raises(ValueError, match="closed"):  # it would have, had the reporter not caught it
        print("x", file=output)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (83, "1m23s"), (3720, "1h02m"), (59.6, "1m00s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
