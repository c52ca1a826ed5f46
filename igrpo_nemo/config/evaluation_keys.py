"""`igrpo.evaluation`: how a trained model is measured (paper, section 4.1)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from igrpo_nemo.config.section import NonNegativeFloat, Positive, Section, TopP

BenchmarkName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class Evaluation(Section):
    """`igrpo.evaluation`: read by the pipelines and the preflight."""

    benchmarks: Annotated[dict[BenchmarkName, Positive], Field(min_length=1)] = {
        "aime24": 64,
        "aime25": 64,
        "math-500": 8,
        "amc23": 8,
        "gsm8k": 8,
        "minerva_math": 8,
    }
    """Samples per problem by benchmark, under NeMo-Skills' names."""
    temperature: NonNegativeFloat = 0.6
    """Temperature; 0 is greedy."""
    top_p: TopP = 0.95
    """Top-p."""
    max_tokens: Positive = 65_000
    """Tokens of a reply at most; a model whose context is smaller gets context minus prompt."""
    profile: Literal["answer_tags", "boxed"] = "answer_tags"
    """Where the answer stands: `<answer>` tags (models trained here) or `\\boxed{}` (baselines)."""
    server_gpus: Positive = 8
    """GPUs of the inference server."""
