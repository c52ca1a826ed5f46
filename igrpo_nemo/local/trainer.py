"""iGRPO on the embedded engine: Algorithm 1 of the paper, one process, CPU or one GPU.

    for each step:  problems -> two-stage rollout under the current weights (the snapshot pi_old)
                             -> training rows -> policy update -> metrics, validation, checkpoint

The snapshot costs nothing: both stages are sampled before the first update of the step. A step is
a pure function of (weights, optimizer, data position, seed) and, with prefetch, of the drafts that
the step before made for it; all of it is in a checkpoint, so a resumed run repeats it exactly.
"""

from __future__ import annotations

from dataclasses import replace

from igrpo_nemo.config import Config
from igrpo_nemo.data.order import Position
from igrpo_nemo.local.dynamic_sampling import Batch, collect_groups
from igrpo_nemo.local.generators import capture_rng
from igrpo_nemo.local.interrupt import EXIT_INTERRUPTED, InterruptFlag
from igrpo_nemo.local.model import save_pretrained_folder
from igrpo_nemo.local.parts import Parts, open_parts
from igrpo_nemo.local.settings import prefetches_drafts
from igrpo_nemo.local.shaping import shape_rows
from igrpo_nemo.local.step_batches import StepBatches
from igrpo_nemo.local.stopwatch import Stopwatch, peak_memory_gb
from igrpo_nemo.local.summary import process_seconds, summarize
from igrpo_nemo.local.time_limit import TimeLimit
from igrpo_nemo.local.validation import validate
from igrpo_nemo.metrics import rollout_metrics, short_circuit_metrics
from igrpo_nemo.run.stop import StopFile
from igrpo_nemo.tracking.samples import response_rows, sample_rows
from igrpo_nemo.types import Rollout, Stage


class StopRequested(Exception):
    """Something asked to stop, at a point where nothing of the current step needs keeping."""


class DataUsedUp(Exception):
    """All epochs are over in the middle of a step, which dynamic sampling could not fill."""


def train(config: Config) -> int:
    """Trains as configured, resuming the run folder's newest intact checkpoint.

    Returns 0 when the last step is done and 75 when a signal, the stop file or the time limit
    stopped the run with its state saved. Raises `UserError` for input that cannot be used.
    """
    stop_file = StopFile.of()
    with InterruptFlag(stop_file=stop_file) as interrupt, open_parts(config) as parts:
        trainer = Trainer(parts, interrupt)
        try:
            trainer.run()
        except StopRequested:
            trainer.save()
            parts.console.note(f"stopped after step {trainer.state.step}; run again to continue")
            return EXIT_INTERRUPTED
        trainer.finish()
        return 0


class Trainer:
    """The loop. What it owns changes once per step, between steps."""

    def __init__(self, parts: Parts, interrupt: InterruptFlag) -> None:
        self.config = parts.config
        self.parts = parts
        self.interrupt = interrupt
        self.state = parts.state
        self.ahead = parts.ahead
        self.dropped = 0
        self.earlier_seconds = self.state.extra.get("earlier_seconds", 0.0)
        self.watch = Stopwatch()
        self.limit = TimeLimit(self.config.checkpointing.checkpoint_must_save_by)
        self.metrics = parts.metrics
        self.saved_step = parts.state.step if parts.resumed else -1
        self.rollout = replace(parts.rollout, timer=self.watch, on_stage=self._on_stage)
        parts.learner.between_micro_batches = self._stop_if_asked

    def run(self) -> None:
        """Algorithm 1, from the current state to the last step."""
        if self.state.step < self.parts.total_steps:
            self.parts.folder.unmark_finished()
        if self.state.step == 0 and self.config.grpo.val_at_start and not self.parts.resumed:
            self._validate()
        self.watch.lap()
        while self.state.step < self.parts.total_steps:
            self._stop_if_asked()
            step = self.state.step + 1
            try:
                with self.parts.policy.autocast():
                    batch, batches = self._collect(step)
            except DataUsedUp:
                self._end_with_data()
                return
            rows = shape_rows(
                batch.rows, self.config.grpo.reward_scaling, self.config.grpo.reward_shaping
            )
            with self.watch("train"):
                learned = self.parts.learner.update(rows)
            self.state = replace(
                self.state,
                step=step,
                epoch=batches.position.epoch,
                index=batches.position.index,
                consumed_problems=self.state.consumed_problems + len(batch.sampled),
            )
            self.ahead = batches.ahead
            self.dropped += batches.dropped
            self._after_step(batch, learned | self._overlap(batch, batches))
            if self.limit.reached() and step < self.parts.total_steps:
                raise StopRequested

    def _collect(self, step: int) -> tuple[Batch, StepBatches]:
        """Rolls out the step's problems; with dynamic sampling, as many batches as it takes."""
        grpo, feedback = self.config.grpo, self.parts.environment.feedback
        last = step == self.parts.total_steps
        batches = StepBatches(
            self.parts.order,
            self.parts.problems,
            self.rollout,
            step=step,
            position=Position(self.state.epoch, self.state.index),
            ahead=self.ahead,
            prefetch=prefetches_drafts(self.config) and not last,
            redraws=grpo.use_dynamic_sampling,
        )
        if grpo.use_dynamic_sampling:
            batch = collect_groups(
                wanted=grpo.num_prompts_per_step,
                max_draws=grpo.dynamic_sampling_max_gen_batches,
                roll_out=lambda draw: self._next_batch(batches, draw),
                training_rows=feedback.training_rows,
            )
        else:
            rollouts = batches.roll_out()
            rows = [row for rollout in rollouts for row in feedback.training_rows(rollout)]
            batch = Batch(rollouts, rows, rollouts)
        return batch, batches

    def _next_batch(self, batches: StepBatches, draw: int) -> list[Rollout]:
        """A step may draw several batches, so the epochs may be over before `total_steps`."""
        following = self.parts.order.take(batches.position)[1]
        if following.epoch >= self.config.grpo.max_num_epochs:
            raise DataUsedUp
        return batches.roll_out(draw)

    def _end_with_data(self) -> None:
        """The last step is done, though nobody knew it then: validates and saves as after one.

        What was rolled out for the step that is not taken is left out, as in NeMo-RL; a run that is
        given more epochs goes on with the next one.
        """
        end = Position(self.config.grpo.max_num_epochs, 0)
        if (self.state.epoch, self.state.index) == (end.epoch, end.index):
            return
        self.state = replace(self.state, epoch=end.epoch, index=end.index)
        self.parts.console.note(
            f"the problems of {self.config.grpo.max_num_epochs} epochs are used up after step "
            f"{self.state.step}"
        )
        if self.config.grpo.val_at_end and self.state.extra.get("val_step") != self.state.step:
            self._validate()
        self.saved_step = -1

    def _overlap(self, batch: Batch, batches: StepBatches) -> dict[str, float]:
        """Metrics of `igrpo.draft_prefetch` and `igrpo.short_circuit` where they are on."""
        if prefetches_drafts(self.config):
            return batches.prefetch_metrics(self.dropped)
        if self.rollout.short_circuit.enabled:
            return short_circuit_metrics(batch.rollouts, self.config.igrpo.num_drafts)
        return {}

    def _after_step(self, batch: Batch, learned: dict[str, float]) -> None:
        """Metrics, then what is due: samples, validation, checkpoint."""
        step, grpo = self.state.step, self.config.grpo
        if self.saved_step == step - 1:
            self.metrics = {}  # not sooner: a step may be saved twice
        metrics = {**learned, **rollout_metrics(batch.rollouts, batch.rows)}
        metrics |= self.parts.environment.scorer.metrics()
        metrics |= self._performance(batch)
        if grpo.use_dynamic_sampling:
            metrics["igrpo/dynamic_sampling_draws"] = float(batch.draws)
        last = step == self.parts.total_steps
        if (grpo.val_period and step % grpo.val_period == 0) or (last and grpo.val_at_end):
            self._validate()
        self.parts.tracker.log("train", step, metrics)
        self.parts.console.step(step, metrics)
        period = self.config.igrpo.sample_table_period
        if period and step % period == 0:
            samples = sample_rows(batch.rollouts)
            self.parts.tracker.log_samples(step, samples)
            self.parts.console.samples(step, samples)
        self.metrics = {**self.metrics, **metrics}
        if self.parts.store is not None and (self.parts.store.due(step) or last):
            self.save()

    def _performance(self, batch: Batch) -> dict[str, float]:
        """`timing/*` and `perf/*` of the step; rates count everything sampled, kept or not."""
        seconds = self.watch.lap()
        completions = [
            completion
            for rollout in batch.sampled
            for group in (rollout.drafts, *rollout.refinements)
            for completion in group.completions
        ]
        elapsed = self.state.extra.get("seconds", 0.0) + seconds["step"]
        sampled = self.state.extra.get("completions", 0) + len(completions)
        self.state = replace(
            self.state,
            extra={**self.state.extra, "seconds": elapsed, "completions": sampled},
        )
        tokens = sum(len(completion.token_ids) for completion in completions)
        return {
            **{f"timing/{name}": value for name, value in seconds.items()},
            "perf/samples_per_s": len(batch.sampled) / seconds["step"],
            "perf/completions_per_s": len(completions) / seconds["step"],
            "perf/tokens_per_s": tokens / seconds["step"],
            "perf/peak_memory_gb": peak_memory_gb(self.parts.policy.model.device),
            "perf/gpu_hours": elapsed / 3600,
        }

    def _validate(self) -> None:
        with self.watch("val"), self.parts.policy.autocast():
            metrics, answers = validate(self.config, self.parts, self._stop_if_asked)
        step = self.state.step
        self.parts.tracker.log("val", step, metrics)
        self.parts.console.note(
            f"step {step}: held-out accuracy {100 * metrics['val/accuracy']:.1f} % "
            f"± {100 * metrics['val/accuracy_stderr']:.1f} (bare prompt, single shot)"
        )
        if limit := self.config.logger.num_val_samples_to_print:
            self.parts.console.samples(step, response_rows(answers, limit), limit)
        self.metrics = {**self.metrics, **metrics}
        extra = {
            **self.state.extra,
            "val_accuracy_end": metrics["val/accuracy"],
            "val_step": step,
        }
        extra.setdefault("val_accuracy_start", metrics["val/accuracy"])
        self.state = replace(self.state, extra=extra)

    def save(self) -> None:
        """Saves the state between two steps, unless this very state is on disk already."""
        parts, step = self.parts, self.state.step
        if parts.store is None or step == self.saved_step:
            return
        earlier = self.earlier_seconds + process_seconds()
        state = replace(self.state, extra={**self.state.extra, "earlier_seconds": earlier})
        tensors: dict[str, object] = {**parts.learner.state_dict(), "rng": capture_rng()}
        if self.ahead is not None:
            tensors["ahead"] = self.ahead.state_dict()
        with self.watch("checkpoint"):
            parts.store.save(
                step,
                write_model=lambda folder: save_pretrained_folder(
                    parts.policy.model, parts.policy.tokenizer, folder
                ),
                tensors=tensors,
                state=state,
                metrics=self.metrics,
            )
        self.saved_step = step

    def finish(self) -> None:
        """The run's result: `summary.json`, the finished state on disk, and the marker."""
        self.save()
        summary = summarize(self.state, process_seconds())
        self.parts.folder.write_summary(summary)
        self.parts.folder.mark_finished(self.state.step)
        start, end = (
            _percent(self.state.extra.get(f"val_accuracy_{moment}")) for moment in ("start", "end")
        )
        self.parts.console.note(
            f"done: {self.state.step} steps, {summary['seconds']:.0f} s, held-out accuracy "
            f"{start} -> {end}; results in {self.parts.folder.path}"
        )

    def _on_stage(self, stage: Stage, done: int, total: int) -> None:
        self.parts.console.stage(str(stage), done, total)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.interrupt.requested:
            raise StopRequested


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"
