"""iGRPO on the embedded engine: Algorithm 1 of the paper, one process, CPU or one GPU.

    for each step:  problems -> two-stage rollout under the current weights (the snapshot pi_old)
                             -> training rows -> policy update -> metrics, validation, checkpoint

The snapshot costs nothing: both stages are sampled before the first update of the step. A step is
a pure function of (weights, optimizer, data position, seed, the feedback's memory if it has one),
all of which is in a checkpoint, so a resumed run repeats it exactly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count

from igrpo_nemo.alarms import HeadlineWatch
from igrpo_nemo.config import Config
from igrpo_nemo.data.order import Position
from igrpo_nemo.errors import NonFiniteError
from igrpo_nemo.feedback.protocol import memory_of
from igrpo_nemo.local.answers import validate
from igrpo_nemo.local.checkpoint import capture_rng
from igrpo_nemo.local.costs import Stopwatch, performance
from igrpo_nemo.local.model import save_pretrained_folder
from igrpo_nemo.local.parts import RunParts
from igrpo_nemo.local.probe import PolicyProbe
from igrpo_nemo.local.rollout import Batch, TwoStageRollout, collect_batch, shape_rows
from igrpo_nemo.local.sampling import sampling_params
from igrpo_nemo.metrics import rollout_metrics
from igrpo_nemo.run.stop import (
    EXIT_INTERRUPTED,
    InterruptFlag,
    StopFile,
    StopRequested,
    TimeLimit,
)
from igrpo_nemo.tracking.tracker import response_rows, sample_rows
from igrpo_nemo.types import Rollout, Stage


def train(config: Config) -> int:
    """Trains as configured, resuming the run folder's newest intact checkpoint.

    Returns 0 when the last step is done and 75 when a signal, the stop file or the time limit
    stopped the run with its state saved. Raises `UserError` for input that cannot be used, and
    `NonFiniteError` where the policy diverges, before anything of that step is saved.
    """
    began, stop_file = time.monotonic(), StopFile.of()
    with InterruptFlag(stop_file=stop_file) as interrupt, ExitStack() as stack:
        try:
            parts = RunParts(config, stack, interrupt)
        except StopRequested:
            return EXIT_INTERRUPTED
        trainer = Trainer(parts, interrupt, began)
        try:
            return trainer.run_to_its_end()
        except NonFiniteError as error:
            raise NonFiniteError(trainer.where_it_diverged(error)) from error


class Trainer:
    """The loop. What it owns changes once per step, between steps.

    `began` is when the run was called, by `time.monotonic`: its parts take their time too.
    """

    def __init__(self, parts: RunParts, interrupt: InterruptFlag, began: float) -> None:
        self.config, self.parts, self.interrupt = parts.config, parts, interrupt
        self.state, self.metrics = parts.state, parts.metrics
        self.began = began - self.state.extra.get("earlier_seconds", 0.0)
        self.watch = Stopwatch()
        self.limit = TimeLimit(self.config.checkpointing.checkpoint_must_save_by)
        self.saved_step = parts.state.step if parts.resumed else -1
        self.rollout = TwoStageRollout(
            parts.environment,
            parts.sampler,
            sampling_params(self.config),
            self.config.grpo.seed,
            timer=self.watch,
            on_stage=self._on_stage,
            alarm=parts.alarm,
        )
        self.headlines = HeadlineWatch(parts.console.note)
        parts.learner.between_micro_batches = interrupt.check
        self.probe = PolicyProbe(
            parts.sampler,
            parts.environment.prompts.question(parts.problems[0]).token_ids,
            temperature=self.config.policy.generation.temperature,
            packed=self.config.policy.sequence_packing.enabled,
        )
        self.at_step = parts.state.step
        self.memory = memory_of(parts.environment.feedback)

    def run_to_its_end(self) -> int:
        """`run`, with what it leaves behind; returns the exit code."""
        try:
            self.run()
        except StopRequested:
            self.save()
            self.parts.console.note(f"stopped after step {self.state.step}; run again to continue")
            return EXIT_INTERRUPTED
        self.finish()
        return 0

    def run(self) -> None:
        """Algorithm 1, from the current state to the last step."""
        parts, grpo = self.parts, self.config.grpo
        if self.state.step < parts.total_steps:
            parts.folder.unmark_finished()
            self.probe.check_agreement()
        if self._owes_validation():
            self._validate()
            if self.state.step:
                self.saved_step = -1
                self.save()
        self.watch.lap()
        while self.state.step < parts.total_steps:
            self.interrupt.check()
            self.at_step = self.state.step + 1
            with parts.policy.autocast():
                training_rows = parts.environment.feedback.training_rows
                batch = collect_batch(self._draws(), grpo, training_rows)
            if batch is None:
                self._end_with_data()
                return
            with self.watch("train"):
                parts.sampler.sleep()
                learned = parts.learner.update(shape_rows(batch.rows, grpo))
            if self.memory is not None:
                self.memory.add(batch.sampled, self.at_step)
            parts.order.add(batch.sampled)
            self.state = replace(
                self.state,
                step=self.state.step + 1,
                epoch=batch.behind.epoch,
                index=batch.behind.index,
                consumed_problems=self.state.consumed_problems + len(batch.sampled),
            )
            self._after_step(batch, learned)
            if self.limit.reached() and self.state.step < parts.total_steps:
                raise StopRequested

    def _draws(self) -> Iterator[tuple[list[Rollout], Position]]:
        """Batch after batch of the data, rolled out for the next step, until the epochs end."""
        step, behind = self.state.step + 1, Position(self.state.epoch, self.state.index)
        for draw in count():
            numbers, behind = self.parts.order.take(behind)
            if behind.epoch >= self.config.grpo.max_num_epochs:
                return
            problems = [self.parts.problems[number] for number in numbers]
            yield self.rollout(problems, step=step, draw=draw), behind

    def _end_with_data(self) -> None:
        """The last step is done, though nobody knew it then: validates and saves as after one.

        What was rolled out for the step that is not taken is left out, as in NeMo-RL; a run that is
        given more epochs goes on with the next one.
        """
        epochs, state = self.config.grpo.max_num_epochs, self.state
        if (state.epoch, state.index) != (epochs, 0):  # not resumed, or something was added
            self.state = replace(state, epoch=epochs, index=0)
            self.saved_step = -1
            self.parts.console.note(
                f"the problems of {epochs} epochs are used up after step {state.step}"
            )
        if self._owes_validation(last=True):
            self._validate()
            self.saved_step = -1

    def _after_step(self, batch: Batch, learned: dict[str, float]) -> None:
        """Metrics, then what is due: samples, validation, checkpoint."""
        parts, step, grpo = self.parts, self.state.step, self.config.grpo
        if self.saved_step == step - 1:
            self.metrics = {}  # not sooner: a step may be saved twice
        costs, so_far = performance(
            batch.sampled, self.watch.lap(), self.state.extra, parts.policy.model.device
        )
        self._remember(**so_far)
        # Not of a run that an earlier version began: it did not count them.
        if (trained := self.state.extra.get("trained_rows", 0 if step == 1 else None)) is not None:
            self._remember(trained_rows=trained + len(batch.rows))
        metrics = {
            **learned,
            **rollout_metrics(batch.rollouts, batch.rows),
            **parts.environment.scorer.metrics(),
            **costs,
            **parts.order.metrics(),
        }
        if grpo.use_dynamic_sampling:
            metrics["igrpo/dynamic_sampling_draws"] = float(batch.draws)
        parts.tracker.log("train", step, metrics)
        parts.console.step(step, metrics)
        self.headlines.step(metrics)
        period = self.config.igrpo.sample_table_period
        if period and step % period == 0:
            samples = sample_rows(batch.rollouts)
            parts.tracker.log_samples(step, samples)
            parts.console.samples(step, samples)
        self.metrics = {**self.metrics, **metrics}
        if self._owes_validation():
            self._validate()
        if parts.store is not None and (parts.store.due(step) or step == parts.total_steps):
            self.save()

    def _owes_validation(self, *, last: bool = False) -> bool:
        """Whether it is due after the step that is done, and was not made: a stop may come first.

        `last`: no other step follows, though the number of steps does not say so.
        """
        grpo, step = self.config.grpo, self.state.step
        due = grpo.val_at_start if step == 0 else grpo.val_period and step % grpo.val_period == 0
        if last or step == self.parts.total_steps:
            due = due or grpo.val_at_end
        return bool(due) and self.state.extra.get("val_step") != step

    def _validate(self) -> None:
        with self.watch("val"), self.parts.policy.autocast():
            metrics, answers = validate(self.parts, self.rollout, self.interrupt.check)
        step, accuracy = self.state.step, metrics["val/accuracy"]
        self.parts.tracker.log("val", step, metrics)
        k, how = self.config.igrpo.validation.samples, "single shot"
        if k > 1:
            how = f"mean of {k}; {100 * metrics[f'val/pass_at_{k}']:.1f} % have a right one"
        drafted = metrics.get("val/draft_conditioned_accuracy")
        self.parts.console.note(
            f"step {step}: held-out accuracy {100 * accuracy:.1f} % "
            f"± {100 * metrics['val/accuracy_stderr']:.1f} (bare prompt, {how})"
            + ("" if drafted is None else f", {100 * drafted:.1f} % under a draft")
        )
        if limit := self.config.logger.num_val_samples_to_print:
            self.parts.console.samples(step, response_rows(answers, limit), limit)
        self.metrics = {**self.metrics, **metrics}
        start = self.state.extra.get("val_accuracy_start", accuracy)
        self._remember(val_accuracy_end=accuracy, val_step=step, val_accuracy_start=start)

    def _remember(self, **extra: object) -> None:
        self.state = replace(self.state, extra={**self.state.extra, **extra})

    def save(self) -> None:
        """Saves the state between two steps, unless this very state is on disk already.

        Every checkpoint is a good one: a policy that has diverged is not saved, and so removes none
        from those that are kept.
        """
        parts, step = self.parts, self.state.step
        if parts.store is None or step == self.saved_step:
            return
        self.probe.check_finite()
        self._remember(earlier_seconds=time.monotonic() - self.began)
        tensors = {**parts.learner.state_dict(), "rng": capture_rng()}
        if self.memory is not None:
            tensors["feedback"] = self.memory.state_dict()
        if measured := parts.order.state_dict():
            tensors["curriculum"] = measured
        policy = parts.policy
        with self.watch("checkpoint"):
            parts.store.save(
                write_model=partial(save_pretrained_folder, policy.model, policy.tokenizer),
                tensors=tensors,
                state=self.state,
                metrics=self.metrics,
            )
        self.saved_step = step

    def finish(self) -> None:
        """The run's result: `summary.json`, the finished state on disk, and the marker.

        Its `seconds` are the wall clock from the run's call on, with those it resumed, and with
        what the warm-up took where its model came from the cache. Accuracies are fractions, on
        held-out problems, on the bare prompt.
        """
        self.save()
        extra, seconds = self.state.extra, time.monotonic() - self.began
        cached = extra.get("warmup_seconds", 0.0) if extra.get("warmup_cached") else 0.0
        training, completions = extra.get("seconds", 0.0), extra.get("completions", 0)
        start, end = extra.get("val_accuracy_start"), extra.get("val_accuracy_end")
        self.parts.folder.write_summary(
            {
                "val_accuracy_start": start,
                "val_accuracy_end": end,
                "steps": self.state.step,
                "seconds": seconds + cached,
                "training_seconds": training,
                "warmup_seconds": extra.get("warmup_seconds"),
                "warmup_cached": bool(extra.get("warmup_cached")),
                "completions": completions,
                "trained_rows": extra.get("trained_rows"),
                "completions_per_second": completions / training if training else None,
            }
        )
        self.parts.folder.mark_finished(self.state.step)
        start, end = ("not measured" if s is None else f"{100 * s:.1f} %" for s in (start, end))
        aside = f" (and {cached:.0f} s of warm-up, cached)" if cached else ""
        self.parts.console.note(
            f"done: {self.state.step} steps, {seconds:.0f} s{aside}, held-out accuracy "
            f"{start} -> {end}; results in {self.parts.folder.path}"
        )

    def where_it_diverged(self, error: NonFiniteError) -> str:
        """The line for the user: the step, and what to begin anew from."""
        newest = self.parts.store and self.parts.store.latest()
        if newest is None:
            return f"step {self.at_step}: {error}; no checkpoint was saved before it"
        if self.at_step == self.saved_step:
            return f"{newest}: {error}; remove it, and the run goes on from the checkpoint before"
        return (
            f"step {self.at_step}: {error}; the last good checkpoint is {newest}: begin a new run "
            f"from policy.model_name={newest / 'model'} with a smaller policy.optimizer.kwargs.lr "
            "or policy.max_grad_norm"
        )

    def _on_stage(self, stage: Stage, done: int, total: int) -> None:
        self.parts.console.stage(str(stage), done, total)
        self.interrupt.check()
