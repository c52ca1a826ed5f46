"""Sinks that show metrics and a table of samples: TensorBoard, and two services, each an extra.

    samples -> table_rows (bounded, without secrets) -> Markdown | a table of wandb or MLflow

A resumed run continues its own: its id there is kept in the run folder (`wandb_run_id`,
`mlflow_run_id`).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_atomic
from igrpo_nemo.files.scrub import flat, scrub_text

TABLE_ROWS, TABLE_CHARACTERS = 8, 2_000
"""Of a table at most: samples, and characters of a text, whose middle is left out."""
TABLE_KEPT = 200
"""Rows that MLflow's table, which is one file, keeps: the newest."""
_TABLE = "samples.json"
_PARAM_BATCH = 100
_PARAM_CHARACTERS = 500


def table_rows(step: int, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples as a table shows them, with equal columns: `step` first, then those of the rows.

    A text loses its middle and the secrets of this process's environment: what a model writes, or
    a data set holds, goes to other people's machines here.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [
        {"step": step, **{name: _cell(row.get(name)) for name in names}}
        for row in rows[:TABLE_ROWS]
    ]


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    half = TABLE_CHARACTERS // 2
    if len(value) > TABLE_CHARACTERS:
        value = f"{value[:half]} [...] {value[-half:]}"
    # Model text may hold lone surrogates, which UTF-8 has no bytes for.
    return scrub_text(value, os.environ).encode("utf-8", "replace").decode()


class TensorBoardSink:
    """Scalars under their own names, and samples as a table under `samples` in the tab Text.

    What an earlier run logged in `folder` after `resume_step` is purged, and all of it where there
    is no step to resume from.
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

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        show_in_tensorboard(self._writer, step, rows)

    def close(self) -> None:
        self._writer.close()


def show_in_tensorboard(writer: Any, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table under `samples` in the tab Text of a `SummaryWriter`."""
    if table := table_rows(step, rows):
        lines = [list(table[0]), ["---"] * len(table[0]), *(row.values() for row in table)]
        text = "\n".join(f"| {' | '.join(map(_markdown, line))} |" for line in lines)
        writer.add_text("samples", text, global_step=step)
        writer.flush()


def _markdown(value: Any) -> str:
    """A cell of a Markdown table: data is neither markup nor a second cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    escaped = re.sub(r"[^\w\s.,:;+=-]", lambda match: f"&#{ord(match[0])};", text)
    return "<br>".join(line.strip() for line in escaped.splitlines())


class WandbSink:
    """Logs to `wandb.init(**settings)`; `settings` are NeMo-RL's `logger.wandb`: project, name.

    wandb itself drops the steps that it already has: they were replayed from the checkpoint and
    are equal.
    """

    remote = True

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, object],
        config: object,
        resume_step: int | None = None,
    ) -> None:
        wandb = _extra("wandb")
        id_file = folder / "wandb_run_id"
        options: dict = {"dir": str(folder), **settings, "config": config}
        if resume_step is not None and id_file.exists():
            options |= {"id": id_file.read_text().strip(), "resume": "allow"}
        try:
            self._run = wandb.init(**options)
        except (wandb.Error, TypeError) as error:
            raise UserError(f"logger.wandb: {' '.join(str(error).split())}") from error
        write_atomic(id_file, self._run.id)

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        show_in_wandb(self._run, step, rows)

    def close(self) -> None:
        self._run.finish()


def show_in_wandb(run: Any, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    if table := table_rows(step, rows):
        data = [list(row.values()) for row in table]
        shown = import_module("wandb").Table(columns=list(table[0]), data=data)
        run.log({"samples": shown}, step=step)


class MlflowSink:
    """`settings` are NeMo-RL's `logger.mlflow`: experiment_name, run_name, tracking_uri.

    MLflow keeps every value it is sent, so a resumed run sends only the steps that each metric
    does not have yet. Samples are one table of the newest rows, which its UI shows.
    """

    remote = True

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, object],
        config: object,
        resume_step: int | None = None,
    ) -> None:
        self._mlflow = _extra("mlflow")
        uri = settings.get("tracking_uri")
        try:
            # None: MLFLOW_TRACKING_URI, or MLflow's own default.
            self._client = self._mlflow.MlflowClient(tracking_uri=str(uri) if uri else None)
            self._run_id, continued = self._open_run(folder, settings, resume_step)
            if not continued:
                self._log_params(config)
        except self._mlflow.MlflowException as error:
            raise UserError(f"logger.mlflow: {' '.join(str(error).split())}") from error
        self._logged: dict[str, int] | None = {} if continued else None
        self._table = MlflowTable(self._client, self._run_id)

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        new = [
            self._mlflow.entities.Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if step > self._last_step(name)
        ]
        self._client.log_batch(self._run_id, metrics=new)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._table.show(step, rows)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)

    def _open_run(
        self, folder: Path, settings: Mapping[str, object], resume_step: int | None
    ) -> tuple[str, bool]:
        id_file = folder / "mlflow_run_id"
        if resume_step is not None and id_file.exists():
            run_id = id_file.read_text().strip()
            self._client.update_run(run_id, status="RUNNING")
            return run_id, True
        name = str(settings.get("experiment_name") or "igrpo")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        run_name = settings.get("run_name")
        run = self._client.create_run(experiment_id, run_name=str(run_name) if run_name else None)
        write_atomic(id_file, run.info.run_id)
        return run.info.run_id, False

    def _log_params(self, config: object) -> None:
        params = [
            self._mlflow.entities.Param(name, str(value)[:_PARAM_CHARACTERS])
            for name, value in flat(config)
        ]
        for start in range(0, len(params), _PARAM_BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAM_BATCH])

    def _last_step(self, name: str) -> int:
        if self._logged is None:
            return -1
        if name not in self._logged:
            history = self._client.get_metric_history(self._run_id, name)
            self._logged[name] = max((metric.step for metric in history), default=-1)
        return self._logged[name]


class MlflowTable:
    """The newest samples as one table, `samples.json`, of a run: MLflow's UI shows it."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._rows: deque[dict[str, Any]] = deque(maxlen=TABLE_KEPT)

    def show(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows += table_rows(step, rows)
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        data = [[row.get(name) for name in columns] for row in self._rows]
        self._client.log_dict(self._run_id, {"columns": columns, "data": data}, _TABLE)
        tag = json.dumps([{"path": _TABLE, "type": "table"}])
        self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", tag)


def _extra(name: str) -> Any:
    """The module of an extra. Raises UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"logger.{name}_enabled needs {name}: pip install 'igrpo-nemo[{name}]'"
        ) from error
