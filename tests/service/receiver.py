"""A webhook's receiver that answers as it is told to."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Writes an answer, or not.
Answer = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hang(seconds: float) -> Answer:
    return lambda _: time.sleep(seconds)


def trickle(seconds: float) -> Answer:
    """A header that never ends, a byte at a time: no single read takes long."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        end = time.monotonic() + seconds
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while time.monotonic() < end:
            try:
                handler.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.05)

    return answer


def flood(handler: BaseHTTPRequestHandler) -> None:
    """A success with a body without end."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x" * 65536)
    except OSError:
        pass


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@dataclass
class Receiver:
    """What came, and what is answered next; the last answer is given again and again."""

    url: str = ""
    answers: list[Answer] = field(default_factory=lambda: [status(204)])
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def receiver() -> Iterator[Receiver]:
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}/hook"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
