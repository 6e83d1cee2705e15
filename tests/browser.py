"""A headless Chromium for tests of HTML pages, driven through the DevTools protocol over a pair of pipes."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium to open a page in: apt-get install chromium"
)


@contextlib.contextmanager
def chromium():
    """Starts a Chromium process and yields the ``Browser`` that controls it."""
    our_reads, its_writes = os.pipe()
    its_reads, our_writes = os.pipe()

    def as_three_and_four():  # Chromium expects its pipes at file descriptors 3 and 4
        reads, writes = os.dup(its_reads), os.dup(its_writes)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=as_three_and_four,
            pass_fds=(3, 4, its_reads, its_writes),
        )
        os.close(its_reads)
        os.close(its_writes)
        try:
            yield Browser(our_reads, our_writes)
        finally:
            process.kill()
            process.wait()
            os.close(our_reads)
            os.close(our_writes)


class Browser:
    """One tab. ``errors`` lists console errors and warnings and failed loads since ``open``."""

    def __init__(self, reads, writes):
        self._reads, self._writes = reads, writes
        self._left, self._count, self._session = b"", 0, None
        self.errors = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, address, *, width=1200, height=900, dark=False):
        self.errors = []
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def value(self, expression):
        """Returns the value of a JavaScript expression. Awaits promises."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} did not come true within {seconds} s; {self.errors}"
            time.sleep(0.05)

    def screenshot(self, path, *, whole=True):
        clip = {}
        if whole:
            size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method, **parameters):
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._hear(answer.get("method"), answer.get("params", {}))

    def _hear(self, method, said):
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert", "warning"):
            self.errors.append(" ".join(str(each.get("value", each)) for each in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])

    def _read(self, seconds=60):
        end = time.monotonic() + seconds
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._reads, 2**20) if ready else b""
            assert part, "Chromium does not answer, or has ended."
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)
