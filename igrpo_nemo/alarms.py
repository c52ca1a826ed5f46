"""What a run warns of while it goes on: a rollout that waits, and headline shares that are high.

StallAlarm     what has been waited for too long, by stage and problem; again after as long
HeadlineWatch  a share above its threshold in the mean over the last steps; once
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

_NAMED = 5
"""Problems that are named of a stage; the others are counted."""


@dataclass(frozen=True, slots=True)
class Headline:
    """A share of the metrics, in words, and what to change where it is above `threshold`."""

    metric: str
    name: str
    threshold: float
    remedy: str


HEADLINES = tuple(
    Headline(metric, **facts)
    for metric, facts in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()
)


class HeadlineWatch:
    """Says once of each headline that its mean over the last `window` steps is high."""

    def __init__(self, say: Callable[[str], None], window: int = 10) -> None:
        self._say = say
        self._recent: dict[Headline, deque[float]] = {
            each: deque(maxlen=window) for each in HEADLINES
        }

    def step(self, metrics: Mapping[str, float]) -> None:
        """The metrics of a step; one that is absent changes nothing."""
        for headline, recent in list(self._recent.items()):
            if headline.metric not in metrics:
                continue
            recent.append(metrics[headline.metric])
            mean = sum(recent) / len(recent)
            if len(recent) == recent.maxlen and mean > headline.threshold:
                del self._recent[headline]
                self._say(
                    f"warning: {mean:.0%} {headline.name} in the last {len(recent)} steps "
                    f"({headline.metric} above {headline.threshold:g}): {headline.remedy}"
                )


class StallAlarm:
    """A context manager; while it is open, waits that last `seconds` are told, by a thread.

    `seconds` 0 is never. `say` is called from that thread.
    """

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._say, self._clock = seconds, say, clock
        self._waits: dict[object, tuple[str, Sequence[str], float]] = {}
        self._told: dict[object, float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        if self._seconds:
            threading.Thread(target=self._watch, name="stall-alarm", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @contextmanager
    def waiting(self, stage: str, problems: Sequence[str]) -> Iterator[Callable[[], None]]:
        """What the body waits for. Calling what it yields says that something has come."""
        wait = object()

        def moved() -> None:
            with self._lock:
                self._waits[wait] = (stage, problems, self._clock())
                self._told.pop(wait, None)

        moved()
        try:
            yield moved
        finally:
            with self._lock:
                del self._waits[wait]
                self._told.pop(wait, None)

    def _watch(self) -> None:
        while not self._closed.wait(min(self._seconds / 10, 5.0)):
            self.look()

    def look(self) -> None:
        """Tells what has been waited for too long, and was not told within as many seconds."""
        now, late = self._clock(), defaultdict[str, list[str]](list)
        longest = 0.0
        with self._lock:
            for wait, (stage, problems, since) in self._waits.items():
                if now - self._told.get(wait, since) >= self._seconds:
                    self._told[wait] = now
                    longest = max(longest, now - since)
                    late[stage] += problems
        if late:
            told = "; ".join(f"{stage} of {_listed(ids)}" for stage, ids in late.items())
            self._say(f"warning: waiting for {longest:.0f} s: {told} (igrpo.stall_alarm_s)")


def _listed(problems: Sequence[str]) -> str:
    rest = len(problems) - _NAMED
    return ", ".join(problems[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
