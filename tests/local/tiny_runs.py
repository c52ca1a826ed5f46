"""Runs of the embedded engine in this process, in a second or two.

The policy is small and random, and the reward a function of the text, so that rewards differ within
a group without anything being learnt first.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from igrpo_nemo.config import Config, load_config
from igrpo_nemo.config.igrpo_keys import SmallModel
from igrpo_nemo.local import parts, trainer
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import save_pretrained_folder
from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.run.tokenizer import build_small_tokenizer
from igrpo_nemo.types import Rollout, Score

FAMILIES = ("qwen2", "llama", "qwen3", "nemotron_h", "gemma2", "granite")
"""Of the models that the fixture `make_model` makes. gemma2 caps and granite scales the logits
behind the head."""

TASK = [
    "experiment=demo",
    "model=hf",
    "igrpo.warmup.enabled=false",
    "data.train.lengths=[2]",
    "data.train.num_problems=14",
    "data.validation.num_problems=4",
    "grpo.max_num_epochs=2",
    "grpo.max_num_steps=6",
    "grpo.num_prompts_per_step=4",
    "grpo.val_period=0",
    "grpo.val_at_start=false",
    "grpo.val_at_end=false",
    "checkpointing.metric_name=null",
    "checkpointing.save_period=1",
    "policy.max_total_sequence_length=160",
    "policy.generation.max_new_tokens=16",
    f"policy.generation.stop_token_ids={list(range(3, 320, 12))}",
    "policy.optimizer.kwargs.lr=1.0e-3",
    "igrpo.schedule.decay=constant",
    "igrpo.schedule.warmup_ratio=0.0",
    "igrpo.sample_table_period=0",
    "logger.tensorboard_enabled=false",
]
"""Two epochs of three steps of four problems, N = G = 4."""


SHAPE = SmallModel(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=320,
    initializer_range=0.15,
)


class TextScorer:
    """Reward 0, 1 or 2, drawn from the text; 2 is the highest."""

    component_names = ("accuracy", "format")
    weights = {"accuracy": 1.0, "format": 1.0}

    def __call__(self, requests: list[ScoreRequest]) -> list[Score]:
        drawn = [zlib.crc32(request.text.encode()) % 3 for request in requests]
        return [Score(float(n), {"accuracy": float(n == 2), "format": float(n > 0)}) for n in drawn]

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is held."""


def tiny_policy(folder: Path, *, seed: int = 1) -> Path:
    """A random model folder; its draws are far from uniform, so that a step changes them."""
    tokenizer = build_small_tokenizer(["<think>12+34=46</think><answer>46</answer>"] * 3, 320)
    model = build_small_model(SHAPE, tokenizer, context=256, seed=seed)
    save_pretrained_folder(model, tokenizer, folder)
    return folder


def tiny_config(policy: Path, log_dir: Path, *overrides: str) -> Config:
    return load_config(
        [*TASK, f"policy.model_name={policy}", f"logger.log_dir={log_dir}", *overrides]
    )


@dataclass
class Seen:
    """Per step: the rollouts of its batches, the weights that sampled them, what was learnt."""

    rollouts: list[list[Rollout]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)
    code: int | None = None


def run(config: Config, *, before_update: Callable[[int], None] = lambda step: None) -> Seen:
    """Trains; `before_update(n)` is called before the n-th update of this call and may raise."""
    seen = Seen()
    roll_out, update = TwoStageRollout.__call__, Learner.update

    def recorded_roll_out(rollout, problems, *, step, draw=0):
        rollouts = roll_out(rollout, problems, step=step, draw=draw)
        if draw:
            seen.rollouts[-1] += rollouts
        else:
            seen.rollouts.append(list(rollouts))
        return rollouts

    def recorded_update(learner, rows):
        seen.weights.append(copied(learner.model))
        before_update(len(seen.weights))
        try:
            return update(learner, rows)
        finally:
            seen.final = copied(learner.model)

    with (
        mock.patch.object(TwoStageRollout, "__call__", recorded_roll_out),
        mock.patch.object(Learner, "update", recorded_update),
        mock.patch.object(parts, "scorer_of", lambda config: TextScorer()),
    ):
        seen.code = trainer.train(config)
    return seen


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)


def learned(log_dir: Path) -> list[dict[str, float]]:
    """The metrics of each step, without those of the process."""
    lines = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line["metrics"].items() if not k.startswith(("perf/", "timing/"))}
        for line in lines
        if line["kind"] == "train"
    ]


def texts(rollouts: list[Rollout]) -> list[tuple]:
    """What was sampled: per problem the token ids of drafts and refinements."""
    return [
        (
            rollout.problem.id,
            [completion.token_ids for completion in rollout.drafts.completions],
            [c.token_ids for group in rollout.refinements for c in group.completions],
        )
        for rollout in rollouts
    ]
