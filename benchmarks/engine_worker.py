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

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from engine_setting import Setting, build_model_folder, environment_of, problems_of, vowel_share

from igrpo_nemo.config import load_config
from igrpo_nemo.environment import Attempt
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import load_model
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.sampler import Sampler, SamplingParams
from igrpo_nemo.run.tokenizer import load_tokenizer
from igrpo_nemo.types import Completion, Problem, Stage, StopReason, TrainingRow

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


def _trl_trainer(
    setting: Setting,
    folder: Path,
    *,
    rows_per_problem: int,
    prompts: Sequence[str],
    rollout: Callable[..., dict[str, Any]] | None,
    reward: Callable[..., list[float]],
    callback: Any,
    steps: int,
    clip: bool = True,
) -> Any:
    """TRL's trainer with the same model, optimizer and loss: its defaults but for those."""
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=setting.problems * rows_per_problem,
        num_generations=rows_per_problem,
        max_completion_length=setting.max_completion,
        max_steps=steps,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=setting.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0 if clip else 0.0,
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=bool(setting.trl_gradient_checkpointing),
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1_000_000,
        disable_tqdm=True,
        seed=setting.seed,
    )
    return trl.GRPOTrainer(
        model=load_model(folder, device="cpu"),
        processing_class=load_tokenizer(folder),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        reward_funcs=[reward],
        rollout_func=rollout,
        callbacks=[callback],
    )


def _step_trl(setting: Setting, folder: Path, *, two_stage: bool) -> None:
    from transformers import TrainerCallback

    tokenizer, steps = load_tokenizer(folder), 1000
    environment = environment_of(setting, tokenizer, two_stage=two_stage)
    problems = [p for step in range(1, steps + 1) for p in problems_of(setting, step)]
    prompts = {environment.reset(p).prompt.text: p for p in problems}
    meter = _Meter()
    seen: dict[str, list[Any]] = {}

    def two_stage_rollout(texts: list[str], trainer: Any) -> dict[str, Any]:
        rows = texts[:: setting.num_refinements]
        drafts = _trl_stage(
            trainer,
            [(prompts[t], environment.reset(prompts[t]).prompt) for t in rows],
            setting.num_drafts,
        )
        results = environment.step(Stage.DRAFT, drafts)
        refinements = _trl_stage(
            trainer,
            [(r.group.problem, r.observations[0].prompt) for r in results],
            setting.num_refinements,
        )
        scored = environment.step(Stage.REFINE, refinements)
        meter.lap("rollout")
        trained = [c.token_ids for a in refinements for c in a.completions]
        contexts = [a.prompt.token_ids for a in refinements for _ in a.completions]
        seen["completions"] = trained + [c.token_ids for a in drafts for c in a.completions]
        seen["prompts"] = contexts
        return {
            "prompt_ids": [list(ids) for ids in contexts],
            "completion_ids": [list(ids) for ids in trained],
            "logprobs": None,
            "refinement_reward": [reward for r in scored for reward in r.group.rewards],
        }

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if two_stage:
            return columns["refinement_reward"]
        meter.lap("rollout")
        seen["completions"] = columns["completion_ids"]
        seen["prompts"] = [tokenizer(text).input_ids for text in columns["prompts"]]
        return [vowel_share(text) for text in completions]

    class Stepper(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not _wait_for_go():
                raise SystemExit
            meter.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.lap("update")
            meter.tell(seen["completions"], seen["prompts"])

    trainer = _trl_trainer(
        setting,
        folder,
        rows_per_problem=setting.num_refinements if two_stage else setting.budget,
        prompts=list(prompts),
        rollout=two_stage_rollout if two_stage else None,
        reward=reward,
        callback=Stepper(),
        steps=steps,
    )
    _tell(ready=True)
    trainer.train()


def _trl_stage(trainer: Any, prompts: Sequence[tuple[Problem, Any]], count: int) -> list[Attempt]:
    """`count` completions of each prompt with the trainer's own generation."""
    repeated = [list(prompt.token_ids) for _, prompt in prompts for _ in range(count)]
    ids, _ = trainer._generate_single_turn(repeated, None, {}, count)
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    completions = [
        Completion(text, tuple(row), (), StopReason.EOS)
        for text, row in zip(texts, ids, strict=True)
    ]
    return [
        Attempt(problem, prompt, tuple(completions[i * count : (i + 1) * count]))
        for i, (problem, prompt) in enumerate(prompts)
    ]


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

    trainer = _trl_trainer(
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
