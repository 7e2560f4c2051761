"""A headless Chromium, driven by its DevTools protocol: what a person would see, press and read."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PATIENCE_S = 20.0


class Page:
    """A tab. Everything that the console tells is kept, and every request but those of the page itself."""

    def __init__(self, socket):
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors, self.requests = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = self._receive()
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]

    def _receive(self):
        said = json.loads(self._socket.recv())
        method, values = said.get("method"), said.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(values["exceptionDetails"].get("exception", values["exceptionDetails"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
            self.errors.append(values["args"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        return said

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def js(self, text):
        """The value of an expression; a promise is waited for."""
        said = self.send("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def until(self, condition):
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE_S
        while not self.js(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.05)

    def look(self, *, width=1280, height=900, dark=False):
        """The size and the colours that the reader has."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key, **more):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def mouse(self, kind, x, y, **more):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def picture(self, path, *, whole=True):
        if whole:  # charts draw themselves when they come into sight
            self.js(
                "(async () => { for (let y = 0; y < document.body.scrollHeight; y += 500) "
                "{ scrollTo(0, y); await new Promise(r => setTimeout(r, 120)); } scrollTo(0, 0); })()"
            )
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chromium(folder):
    """A tab of a new browser whose files are in ``folder``."""
    import websocket

    command = [
        PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run",
        "--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={folder}", "about:blank",
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        told, end = folder / "DevToolsActivePort", time.monotonic() + _PATIENCE_S
        while not (told.exists() and told.read_text().count("\n")):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(each for each in json.load(answer) if each["type"] == "page")
        socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=_PATIENCE_S)
        try:
            yield Page(socket)
        finally:
            socket.close()
    finally:
        process.terminate()
        process.wait()
