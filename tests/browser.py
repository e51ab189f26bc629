"""A headless Chromium, spoken to in its DevTools protocol over pipes. Debian's package is installed where that is possible."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.packages import PATH

PROGRAMS, PACKAGES = ("chromium",), ("chromium", "fonts-liberation")
SECONDS = 60.0
# Chromium reads commands from 3 and answers on 4. A shell puts them there, from higher numbers, so that neither is in the other's way.
_SCRIPT = 'exec "$0" --remote-debugging-pipe "$@" 3<&{0} 4>&{1}'
_HIGH = 10


class Browser:
    """One browser with one page. Use it in a `with` statement."""

    def __init__(self, profile: Path, *, width: int = 1280, height: int = 900) -> None:
        program = shutil.which("chromium", path=PATH)
        assert program is not None, "install() first"
        (low_commands, self._write_end), (self._read_end, low_answers) = os.pipe(), os.pipe()
        commands, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _HIGH) for end in (low_commands, low_answers))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += [
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", _SCRIPT.format(commands, answers), program, *options],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (low_commands, low_answers, commands, answers):
            os.close(end)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target for target in targets if target["type"] == "page")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired):
            self.call("Browser.close")
            self._process.wait(timeout=10)
        self._process.kill()
        self._process.wait()
        os.close(self._write_end)
        os.close(self._read_end)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result. Events that come meanwhile are kept."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_end, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read_end], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._read_end, 1 << 20) if ready else b""
            assert chunk, f"the browser does not answer; exit code {self._process.poll()}"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, file: Path) -> None:
        """Load a page from a file, up to its `load` event."""
        self._events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not self.find_events("Page.loadEventFired"):
            self._events.append(self._receive())

    def find_events(self, method: str) -> list[dict[str, Any]]:
        """Return what the browser told of since the page was opened."""
        return [event["params"] for event in self._events if event.get("method") == method]

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window, in CSS pixels."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Click on the first element that a CSS selector finds."""
        box = self.evaluate(
            f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))(document.querySelector({selector!r}))"
        )
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def take_picture(self) -> bytes:
        """Return a PNG of the whole page, also of what lies below the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
