"""Stage 1 and Stage 2 as steps of a NeMo-RL environment: a Ray actor, and its client.

    rollout ─ NemoEnvironment.step(stage, attempt) ─ calculate_rewards ─> TwoStageActor.step
              one row per completion, what it needs as metadata          the core's environment

stage "draft": scores, selects, and returns q' as the observation, not terminated. stage "refine":
scores, terminated. No stage: plain scoring, terminated; that is validation, and plain GRPO.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import ray
import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from nemo_rl.experience import rollouts as nemo_rollouts

from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.validate import validated
from igrpo_nemo.environment import Attempt, StepReturn, TwoStageEnvironment
from igrpo_nemo.run.core import evaluation_scorer, prompt_builder, scorer_of
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Score, Stage, StopReason

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
        self.validation = self.environment
        if "judge" in self.scorer.weights:
            # Measured in accuracy alone, it asks no judge.
            self.validation = TwoStageEnvironment(
                prompts, evaluation_scorer(config), config.feedback
            )
        # A call of the synchronous engine has all groups of a step, each with its own deadline.
        self._threads = ThreadPoolExecutor(CONCURRENT_STEPS, thread_name_prefix="groups")

    def step(
        self, message_log_batch: list[Any], metadata: list[dict[str, Any]]
    ) -> EnvironmentReturn:
        """One row per completion; rows with an equal `attempt` are completions of one prompt."""
        texts = [_last_answer(log) for log in message_log_batch]
        rows_of: dict[Any, list[int]] = {}
        for row, info in enumerate(metadata):
            rows_of.setdefault(info.get("attempt", ("row", row)), []).append(row)
        groups = list(rows_of.values())
        results = self._threads.map(
            lambda rows: self._step([texts[row] for row in rows], [metadata[row] for row in rows]),
            groups,
        )
        returned: dict[int, dict[str, Any]] = {}
        for rows, result in zip(groups, results, strict=True):
            for place, row in enumerate(rows):
                returned[row] = _row_return(result, place)
        ordered = [returned[row] for row in range(len(texts))]
        return EnvironmentReturn(
            observations=[each.pop("observation") for each in ordered],
            metadata=ordered,
            next_stop_strings=[None] * len(ordered),
            rewards=self._rewards([each["score"] for each in ordered], metadata),
            terminateds=torch.tensor([each.pop("terminated") for each in ordered]),
            answers=None,
        )

    def _step(self, texts: Sequence[str], infos: Sequence[Mapping[str, Any]]) -> StepReturn:
        info = infos[0]
        problem = Problem(**info["problem"])
        stage = None if info.get("stage") is None else Stage(info["stage"])
        completions = tuple(
            _scored_text(text, bool(row.get("truncated", False)))
            for text, row in zip(texts, infos, strict=True)
        )
        prompt = Prompt("", (), thinking_open=info["thinking_open"])
        if stage is Stage.DRAFT:
            prompt = self.environment.prompts.question(problem)
        attempt = Attempt(problem, prompt, completions)
        scores = tuple(row["score"] for row in infos) if "score" in info else None
        step = info.get("step", 0)
        if scores is None:
            environment = self.validation if info.get("validation") else self.environment
            return environment.step(stage, [attempt], step=step)[0]
        drafts = Group(problem, Stage.DRAFT, prompt, completions, scores)
        return self.environment.after_drafts(drafts, step)

    def _rewards(
        self, scores: Sequence[Score], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """[B] rewards; [B, K] weighted components where there are several, which NeMo-RL sums up.

        Validation is measured in accuracy, whatever the policy is trained on.
        """
        if metadata and all(info.get("validation") for info in metadata):
            return torch.tensor([float(score.correct) for score in scores])
        weights = self.scorer.weights
        if len(weights) == 1:
            return torch.tensor([score.reward for score in scores], dtype=torch.float32)
        columns = [[w * s.components[name] for name, w in weights.items()] for s in scores]
        return torch.tensor(columns, dtype=torch.float32)

    def global_post_process_and_metrics(
        self, batch: BatchedDataDict
    ) -> tuple[BatchedDataDict, dict]:
        rewards = batch["total_reward"]
        return batch, {"reward": float(rewards.mean())} if len(rewards) else {}

    def shutdown(self) -> None:
        self.scorer.close()
        self.validation.scorer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


_ACTOR_OPTIONS: dict[str, Any] = {
    "max_concurrency": CONCURRENT_STEPS,
    "max_restarts": -1,
    "max_task_retries": 2,
}

TwoStageActor = ray.remote(**_ACTOR_OPTIONS)(TwoStageWorker)


def register() -> None:
    """Makes the environment known to NeMo-RL under `ENV_NAME`; may be called again."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import ENV_REGISTRY, register_env

    ACTOR_ENVIRONMENT_REGISTRY[ACTOR_PATH] = PY_EXECUTABLES.SYSTEM
    if ENV_NAME not in ENV_REGISTRY:
        register_env(ENV_NAME, ACTOR_PATH)


class NemoEnvironment:
    """The core's environment, reached through NeMo-RL's `calculate_rewards`.

    `step_number` numbers the training step for seeded choices. `executor` runs the waiting, which
    must stay off the event loop.
    """

    def __init__(
        self,
        task_to_env: Mapping[str, Any],
        task_name: str,
        step_number: int,
        executor: Executor | None = None,
    ) -> None:
        self._task_to_env = dict(task_to_env)
        self._task_name = task_name
        self._step_number = step_number
        self._executor = executor

    def step_all(self, stage: Stage | None, attempts: Sequence[Attempt]) -> list[StepReturn]:
        """All attempts in one call, in order."""
        return self._call(stage, attempts, [None] * len(attempts))

    async def step(
        self, stage: Stage | None, attempt: Attempt, *, scores: tuple[Score, ...] | None = None
    ) -> StepReturn:
        """One attempt, without blocking the loop."""
        call = functools.partial(self._call, stage, [attempt], [scores])
        [result] = await asyncio.get_running_loop().run_in_executor(self._executor, call)
        return result

    def _call(
        self,
        stage: Stage | None,
        attempts: Sequence[Attempt],
        scores: Sequence[tuple[Score, ...] | None],
    ) -> list[StepReturn]:
        logs, infos = [], []
        for number, (attempt, known) in enumerate(zip(attempts, scores, strict=True)):
            for place, completion in enumerate(attempt.completions):
                logs.append([{"role": "assistant", "content": completion.text}])
                info = _metadata(stage, attempt, completion)
                info |= {"attempt": number, "step": self._step_number}
                if known is not None:
                    info["score"] = known[place]
                infos.append(info)
        rows: BatchedDataDict = BatchedDataDict(
            {
                "message_log": logs,
                "extra_env_info": infos,
                "task_name": [self._task_name] * len(logs),
            }
        )
        returned = iter(nemo_rollouts.calculate_rewards(rows, self._task_to_env).metadata)
        return [_step_return(stage, each, returned) for each in attempts]


def _metadata(stage: Stage | None, attempt: Attempt, completion: Completion) -> dict[str, Any]:
    problem = attempt.problem
    return {
        "stage": None if stage is None else str(stage),
        "problem": {"id": problem.id, "question": problem.question, "answer": problem.answer},
        "thinking_open": attempt.prompt.thinking_open,
        "truncated": completion.truncated,
    }


def _step_return(stage: Stage | None, attempt: Attempt, returned: Any) -> StepReturn:
    infos = [next(returned) for _ in attempt.completions]
    group = Group(
        attempt.problem,
        stage or Stage.DRAFT,
        attempt.prompt,
        attempt.completions,
        tuple(info["score"] for info in infos),
    )
    following = infos[0]["following"]
    return StepReturn(group, infos[0]["selection"], following, not following)


def _row_return(result: StepReturn, place: int) -> dict[str, Any]:
    """What a row gets back; the group's decision travels with its first row."""
    first = place == 0
    following = result.observations
    text = following[0].prompt.text if following else ""
    return {
        "observation": {"role": "user" if following else "environment", "content": text},
        "terminated": result.terminated,
        "score": result.group.scores[place],
        "selection": result.selection if first else None,
        "following": following if first else (),
    }


def _last_answer(log: Sequence[Mapping[str, Any]]) -> str:
    """The last assistant message: an earlier one would be part of the prompt."""
    return next(str(m["content"]) for m in reversed(log) if m["role"] == "assistant")


def _scored_text(text: str, truncated: bool) -> Completion:
    reason = StopReason.LENGTH if truncated else StopReason.EOS
    return Completion(text, (), (), reason)
