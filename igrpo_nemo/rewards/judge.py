"""A generative judge as a reward component: any OpenAI-compatible endpoint, strict and bounded.

    (problem, completion) --cache?--> score
            \\--prompt (completion between unguessable delimiters)--> endpoint --JSON--> score
    down, late or malformed to the end --> the rule-based verdict, counted

The key is read from the environment and never logged; error texts of the endpoint, which may quote
it, are not passed on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards.accuracy import Verdict
from igrpo_nemo.rewards.judge_prompt import RESPONSE_SCHEMA, judge_messages, read_score
from igrpo_nemo.rewards.weighted import ScoreRequest

# What the endpoint says about us rather than about the moment: retrying does not help.
_REFUSALS = {
    400: "does not accept the request",
    401: "refuses the key",
    403: "refuses the key",
    404: "does not know the model",
    422: "does not accept the request",
}
_RESPONSE_FORMATS = ("json_schema", "json_object", "none")


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Where the judge is, and its limits (seconds; prices per million tokens)."""

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    cache_path: Path | None = None
    concurrency: int = 16
    attempts: int = 8
    attempt_timeout_s: float = 30.0
    item_deadline_s: float = 120.0
    group_deadline_s: float = 300.0
    backoff_s: float = 0.5
    max_tokens: int = 1_024
    response_format: str = "json_schema"
    """`json_schema`, `json_object`, or `none` for endpoints without structured output."""
    prompt_price: float = 0.0
    completion_price: float = 0.0


@dataclass(slots=True)
class JudgeStats:
    """Counts since the judge was made."""

    judged: int = 0
    """Completions that got the judge's score, cached ones included."""
    cached: int = 0
    """Completions whose score came from the cache (or from an equal one in the group)."""
    requests: int = 0
    """Requests sent, retries included."""
    fallbacks: int = 0
    """Completions that got the rule-based verdict instead."""
    failures: Counter[str] = field(default_factory=Counter)
    """Attempts that failed, by kind: timeout, connection, status_500, malformed, ..."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Judge:
    """A reward component (`weighted.Component`): scores in [0, 1], rounded to 2 decimals.

    Equal (model, prompt, problem, completion) are judged once and kept in `cache_path`. A call
    returns within `group_deadline_s`; what is missing then, or fails to the end, gets 1.0 or 0.0
    by its accuracy verdict. Raises UserError without a key, and where the endpoint refuses the
    first requests for a reason that no retry mends.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "the judge needs the openai client: pip install 'igrpo-nemo[judge]'"
            ) from None
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise UserError(f"the judge's key is not set: export {settings.api_key_env}")
        if settings.response_format not in _RESPONSE_FORMATS:
            raise UserError(
                f"judge response_format {settings.response_format!r}: known are "
                f"{', '.join(_RESPONSE_FORMATS)}"
            )
        self.settings = settings
        self.stats = JudgeStats()
        self._openai = openai
        self._key = key
        self._cache = _Cache(settings.cache_path)
        self._stats_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Judge(model={self.settings.model!r}, base_url={self.settings.base_url!r})"

    def __call__(
        self, requests: Sequence[ScoreRequest], verdicts: Sequence[Verdict]
    ) -> list[float]:
        """A score per request, in order, within the group's deadline."""
        deadline = time.monotonic() + self.settings.group_deadline_s
        messages = [judge_messages(r.problem, r.text) for r in requests]
        keys = [self._cache_key(message) for message in messages]
        scores = self._cache.read(keys)
        fresh = {k: m for k, m in zip(keys, messages, strict=True) if k not in scores}
        known = len(keys) - len(fresh)
        if fresh:
            scores.update(self._judge_in_thread(fresh, deadline))
        judged = sum(key in scores for key in keys)
        with self._stats_lock:
            self.stats.judged += judged
            self.stats.cached += known
            self.stats.fallbacks += len(keys) - judged
        return [
            scores.get(key, 1.0 if verdict.correct else 0.0)
            for key, verdict in zip(keys, verdicts, strict=True)
        ]

    def close(self) -> None:
        self._cache.close()

    def _cache_key(self, messages: list[dict[str, str]]) -> str:
        # The messages hold the prompt, the problem and the completion.
        text = json.dumps([self.settings.model, self.settings.response_format, messages])
        return hashlib.sha256(text.encode()).hexdigest()

    def _judge_in_thread(
        self, fresh: dict[str, list[dict[str, str]]], deadline: float
    ) -> dict[str, float]:
        """Run the requests on an event loop of their own: the caller may already be on one."""
        done: Future[dict[str, float]] = Future()
        found: dict[str, float] = {}

        def work() -> None:
            try:
                done.set_result(asyncio.run(self._judge_all(fresh, deadline, found)))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, name="judge", daemon=True).start()
        try:
            return done.result(timeout=max(0.0, deadline - time.monotonic()) + 1.0)
        except TimeoutError:
            return dict(found)  # The loop is stuck in a call that does not yield: leave it.

    async def _judge_all(
        self, fresh: dict[str, list[dict[str, str]]], deadline: float, found: dict[str, float]
    ) -> dict[str, float]:
        slots = asyncio.Semaphore(self.settings.concurrency)

        async def one(client: Any, key: str, messages: list[dict[str, str]]) -> None:
            async with slots:
                score = await self._judge_one(client, messages, deadline)
            if score is not None:
                found[key] = score
                self._cache.write(key, score)

        async with self._openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.settings.base_url,
            max_retries=0,  # Retries are ours: they know the deadline and are counted.
            timeout=self.settings.attempt_timeout_s,
        ) as client:
            tasks = [asyncio.ensure_future(one(client, k, m)) for k, m in fresh.items()]
            finished, late = await asyncio.wait(
                tasks,
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_EXCEPTION,
            )
            for task in late:
                task.cancel()
            errors = [task.exception() for task in finished]
        for error in filter(None, errors):
            raise error
        return dict(found)

    async def _judge_one(
        self, client: Any, messages: list[dict[str, str]], deadline: float
    ) -> float | None:
        """The score, or None after the last attempt or at the item's deadline."""
        limit = min(deadline, time.monotonic() + self.settings.item_deadline_s)
        for attempt in range(self.settings.attempts):
            left = limit - time.monotonic()
            if left <= 0:
                break
            timeout = min(left, self.settings.attempt_timeout_s)
            try:
                return await asyncio.wait_for(self._ask(client, messages), timeout)
            except _Failed as failure:
                self._count(str(failure))
            except TimeoutError:
                self._count("timeout")
            pause = self.settings.backoff_s * 2**attempt * (0.5 + random.random())
            await asyncio.sleep(min(pause, max(0.0, limit - time.monotonic())))
        return None

    async def _ask(self, client: Any, messages: list[dict[str, str]]) -> float:
        """One request. Raises _Failed with the kind of failure."""
        openai = self._openai
        with self._stats_lock:
            self.stats.requests += 1
        try:
            reply = await client.chat.completions.create(
                model=self.settings.model,
                messages=messages,
                temperature=0.0,
                max_tokens=self.settings.max_tokens,
                **_response_format(self.settings.response_format),
            )
        except openai.APITimeoutError:
            raise _Failed("timeout") from None
        except openai.APIStatusError as error:
            self._refuse(error.status_code)
            raise _Failed(f"status_{error.status_code}") from None
        except openai.APIConnectionError:
            raise _Failed("connection") from None
        except openai.OpenAIError as error:
            raise _Failed(type(error).__name__) from None
        except ValueError:
            raise _Failed("malformed") from None
        self._count_tokens(getattr(reply, "usage", None))
        choices = getattr(reply, "choices", None)
        score = read_score(choices[0].message.content) if choices else None
        if score is None:
            raise _Failed("malformed")
        return score

    def _refuse(self, status: int) -> None:
        """Stop on an answer that no retry mends, unless the judge has worked before."""
        if status in _REFUSALS and self.stats.judged == 0:
            where = self.settings.base_url or "api.openai.com"
            raise UserError(
                f"the judge at {where} {_REFUSALS[status]} (HTTP {status}): check the model "
                f"{self.settings.model!r} and {self.settings.api_key_env}"
            ) from None

    def _count(self, kind: str) -> None:
        with self._stats_lock:
            self.stats.failures[kind] += 1

    def _count_tokens(self, usage: Any) -> None:
        prompt = int(getattr(usage, "prompt_tokens", 0) or 0)
        completion = int(getattr(usage, "completion_tokens", 0) or 0)
        with self._stats_lock:
            self.stats.prompt_tokens += prompt
            self.stats.completion_tokens += completion
            self.stats.cost += (
                prompt * self.settings.prompt_price + completion * self.settings.completion_price
            ) / 1e6

    def metrics(self) -> dict[str, float]:
        """The counts of `stats` by name, failed requests by kind, since the judge was made."""
        with self._stats_lock:
            counts = asdict(self.stats)
        failures = counts.pop("failures")
        counts.update({f"failures/{kind}": number for kind, number in failures.items()})
        return {name: float(value) for name, value in counts.items()}


class _Failed(Exception):
    """One attempt that gave no score; its text is the kind."""


def _response_format(kind: str) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    return {"response_format": {"type": "json_schema", "json_schema": RESPONSE_SCHEMA}}


class _Cache:
    """Scores on disk (SQLite: safe between threads and processes), or in memory without a path."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                path or ":memory:", timeout=30.0, check_same_thread=False, isolation_level=None
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)"
            )
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"the judge's cache {path} cannot be used: {error}") from None

    def read(self, keys: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        with self._lock:
            for key in dict.fromkeys(keys):
                row = self._database.execute(
                    "SELECT score FROM scores WHERE key = ?", (key,)
                ).fetchone()
                if row is not None:
                    found[key] = row[0]
        return found

    def write(self, key: str, score: float) -> None:
        with self._lock:
            self._database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))

    def close(self) -> None:
        with self._lock:
            self._database.close()
