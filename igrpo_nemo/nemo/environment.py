"""The core's environment in a Ray actor of NeMo-RL's, and its client.

    rollout ─ EnvironmentClient.step(stage, attempt) ─> TwoStageActor.grade: the core's step
    NeMo-RL ─ calculate_rewards ─────────────────────> TwoStageActor.step:  validation, scoring

Stage "draft": scores, selects, and returns q' as the observation, not terminated. Stage "refine":
scores, terminated. No stage: plain scoring, terminated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from igrpo_nemo.config.schema import Config, validated
from igrpo_nemo.environment import Attempt, StepReturn, TwoStageEnvironment
from igrpo_nemo.nemo.versions import component_rewards
from igrpo_nemo.run.core import evaluation_scorer, prompt_builder, scorer_of
from igrpo_nemo.types import Completion, Problem, Prompt, Stage, StopReason

ENV_NAME = "igrpo"
"""Under this name the environment is registered, and its config stands in `env`."""

ACTOR_PATH = "igrpo_nemo.nemo.environment.TwoStageActor"

CONCURRENT_STEPS = 32
"""Steps that one actor serves at a time, each in a thread; the reward pool bounds the work."""


class TwoStageWorker(EnvironmentInterface):
    """The environment inside the actor. Steps keep no state, so a restarted actor may repeat one.

    `cfg` holds the resolved project config under `config` and NeMo-RL's tokenizer section under
    `tokenizer`.
    """

    def __init__(self, cfg: dict[str, Any]) -> None:
        from nemo_rl.algorithms.utils import get_tokenizer

        config: Config = validated(cfg["config"])
        self.scorer = scorer_of(config)
        prompts = prompt_builder(config, get_tokenizer(cfg["tokenizer"]))
        self.environment = TwoStageEnvironment(prompts, self.scorer, config.feedback)
        self.unjudged = self.environment
        if self.scorer.weights.keys() - {"accuracy", "format"}:
            unjudged = evaluation_scorer(config, functions=False)
            self.unjudged = TwoStageEnvironment(prompts, unjudged, config.feedback)
        # NeMo-RL brings all rows in one call; each has its own deadline.
        self._threads = ThreadPoolExecutor(CONCURRENT_STEPS, thread_name_prefix="rows")

    def grade(
        self, stage: Stage | None, attempt: Attempt, step: int, judged: bool = True
    ) -> StepReturn:
        """`TwoStageEnvironment.step` of one attempt.

        `step` numbers the training step. Not `judged`: accuracy and format alone, no judge is
        asked and no function of the user's called.
        """
        environment = self.environment if judged else self.unjudged
        return environment.step(stage, [attempt], step=step)[0]

    def step(
        self, message_log_batch: list[Any], metadata: list[dict[str, Any]]
    ) -> EnvironmentReturn:
        """NeMo-RL's contract: the last answer of each row is scored, and the episode is over.

        Validation rows (`validation` in their metadata) are measured in accuracy, whatever the
        policy is trained on, and ask no judge.
        """
        attempts = [_attempt(*row) for row in zip(message_log_batch, metadata, strict=True)]
        validation = bool(metadata) and all(info.get("validation") for info in metadata)
        steps = self._threads.map(lambda each: self.grade(None, each, 0, not validation), attempts)
        scores = [step.group.scores[0] for step in steps]
        weights = self.scorer.weights
        if validation:
            rewards: Any = torch.tensor([float(score.correct) for score in scores])
        elif len(weights) == 1:
            rewards = torch.tensor([score.reward for score in scores], dtype=torch.float32)
        else:  # weighted components, which NeMo-RL sums
            rewards = component_rewards(
                {n: torch.tensor([w * s.components[n] for s in scores]) for n, w in weights.items()}
            )
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""}] * len(scores),
            metadata=metadata,
            next_stop_strings=[None] * len(scores),
            rewards=rewards,
            terminateds=torch.ones(len(scores), dtype=torch.bool),
            answers=None,
        )

    def global_post_process_and_metrics(
        self, batch: BatchedDataDict
    ) -> tuple[BatchedDataDict, dict]:
        rewards = batch["total_reward"]
        return batch, {"reward": float(rewards.mean())} if len(rewards) else {}

    def shutdown(self) -> None:
        self.scorer.close()
        self.unjudged.scorer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _attempt(log: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> Attempt:
    """A row of NeMo-RL's. An answer before the last would be part of the prompt."""
    text = next(str(m["content"]) for m in reversed(log) if m["role"] == "assistant")
    prompt = Prompt("", (), thinking_open=info["thinking_open"])
    return Attempt(Problem(**info["problem"]), prompt, (Completion(text, (), (), StopReason.EOS),))


_OPTIONS = {"max_concurrency": CONCURRENT_STEPS, "max_restarts": -1, "max_task_retries": 2}

TwoStageActor = ray.remote(**_OPTIONS)(TwoStageWorker)  # type: ignore[call-overload]


def register() -> None:
    """Makes the environment known to NeMo-RL under `ENV_NAME`; may be called again."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import ENV_REGISTRY, register_env

    ACTOR_ENVIRONMENT_REGISTRY[ACTOR_PATH] = PY_EXECUTABLES.SYSTEM
    if ENV_NAME not in ENV_REGISTRY:
        register_env(ENV_NAME, ACTOR_PATH)


class EnvironmentClient:
    """The core's environment behind an actor's handle; `step_number` numbers the training step,
    for seeded choices. `seconds`: how long at least one attempt was with the actor."""

    def __init__(self, actor: Any, step_number: int) -> None:
        self._actor = actor
        self._step_number = step_number
        self._running = 0
        self.seconds = 0.0

    async def step(self, stage: Stage | None, attempt: Attempt) -> StepReturn:
        """One attempt, without blocking the loop. Texts travel, tokens and log-probs stay."""
        texts = tuple(Completion(c.text, (), (), c.stop_reason) for c in attempt.completions)
        sent = replace(attempt, completions=texts)
        if not self._running:
            self._since = time.perf_counter()
        self._running += 1
        try:
            found: StepReturn = await self._actor.grade.remote(stage, sent, self._step_number)
        finally:
            self._running -= 1
            if not self._running:
                self.seconds += time.perf_counter() - self._since
        group = replace(found.group, prompt=attempt.prompt, completions=attempt.completions)
        return replace(found, group=group)
