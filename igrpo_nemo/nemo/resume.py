"""A run that stops and goes on: by request, at its data's end, after a resume; only what is sound
is saved.

    trainer, at the end of a step ─ TimeoutChecker.check_save() ─> its own answer, or the stop file
    trainer ─ policy.train() ─> loss, gradient norm ─> both finite, or NonFiniteError (exit code 76)
    metrics.jsonl (up to the checkpoint), summary.json ──────────> Progress ─> RunLog, new summary

All of NeMo-RL's trainers save a checkpoint and return when `check_save` says so. They save at
`save_period`, at `max_num_steps`, and at the step that is as many as an epoch has batches. Under
dynamic sampling a step may draw several batches, so the data end before that step: without
`save_last_step` the steps since the last period would be lost. They log a loss of nan and go on:
the next checkpoint, and all after it, would hold nan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igrpo_nemo.errors import NonFiniteError
from igrpo_nemo.nemo.seam import StepClock
from igrpo_nemo.nemo.versions import before_finalization, entries, newest_checkpoint
from igrpo_nemo.run.stop import StopFile


class StopRequest:
    """`given`: whether a trainer was told to stop."""

    given = False


@contextmanager
def stop_requests(file: StopFile) -> Iterator[StopRequest]:
    """Inside, NeMo-RL's `check_save` also looks at the stop file."""
    from nemo_rl.utils.timer import TimeoutChecker

    stop, original = StopRequest(), TimeoutChecker.check_save

    def check_save(checker: Any) -> bool:
        if original(checker):
            stop.given = True
        elif not stop.given and file:
            print(f"{file.path}: saving after this step", flush=True)
            # What the checker notes when its own time is over.
            stop.given = checker.last_saved = True
        else:
            return False
        return True

    TimeoutChecker.check_save = check_save
    try:
        yield stop
    finally:
        TimeoutChecker.check_save = original


def refuse_non_finite(policy: Any, checkpointer: Any, clock: StepClock) -> list[NonFiniteError]:
    """Has the policy's updates raise `NonFiniteError` where loss or gradient is no finite number.

    The line names the step and the newest checkpoint, which was saved before it and is sound.

    Returns: what was raised, for a trainer that prints errors and returns (the asynchronous one).
    """
    raised: list[NonFiniteError] = []

    def checked(update: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def update_and_check(*args: Any, **kwargs: Any) -> dict[str, Any]:
            results = update(*args, **kwargs)
            for key, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
                value = results.get(key)
                if value is None or bool(torch.isfinite(torch.as_tensor(value)).all()):
                    continue
                newest = newest_checkpoint(checkpointer)
                good = f"the last good checkpoint is {newest}" if newest else "none was saved"
                error = NonFiniteError(
                    f"step {clock.finished + 1}: the {what} is not finite; {good}; begin a new run "
                    "with a smaller learning rate or policy.max_grad_norm"
                )
                raised.append(error)
                raise error
            return results

        return update_and_check

    # What NeMo-RL's trainers call, the second one where rows travel through TransferQueue.
    for name in ("train", "train_from_meta"):
        if hasattr(policy, name):
            setattr(policy, name, checked(getattr(policy, name)))
    return raised


@dataclass(slots=True)
class Progress:
    """What a run has done; accuracies are None where nothing was validated.

    `seconds` is the wall clock of the jobs before this one, as the last summary has it; a job that
    was killed wrote none, and of such ones only the steps count.
    """

    steps: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    completions: int = 0
    first_accuracy: float | None = None
    last_accuracy: float | None = None

    @classmethod
    def before(cls, folder: Path, steps: int) -> Progress:
        """From a run folder whose log ends with step `steps`, which the run is resumed after."""
        done = cls(steps)
        log = folder / "metrics.jsonl"
        if not steps or not log.is_file():
            return done
        for line in log.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            metrics = record["metrics"]
            if record["kind"] == "train":
                done.training_seconds += metrics.get("timing/step", 0.0)
                done.completions += int(metrics.get("igrpo/completions", 0.0))
            elif record["kind"] == "val" and "val/accuracy" in metrics:
                done.validated(metrics["val/accuracy"])
        done.seconds = max(done.training_seconds, summary_of(folder).get("seconds") or 0.0)
        return done

    def validated(self, accuracy: float) -> None:
        self.last_accuracy = accuracy
        if self.first_accuracy is None:
            self.first_accuracy = accuracy


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary in a run folder; empty where there is none yet."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def carry_tokenizer(checkpointer: Any, tokenizer: Any) -> None:
    """Lets every checkpoint hold the tokenizer, its chat template included.

    NeMo-RL asks its policy workers to save it, and the Megatron-Core one does not
    (megatron_policy_worker.py: save_checkpoint takes `tokenizer_path` as any other keyword): what
    is not there when a checkpoint is whole is saved here.
    """

    def save(checkpoint: Any) -> None:
        folder = Path(checkpoint) / "policy" / "tokenizer"
        if not folder.is_dir():
            tokenizer.save_pretrained(str(folder))

    before_finalization(checkpointer, save)


def save_last_step(arguments: Mapping[str, Any], loader: Any, steps: int) -> None:
    """Saves the policy after `steps` steps, as `grpo_train` does (nemo_rl/algorithms/grpo.py),
    where it has not.

    `arguments` are the trainer's. Nothing was measured after the last step, so the checkpoint has
    no metric to be ranked by; a run that is given more epochs goes on with the next one.
    """
    policy, checkpointer, master = (
        arguments[name] for name in ("policy", "checkpointer", "master_config")
    )
    newest = newest_checkpoint(checkpointer)
    if not master.checkpointing["enabled"] or newest and Path(newest).name == f"step_{steps}":
        return
    state, grpo = entries(arguments["grpo_save_state"]), entries(master.grpo)
    rows = (steps - state["total_steps"]) * grpo["num_prompts_per_step"]
    state["consumed_samples"] += rows
    state |= {"total_steps": steps, "current_step": 0, "current_epoch": grpo["max_num_epochs"]}
    for name in ("val_reward", master.checkpointing["metric_name"]):
        state.pop(name, None)
    policy.prepare_for_training()
    folder = Path(checkpointer.init_tmp_checkpoint(steps, state, master))
    policy.save_checkpoint(
        weights_path=str(folder / "policy" / "weights"),
        optimizer_path=str(folder / "policy" / "optimizer")
        if checkpointer.save_optimizer
        else None,
        tokenizer_path=str(folder / "policy" / "tokenizer"),
        checkpointing_cfg=master.checkpointing,
    )
    torch.save(loader.state_dict(), folder / "train_dataloader.pt")
    checkpointer.finalize_checkpoint(str(folder))
