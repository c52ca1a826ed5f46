"""The TensorBoard sink: scalars under their own names, flushed with every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


class TensorBoardSink:
    """Scalars in `folder`. What an earlier run logged there after `resume_step` is purged, and all
    of it where there is no step to resume from.

    Samples are not written here: samples.jsonl and the report show them.
    """

    remote = False

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step)

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        pass

    def close(self) -> None:
        self._writer.close()
