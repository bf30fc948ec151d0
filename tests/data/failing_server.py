"""A web server on localhost that fails as one tells it to."""

import hashlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Fault(NamedTuple):
    """What goes wrong with one request: a status, or the connection after `after` bytes of the body."""

    status: int = 200
    after: int | None = None
    stall: bool = False  # keep the connection open without sending on, instead of closing it


@dataclass
class FailingServer:
    """`files` maps a path such as `/0.tar` to its content. Each request takes the first of its path's `faults`, if any.

    `requests` are the paths asked for, `sent` the bytes of the body sent for each.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    ranges: bool = True
    lengths: bool = True
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds_per_request: float = 0.0
    closed: threading.Event = field(default_factory=threading.Event)

    def add(self, path: str, content: bytes) -> str:
        """Serve `content`; returns its URL."""
        self.files[path] = content
        return self.url + path


@contextmanager
def failing_server() -> Iterator[FailingServer]:
    """Run a server on a free port."""
    state = FailingServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, state)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield state
    finally:
        state.closed.set()
        server.shutdown()
        server.server_close()


def _answer(request: BaseHTTPRequestHandler, state: FailingServer) -> None:
    path = request.path.partition("?")[0]
    state.requests.append(path)
    time.sleep(state.seconds_per_request)
    fault = state.faults[path].pop(0) if state.faults[path] else Fault()
    content = state.files.get(path)
    if fault.status != 200 or content is None:
        request.send_error(fault.status if content is not None or fault.status != 200 else 404)
        return
    match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")) if state.ranges else None
    start = int(match[1]) if match else 0
    if start >= len(content) > 0:
        request.send_error(416)
        return
    request.send_response(206 if match else 200)
    if match:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    if state.lengths:
        request.send_header("Content-Length", str(len(content) - start))
    request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:16]}"')
    request.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
    request.end_headers()
    end = len(content) if fault.after is None else max(start, fault.after)
    state.sent[path] += end - start
    try:
        request.wfile.write(content[start:end])
        request.wfile.flush()
    except ConnectionError:
        pass
    if fault.stall:
        state.closed.wait(30)
    request.close_connection = True
