"""A plan: what the preflight found, as tables for a terminal and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

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
        """The plan as tables for a terminal, the verdict last."""
        tables: list[Iterable[str]] = [_run(self)]
        if self.context is not None and self.questions is not None:
            tables.append(_tokens(self, self.context, self.questions))
            tables += [_training(self, self.training)] if self.training else []
            tables += [_vllm(self, self.context, self.vllm)] if self.vllm else []
        if self.cost is not None and self.other is not None:
            tables.append(_cost(self, self.cost, self.other))
        if self.notes:
            tables.append(f"note: {note}" for note in self.notes)
        if self.judge:
            tables.append(["its judge cannot be used:", *(f"  {each}" for each in self.judge)])
        verdict = ["it does not fit:", *(f"  {each}" for each in self.problems)]
        tables.append(["it fits"] if self.fits else verdict)
        return "\n\n".join("\n".join(table) for table in tables) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: bytes, seconds, tokens; absent parts are null."""
        config, vllm, disk = self.config, self.vllm, self.disk
        costs = ("step", "hours", "gpu_hours")
        tokens = _part(self.context)
        if tokens is not None:
            for name in ("question", "draft_room"):  # JSON wants text for keys
                tokens[name] = {str(quantile): n for quantile, n in tokens[name].items()}
        at_once = vllm.at_once(vllm.max_model_len) if vllm else None
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
            "vllm_memory": _part(vllm, "cache", engines=engines(config), longest_at_once=at_once),
            "checkpoints": _part(disk, "total", folder=str(disk.folder) if disk else None),
        }


def _part(part: Any, *properties: str, **more: Any) -> dict[str, Any] | None:
    """A dataclass as plain values, with properties and other values of it."""
    if part is None:
        return None
    return {**asdict(part), **{name: getattr(part, name) for name in properties}, **more}


def _row(label: str, text: object) -> str:
    return f"  {label:<22}{text}"


def _sizes(sizes: dict[str, int]) -> list[str]:
    return [_row(label, f"{size / GIB:6.1f}") for label, size in sizes.items()]


def _run(plan: Plan) -> Iterator[str]:
    config, grpo, igrpo = plan.config, plan.config.grpo, plan.config.igrpo
    count = plan.parameters or 0
    size = f"{count:,}" if count < 1e8 else f"{count / 1e9:.3f}e9"
    yield f"{config.logger.log_dir}: engine {igrpo.engine}"
    yield _row("model", f"{config.policy.model_name}{f', {size} parameters' if count else ''}")
    stages = f"{igrpo.num_drafts} drafts and {igrpo.num_refinements} refinements a problem"
    alone = f"GRPO: {igrpo.budget} completions of q a problem"
    yield _row("method", stages if config.feedback.two_stage else alone)
    if igrpo.engine == "nemo_rl" and plan.shape and (adapters := low_rank(config)):
        trained = trained_parameters(config, plan.shape)
        yield _row("adapters", f"rank {adapters.dim}, {trained:,} parameters are trained")
    rows = grpo.num_prompts_per_step * grpo.num_generations_per_prompt
    yield _row(
        "batch",
        f"{grpo.num_prompts_per_step} problems, {rows} trained rows, "
        f"{igrpo.updates_per_rollout} update(s) a step",
    )
    if plan.gpu:
        yield _row("machines", _machines(config, plan.gpu))
    if plan.steps is not None and plan.questions and plan.context:
        count = usable(config, plan.questions, plan.context) or 0
        each = count // round(grpo.num_prompts_per_step * grpo.batch_multiplier)
        epochs = f" ({each} an epoch)" if each != plan.steps else ""
        warmup = f"{plan.warmup_steps} of them warm-up"
        yield _row("steps", f"{plan.steps}{epochs} from {count:,} problems, {warmup}")
    if disk := plan.disk:
        size = f"{disk.each / GIB:,.1f} GiB" if disk.each >= GIB / 10 else f"{disk.each:,} bytes"
        total = f", {disk.total / GIB:,.0f} GiB in {disk.folder}" if disk.each >= GIB else ""
        yield _row("checkpoints", f"at most {disk.count} of {size}{total}")
    if plan.dumps:
        yield _row("row dumps", f"about {plan.dumps / GIB:,.1f} GiB in {config.logger.log_dir}")


def _machines(config: Config, gpu: GPU) -> str:
    """How the GPUs are used, in words."""
    split, spread = machines(config), parallel(config)
    sizes = {"TP": spread.tensor, "PP": spread.pipeline, "CP": spread.context}
    layout = ", ".join(f"{name} {n}" for name, n in sizes.items() if n > 1 or name == "TP")
    name = "Megatron-Core" if spread.backend == "megatron" else "DTensor (FSDP2)"
    where = "also generate" if split.colocated else "train"
    apart = "" if split.colocated else f"; {split.generation} generate"
    training = f"{split.training} {where}: {name}, {layout}, DP {replicas(config)}"
    return f"{split.total} x {gpu.name}: {training}{apart}"


def _tokens(plan: Plan, budget: Context, asked: Questions) -> Iterator[str]:
    assumed, shape = plan.config.igrpo.preflight, plan.shape
    q, room = budget.question, budget.draft_room
    yield "tokens"
    yield _row("q", f"median {q[0.5]}, 99 % {q[0.99]}, longest {q[1.0]} ({asked.source})")
    mean = assumed.response_share * budget.new_tokens
    yield _row(
        "completion",
        f"at most {budget.new_tokens:,}, mean {mean:,.0f} assumed "
        f"(igrpo.preflight.response_share={assumed.response_share:g})",
    )
    if plan.config.feedback.two_stage:
        clipped = f", {100 * budget.clipped:.0f} % shortened" if budget.clipped else ""
        yield _row(
            "draft in q'",
            f"room for {room[0.5]:,} behind a median q, {room[1.0]:,} behind the longest{clipped}",
        )
    held = "an unknown number" if shape is None else f"{shape.context:,}"
    yield _row("context", f"{budget.total:,} of {held}")
    if shape is not None:
        reply = min(plan.config.igrpo.evaluation.max_tokens, shape.context - q[0.5])
        yield _row("evaluation", f"replies of at most {reply:,}")


def _training(plan: Plan, memory: TrainingMemory) -> list[str]:
    return [
        f"training memory of a GPU, GiB (micro-batch of {memory.tokens:,} tokens)",
        *_sizes(
            {
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "layer inputs": memory.layer_inputs,
                "largest layer": memory.working_set,
                "or logits": memory.logits,
                "context, NCCL": memory.overhead,
            }
        ),
        _row("in all", f"{memory.total / GIB:6.1f} of {plan.capacity / GIB:.1f}"),
    ]


def _vllm(plan: Plan, context: Context, memory: VllmMemory) -> list[str]:
    two, longest = plan.config.feedback.two_stage, memory.max_model_len
    prompt = context.mean_refinement_prompt if two else context.mean_question
    mean = prompt + plan.config.igrpo.preflight.response_share * context.new_tokens
    what = "q' + refinement" if two else "q + completion"
    state = f" + {memory.state_per_sequence:,} a sequence" if memory.state_per_sequence else ""
    return [
        f"vLLM memory of a GPU, GiB ({engines(plan.config)} engines, TP {memory.tensor})",
        *_sizes(
            {
                "weights": memory.weights,
                "forward pass": memory.forward,
                "context, graphs": memory.overhead,
                "cache": memory.cache,
            }
        ),
        _row("cache of a token", f"{memory.kv_per_token:,} bytes{state}"),
        _row(
            "at once an engine",
            f"{memory.at_once(longest)} of the longest {what} ({longest:,}), "
            f"{memory.at_once(mean)} of the mean ({mean:,.0f}); "
            f"max_num_seqs {memory.max_num_seqs}",
        ),
    ]


def _cost(plan: Plan, cost: Cost, other: Cost) -> Iterator[str]:
    first, second = (other, cost) if plan.config.feedback.two_stage else (cost, other)
    yield "seconds of a step by the roofline        GRPO  2 stages   (the same budget)"
    for label, name in (
        ("generation", "generation"),
        ("  of it prefill", "prefill"),
        ("weights to vLLM", "refit"),
        ("log-probs", "logprobs"),
        ("update", "training"),
        ("in all", "step"),
    ):
        yield f"  {label:<36}{getattr(first, name):8.1f}{getattr(second, name):10.1f}"
    yield "the run"
    yield f"  {'trained tokens a step':<36}{first.trained_tokens:8,}{second.trained_tokens:10,}"
    yield f"  {'hours':<36}{first.hours:8.1f}{second.hours:10.1f}"
    yield f"  {'GPU-hours':<36}{first.gpu_hours:8.0f}{second.gpu_hours:10.0f}"
    yield (
        f"  2 stages / GRPO in GPU-hours: {plan.ratio:.2f} here; Table S.3, iGRPO: "
        f"{PAPER_GPU_HOURS['igrpo']:g} / {PAPER_GPU_HOURS['grpo']:g} = {PAPER_RATIO:.2f}"
    )
    assumed = plan.config.igrpo.preflight
    names = ("train_mfu", "prefill_mfu", "decode_bandwidth", "decode_overhead_ms", "response_sigma")
    yield "  assumed: " + ", ".join(f"{name} {getattr(assumed, name):g}" for name in names)
