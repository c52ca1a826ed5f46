"""Small things that many unit tests need: a tokenizer, and completions without a model."""

from __future__ import annotations

import pytest
from fake_slurm import no_slurm, slurm  # noqa: F401 - fixtures

from igrpo_nemo.prompts import PromptProfile
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Score, Stage, StopReason

PROFILE = PromptProfile("Think, then answer.", "\nA prior draft:\n", "draft")


@pytest.fixture(scope="session")
def tokenizer():
    from igrpo_nemo.run.tokenizer import build_small_tokenizer

    texts = [PROFILE.system, PROFILE.draft_open, PROFILE.draft_close, "user assistant system"]
    return build_small_tokenizer(texts * 4, 320)


@pytest.fixture
def make_group():
    def build(
        rewards, *, stage=Stage.DRAFT, problem_id="p", truncated=(), prompt=(1, 2), texts=None
    ):
        problem = Problem(problem_id, "1+1=", "2")
        completions = tuple(
            Completion(
                texts[i] if texts else f"text {i}",
                (10 + i, 11),
                (-0.5, -0.25),
                StopReason.LENGTH if i in truncated else StopReason.EOS,
            )
            for i in range(len(rewards))
        )
        scores = tuple(
            Score(float(r), {"accuracy": float(r >= 1), "format": float(r > 0)}) for r in rewards
        )
        return Group(problem, stage, Prompt("q", tuple(prompt)), completions, scores)

    return build
