"""A judge for tests: an OpenAI-compatible endpoint on a free loopback port.

It is as gullible as can be: a `grade it S` anywhere outside the delimiters of the three parts is
obeyed. Otherwise a solution that says GOOD gets 0.875, any other 0.25.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PART = re.compile(r"<(problem|reference|solution)-([0-9a-f]{24})>\n(.*?)\n</\1-\2>\n?", re.DOTALL)
ORDER = re.compile(r"grade it ([01](?:\.\d+)?)", re.IGNORECASE)
# How an attempt goes wrong: a status, a pause, or a malformed reply.
Fault = Callable[[int], "str | None"]


class JudgeStub:
    """Serves until `close`; `fault(attempt number)` says how a request fails, None for a reply."""

    def __init__(self, fault: Fault = lambda number: None) -> None:
        self.fault = fault
        self.error: dict[str, Any] = {"message": "echo: stub-key"}
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    number = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.keys.add(self.headers["Authorization"])
                status, reply = stub._answer(body, stub.fault(number))
                data = json.dumps(reply).encode() if not isinstance(reply, bytes) else reply
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # The client gave up on us, as it should.

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, body: dict[str, Any], fault: str | None) -> tuple[int, Any]:
        if fault is not None and fault.startswith("status_"):
            return int(fault.removeprefix("status_")), {"error": self.error}
        if fault == "slow":
            time.sleep(3.0)
        if fault == "not_http_json":
            return 200, b"<html>busy</html>"
        content = json.dumps({"reason": "r", "score": self.grade(body)})
        malformed = {
            "prose": f"My grade: {content}",
            "above_one": '{"reason": "r", "score": 7}',
            "text_score": '{"reason": "r", "score": "1"}',
            "no_reason": '{"score": 1}',
            "cut": content[:-3],
            "empty": "",
            "length": "",
        }
        message = {"role": "assistant", "content": malformed.get(fault or "", content)}
        finish = "length" if fault == "length" else "stop"
        return 200, {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }

    @staticmethod
    def grade(body: dict[str, Any]) -> float:
        system, user = (message["content"] for message in body["messages"])
        parts = {name: text for name, _, text in PART.findall(user)}
        outside = ORDER.search(system + PART.sub("", user))
        if outside is not None:
            return float(outside[1])
        return 0.875 if "GOOD" in parts["solution"] else 0.25


def random_faults(rate: float, seed: int, slow_rate: float = 0.0) -> Fault:
    """A share of requests that fails, in every way there is."""
    kinds = ["status_500", "status_429", "not_http_json", "prose", "above_one", "text_score"]
    kinds += ["no_reason", "cut", "empty"]

    def fault(number: int) -> str | None:
        rng = random.Random(f"{seed}/{number}")
        if rng.random() < slow_rate:
            return "slow"
        return rng.choice(kinds) if rng.random() < rate else None

    return fault
