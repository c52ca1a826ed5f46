"""NeMo-RL's log in the project's run folder, under the project's metric names.

    grpo_train ─ Logger's calls ─> RunLog ─┬─> NeMo-RL's Logger (TensorBoard, W&B, MLflow)
                                           └─> metrics.jsonl, samples.jsonl

A training step is one line, written when NeMo-RL says that the step is finished; that also advances
the step clock, by which the rollout numbers steps and tells how old a draft is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from igrpo_nemo.config.schema import Config
from igrpo_nemo.metrics import best_draft_prediction, mean_and_stderr
from igrpo_nemo.nemo.resume import Earlier
from igrpo_nemo.nemo.seam import SAMPLES, StepClock
from igrpo_nemo.prompts import opens_thinking
from igrpo_nemo.rewards import format_reward
from igrpo_nemo.tracking import Tracker
from igrpo_nemo.tracking.samples import sample_rows
from igrpo_nemo.types import Rollout

COMPLETIONS = "igrpo/completions"
TOKENS = "igrpo/generated_tokens"
DROPPED = "igrpo/drafts_dropped"
"""Counted since the start of the run."""

PASSED_ON = ("igrpo/", "reward/reason/", "timing/")
"""Prefixes of metrics that are the project's own already."""

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
}
"""NeMo-RL's metrics of a step, and what they are called here.

Means over the updates of the step: NeMo-RL's workers divide by their number. Only `probs_ratio_max`
is the largest, and `grad_norm` the last update's.
"""

TIMINGS = {
    "policy_training": "timing/train",
    "checkpointing": "timing/checkpoint",
    "total_step_time": "timing/step",
}

SAMPLE_ROWS = 8
"""Problems in a sample table."""

DUMPS = "nemo_rl"
"""Sub-folder for the rows that NeMo-RL writes out."""


class RunLog:
    """Stands in for NeMo-RL's `Logger`; what it does not know goes to that one."""

    def __init__(
        self,
        logger: Any,
        config: Config,
        tracker: Tracker,
        clock: StepClock,
        rollouts: Callable[[], Sequence[Rollout]] = list,
        *,
        conditioned: Callable[[], Sequence[bool]] = list,
        peak_memory: Callable[[], float | None] = lambda: None,
        earlier: Earlier | None = None,
    ) -> None:
        """`rollouts()` gives those of the last step, `conditioned()` whether the answers under q'
        of the last validation were right, `peak_memory()` the bytes of the fullest training GPU
        where they are known. `earlier` is what a resumed run did before."""
        self._logger = logger
        self._config = config
        self._tracker = tracker
        self._clock = clock
        self._rollouts = rollouts
        self._conditioned = conditioned
        self._peak_memory = peak_memory
        self._pending: dict[str, Any] = {}
        self._draws: list[dict[str, Any]] = []
        self._samples: list[dict[str, object]] = []
        self._answers: Sequence[Mapping[str, Any]] = ()
        earlier = earlier or Earlier()
        self.seconds = earlier.training_seconds
        self.completions = earlier.completions
        self.first_accuracy = earlier.first_accuracy
        self.last_accuracy = earlier.last_accuracy

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
        self._note_samples(metrics.pop(SAMPLES, None))
        self._logger.log_metrics(metrics, step, prefix, step_metric, step_finished)
        if prefix == "validation":
            self._validation(metrics, step)
        elif prefix == "train":
            if "loss" in metrics:
                self._pending |= metrics
            else:
                # One rollout; under dynamic sampling a step has several.
                self._draws.append(_own(metrics))
        elif prefix == "timing/train":
            self._pending |= {f"timing/train/{name}": value for name, value in metrics.items()}
        if step_finished:
            self._finish(step)

    def _note_samples(self, found: Any) -> None:
        """Rows for the sample table, from a rollout in another process.

        The asynchronous trainer rolls problems out one by one, and lists their rows.
        """
        if found is not None:
            rows = [row for each in found for row in (each if isinstance(each, list) else [each])]
            self._samples = rows[:SAMPLE_ROWS]

    def log_batched_dict_as_jsonl(self, to_log: Any, filename: str) -> None:
        """NeMo-RL's dumps of rows, padded ones of every step: those that were asked for, kept
        apart. Validation answers, which are short, are measured on the way and always kept."""
        if filename.startswith("train_data"):
            period = self._config.igrpo.row_dump_period
            step = int("".join(c for c in filename if c.isdigit()))
            if not period or step % period:
                return
        elif filename.startswith("val_data"):
            self._answers = [
                {"reward": reward, "log": log}
                for reward, log in zip(to_log["rewards"], to_log["content"], strict=True)
            ]
        self._logger.log_batched_dict_as_jsonl(to_log, f"{DUMPS}/{filename}")

    def _finish(self, step: int) -> None:
        metrics = self._named(self._pending)
        self._tracker.log("train", step, metrics)
        period = self._config.igrpo.sample_table_period
        rollouts: Sequence[Rollout] = self._rollouts()
        samples = self._samples or sample_rows(rollouts, SAMPLE_ROWS)
        if period and step % period == 0 and samples:
            self._tracker.log_samples(step, samples)
        self._pending, self._draws, self._samples = {}, [], []
        self._clock.finished = step

    def _named(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The project's names for what a step logged."""
        named = _own(found) | self._rolled_out()
        named |= {new: float(found[old]) for old, new in RENAMED.items() if old in found}
        named |= {
            new: float(found[f"timing/train/{old}"])
            for old, new in TIMINGS.items()
            if f"timing/train/{old}" in found
        }
        if not self._draws and COMPLETIONS in named:
            named |= self._sums(named)
        return named | self._performance(named, named.get("timing/step", 0.0))

    def _rolled_out(self) -> dict[str, float]:
        """Of all draws: NeMo-RL's metrics of the step have those of the last one."""
        named = {}
        if len(self._draws) > 1:
            names = dict.fromkeys(name for draw in self._draws for name in draw)
            named = together(self._draws, list(names))
        if self._config.grpo.use_dynamic_sampling:
            named["igrpo/dynamic_sampling_draws"] = float(len(self._draws))
        return named

    def _sums(self, means: Mapping[str, float]) -> dict[str, float]:
        """What the asynchronous trainer's means over problems, rolled out one by one, stand for."""
        config = self._config
        predicted = best_draft_prediction(means["igrpo/draft_accuracy"], config.feedback.num_drafts)
        return {
            COMPLETIONS: means[COMPLETIONS] * config.grpo.num_prompts_per_step,
            TOKENS: means[TOKENS] * config.grpo.num_prompts_per_step,
            "igrpo/best_draft_predicted_pooled": predicted,
        }

    def _performance(self, named: Mapping[str, float], seconds: float) -> dict[str, float]:
        cluster = self._config.cluster
        completions, tokens = named.get(COMPLETIONS, 0.0), named.get(TOKENS, 0.0)
        self.seconds += seconds
        self.completions += int(completions)
        if not seconds:
            return {}
        return {
            "perf/samples_per_s": completions / self._config.igrpo.budget / seconds,
            "perf/completions_per_s": completions / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/gpu_hours": self.seconds * cluster.num_nodes * cluster.gpus_per_node / 3600,
        } | self._memory()

    def _memory(self) -> dict[str, float]:
        """Peak memory of the fullest training GPU in GB (10^9 bytes), where it is known."""
        peak = self._peak_memory()
        return {} if peak is None else {"perf/peak_memory_gb": peak / 1e9}

    def _validation(self, metrics: Mapping[str, Any], step: int) -> None:
        if "accuracy" not in metrics:
            return
        rewards = [float(each["reward"]) for each in self._answers]
        named = {"val/accuracy": float(metrics["accuracy"])}
        if rewards:
            named["val/accuracy_stderr"] = mean_and_stderr(rewards)[1]
            formats = [_format(each["log"]) for each in self._answers]
            named["val/format"] = sum(formats) / len(formats)
        if "avg_length" in metrics:
            named["val/tokens"] = float(metrics["avg_length"])
        if conditioned := self._conditioned():
            accuracy = sum(conditioned) / len(conditioned)
            named["val/draft_conditioned_accuracy"] = accuracy
            named["val/transfer_gap"] = accuracy - named["val/accuracy"]
        self._tracker.log("val", step, named)
        self.last_accuracy = named["val/accuracy"]
        if self.first_accuracy is None:
            self.first_accuracy = self.last_accuracy


def together(draws: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """The metrics `names` of several rollouts; one that only some have is a mean over those."""
    return {name: _together(name, [draw for draw in draws if name in draw]) for name in names}


def _together(name: str, draws: Sequence[Mapping[str, Any]]) -> float:
    values = [float(draw[name]) for draw in draws]
    if name == DROPPED:
        return values[-1]
    if name in (COMPLETIONS, TOKENS) or name.startswith("timing/"):
        return sum(values)
    weights = [float(draw.get(COMPLETIONS, 1.0)) for draw in draws]
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _own(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among metrics that have the project's names already."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith(PASSED_ON) and not name.startswith("timing/train/")
        if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _format(log: Sequence[Mapping[str, Any]]) -> float:
    """The format reward of the last answer; a template may have opened its thinking part."""
    answer = next((str(m["content"]) for m in reversed(log) if m["role"] == "assistant"), "")
    question = next((str(m["content"]) for m in log if m["role"] == "user"), "")
    return format_reward(answer, thinking_open=opens_thinking(question))
