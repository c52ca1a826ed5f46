"""Sinks on other people's services, each an extra of its own; a resumed run continues its own.

The run's id there is kept in the run folder (`wandb_run_id`, `mlflow_run_id`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_atomic
from igrpo_nemo.files.scrub import flat

_PARAM_BATCH = 100
_PARAM_CHARACTERS = 500


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


class MlflowSink:
    """`settings` are NeMo-RL's `logger.mlflow`: experiment_name, run_name, tracking_uri.

    MLflow keeps every value it is sent, so a resumed run sends only the steps that each metric
    does not have yet.
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

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        new = [
            self._mlflow.entities.Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if step > self._last_step(name)
        ]
        self._client.log_batch(self._run_id, metrics=new)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        if rows:
            artifact = f"samples/step_{step:08d}.json"
            self._client.log_dict(self._run_id, {"rows": [dict(row) for row in rows]}, artifact)

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


def _extra(name: str) -> Any:
    """The module of an extra. Raises UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"logger.{name}_enabled needs {name}: pip install 'igrpo-nemo[{name}]'"
        ) from error
