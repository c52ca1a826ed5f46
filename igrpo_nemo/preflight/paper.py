"""What the paper measured, beside this project's estimate of the same setting.

Appendix D: TRL on a node of eight A100 for training and one for vLLM, DeepSeek-R1-Distill-Qwen-7B
with 16 rows a GPU, completions of 2,048 tokens, gradient checkpointing, FlashAttention-2, bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

from igrpo_nemo.preflight.gpu import GB
from igrpo_nemo.preflight.parameters import BF16, FP32, counts
from igrpo_nemo.preflight.shape import Shape

PEAK_GB = {"grpo": 54.9286, "igrpo": 54.9349}
GPU_HOURS = {"grpo": 83.3, "igrpo": 94.1}
SAMPLES_PER_S = {"grpo": 0.41, "igrpo": 0.34}
"""Table S.3."""

RATIO = GPU_HOURS["igrpo"] / GPU_HOURS["grpo"]
"""GPU-hours of iGRPO over GRPO's at the same budget: 1.13."""

ROWS, PROMPT, COMPLETION, GPUS = 16, 1024, 2048, 8
LOGIT_COPIES = 2
"""Logits-sized tensors of TRL's loss at its peak: scaled logits and the rows' log-softmax, later as
many gradients."""


@dataclass(frozen=True, slots=True)
class AppendixD:
    """Bytes of one training GPU in appendix D's setting, under DeepSpeed ZeRO of `stage`."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    layer_inputs: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.layer_inputs + self.logits

    @property
    def gb(self) -> float:
        return self.total / GB


def appendix_d(shape: Shape, stage: int = 2) -> AppendixD:
    """The estimate of Table S.3's peak memory.

    The paper names neither ZeRO nor its stage, but without shards 7.6e9 parameters need 16 bytes
    each. Stage 2 shards optimizer and gradients, stage 3 weights too. The peak is that of the whole
    run, so the prompts are the longest that the paper allows: 1,024 tokens.
    """
    total = counts(shape).total
    tokens = ROWS * (PROMPT + COMPLETION)
    return AppendixD(
        stage=stage,
        weights=BF16 * total // (GPUS if stage == 3 else 1),
        gradients=BF16 * total // GPUS,
        optimizer=3 * FP32 * total // GPUS,
        layer_inputs=BF16 * shape.depth * tokens * shape.hidden,
        logits=LOGIT_COPIES * BF16 * ROWS * COMPLETION * shape.vocab,
    )
