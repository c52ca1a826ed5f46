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
import re
import sqlite3
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards.accuracy import Verdict
from igrpo_nemo.rewards.judge_prompt import TEXTS, judge_messages, read_score
from igrpo_nemo.types import Problem, ScoreRequest

_REFUSALS: dict[int, str] = TEXTS["refusals"]
_PARAMETERS: dict[str, str] = TEXTS["parameters"]


_COUNTS = "judged cached fallbacks requests prompt_tokens completion_tokens cost".split()


class Judge:
    """A reward component (`weighted.Component`): scores in [0, 1], rounded to 2 decimals.

    Equal (model, prompt, problem, completion) are judged once and kept in `cache_path`. A call
    returns within `group_deadline_s`; what is missing then, or fails to the end, gets 1.0 or 0.0
    by its accuracy verdict. Raises UserError without a key, and where the endpoint refuses the
    first requests for a reason that no retry mends.

    Args:
        keys: The config section `igrpo.judge`.
        cache_path: The file of the scores where the section names none; None keeps them in memory.
        backoff_s: Seconds before a first retry; they double from there.
    """

    def __init__(
        self, keys: Any, cache_path: Path | None = None, *, backoff_s: float = 0.5
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "the judge needs the openai client: pip install 'igrpo-nemo[judge]'"
            ) from None
        key = os.environ.get(keys.api_key_env)
        if not key:
            raise UserError(f"the judge's key is not set: export {keys.api_key_env}")
        self.keys = keys
        self.stats: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self._openai = openai
        self._key = key
        self._backoff_s = backoff_s
        self._answered = self._warned = False
        self._cache = _Cache(Path(keys.cache_path) if keys.cache_path else cache_path)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Judge(model={self.keys.model!r}, base_url={self.keys.base_url!r})"

    def __call__(
        self, requests: Sequence[ScoreRequest], verdicts: Sequence[Verdict]
    ) -> list[float]:
        """A score per request, in order, within the group's deadline."""
        deadline = time.monotonic() + self.keys.group_deadline_s
        messages = [judge_messages(r.problem, r.text) for r in requests]
        keys = [self._cache_key(message) for message in messages]
        scores = self._cache.read(keys)
        fresh = {k: m for k, m in zip(keys, messages, strict=True) if k not in scores}
        known = len(keys) - len(fresh)
        if fresh:
            scores |= self._judged(fresh, deadline)
        judged = sum(key in scores for key in keys)
        if fresh and not self._answered and not self._warned:
            self._warned = True
            failed = [
                f"{n} {kind.partition('/')[2]}"
                for kind, n in self.stats.most_common()
                if kind.startswith("failures/")
            ]
            kinds = ", ".join(failed)
            warnings.warn(
                f"{self._name} has given no score yet ({kinds or 'no reply in time'}): the "
                "rule-based verdict stands in, counted in reward/judge/fallbacks",
                stacklevel=2,
            )
        self._count(judged=judged, cached=known, fallbacks=len(keys) - judged)
        return [
            scores.get(key, 1.0 if verdict.correct else 0.0)
            for key, verdict in zip(keys, verdicts, strict=True)
        ]

    def close(self) -> None:
        self._cache.close()

    def _cache_key(self, messages: list[dict[str, str]]) -> str:
        # The messages hold the prompt, the problem and the completion.
        text = json.dumps([self.keys.model, self.keys.response_format, messages])
        return hashlib.sha256(text.encode()).hexdigest()

    def _judged(self, fresh: dict[str, list[dict[str, str]]], deadline: float) -> dict[str, float]:
        """The scores that there are at the deadline, from an event loop of its own: the caller may
        already be on one."""
        found: dict[str, float] = {}
        thread = ThreadPoolExecutor(1, "judge")
        work = thread.submit(asyncio.run, self._judge_all(fresh, deadline, found))
        thread.shutdown(wait=False)
        try:
            work.result(max(0.0, deadline - time.monotonic()) + 1.0)
        except TimeoutError:
            pass  # The loop is stuck in a call that does not yield, such as a look-up of a name.
        return dict(found)

    async def _judge_all(
        self, fresh: dict[str, list[dict[str, str]]], deadline: float, found: dict[str, float]
    ) -> None:
        slots = asyncio.Semaphore(self.keys.concurrency)

        async def one(client: Any, key: str, messages: list[dict[str, str]]) -> None:
            async with slots:
                score = await self._judge_one(client, messages, deadline)
            if score is not None:
                found[key] = score
                self._cache.write(key, score)

        async with self._client() as client:
            tasks = [asyncio.ensure_future(one(client, k, m)) for k, m in fresh.items()]
            left = max(0.0, deadline - time.monotonic())
            finished, late = await asyncio.wait(
                tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for error in filter(None, [task.exception() for task in finished]):
            raise error

    def _client(self) -> Any:
        return self._openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.keys.base_url,
            max_retries=0,  # Retries are ours: they know the deadline and are counted.
            timeout=self.keys.attempt_timeout_s,
        )

    async def _judge_one(
        self, client: Any, messages: list[dict[str, str]], deadline: float
    ) -> float | None:
        """The score, or None after the last attempt or at the item's deadline."""
        limit = min(deadline, time.monotonic() + self.keys.item_deadline_s)
        for attempt in range(self.keys.attempts):
            if (left := limit - time.monotonic()) <= 0:
                break
            try:
                return await asyncio.wait_for(
                    self._ask(client, messages), min(left, self.keys.attempt_timeout_s)
                )
            except _Failed as failure:
                self._count(**{f"failures/{failure}": 1})
            except TimeoutError:
                self._count(**{"failures/timeout": 1})
            pause = self._backoff_s * 2**attempt * (0.5 + random.random())
            await asyncio.sleep(min(pause, max(0.0, limit - time.monotonic())))
        return None

    async def _ask(self, client: Any, messages: list[dict[str, str]]) -> float:
        """One request. Raises _Failed with the kind of failure."""
        openai = self._openai
        self._count(requests=1)
        try:
            reply = await client.chat.completions.create(
                model=self.keys.model, messages=messages, **self._parameters()
            )
        except openai.APITimeoutError:
            raise _Failed("timeout") from None
        except openai.APIStatusError as error:
            self._refuse(error)
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
            cut = bool(choices) and getattr(choices[0], "finish_reason", None) == "length"
            raise _Failed("cut_off" if cut else "malformed")
        self._answered = True
        return score

    def _parameters(self) -> dict[str, Any]:
        """What is sent beside model and messages: no key that is null."""
        names = ("temperature", "max_tokens", "max_completion_tokens", "reasoning_effort")
        given = {name: getattr(self.keys, name) for name in names}
        sent = {name: value for name, value in given.items() if value is not None}
        kind = self.keys.response_format
        schema = {"json_schema": TEXTS["response_schema"]} if kind == "json_schema" else {}
        form = {"type": kind, **schema}
        return sent if kind == "none" else {**sent, "response_format": form}

    def _refuse(self, error: Any) -> None:
        """Stop on an answer that no retry mends, unless the judge has worked before.

        The endpoint's own words may quote the key: only a parameter's name is taken from them.
        """
        status = error.status_code
        if status not in _REFUSALS or self._answered:
            return
        blamed, said = error.param, str(error.body)
        sent = [name for name in _PARAMETERS if name in self._parameters()]
        named = [blamed] if blamed in sent else [n for n in sent if re.search(rf"\b{n}\b", said)]
        if named and status in (400, 422):
            raise UserError(
                f"{self._name} does not accept {named[0]} (HTTP {status}): set "
                f"{_PARAMETERS[named[0]]}"
            ) from None
        raise UserError(
            f"{self._name} {_REFUSALS[status]} (HTTP {status}): check the model "
            f"{self.keys.model!r} and {self.keys.api_key_env}"
        ) from None

    @property
    def _name(self) -> str:
        return f"the judge at {self.keys.base_url or 'api.openai.com'}"

    def check(self) -> None:
        """One request, uncached; raises UserError with one line where it earns no score."""
        messages = judge_messages(Problem("check", "What is 1 + 1?", "2"), "<answer>2</answer>")

        async def ask() -> None:
            async with self._client() as client:
                await asyncio.wait_for(self._ask(client, messages), self.keys.attempt_timeout_s)

        try:
            asyncio.run(ask())
        except (_Failed, TimeoutError) as failure:
            kind = "timeout" if isinstance(failure, TimeoutError) else str(failure)
            what = TEXTS["failures"].get(kind, f"fails with {kind}: try again later")
            raise UserError(f"{self._name} {what}") from None

    def _count(self, **more: float) -> None:
        with self._lock:
            self.stats.update(more)

    def _count_tokens(self, usage: Any) -> None:
        prompt, completion = (
            int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens")
        )
        cost = prompt * self.keys.prompt_price + completion * self.keys.completion_price
        self._count(prompt_tokens=prompt, completion_tokens=completion, cost=cost / 1e6)

    def metrics(self) -> dict[str, float]:
        """Counts since the judge was made: completions `judged` (`cached` ones, or equal to another
        of the group, included) and `fallbacks`; `requests` with retries, `failures/<kind>`."""
        with self._lock:
            return {name: float(value) for name, value in self.stats.items()}


def judge_problems(igrpo: Any) -> list[str]:
    """What one request to the judge of the config section `igrpo` finds wrong, from this host.

    Empty where no judge is used, where `igrpo.judge.check` is false, and where it answers.
    """
    if not igrpo.reward.judge or igrpo.judge is None or not igrpo.judge.check:
        return []
    try:
        judge = Judge(igrpo.judge.model_copy(update={"cache_path": None}))
        judge.check()
    except UserError as error:
        return [f"{error} (igrpo.judge.check=false leaves this check out)"]
    return []


class _Failed(Exception):
    """One attempt that gave no score; its text is the kind."""


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
        query, found = "SELECT score FROM scores WHERE key = ?", {}
        with self._lock:
            for key in keys:
                if row := self._database.execute(query, (key,)).fetchone():
                    found[key] = row[0]
        return found

    def write(self, key: str, score: float) -> None:
        with self._lock:
            self._database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))

    def close(self) -> None:
        with self._lock:
            self._database.close()
