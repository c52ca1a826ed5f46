"""NeMo-RL's log in the project's run folder, under the project's metric names.

    grpo_train ─ Logger's calls ─> RunLog ─┬─> NeMo-RL's Logger (TensorBoard, W&B, MLflow)
                                           └─> metrics.jsonl, samples.jsonl

A training step is one line, written when NeMo-RL says that the step is finished; that also advances
the step clock, by which the rollout numbers steps and tells how old a draft is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from igrpo_nemo.alarms import HeadlineWatch
from igrpo_nemo.config.schema import Config
from igrpo_nemo.data.order import Curriculum
from igrpo_nemo.metrics import best_draft_prediction, mean_and_stderr
from igrpo_nemo.nemo.resume import Progress, summary_of
from igrpo_nemo.nemo.seam import SAMPLES, SOLVE_RATES, RunMap
from igrpo_nemo.prompts import opens_thinking
from igrpo_nemo.rewards import format_reward
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.tracking import Tracker
from igrpo_nemo.tracking.services import MlflowTable, show_in_tensorboard, show_in_wandb
from igrpo_nemo.tracking.tracker import sample_rows

COMPLETIONS = "igrpo/completions"
TOKENS = "igrpo/generated_tokens"
DROPPED = "igrpo/drafts_dropped"
"""Counted since the start of the run."""

PASSED_ON = ("igrpo/", "data/", "reward/reason/", "timing/")
"""Prefixes of metrics that are the project's own already."""
TIMINGS = "timing/train"
"""NeMo-RL's prefix of a step's timings."""

RENAMED = {
    "loss": "loss",
    "approx_entropy": "entropy/sampled",
    "exact_entropy": "entropy/exact",
    "probs_ratio": "policy/ratio_mean",
    "kl_penalty": "policy/kl",
    "token_mult_prob_error": "policy/engine_mismatch",
    "lr": "lr",
    "probs_ratio_max": "policy/ratio_max",
    "grad_norm": "grad_norm",
    f"{TIMINGS}/policy_training": "timing/train",
    f"{TIMINGS}/checkpointing": "timing/checkpoint",
    f"{TIMINGS}/total_step_time": "timing/step",
}
"""NeMo-RL's metrics of a step, and what they are called here: means over the updates of the step,
but for `probs_ratio_max`, the largest, and `grad_norm`, the last update's."""

SAMPLE_ROWS = 8
"""Problems in a sample table."""


class RunLog:
    """Stands in for NeMo-RL's `Logger`; what it does not know goes to that one."""

    def __init__(
        self,
        logger: Any,
        config: Config,
        tracker: Tracker,
        task_to_env: RunMap,
        *,
        measured: Callable[[], Mapping[str, float]] = dict,
        peak_memory: Callable[[], float | None] = lambda: None,
        progress: Progress | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        """`task_to_env` has the step clock and the rollouts of the last step, `measured()` has
        what was measured beside the last validation, `peak_memory()` the bytes of the fullest
        training GPU. `progress` is what a resumed run did before, and goes on here; `curriculum`
        learns what was solved."""
        self._logger = logger
        self._config = config
        self._tracker = tracker
        self._run = task_to_env
        self._measured = measured
        self._peak_memory = peak_memory
        self._curriculum = curriculum
        self._pending: dict[str, Any] = {}
        self._draws: list[dict[str, float]] = []
        self._samples: list[dict[str, object]] = []
        self._answers: Sequence[tuple[float, Any]] = ()
        self._headlines = HeadlineWatch(print)
        self.progress = progress or Progress()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)

    def log_metrics(
        self,
        metrics: dict[str, Any],
        step: int,
        prefix: str | None = "",
        step_metric: str | None = None,
        step_finished: bool = False,
    ) -> None:
        """NeMo-RL's call: rollout metrics, then the step's, then its timings."""
        metrics = dict(metrics)
        # The asynchronous trainer rolls problems out one by one, and lists their rows.
        found = metrics.pop(SAMPLES, ())
        rows = [row for each in found for row in (each if isinstance(each, list) else [each])]
        self._samples = rows[:SAMPLE_ROWS] or self._samples
        rates = metrics.pop(SOLVE_RATES, {})
        if self._curriculum is not None:
            self._curriculum.add_rates(rates)
        if step_finished:  # a service takes nothing for a step that it holds to be complete
            self._show_samples(step)
        self._logger.log_metrics(metrics, step, prefix, step_metric, step_finished)
        if prefix == "validation":
            self._validation(metrics, step)
        elif prefix == "train" and "loss" not in metrics:
            # One rollout; under dynamic sampling a step has several.
            self._draws.append(_own(metrics))
        elif prefix in ("train", TIMINGS):
            begin = "" if prefix == "train" else f"{TIMINGS}/"
            self._pending |= {f"{begin}{name}": value for name, value in metrics.items()}
        if step_finished:
            self._finish(step)

    def log_batched_dict_as_jsonl(self, to_log: Any, filename: str) -> None:
        """NeMo-RL's dumps of rows, padded ones of every step: those that were asked for, kept
        apart. Validation answers, which are short, are measured on the way and always kept."""
        if filename.startswith("train_data"):
            period = self._config.igrpo.row_dump_period
            step = int("".join(c for c in filename if c.isdigit()))
            if not period or step % period:
                return
        elif filename.startswith("val_data"):
            self._answers = list(zip(to_log["rewards"], to_log["content"], strict=True))
        self._logger.log_batched_dict_as_jsonl(to_log, f"nemo_rl/{filename}")

    def write_summary(self, folder: RunFolder, seconds: float, finished: bool) -> None:
        """The whole run's, after `seconds` of this job; that of a finished run that was only asked
        for again stays."""
        done, steps = self.progress, self._run.clock.finished
        if finished and steps == done.steps and summary_of(folder.path).get("finished"):
            return
        trained = done.training_seconds
        folder.write_summary(
            {
                "val_accuracy_start": done.first_accuracy,
                "val_accuracy_end": done.last_accuracy,
                "steps": steps,
                "seconds": done.seconds + seconds,
                "training_seconds": trained,
                "completions": done.completions,
                "completions_per_second": done.completions / trained if trained else None,
                "finished": finished,
            }
        )

    def _finish(self, step: int) -> None:
        metrics = self._named(self._pending)
        self._tracker.log("train", step, metrics)
        self._headlines.step(metrics)
        self._pending, self._draws, self._samples = {}, [], []
        self._run.clock.finished = step

    def _show_samples(self, step: int) -> None:
        period = self._config.igrpo.sample_table_period
        samples = self._samples or sample_rows(self._run.rollouts, SAMPLE_ROWS)
        if period and step % period == 0 and samples:
            self._tracker.log_samples(step, samples)

    def _named(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The project's names for what a step logged."""
        named = _own(found)
        if len(self._draws) > 1:  # NeMo-RL's metrics of the step have those of the last one
            named |= _together(self._draws)
        if self._config.grpo.use_dynamic_sampling:
            named["igrpo/dynamic_sampling_draws"] = float(len(self._draws))
        named |= {new: float(found[old]) for old, new in RENAMED.items() if old in found}
        if not self._draws and COMPLETIONS in named:
            # The asynchronous trainer's means over problems, which are rolled out one by one.
            drafts, accuracy = self._config.feedback.num_drafts, named["igrpo/draft_accuracy"]
            named["igrpo/best_draft_predicted_pooled"] = best_draft_prediction(accuracy, drafts)
            for name in (COMPLETIONS, TOKENS):
                named[name] *= self._config.grpo.num_prompts_per_step
        if self._curriculum is not None:
            named |= self._curriculum.metrics()
        return named | self._performance(named)

    def _performance(self, named: Mapping[str, float]) -> dict[str, float]:
        """Rates, GPU hours and the peak memory of the fullest training GPU in GB (10^9 bytes)."""
        cluster, done = self._config.cluster, self.progress
        seconds, completions = named.get("timing/step", 0.0), named.get(COMPLETIONS, 0.0)
        done.training_seconds += seconds
        done.completions += int(completions)
        if not seconds:
            return {}
        gpus, peak = cluster.num_nodes * cluster.gpus_per_node, self._peak_memory()
        return {
            "perf/samples_per_s": completions / self._config.igrpo.budget / seconds,
            "perf/completions_per_s": completions / seconds,
            "perf/tokens_per_s": named.get(TOKENS, 0.0) / seconds,
            "perf/gpu_hours": done.training_seconds * gpus / 3600,
        } | ({} if peak is None else {"perf/peak_memory_gb": peak / 1e9})

    def _validation(self, metrics: Mapping[str, Any], step: int) -> None:
        if "accuracy" not in metrics:
            return
        named = {"val/accuracy": float(metrics["accuracy"])}
        if self._answers:
            formats = [_format(log) for _, log in self._answers]
            rewards, k = [float(r) for r, _ in self._answers], self._config.igrpo.validation.samples
            groups = [rewards[start : start + k] for start in range(0, len(rewards), k)]
            named["val/accuracy_stderr"] = mean_and_stderr([sum(g) / k for g in groups])[1]
            named["val/format"] = sum(formats) / len(formats)
            if k > 1:
                named[f"val/avg_at_{k}"] = named["val/accuracy"]
                named[f"val/pass_at_{k}"] = sum(any(group) for group in groups) / len(groups)
        if "avg_length" in metrics:
            named["val/tokens"] = float(metrics["avg_length"])
        named |= self._measured()
        if (conditioned := named.get("val/draft_conditioned_accuracy")) is not None:
            named["val/transfer_gap"] = conditioned - named["val/accuracy"]
        self._tracker.log("val", step, named)
        self.progress.validated(named["val/accuracy"])


class LoggersTables:
    """The services that NeMo-RL's `Logger` has opened, as a sink: they get the sample tables."""

    remote = True

    def __init__(self, logger: Any) -> None:
        self._shows: list[Callable[[int, Sequence[Mapping[str, Any]]], None]] = []
        for each in getattr(logger, "loggers", ()):
            kind = type(each).__name__
            if kind == "TensorboardLogger":
                self._shows.append(partial(show_in_tensorboard, each.writer))
            elif kind == "WandbLogger":
                self._shows.append(partial(show_in_wandb, each.run))
            elif kind == "MLflowLogger":
                client = import_module("mlflow").MlflowClient()
                self._shows.append(MlflowTable(client, each.run_id).show)

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """NeMo-RL's Logger has them already."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for show in self._shows:
            show(step, rows)

    def close(self) -> None:
        """NeMo-RL closes its own."""


def _together(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of several rollouts: what they took adds up, the rest are means over those that
    have it."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for draw in draws for name in draw):
        having = [draw for draw in draws if name in draw]
        values, weights = [d[name] for d in having], [d.get(COMPLETIONS, 1.0) for d in having]
        if name == DROPPED:
            found[name] = values[-1]
        elif name in (COMPLETIONS, TOKENS) or name.startswith("timing/"):
            found[name] = sum(values)
        else:
            found[name] = sum(map(operator.mul, values, weights)) / sum(weights)
    return found


def _own(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among metrics that have the project's names already."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith(PASSED_ON) and not name.startswith(f"{TIMINGS}/")
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _format(log: Sequence[Mapping[str, Any]]) -> float:
    """The format reward of the last answer; a template may have opened its thinking part."""
    answer = next((str(m["content"]) for m in reversed(log) if m["role"] == "assistant"), "")
    question = next((str(m["content"]) for m in log if m["role"] == "user"), "")
    return format_reward(answer, thinking_open=opens_thinking(question))
