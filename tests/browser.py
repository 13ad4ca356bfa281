"""A real browser without a window, driven over a pipe: what a page does when it is opened."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: What is wider than the window, or sticks out of it; and images that are not there.
_FAULTS = """(() => {
  const width = document.documentElement.clientWidth, faults = [];
  if (document.documentElement.scrollWidth > width)
    faults.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const each of document.querySelectorAll('details')) each.open = true;
  for (const each of document.body.querySelectorAll('*')) {
    const box = each.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1))
      faults.push(`${each.tagName} .${each.getAttribute('class')} reaches to ${box.right}: `
                  + each.textContent.slice(0, 40));
    if (each.scrollWidth > each.clientWidth + 1 && each.clientWidth
        && getComputedStyle(each).display !== 'inline')
      faults.push(`${each.tagName} .${each.getAttribute('class')} holds ${each.scrollWidth}`);
  }
  for (const each of document.images)
    if (!each.complete || !each.naturalWidth) faults.push(`no image: ${each.alt}`);
  return faults;
})()"""


def find() -> str | None:
    """Return the path of a browser, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = os.fdopen(to, "wb", 0), os.fdopen(back, "rb", 0)
        self._number, self._rest = 0, b""
        self._session: str | None = None
        #: What the page has asked for, and what it has complained about.
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, width: int, *, dark: bool = False) -> list[str]:
        """Open a page in a window of a width, and return all that is wrong with it."""
        self.requests, self.complaints = [], []
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        while self.evaluate("document.readyState") != "complete":
            pass
        faults = self.evaluate(_FAULTS)
        asked = [url for url in self.requests if not url.startswith(("file:", "data:"))]
        return [*faults, *self.complaints, *asked]

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of the page's language."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        """Write what the whole page looks like, as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; what the page says meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = self._back.read(65536)
            assert got, "the browser has ended"
            self._rest += got
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        kind, said = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif kind == "Log.entryAdded":
            self.complaints.append(said["entry"]["text"])
        elif kind in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(said)[:500])


@contextmanager
def running(folder: Path) -> Iterator[Browser]:
    """Yield a browser that keeps its things in a folder, and ends with the block."""
    path = find()
    assert path is not None
    # The browser reads the pipe 3 and writes the pipe 4.
    read, to = os.pipe()
    back, write = os.pipe()
    words = [path, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    words += [f"--user-data-dir={folder}", "--hide-scrollbars", "--no-first-run"]
    script = f'exec "$@" 3<&{read} 4>&{write}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *words],
        pass_fds=(read, write),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    browser = None
    try:
        browser = Browser(to, back)
        yield browser
    finally:
        if browser is not None:
            browser._session = None
            browser._to.write(b'{"id":0,"method":"Browser.close"}\0')
        process.terminate()
        process.wait(timeout=30)
        for pipe in (browser._to, browser._back) if browser else ():
            pipe.close()
