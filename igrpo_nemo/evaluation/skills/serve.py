"""A small model on loopback, behind the chat API that NeMo-Skills and others speak.

    POST /v1/chat/completions -> chat template -> queue -> one batch of all that wait -> Sampler
    GET  /v1/models           -> the model's name and its context

Requests that come while a batch is being sampled form the next one. A reply depends on its request
alone (`seed` and prompt), not on the batch that it was sampled in.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.model import LoadedPolicy, open_policy
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.types import Completion

GATHER_S = 0.005
"""How long a batch waits for more requests after its first one."""
MAX_BATCH = 512
MAX_BODY_BYTES = 16 << 20


_Asked = tuple[SampleRequest, SamplingParams, Future[Completion]]


class Batcher:
    """Samples what waits in its queue, in batches of equal sampling parameters.

    One thread uses the model. `close()` lets the batch that is being sampled finish.
    """

    def __init__(self, policy: LoadedPolicy) -> None:
        self.tokenizer = policy.tokenizer
        self.sampler = Sampler(policy.model, policy.tokenizer)
        self._autocast = policy.autocast
        self._queue: queue.Queue[_Asked | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int | None:
        """Tokens of prompt and reply together."""
        return self.sampler.max_model_len

    def prompt_ids(self, messages: Any, template_kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """The messages as the chat template renders them. Raises `UserError` where it cannot."""
        try:  # boundary: a template, and messages from the network
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs
            )
        except Exception as error:
            raise UserError(f"the chat template cannot render these messages: {error}") from error
        return tuple(self.tokenizer(str(text), add_special_tokens=False).input_ids)

    def submit(self, request: SampleRequest, params: SamplingParams) -> Completion:
        """The completion of a request for one; waits for it."""
        reply: Future[Completion] = Future()
        self._queue.put((request, params, reply))
        return reply.result()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=60)

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            time.sleep(GATHER_S)
            groups = {first[1]: [first]}
            for _ in range(min(self._queue.qsize(), MAX_BATCH - 1)):
                if (waiting := self._queue.get()) is None:
                    self._queue.put(None)  # the end comes after this batch
                    break
                groups.setdefault(waiting[1], []).append(waiting)
            for params, group in groups.items():
                self._sample(params, group)

    def _sample(self, params: SamplingParams, group: Sequence[_Asked]) -> None:
        try:  # whatever goes wrong belongs to those who asked, not to this thread
            with self._autocast():
                rows = self.sampler.sample([request for request, *_ in group], params)
        except Exception as error:
            for *_, reply in group:
                reply.set_exception(error)
        else:
            for (*_, reply), (completion,) in zip(group, rows, strict=True):
                reply.set_result(completion)


@contextmanager
def serving(
    model: Path, *, precision: str = "float32", chat_template: str | None = None
) -> Iterator[str]:
    """Serves a model folder on loopback; yields the address, ending in /v1. `chat_template` is
    that of the config, None the model's own."""
    engine = Batcher(open_policy(model, precision=precision, chat_template=chat_template))
    server = _Server(engine, str(model.absolute()))
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        engine.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # NeMo-Skills opens hundreds of connections at once

    def __init__(self, engine: Batcher, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.engine = engine
        self.name = name


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:  # how NeMo-Skills asks whether a server is there
        self._no_such_page()

    def do_GET(self) -> None:
        if self.path.rstrip("/") != "/v1/models":
            return self._no_such_page()
        model = {"id": self.server.name, "object": "model", "owned_by": "igrpo-nemo"}
        context = {"max_model_len": self.server.engine.context}
        self._send(200, {"object": "list", "data": [{**model, **context}]})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.path.rstrip("/") != "/v1/chat/completions" or not 0 < size <= MAX_BODY_BYTES:
            return self._no_such_page()
        body = self.rfile.read(size)
        try:  # boundary: a request from the network
            reply = chat_completion(self.server.engine, self.server.name, json.loads(body))
        except (UserError, ValueError, KeyError, TypeError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            return self._send(400, {"error": {"message": message, "type": "BadRequestError"}})
        except Exception as error:
            return self._send(500, {"error": {"message": f"{type(error).__name__}: {error}"}})
        self._send(200, reply)

    def _no_such_page(self) -> None:
        self.close_connection = True  # a body may not have been read
        self._send(404, {"error": {"message": f"there is no {self.path}"}})

    def _send(self, code: int, values: Mapping[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def chat_completion(engine: Batcher, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to a chat completion request: `temperature`, `top_p`, `top_k`, `max_tokens`,
    `stop`, `seed` and `chat_template_kwargs` count. Raises `UserError` for one that cannot be
    answered."""
    if body.get("stream") or body.get("n") not in (None, 1):
        raise UserError("stream and n are not supported: ask for one reply at a time")
    prompt_ids = engine.prompt_ids(body["messages"], body.get("chat_template_kwargs") or {})
    seed_key = uuid.uuid4().hex
    if body.get("seed") is not None:
        asked = hashlib.sha256(json.dumps(list(prompt_ids)).encode())
        seed_key = f"{body['seed']}/{asked.hexdigest()}"
    params = _sampling_params(engine.context, body, len(prompt_ids))
    completion = engine.submit(SampleRequest(prompt_ids, 1, seed_key), params)
    finish, tokens = "length" if completion.truncated else "stop", len(completion.token_ids)
    message = {"role": "assistant", "content": completion.text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": tokens,
            "total_tokens": len(prompt_ids) + tokens,
        },
    }


def _sampling_params(context: int | None, body: Mapping[str, Any], prompt: int) -> SamplingParams:
    """OpenAI's names and defaults; without a limit a reply may fill the context."""
    given = {name: value for name, value in body.items() if value is not None}
    room = None if context is None else context - prompt
    limit = given.get("max_completion_tokens", given.get("max_tokens", max(room or 1, 1)))
    if room is not None and int(limit) > max(room, 1):
        raise UserError(
            f"This model's maximum context length is {context} tokens. However, your "
            f"request has {prompt} input tokens, and max_tokens is {limit}"
        )
    stop, top_k = given.get("stop", ()), int(given.get("top_k", 0))
    return SamplingParams(
        max_new_tokens=int(limit),
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=top_k if top_k > 0 else None,
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
    )
