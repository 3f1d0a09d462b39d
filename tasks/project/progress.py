"""Live progress of a stage: a bar on a terminal, a plain line now and then elsewhere (logs, Prefect)."""

import contextlib
import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_INTERVAL = 5.0  # seconds between plain lines
WINDOW = 50  # calls over which speed is measured: long enough to be calm, short enough to follow changes

Value = str | int | float


class Reporter:
    """Shows `done` of `total`, the newest values, and the time left by the recent speed."""

    def __init__(self, stage: str, console: Console | None = None) -> None:
        self.stage = stage
        self.console = console or Console(file=sys.stdout)
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = float("-inf")

    def update(self, done: float, total: float, unit: str = "", **values: Value) -> None:
        """Tell how far the stage is; with a `unit` ("passages") also how many of them a second."""
        now = time.monotonic()
        if self._recent and done < self._recent[-1][1]:  # a new phase begins
            self._recent.clear()
            self._last_line = float("-inf")
        self._recent.append((now, done))
        shown = [f"{name}={_short(value)}" for name, value in values.items()]
        if unit and (speed := self._speed()):
            shown.append(f"{speed:,.4g} {unit}/s" if speed < 1000 else f"{speed:,.0f} {unit}/s")
        text = " ".join([*shown, self._time_left(total)])
        # The terminal or the reader of the pipe may be gone; that is no reason to stop the work.
        with contextlib.suppress(OSError, ValueError):
            if self.console.is_terminal:
                self._show_bar(done, total, text)
            elif now - self._last_line >= LINE_INTERVAL or done >= total:
                self._last_line = now
                print(f"[{self.stage}] {done:.8g}/{total:.8g} {text}", file=self.console.file, flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar where there is one."""
        with contextlib.suppress(OSError, ValueError):
            self.console.print(f"[{self.stage}] {text}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        if self._bar:
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()
            self._bar = None

    def _show_bar(self, done: float, total: float, text: str) -> None:
        if self._bar is None:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:.8g}/{task.total:.8g} {task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=total, text=text)
        self._bar.update(self._task, completed=done, total=total, text=text)

    def _time_left(self, total: float) -> str:
        done = self._recent[-1][1]
        if done >= total:
            return "done"
        speed = self._speed()
        return f"{duration((total - done) / speed)} left" if speed else ""

    def _speed(self) -> float:
        """Return the units a second, lately; 0 while it is not known."""
        (start, first), (now, done) = self._recent[0], self._recent[-1]
        return (done - first) / (now - start) if now > start else 0.0


def duration(seconds: float) -> str:
    """Write seconds shortly: 12 -> `12s`, 83 -> `1m23s`, 3720 -> `1h02m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
