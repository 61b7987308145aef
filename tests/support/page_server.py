"""A small server on loopback that answers as a service does: token, policy, files of the page, JSON, events."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue

from ray_probe.page.report_file import static_path

TOKEN = "a-token_of-32-characters-and-more"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}


class PageServer(ThreadingHTTPServer):
    """Answers with `replies`, which a test may change; `send` sends an event to every open stream.

    Args:
        replies: JSON by path under `/v1/`; a missing one is answered with 404 and a line.
        port: of loopback; 0: any free one.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, replies: Mapping[str, object], port: int = 0) -> None:
        self.replies = dict(replies)
        self.asked: list[str] = []
        self.streams: list[SimpleQueue[bytes | None]] = []
        self.listening = threading.Condition()
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def port(self) -> int:
        """Port of the server."""
        return int(self.server_address[1])

    def url(self, token: str | None = TOKEN) -> str:
        """Return the address of the page, with a token in its fragment."""
        return f"http://127.0.0.1:{self.port}/" + ("" if token is None else f"#token={token}")

    def wait_for_stream(self) -> None:
        """Wait until a page listens."""
        with self.listening:
            assert self.listening.wait_for(lambda: len(self.streams) > 0, 20.0), "no page listens"

    def send(self, kind: str, value: object) -> None:
        """Send an event to every stream."""
        for stream in self.streams:
            stream.put(f"event: {kind}\r\ndata: {json.dumps(value)}\r\n\r\n".encode())

    def stop(self) -> None:
        """End streams and server."""
        self.ended.set()
        for stream in self.streams:
            stream.put(None)
        self.shutdown()
        self.server_close()


@contextmanager
def serving(replies: Mapping[str, object], port: int = 0) -> Iterator[PageServer]:
    """Serve the page with these replies for the block."""
    server = PageServer(replies, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if not server.ended.is_set():
            server.stop()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        """Answer a request."""
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if not path.startswith("/v1/"):
            self._file(static_path("index.html" if path == "/" else path.removeprefix("/static/")))
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(403, b'{"error": "the token is wrong"}', "application/json")
        elif path == "/v1/events":
            self._events()
        elif (name := path.removeprefix("/v1/")) in self.server.replies:
            self._answer(200, json.dumps(self.server.replies[name]).encode(), "application/json")
        else:
            self._answer(404, b'{"error": "no measurement has started yet"}', "application/json")

    def _file(self, path: Path) -> None:
        if path.is_file():
            self._answer(200, path.read_bytes(), KINDS.get(path.suffix, "text/plain"))
        else:
            self._answer(404, b"", "text/plain")

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def _events(self) -> None:
        stream: SimpleQueue[bytes | None] = SimpleQueue()
        with self.server.listening:
            self.server.streams.append(stream)
            self.server.listening.notify_all()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            while (event := self._next(stream)) is not None:
                self.wfile.write(event)
                self.wfile.flush()
        except OSError:  # the page is closed
            self.server.streams.remove(stream)

    @staticmethod
    def _next(stream: "SimpleQueue[bytes | None]") -> bytes | None:
        try:
            return stream.get(timeout=15)
        except Empty:
            return b": still here\r\n\r\n"
