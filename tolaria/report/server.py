"""The page of a run that is still going: served on loopback only, from files that are only read."""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from tolaria.report.page import data_of, render
from tolaria.report.reading import RAW, RunReading

_BUCKETS = 2048
_PAUSE_S = 0.5
_PATIENCE_S = 10.0
_MOST_CONNECTIONS = 16
_PIECE = 2**20


def loopback(host: str) -> str:
    """``host`` as an address, if it is one of this machine's own that nobody else reaches.

    Raises:
        ValueError: it is another one.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not address.is_loopback:
        raise ValueError(
            f"host: expected a loopback address, such as 127.0.0.1 or ::1, got {host!r}: whoever reaches the "
            "page reads the run"
        )
    return str(address)


class Watched:
    """A run that is read on by one thread and looked at by others.

    Args:
        run: as for :class:`RunReading`.
    """

    def __init__(self, run: str | Path) -> None:
        self.reading = RunReading(Path(run), buckets=_BUCKETS)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._made: tuple[int, bytes] = (-1, b"")

    def follow(self) -> None:
        """Read what is new, again and again, until :meth:`stop`."""
        while not self._ended.is_set():
            if not self.read_once():
                self._ended.wait(_PAUSE_S)

    def read_once(self) -> bool:
        """Read one piece; whether there was one."""
        with self._lock:
            try:
                self.reading.begin_anew_if_replaced()
                return self.reading.read_some()
            except OSError:
                return False  # it is being written anew: later
            except ValueError:
                return False  # it is gone: what is known stays

    def stop(self) -> None:
        """End :meth:`follow`."""
        self._ended.set()

    def page(self) -> bytes:
        """The page with what is known by now."""
        with self._lock:
            return render(data_of([self.reading], None))

    def data(self, after: int) -> bytes | None:
        """The page's data, or None if there is none newer than version ``after``."""
        with self._lock:
            version = self.reading.version
            if version == after:
                return None
            if self._made[0] != version:
                data = data_of([self.reading], None) | {"data_version": version}
                self._made = (version, json.dumps(data, allow_nan=False, separators=(",", ":")).encode())
            return self._made[1]

    def raw(self, name: str) -> Path | None:
        """The file that a link of the page names; None if the page has no such link."""
        known = {*RAW, *self.reading.files}
        path = self.reading.folder / name
        return path if name in known and path.is_file() else None


class Server(ThreadingHTTPServer):
    """Answers on one loopback address, to at most sixteen connections at a time."""

    daemon_threads = True
    watched: Watched
    hosts: frozenset[str]

    def __init__(self, address: tuple[str, int], watched: Watched) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)
        self.watched = watched
        port = self.server_address[1]
        names = ("localhost", "127.0.0.1", "[::1]", f"[{address[0]}]" if ":" in address[0] else address[0])
        self.hosts = frozenset(f"{name}:{port}" for name in names)
        self.places = threading.BoundedSemaphore(_MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (the base class's)
        """Take a connection, unless there are too many."""
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (likewise)
        """Answer it, and make room."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (likewise)
        """A browser that has left is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _PATIENCE_S
    server_version, sys_version = "tolaria", ""
    _HEADERS: ClassVar[dict[str, str]] = {
        "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin", "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
    }  # fmt: skip

    def do_GET(self) -> None:
        """The page, its data, or a raw file."""
        # whoever points a name of their own here would else read the run from their page
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, b"this page is for the machine it runs on\n", "text/plain")
            return
        url = urlsplit(self.path)
        watched = self.server.watched
        if url.path == "/":
            self._send(HTTPStatus.OK, watched.page(), "text/html; charset=utf-8")
        elif url.path == "/data.json":
            after = parse_qs(url.query).get("after", ["-1"])[0]
            body = watched.data(int(after) if after.isascii() and after.isdigit() and len(after) < 16 else -1)
            status = HTTPStatus.NO_CONTENT if body is None else HTTPStatus.OK
            self._send(status, body or b"", "application/json")
        elif url.path.startswith("/files/"):
            self._file(watched.raw(unquote(url.path.removeprefix("/files/"))))
        else:
            self._send(HTTPStatus.NOT_FOUND, b"there is no such page\n", "text/plain")

    def _file(self, path: Path | None) -> None:
        if path is None:
            self._send(HTTPStatus.NOT_FOUND, b"there is no such file\n", "text/plain")
            return
        with path.open("rb") as file:
            left = path.stat().st_size
            self._head(HTTPStatus.OK, left, "text/plain; charset=utf-8")
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                self.wfile.write(piece)
                left -= len(piece)

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self._head(status, len(body), kind)
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, length: int, kind: str) -> None:
        self.send_response(status)
        for name, value in self._HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads a line for each look."""


def watch_run(
    run: str | Path, *, host: str = "127.0.0.1", port: int = 0, say: Callable[[str], object] = print
) -> None:
    """Serve the page of a run that goes on, until Ctrl-C.

    Nothing is written to the run's folder. Whoever asks under another name than this machine's own is
    refused, so that no page from elsewhere can read it.

    Args:
        run: a run folder, a folder with ``events*.jsonl`` or ``metrics*.jsonl``, or such a file.
        host: a loopback address.
        port: where; 0: any that is free.
        say: gets the address to open.

    Raises:
        ValueError: ``run`` is none, or ``host`` is no loopback address, or ``port`` is out of range.
        OSError: the port is taken.
        MissingDependencyError: plotly is not installed.
    """
    address = loopback(host)
    if not 0 <= port <= 65535:
        raise ValueError(f"port: expected 0 to 65535, got {port}")
    watched = Watched(run)
    render({"runs": [], "comparison": None, "live": True, "version": ""})  # fail now if there is no plotly
    with Server((address, port), watched) as server:
        reader = threading.Thread(target=watched.follow, name="tolaria-watch", daemon=True)
        reader.start()
        shown = f"[{address}]" if ":" in address else address
        say(f"watching {watched.reading.path} at http://{shown}:{server.server_address[1]}/ (Ctrl-C ends it)")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            watched.stop()
            reader.join(timeout=_PATIENCE_S)
