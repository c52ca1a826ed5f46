"""A policy and a task small enough to run NeMo-RL's loop in a second or two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from igrpo_nemo.config import Config, load_config
from igrpo_nemo.types import Rollout

TASK = [
    "experiment=demo",
    "data.train.lengths=[2]",
    "data.train.num_problems=64",
    "data.validation.num_problems=16",
    "grpo.max_val_samples=16",
    "grpo.val_batch_size=16",
    "grpo.num_prompts_per_step=8",
    "grpo.max_num_steps=2",
    "grpo.val_period=0",
    "grpo.val_at_start=false",
    "grpo.val_at_end=false",
    "igrpo.val_draft_conditioned=false",
    "checkpointing.enabled=false",
    "checkpointing.metric_name=null",
    "policy.max_total_sequence_length=128",
    "policy.generation.max_new_tokens=24",
    "igrpo.schedule.decay=constant",
    "igrpo.schedule.warmup_ratio=0.0",
    "logger.tensorboard_enabled=false",
    "igrpo.budget=null",
    "igrpo.row_dump_period=1",
]


SYNC = "policy.generation.vllm_cfg.async_engine=false"
ASYNC = "policy.generation.vllm_cfg.async_engine=true"
ENGINES = pytest.mark.parametrize("engine", [SYNC, ASYNC], ids=["sync", "async"])


def tiny_policy(folder: Path) -> str:
    """A small model in about ten seconds of CPU: it breaks the answer format half of the time, so
    rewards differ within groups and there is something to learn."""
    from igrpo_nemo.local.warmup import small_policy

    config = load_config(
        [
            *TASK,
            "igrpo.model.hidden_size=96",
            "igrpo.model.num_heads=6",
            "igrpo.model.num_kv_heads=6",
            "igrpo.model.intermediate_size=384",
            "igrpo.warmup.lr=2.5e-3",
            "igrpo.warmup.steps=150",
            "igrpo.warmup.batch_size=64",
            "igrpo.warmup.broken_format=0.5",
        ]
    )
    return str(small_policy(config, cache_dir=folder).folder)


def tiny_config(policy: str, log_dir: Path, *overrides: str) -> Config:
    """The task on engine `nemo_rl_local` with that policy."""
    return load_config(
        [
            *TASK,
            "model=hf",
            f"policy.model_name={policy}",
            f"logger.log_dir={log_dir}",
            "engine=nemo_rl_local",
            *overrides,
        ]
    )


@dataclass
class Seen:
    """What a run's rollouts were made of: per call the plain rollouts and NeMo-RL's batch."""

    rollouts: list[list[Rollout]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    policies: list[Any] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Records every two-stage rollout of the runs inside, and the policies they train."""
    from igrpo_nemo.nemo import rollout
    from igrpo_nemo.nemo.cpu import policy

    seen = Seen()
    roll_out, two_stages = rollout.TrainingMap.roll_out, rollout.two_stages
    make = policy.LocalPolicy.__init__

    def rolled_out(task_to_env: Any, call: Any) -> Any:
        returned = roll_out(task_to_env, call)
        seen.batches.append(returned[0])
        return returned

    def ran(*args: Any) -> Any:
        returned = two_stages(*args)
        seen.rollouts.append(returned[0])
        return returned

    def init(policy: Any, *args: Any, **kwargs: Any) -> None:
        make(policy, *args, **kwargs)
        seen.policies.append(policy)

    with (
        mock.patch.object(rollout.TrainingMap, "roll_out", rolled_out),
        mock.patch.object(rollout, "two_stages", ran),
        mock.patch.object(policy.LocalPolicy, "__init__", init),
    ):
        yield seen


def train(config: Config, *, shared: bool = True) -> Seen:
    """Runs the launcher and returns what was seen; not `shared`, with an environment of its own."""
    from igrpo_nemo.nemo.launch import train as launch

    with watched() as seen, shared_environments() if shared else nullcontext():
        assert launch(config) == 0
    return seen


class _Host:
    """All environments of the tests in one process, whose start takes seconds."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def make(self, key: str, settings: dict[str, Any]) -> None:
        from igrpo_nemo.nemo.environment import TwoStageWorker

        self._made[key] = TwoStageWorker(settings)

    def call(self, key: str, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._made[key], method)(*args, **kwargs)


class _Hosted:
    """In the place of an environment's own actor."""

    def __init__(self, host: Any, key: str) -> None:
        for name in ("grade", "step", "global_post_process_and_metrics"):
            remote = partial(host.call.remote, key, name)
            setattr(self, name, SimpleNamespace(remote=remote))


_hosts: list[Any] = []
_environments: dict[str, Any] = {}


@contextmanager
def shared_environments() -> Iterator[None]:
    """Runs with equal settings of the environment share one, and all share a process."""
    import ray
    from nemo_rl.data import utils

    def create(env_name: str, env_config: dict[str, Any]) -> Any:
        config = env_config["config"]
        parts = [env_config["tokenizer"], config["igrpo"], config["policy"]["generation"]]
        for key in UNSEEN_BY_ENVIRONMENTS:
            parts[1] = {name: value for name, value in parts[1].items() if name != key}
        parts[2] = {k: parts[2][k] for k in ("max_new_tokens", "temperature")}
        parts.append(config["policy"]["max_total_sequence_length"])
        key = json.dumps(parts, sort_keys=True)
        if key not in _environments:
            if not _hosts:
                _hosts.append(ray.remote(max_concurrency=32)(_Host).remote())
            ray.get(_hosts[0].make.remote(key, env_config))
            _environments[key] = _Hosted(_hosts[0], key)
        return _environments[key]

    with mock.patch.object(utils, "create_env", create):
        yield


UNSEEN_BY_ENVIRONMENTS = (
    "updates_per_rollout",
    "constant_length_divisor",
    "train_stages",
    "draft_prefetch",
    "row_dump_period",
    "val_draft_conditioned",
    "entropy",
    "curriculum_keep",
    "objective",
    "sample_table_period",
    "schedule",
    "stall_alarm_s",
    "validation",
)
"""Keys of `igrpo` that change nothing in the environment."""


def metrics(log_dir: Path, kind: str = "train") -> list[dict[str, float]]:
    """The metrics of each step of a run folder."""
    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["metrics"] for record in records if record["kind"] == kind]


def dump(log_dir: Path, step: int) -> list[dict[str, Any]]:
    """The rows that NeMo-RL trained on in a step, as it wrote them out."""
    path = log_dir / "nemo_rl" / f"train_data_step{step}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: _first(value) for key, value in row.items()} for row in rows]


def trained(row: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of a dumped row: its context, which is not in the loss, and its answer, which is
    to its end."""
    length = row["input_lengths"]
    ids, mask = row["token_ids"][:length], row["token_loss_mask"][:length]
    start = mask.index(1)
    assert mask == [0] * start + [1] * (length - start)
    return tuple(ids[:start]), tuple(ids[start:])


def as_nemo_rl_takes_it(config: Config, folder: Path, num_validation: int = 500) -> Any:
    """NeMo-RL's own typed config, with paths of problems that nobody has written."""
    from igrpo_nemo.nemo.master_config import master_config

    validation_path = folder / "validation.jsonl" if num_validation else None
    return master_config(
        config,
        train_path=folder / "train.jsonl",
        validation_path=validation_path,
        num_validation=num_validation,
    )


def _first(value: Any) -> Any:
    """NeMo-RL writes each value as a batch of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def open_weights(policy: str) -> dict[str, Any]:
    """The weights that a policy folder holds."""
    from safetensors.torch import load_file

    return load_file(Path(policy) / "model.safetensors")
