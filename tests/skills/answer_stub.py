"""A chat server that answers by a rule, keeps what it was asked, and can fail on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int = 10
    truncated: bool = False


@dataclass
class Stub:
    """`answer(problem, seed)` gives the reply; `problem` is the last line of the user's message.

    `fault(number)` is called with the number of each request, from 1, before it is answered. What
    either of them raises by mistake is in `failures`, and `stub_server` raises it at its end.
    """

    answer: Callable[[str, int], Reply]
    fault: Callable[[int], None] = lambda number: None
    asked: Counter[tuple[str, int]] = field(default_factory=Counter)
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        problem = body["messages"][-1]["content"].splitlines()[-1].strip()
        key = (problem, body["seed"])
        with self.lock:
            self.asked[key] += 1
            self.bodies.append(body)
            number = len(self.bodies)
        self.fault(number)
        reply = self.answer(problem, body["seed"])
        with self.lock:
            self.answered[key] += 1
        finish = "length" if reply.truncated else "stop"
        message = {"role": "assistant", "content": reply.text}
        usage = {"prompt_tokens": 1, "completion_tokens": reply.tokens}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {**usage, "total_tokens": 1 + reply.tokens},
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    stub: Stub


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        self._send({})

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "stub", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self._send(self.server.stub.chat(body))
        except ConnectionError:
            self.close_connection = True  # no answer, as from a server that died
        except Exception as error:
            self.server.stub.failures.append(error)  # this thread's end would fail no test
            self.close_connection = True

    def _send(self, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class StubServer:
    """A stub behind a port; after `die()` nothing listens there, until it is `started` again."""

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.port = 0
        self._http: _Server | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._http = _Server(("127.0.0.1", self.port), _Handler)
        self._http.stub = self.stub
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def die(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()


@contextmanager
def stub_server(stub: Stub) -> Iterator[StubServer]:
    server = StubServer(stub)
    server.start()
    try:
        yield server
    finally:
        server.die()
        if stub.failures:
            raise AssertionError(f"the stub failed: {stub.failures[0]}") from stub.failures[0]
