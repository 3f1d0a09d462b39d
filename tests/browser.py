"""A headless Chromium, driven over its DevTools protocol: as much of it as the tests of pages need."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect
from websockets.sync.connection import Connection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT = 30.0  # seconds, for anything


class Page:
    """One tab."""

    def __init__(self, socket: Connection) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self.errors: list[str] = []  # of scripts, and what the content security policy refused
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        """Send a command and return its result. Raises RuntimeError with the browser's words."""
        own = next(self._ids)
        self._socket.send(json.dumps({"id": own, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(TIMEOUT))
            if message.get("id") == own:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression (or of its promise)."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{expression}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true. Raises AssertionError when it does not become so."""
        end = time.monotonic() + TIMEOUT
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}; errors: {self.errors}"
            time.sleep(0.05)

    def resize(self, width: int, height: int, scale: float = 1.0, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browse(profile: Path) -> Iterator[Page]:
    """Start a browser and give its one tab; `profile` is an empty folder for it."""
    assert CHROMIUM is not None, "there is no Chromium"
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _port(profile / "DevToolsActivePort", process)
        tabs = httpx.get(f"http://127.0.0.1:{port}/json", timeout=TIMEOUT).json()
        url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(url, max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + TIMEOUT
    while not (file.is_file() and file.read_text()):
        assert process.poll() is None and time.monotonic() < end, "the browser does not start"
        time.sleep(0.05)
    return int(file.read_text().splitlines()[0])
