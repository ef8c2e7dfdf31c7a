"""Headless Chromium, driven by the DevTools protocol over a pipe: a test sees and does what a person would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

_KEYS = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Escape": (27, ""),
    "Backspace": (8, ""),
    "Space": (32, " "),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
_CTRL = 2


class Browser:
    """One page. `requests` are the addresses it asked for; `errors` what its scripts or its security policy complained of."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert program, "Chromium is missing: apt-get install chromium, or FANIN_SKIP_BROWSER=1 to go without these tests"
        commands_out, commands_in = os.pipe()
        events_out, events_in = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe "
            f"--user-data-dir={profile} about:blank"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "{program}" {flags} 3<&{commands_out} 4>&{events_in}'],
            pass_fds=(commands_out, events_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_out)
        os.close(events_in)
        self._commands, self._events = os.fdopen(commands_in, "wb"), os.fdopen(events_out, "rb")
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Accessibility", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._commands.close()  # Chromium ends with its pipe
        self._events.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; meanwhile events are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            event = self._read()
            self._note(event.get("method"), event.get("params", {}))
            if event.get("id") == self._number:
                assert "error" not in event, event
                result: dict[str, Any] = event["result"]
                return result

    def _note(self, method: str | None, facts: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(facts["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert"):
            self.errors.append(str(facts["args"]))
        elif method == "Log.entryAdded" and facts["entry"]["level"] == "error" and facts["entry"]["source"] != "network":
            self.errors.append(facts["entry"]["text"])  # an answer of 4xx or 5xx is of the source "network"

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str) -> None:
        end = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}; the page says: {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        start = url.partition("#")[0]  # what follows is the page's to change
        self.wait_for(f"location.href.startsWith({json.dumps(start)}) && document.readyState === 'complete'")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        code, text = _KEYS[key]
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": _CTRL if ctrl else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def prefer(self, **features: str) -> None:
        """Sets media features of the person in front, such as prefers_color_scheme="dark"."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def controls(self) -> list[tuple[str, str]]:
        """(role, accessible name) of everything that can take the focus, as a screen reader is told."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node["name"]["value"])
            for node in nodes
            if node["role"]["value"] != "RootWebArea"
            and any(fact["name"] == "focusable" and fact["value"]["value"] for fact in node.get("properties", ()))
        ]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            piece = os.read(self._events.fileno(), 1 << 16)
            assert piece, "Chromium ended"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        return event
