"""One side of `local_vs_trl.py` in a process of its own, stepped through its standard input.

    python benchmarks/engine_worker.py SIDE STAGES FOLDER SETTING
        SIDE local | trl, STAGES two | one; one training step per line read, one JSON line each
    python benchmarks/engine_worker.py local build FOLDER SETTING
        the model both sides train -> FOLDER
    python benchmarks/engine_worker.py SIDE check FOLDER SETTING
        log-probs and first gradient of the rows in FOLDER/rows.json -> FOLDER/SIDE.pt
    python benchmarks/engine_worker.py local memory FOLDER SETTING G...
        peak memory of one update for each group size

Times are CPU seconds of the process and its children; memory is the peak resident set.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from engine_setting import Setting, build_model_folder, environment_of, problems_of
from trl_side import stepping_trainer, trl_trainer

from igrpo_nemo.config import load_config
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import load_model
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.sampler import Sampler, SamplingParams
from igrpo_nemo.run.tokenizer import load_tokenizer
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow

_PROTOCOL = sys.stdout
"""The parent's end; everything that libraries print goes to stderr instead."""


def main(arguments: Sequence[str]) -> None:
    sys.stdout = sys.stderr
    side, what, folder = arguments[0], arguments[1], Path(arguments[2])
    setting = Setting(**json.loads(arguments[3]))
    torch.set_num_threads(1)
    torch.manual_seed(setting.seed)
    if what == "build":
        build_model_folder(setting, folder)
    elif what == "memory":
        _local_memory(setting, folder, int(arguments[4]))
    elif what == "check":
        {"local": _check_local, "trl": _check_trl}[side](setting, folder)
    else:
        {"local": _step_local, "trl": _step_trl}[side](setting, folder, two_stage=what == "two")


def _wait_for_go() -> bool:
    return bool(sys.stdin.readline().strip())


def _tell(**values: Any) -> None:
    print(json.dumps(values), file=_PROTOCOL, flush=True)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which a Linux process inherits from the one that started it.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Meter:
    """Measures one step at a time."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.idle_mb = _peak_mb()
        self.start()

    def start(self) -> None:
        self.parts, self._cpu, self._wall = {}, _cpu_seconds(), time.perf_counter()
        self._last = self._cpu

    def lap(self, name: str) -> None:
        now = _cpu_seconds()
        self.parts[name], self._last = now - self._last, now

    def tell(self, completions: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> None:
        _tell(
            cpu=_cpu_seconds() - self._cpu,
            wall=time.perf_counter() - self._wall,
            parts=self.parts,
            peak_mb=_peak_mb(),
            idle_mb=self.idle_mb,
            completions=len(completions),
            completion_tokens=sum(map(len, completions)) / len(completions),
            prompt_tokens=sum(map(len, prompts)) / len(prompts),
        )


def _learner(setting: Setting, folder: Path, *, clip: bool = True) -> Learner:
    model = load_model(folder, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    config = load_config(
        [
            "experiment=demo",
            "igrpo.advantage_delta=1.0e-4",
            f"policy.max_grad_norm={1.0 if clip else 'null'}",
            "policy.sequence_packing.train_mb_tokens=1000000",
        ]
    )
    return Learner(model, optimizer, scheduler, config)


def _step_local(setting: Setting, folder: Path, *, two_stage: bool) -> None:
    learner, tokenizer = _learner(setting, folder), load_tokenizer(folder)
    environment = environment_of(setting, tokenizer, two_stage=two_stage)
    rollout = TwoStageRollout(
        environment,
        Sampler(learner.model, tokenizer),
        SamplingParams(setting.max_completion, temperature=1.0),
        setting.seed,
    )
    meter, step = _Meter(), 0
    _tell(ready=True)
    while _wait_for_go():
        step += 1
        meter.start()
        rollouts = rollout(problems_of(setting, step), step=step)
        meter.lap("rollout")
        rows = [row for r in rollouts for row in environment.feedback.training_rows(r)]
        learner.update(rows)
        meter.lap("update")
        groups = [group for r in rollouts for group in (r.drafts, *r.refinements)]
        meter.tell(
            [c.token_ids for group in groups for c in group.completions],
            [row.context_ids for row in rows],
        )


def _local_memory(setting: Setting, folder: Path, group_size: int) -> None:
    """The peak of one update above the process before it, at fixed lengths."""
    learner = _learner(setting, folder)
    length = setting.max_completion * 3 // 4
    rows = []
    for group in range(setting.problems):
        context = tuple((group + i) % 200 + 40 for i in range(setting.refinement_tokens))
        for number in range(group_size):
            ids = tuple((number + 3 * i) % 200 + 40 for i in range(length))
            completion = Completion("", ids, (0.0,) * length, StopReason.LENGTH)
            rows.append(TrainingRow(str(group), Stage.REFINE, context, completion, number % 3))
    learner.update(rows[:2])
    before = _peak_mb()
    learner.update(rows)
    _tell(mb=_peak_mb() - before)


def _read_rows(folder: Path) -> list[TrainingRow]:
    return [
        TrainingRow(
            str(row["group"]),
            Stage.REFINE,
            tuple(row["context"]),
            Completion("", tuple(row["ids"]), (0.0,) * len(row["ids"]), StopReason.EOS),
            row["reward"],
        )
        for row in json.loads((folder / "rows.json").read_text())
    ]


def _save_check(
    folder: Path, side: str, logprobs: Sequence[torch.Tensor], gradient: dict[str, torch.Tensor]
) -> None:
    torch.save({"logprobs": list(logprobs), "gradient": gradient}, folder / f"{side}.pt")


def _check_local(setting: Setting, folder: Path) -> None:
    learner, rows = _learner(setting, folder, clip=False), _read_rows(folder)
    with torch.no_grad():
        batch = completion_logprobs(learner.model, rows, temperature=1.0)
    logprobs = [
        row_T[:length]
        for row_T, length in zip(batch.logprobs_RT, batch.lengths_R.tolist(), strict=True)
    ]
    gradient: dict[str, torch.Tensor] = {}
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradient.update(_gradient(learner.model)) or None
    )
    learner.update(rows)
    _save_check(folder, "local", logprobs, gradient)


def _gradient(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class _Stepper:
    """TRL's steps, one for each line read."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter

    def begin(self) -> None:
        if not _wait_for_go():
            raise SystemExit
        self._meter.start()

    def rolled_out(self) -> None:
        self._meter.lap("rollout")

    def end(self, completions: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> None:
        self._meter.lap("update")
        self._meter.tell(completions, prompts)


def _step_trl(setting: Setting, folder: Path, *, two_stage: bool) -> None:
    stepper = _Stepper(_Meter())
    trainer = stepping_trainer(setting, folder, stepper, two_stage=two_stage, steps=1000)
    _tell(ready=True)
    trainer.train()


def _check_trl(setting: Setting, folder: Path) -> None:
    from transformers import TrainerCallback

    rows = _read_rows(folder)
    gradient: dict[str, torch.Tensor] = {}
    logprobs: dict[tuple[int, ...], torch.Tensor] = {}

    def fixed_rollout(texts: list[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [list(row.context_ids) for row in rows],
            "completion_ids": [list(row.completion.token_ids) for row in rows],
            "logprobs": None,
            "refinement_reward": [row.reward for row in rows],
        }

    class Catcher(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            gradient.update(_gradient(model))

    trainer = trl_trainer(
        setting,
        folder,
        rows_per_problem=setting.num_refinements,
        prompts=[f"problem {i}" for i in range(setting.problems)],
        rollout=fixed_rollout,
        reward=lambda completions, **columns: columns["refinement_reward"],
        callback=Catcher(),
        steps=1,
        clip=False,
    )
    score = trainer._get_per_token_logps_and_entropies

    def catching(
        model: Any, input_ids: torch.Tensor, mask: torch.Tensor, kept: int, *_: Any, **options: Any
    ) -> Any:
        # The trainer has shuffled the rows: they are known by their tokens.
        result = score(model, input_ids, mask, kept, *_, **options)
        lengths = mask[:, -kept:].sum(1).tolist()
        for ids_T, logprobs_T, length in zip(input_ids, result[0], lengths, strict=True):
            logprobs[tuple(ids_T[-kept:][:length].tolist())] = logprobs_T[:length].detach()
        return result

    trainer._get_per_token_logps_and_entropies = catching
    trainer.train()
    in_order = [logprobs[row.completion.token_ids] for row in rows]
    _save_check(folder, "trl", in_order, gradient)


if __name__ == "__main__":
    main(sys.argv[1:])
