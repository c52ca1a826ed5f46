"""TRL's GRPO trainer on the work of `engine_setting`: one-stage as it is, two-stage in a rollout.

The two-stage rollout is our environment inside TRL's `rollout_func`, with TRL's own generation:
the model's, or vLLM in the same process (`vllm_mode="colocate"`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine_setting import Setting, environment_of, problems_of, vowel_share

from igrpo_nemo.environment import Attempt
from igrpo_nemo.local.model import load_model
from igrpo_nemo.run.tokenizer import load_tokenizer
from igrpo_nemo.types import Completion, Problem, Stage, StopReason


class StepWatch(Protocol):
    """Is told when a training step begins, has its rollout, and ends with which tokens."""

    def begin(self) -> None: ...
    def rolled_out(self) -> None: ...
    def end(
        self, completions: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]
    ) -> None: ...


def trl_trainer(
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
    device: str = "cpu",
    rows_at_once: int | None = None,
    vllm: bool = False,
) -> Any:
    """TRL's trainer with the same model, optimizer and loss: its defaults but for those.

    `rows_at_once` is the micro-batch (all rows where None). On a GPU it trains in bf16.
    """
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")
    rows = setting.problems * rows_per_problem
    at_once = rows_at_once or rows
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rows // at_once,
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
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        gradient_checkpointing=bool(setting.trl_gradient_checkpointing),
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1_000_000,
        disable_tqdm=True,
        seed=setting.seed,
        **({"use_vllm": True, "vllm_max_model_length": setting.context} if vllm else {}),
    )
    return trl.GRPOTrainer(
        model=load_model(folder, device=device),
        processing_class=load_tokenizer(folder),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        reward_funcs=[reward],
        rollout_func=rollout,
        callbacks=[callback],
    )


def stepping_trainer(
    setting: Setting,
    folder: Path,
    watch: StepWatch,
    *,
    two_stage: bool,
    steps: int,
    **options: Any,
) -> Any:
    """A trainer of `steps` steps on the problems of the setting; `options` go to `trl_trainer`.

    `watch.begin` and `watch.end` may raise to leave the training.
    """
    from transformers import TrainerCallback

    tokenizer = load_tokenizer(folder)
    environment = environment_of(setting, tokenizer, two_stage=two_stage)
    problems = [p for step in range(1, steps + 1) for p in problems_of(setting, step)]
    prompts = {environment.reset(p).prompt.text: p for p in problems}
    seen: dict[str, list[Any]] = {}

    def two_stage_rollout(texts: list[str], trainer: Any) -> dict[str, Any]:
        rows = texts[:: setting.num_refinements]
        drafts = _stage(
            trainer,
            [(prompts[t], environment.reset(prompts[t]).prompt) for t in rows],
            setting.num_drafts,
        )
        results = environment.step(Stage.DRAFT, drafts)
        refinements = _stage(
            trainer,
            [(r.group.problem, r.observations[0].prompt) for r in results],
            setting.num_refinements,
        )
        scored = environment.step(Stage.REFINE, refinements)
        watch.rolled_out()
        trained = [c for a in refinements for c in a.completions]
        contexts = [list(a.prompt.token_ids) for a in refinements for _ in a.completions]
        sampled = [*trained, *(c for a in drafts for c in a.completions)]
        seen["completions"], seen["prompts"] = [c.token_ids for c in sampled], contexts
        return {
            "prompt_ids": contexts,
            "completion_ids": [list(c.token_ids) for c in trained],
            "logprobs": [list(c.logprobs) for c in trained] if trained[0].logprobs else None,
            "refinement_reward": [reward for r in scored for reward in r.group.rewards],
        }

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if two_stage:
            return columns["refinement_reward"]
        watch.rolled_out()
        seen["completions"] = columns["completion_ids"]
        seen["prompts"] = [tokenizer(text).input_ids for text in columns["prompts"]]
        return [vowel_share(text) for text in completions]

    class Watched(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.end(seen["completions"], seen["prompts"])

    return trl_trainer(
        setting,
        folder,
        rows_per_problem=setting.num_refinements if two_stage else setting.budget,
        prompts=list(prompts),
        rollout=two_stage_rollout if two_stage else None,
        reward=reward,
        callback=Watched(),
        steps=steps,
        **options,
    )


def _stage(trainer: Any, prompts: Sequence[tuple[Problem, Any]], count: int) -> list[Attempt]:
    """`count` completions of each prompt with the trainer's own generation."""
    repeated = [list(prompt.token_ids) for _, prompt in prompts for _ in range(count)]
    ids, logprobs = trainer._generate_single_turn(repeated, None, {}, count)
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    completions = [
        Completion(text, tuple(row), tuple(row_logprobs), StopReason.EOS)
        for text, row, row_logprobs in zip(texts, ids, logprobs or [()] * len(ids), strict=True)
    ]
    return [
        Attempt(problem, prompt, tuple(completions[i * count : (i + 1) * count]))
        for i, (problem, prompt) in enumerate(prompts)
    ]
