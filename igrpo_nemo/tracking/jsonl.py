"""The sink that is always there: metrics.jsonl and samples.jsonl of the run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from igrpo_nemo.run.folder import RunFolder


class JsonlSink:
    """Writes through the run folder, which its owner closes. Errors are the run's (UserError)."""

    remote = False

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        self._folder.append_metrics(kind, step, time.time(), metrics)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        for row in rows:
            self._folder.append_sample(step, row)

    def close(self) -> None:
        pass
