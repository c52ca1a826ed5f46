"""A plan: what the preflight found, as tables for a terminal and as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment

from igrpo_nemo.config import Config
from igrpo_nemo.config.derive import warmup_updates
from igrpo_nemo.config.machines import low_rank, machines, parallel, replicas
from igrpo_nemo.preflight.cost import Cost
from igrpo_nemo.preflight.disk import CheckpointSpace
from igrpo_nemo.preflight.memory import (
    GIB,
    GPU,
    TrainingMemory,
    VllmMemory,
    engines,
    trained_parameters,
)
from igrpo_nemo.preflight.shape import Shape
from igrpo_nemo.preflight.tokens import Context, Questions, usable

_TEMPLATE = Environment(
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
).from_string(Path(__file__).with_name("plan.jinja").read_text(encoding="utf-8"))

PAPER_GPU_HOURS = {"grpo": 83.3, "igrpo": 94.1}
"""Table S.3."""
PAPER_RATIO = PAPER_GPU_HOURS["igrpo"] / PAPER_GPU_HOURS["grpo"]
"""GPU-hours of iGRPO over GRPO's at the same budget: 1.13."""


@dataclass
class Plan:
    """What the preflight found. `problems` is empty where the run fits; each is one line that names
    the key and a value that works. `other` is the cost of the other method at the same budget;
    `judge` says what stands between the run and its judge, whether it fits or not.

    Sizes are bytes; `capacity` is what a training GPU offers. `steps` are None where the number of
    problems is not known, `shape` where nobody describes the model; without `questions` and
    `context` a check has failed before anything was estimated.
    """

    config: Config
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    judge: list[str] = field(default_factory=list)
    shape: Shape | None = None
    questions: Questions | None = None
    context: Context | None = None
    steps: int | None = None
    dumps: int = 0
    disk: CheckpointSpace | None = None
    gpu: GPU | None = None
    capacity: int = 0
    training: TrainingMemory | None = None
    vllm: VllmMemory | None = None
    cost: Cost | None = None
    other: Cost | None = None

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def parameters(self) -> int | None:
        return self.shape.parameters if self.shape else None

    @property
    def ratio(self) -> float | None:
        """GPU-hours of the two-stage method over GRPO's."""
        if self.cost is None or self.other is None:
            return None
        ratio = self.cost.gpu_hours / self.other.gpu_hours
        return ratio if self.config.feedback.two_stage else 1 / ratio

    @property
    def warmup_steps(self) -> int | None:
        """Steps over which the learning rate rises."""
        return None if self.steps is None else warmup_updates(self.config, self.steps)

    def text(self) -> str:
        """The plan as tables for a terminal, the verdict last; plan.jinja has the words."""
        config, shape, context, grpo = self.config, self.shape, self.context, self.config.grpo
        two_stage, assumed = config.feedback.two_stage, config.igrpo.preflight
        grown = self.parameters or 0
        count = usable(config, self.questions, context) if self.questions and context else None
        completion = assumed.response_share * context.new_tokens if context else 0
        prompt = context.mean_refinement_prompt if context and two_stage else 0
        prompt = context.mean_question if context and not two_stage else prompt
        cluster = config.igrpo.engine == "nemo_rl" and shape is not None
        costs = (self.other, self.cost) if two_stage else (self.cost, self.other)
        hours = (PAPER_GPU_HOURS["igrpo"], PAPER_GPU_HOURS["grpo"])
        return _TEMPLATE.render(
            plan=self,
            **{"config": config, "igrpo": config.igrpo, "grpo": grpo, "assumed": assumed},
            **{"context": context, "disk": self.disk, "vllm": self.vllm, "GIB": GIB},
            size=f"{grown:,}" if grown < 1e8 else f"{grown / 1e9:.3f}e9",
            two_stage=two_stage,
            adapters=low_rank(config) if cluster else None,
            trained=trained_parameters(config, shape) if shape else 0,
            split=machines(config) if self.gpu else None,
            layout=_layout(config) if self.gpu else "",
            count=count,
            epoch=(count or 0) // round(grpo.num_prompts_per_step * grpo.batch_multiplier),
            completion=completion,
            mean=prompt + completion,
            training=self.training,
            engines=engines(config) if self.vllm else 0,
            gib=lambda size: f"{size / GIB:6.1f}",
            first=costs[0],
            second=costs[1],
            published=f"{hours[0]:g} / {hours[1]:g} = {PAPER_RATIO:.2f}",
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: bytes, seconds, tokens; absent parts are null."""
        config, vllm, disk = self.config, self.vllm, self.disk
        costs = ("step", "hours", "gpu_hours")
        tokens = _part(self.context)
        if tokens is not None:
            for name in ("question", "draft_room"):  # JSON wants text for keys
                tokens[name] = {str(quantile): n for quantile, n in tokens[name].items()}
        at_once = vllm.at_once(vllm.max_model_len) if vllm else None
        count = engines(config) if vllm else None
        return {
            "log_dir": config.logger.log_dir,
            "model": config.policy.model_name,
            "engine": config.igrpo.engine,
            "fits": self.fits,
            "problems": self.problems,
            "judge": self.judge,
            "notes": self.notes,
            "parameters": self.parameters,
            "assumed": config.igrpo.preflight.model_dump(),
            "warmup_steps": self.warmup_steps,
            "cost": _part(self.cost, *costs),
            "cost_of_other_method": _part(self.other, *costs),
            "gpu_hours_igrpo_over_grpo": self.ratio,
            "published_gpu_hours_igrpo_over_grpo": PAPER_RATIO,
            "steps": self.steps,
            "tokens": tokens,
            "row_dumps": None if self.context is None else self.dumps,
            "training_memory": _part(self.training, "total", capacity=self.capacity),
            "vllm_memory": _part(vllm, "cache", engines=count, longest_at_once=at_once),
            "checkpoints": _part(disk, "total", folder=str(disk.folder) if disk else None),
        }


def _part(part: Any, *properties: str, **more: Any) -> dict[str, Any] | None:
    """A dataclass as plain values, with properties and other values of it."""
    if part is None:
        return None
    return {**asdict(part), **{name: getattr(part, name) for name in properties}, **more}


def _layout(config: Config) -> str:
    """How a model is spread over the GPUs that train, in words."""
    spread = parallel(config)
    sizes = {"TP": spread.tensor, "PP": spread.pipeline, "CP": spread.context}
    parts = ", ".join(f"{name} {n}" for name, n in sizes.items() if n > 1 or name == "TP")
    name = "Megatron-Core" if spread.backend == "megatron" else "DTensor (FSDP2)"
    return f"{name}, {parts}, DP {replicas(config)}"
