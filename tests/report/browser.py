"""A page in headless Chromium, driven by the DevTools protocol: scripts of a test run in it, and errors are kept."""

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]
SECONDS = 60


class Browser:
    """One open page."""

    def __init__(self, socket: Any):
        self.socket, self.calls, self.errors = socket, 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while (answer := self.receive()).get("id") != self.calls:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        message = json.loads(self.socket.recv(timeout=SECONDS))
        is_error = message.get("params", {}).get("entry", {}).get("level") == "error"
        if is_error or message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"])
        return message

    def open(self, path: str) -> None:
        self.call("Page.navigate", url=f"file://{path}")
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@contextmanager
def opened_browser(folder: Path) -> Iterator[Browser]:
    """Skips the test where Chromium or the WebSocket library is not installed."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium to open the page")
    client = pytest.importorskip("websockets.sync.client", reason="needs websockets to drive chromium")
    command = [chromium, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = folder / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port_file.exists() and "\n" in port_file.read_text()):
            assert time.monotonic() < end and process.poll() is None, "chromium does not start"
            time.sleep(0.05)
        port = int(port_file.read_text().splitlines()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        connection.request("GET", "/json/list")
        pages = [one for one in json.load(connection.getresponse()) if one["type"] == "page"]
        with client.connect(pages[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
