"""The Weights & Biases sink (extra `wandb`); a resumed run continues its own wandb run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_atomic


class WandbSink:
    """Logs to `wandb.init(**settings)`; `settings` are NeMo-RL's `logger.wandb`: project, name.

    The run's id is kept in `folder`, so that a resumed run is the same run there. wandb itself
    drops the steps that it already has: they were replayed from the checkpoint and are equal.
    """

    remote = True

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, object],
        config: object,
        resume_step: int | None = None,
    ) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise UserError(
                "logger.wandb_enabled needs wandb: pip install 'igrpo-nemo[wandb]'"
            ) from error
        id_file = folder / "wandb_run_id"
        options: dict = {"dir": str(folder), **settings, "config": config}
        if resume_step is not None and id_file.exists():
            options |= {"id": id_file.read_text().strip(), "resume": "allow"}
        try:
            self._run = wandb.init(**options)
        except (wandb.Error, TypeError) as error:
            raise UserError(f"logger.wandb: {' '.join(str(error).split())}") from error
        write_atomic(id_file, self._run.id)
        self._table = wandb.Table

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        if rows:
            columns = sorted({name for row in rows for name in row})
            data = [[row.get(name) for name in columns] for row in rows]
            self._run.log({"samples": self._table(columns=columns, data=data)}, step=step)

    def close(self) -> None:
        self._run.finish()
