"""A chat server that answers by a rule, keeps what it was asked, and can fail on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int = 10
    truncated: bool = False


class Stub:
    """`answer(problem, seed)` gives the reply; `problem` is the last line of the user's message.

    `fault(number)` is called with the number of each request, from 1, before it is answered. What
    either of them raises by mistake is raised at the end of the `with` that the stub serves in.
    After `die()` nothing listens at its address, until it is started again.
    """

    def __init__(
        self,
        answer: Callable[[str, int], Reply],
        fault: Callable[[int], None] = lambda number: None,
        port: int = 0,
    ) -> None:
        self.answer, self.fault, self.port = answer, fault, port
        self.asked: Counter[tuple[str, int]] = Counter()
        self.answered: Counter[tuple[str, int]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.failures: list[Exception] = []
        self._lock = threading.Lock()
        self._http: _Server | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Stub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        if self.failures:
            raise AssertionError(f"the stub failed: {self.failures[0]}") from self.failures[0]

    def start(self) -> None:
        self._http = _Server(("127.0.0.1", self.port), _Handler)
        self._http.stub = self
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def die(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        problem = body["messages"][-1]["content"].splitlines()[-1].strip()
        key = (problem, body["seed"])
        with self._lock:
            self.asked[key] += 1
            self.bodies.append(body)
            number = len(self.bodies)
        self.fault(number)
        reply = self.answer(problem, body["seed"])
        with self._lock:
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
