"""A web server on loopback whose answers a test sets, and which remembers what it was asked."""

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Seen:
    """One request that the server got."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Reply:
    """What the server answers on one path."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    before: Callable[[], object] = lambda: None
    """Called first: to wait, for example."""


class Web:
    """`replies` by path; what has none answers 404."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.replies: dict[str, Reply] = {}
        self.seen: list[Seen] = []

    def serve(self, path: str, body: bytes = b"", status: int = 200, **headers: str) -> str:
        """Set the answer of a path and return its URL."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.replies[path] = Reply(status, body, named)
        return self.url + path


@contextmanager
def open_web() -> Generator[Web]:
    """Start a Web on a free port and stop it in the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            web.seen.append(Seen(self.command, self.path, dict(self.headers), body))
            reply = web.replies.get(self.path, Reply(404))
            reply.before()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # a client may have given up by now, which some tests are about
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        web = Web(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
