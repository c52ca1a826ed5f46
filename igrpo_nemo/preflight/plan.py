"""A plan: what the preflight found, as tables for a terminal and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from igrpo_nemo.config import Config
from igrpo_nemo.config.derive import warmup_updates
from igrpo_nemo.config.machines import low_rank, machines, parallel, replicas
from igrpo_nemo.preflight.capacity import GIB, GPU, CheckpointSpace
from igrpo_nemo.preflight.checks import usable
from igrpo_nemo.preflight.cost import Cost
from igrpo_nemo.preflight.shape import Shape
from igrpo_nemo.preflight.tokens import Context, Questions
from igrpo_nemo.preflight.training_memory import TrainingMemory, trained_parameters
from igrpo_nemo.preflight.vllm_memory import VllmMemory, engines

PAPER_GPU_HOURS = {"grpo": 83.3, "igrpo": 94.1}
"""Table S.3."""
PAPER_RATIO = PAPER_GPU_HOURS["igrpo"] / PAPER_GPU_HOURS["grpo"]
"""GPU-hours of iGRPO over GRPO's at the same budget: 1.13."""

Kind = Literal["training", "vllm"]

_LABEL = 22


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory that does not fit, in words that end before what would."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Estimates:
    """Sizes in bytes. `capacity` is what a training GPU offers; `steps` are None where the number
    of problems is not known."""

    questions: Questions
    context: Context
    steps: int | None
    gpu: GPU | None = None
    capacity: int = 0
    training: TrainingMemory | None = None
    vllm: VllmMemory | None = None
    disk: CheckpointSpace | None = None
    dumps: int = 0
    shortages: tuple[Shortage, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What the preflight found. `problems` is empty where the run fits; each is one line that names
    the key and a value that works. `other` is the cost of the other method at the same budget;
    `judge` says what stands between the run and its judge, whether it fits or not.
    """

    config: Config
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    shape: Shape | None = None
    parameters: int | None = None
    estimates: Estimates | None = None
    cost: Cost | None = None
    other: Cost | None = None
    judge: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def ratio(self) -> float | None:
        """GPU-hours of the two-stage method over GRPO's."""
        if self.cost is None or self.other is None:
            return None
        igrpo, grpo = self.cost, self.other
        if not self.config.feedback.two_stage:
            igrpo, grpo = grpo, igrpo
        return igrpo.gpu_hours / grpo.gpu_hours

    @property
    def warmup_steps(self) -> int | None:
        """Steps over which the learning rate rises."""
        steps = self.estimates.steps if self.estimates else None
        if steps is None:
            return None
        return warmup_updates(self.config, steps)

    def text(self) -> str:
        """The plan as tables for a terminal."""
        return "\n".join(_lines(self)) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: bytes, seconds, tokens."""
        return _values(self)


def _lines(plan: Plan) -> list[str]:
    """The whole plan, the verdict last."""
    lines = [*_run(plan)]
    found = plan.estimates
    if found is not None:
        lines += ["", *_tokens(plan, found)]
        if found.training is not None:
            lines += ["", *_training(found)]
        if found.vllm is not None:
            lines += ["", *_vllm(plan, found)]
    if plan.cost is not None and plan.other is not None:
        lines += ["", *_cost(plan, plan.cost, plan.other)]
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    if plan.judge:
        lines += ["", "its judge cannot be used:", *(f"  {problem}" for problem in plan.judge)]
    if plan.fits:
        return [*lines, "", "it fits"]
    return [*lines, "", "it does not fit:", *(f"  {problem}" for problem in plan.problems)]


def _row(label: str, text: object) -> str:
    return f"  {label:<{_LABEL}}{text}"


def _run(plan: Plan) -> Iterator[str]:
    config, grpo, igrpo = plan.config, plan.config.grpo, plan.config.igrpo
    count = plan.parameters or 0
    size = f"{count:,}" if count < 1e8 else f"{count / 1e9:.3f}e9"
    size = f", {size} parameters" if count else ""
    yield f"{config.logger.log_dir}: engine {igrpo.engine}"
    yield _row("model", f"{config.policy.model_name}{size}")
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
    if igrpo.engine == "nemo_rl" and plan.estimates and plan.estimates.gpu:
        split = machines(config)
        apart = "" if split.colocated else f"; {split.generation} generate"
        yield _row(
            "machines", f"{split.total} x {plan.estimates.gpu.name}: {_layout(config)}{apart}"
        )
    if plan.estimates and plan.estimates.steps is not None:
        yield _row("steps", _steps(plan, plan.estimates))
    if plan.estimates and (disk := plan.estimates.disk):
        each = f"{disk.each / GIB:,.1f} GiB" if disk.each >= GIB / 10 else f"{disk.each:,} bytes"
        total = f", {disk.total / GIB:,.0f} GiB in {disk.folder}" if disk.each >= GIB else ""
        yield _row("checkpoints", f"at most {disk.count} of {each}{total}")
    if plan.estimates and plan.estimates.dumps:
        yield _row(
            "row dumps", f"about {plan.estimates.dumps / GIB:,.1f} GiB in {config.logger.log_dir}"
        )


def _steps(plan: Plan, found: Estimates) -> str:
    config, grpo = plan.config, plan.config.grpo
    count = usable(config, found.questions, found.context) or 0
    each = count // round(grpo.num_prompts_per_step * grpo.batch_multiplier)
    epochs = f" ({each} an epoch)" if each != found.steps else ""
    return f"{found.steps}{epochs} from {count:,} problems, {plan.warmup_steps} of them warm-up"


def _tokens(plan: Plan, found: Estimates) -> Iterator[str]:
    budget, assumed = found.context, plan.config.igrpo.preflight
    yield "tokens"
    q = budget.question
    yield _row("q", f"median {q[0.5]}, 99 % {q[0.99]}, longest {q[1.0]} ({found.questions.source})")
    mean = assumed.response_share * budget.new_tokens
    yield _row(
        "completion",
        f"at most {budget.new_tokens:,}, mean {mean:,.0f} assumed "
        f"(igrpo.preflight.response_share={assumed.response_share:g})",
    )
    if plan.config.feedback.two_stage:
        room = budget.draft_room
        clipped = f", {100 * budget.clipped:.0f} % shortened" if budget.clipped else ""
        yield _row(
            "draft in q'",
            f"room for {room[0.5]:,} behind a median q, {room[1.0]:,} behind the longest{clipped}",
        )
    shape = plan.shape
    held = "an unknown number" if shape is None else f"{shape.context:,}"
    yield _row("context", f"{budget.total:,} of {held}")
    if shape is not None:
        reply = min(plan.config.igrpo.evaluation.max_tokens, shape.context - q[0.5])
        yield _row("evaluation", f"replies of at most {reply:,}")


def _training(found: Estimates) -> Iterator[str]:
    memory = found.training
    assert memory is not None and found.gpu is not None
    yield f"training memory of a GPU, GiB (micro-batch of {memory.tokens:,} tokens)"
    for label, size in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("layer inputs", memory.layer_inputs),
        ("largest layer", memory.working_set),
        ("or logits", memory.logits),
        ("context, NCCL", memory.overhead),
    ):
        yield _row(label, f"{size / GIB:6.1f}")
    yield _row("in all", f"{memory.total / GIB:6.1f} of {found.capacity / GIB:.1f}")


def _vllm(plan: Plan, found: Estimates) -> Iterator[str]:
    memory = found.vllm
    assert memory is not None
    yield f"vLLM memory of a GPU, GiB ({engines(plan.config)} engines, TP {memory.tensor})"
    for label, size in (
        ("weights", memory.weights),
        ("forward pass", memory.forward),
        ("context, graphs", memory.overhead),
        ("cache", memory.cache),
    ):
        yield _row(label, f"{size / GIB:6.1f}")
    state = f" + {memory.state_per_sequence:,} a sequence" if memory.state_per_sequence else ""
    yield _row("cache of a token", f"{memory.kv_per_token:,} bytes{state}")
    two = plan.config.feedback.two_stage
    prompt = found.context.mean_refinement_prompt if two else found.context.mean_question
    mean = prompt + plan.config.igrpo.preflight.response_share * found.context.new_tokens
    what = "q' + refinement" if two else "q + completion"
    yield _row(
        "at once an engine",
        f"{memory.at_once(memory.max_model_len)} of the longest {what} "
        f"({memory.max_model_len:,}), {memory.at_once(mean)} of the mean ({mean:,.0f}); "
        f"max_num_seqs {memory.max_num_seqs}",
    )


def _cost(plan: Plan, cost: Cost, other: Cost) -> Iterator[str]:
    two_stages = plan.config.feedback.two_stage
    first, second = (other, cost) if two_stages else (cost, other)
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
    yield f"  assumed: {_assumptions(plan)}"


def _assumptions(plan: Plan) -> str:
    """The keys of `igrpo.preflight` behind the cost."""
    assumed = plan.config.igrpo.preflight
    names = ("train_mfu", "prefill_mfu", "decode_bandwidth", "decode_overhead_ms", "response_sigma")
    return ", ".join(f"{name} {getattr(assumed, name):g}" for name in names)


def _values(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens; absent parts are null."""
    config, found, costs = plan.config, plan.estimates, ("step", "hours", "gpu_hours")
    values: dict[str, Any] = {
        "log_dir": config.logger.log_dir,
        "model": config.policy.model_name,
        "engine": config.igrpo.engine,
        "fits": plan.fits,
        "problems": plan.problems,
        "judge": plan.judge,
        "notes": plan.notes,
        "parameters": plan.parameters,
        "assumed": config.igrpo.preflight.model_dump(),
        "warmup_steps": plan.warmup_steps,
        "cost": _part(plan.cost, *costs),
        "cost_of_other_method": _part(plan.other, *costs),
        "gpu_hours_igrpo_over_grpo": plan.ratio,
        "published_gpu_hours_igrpo_over_grpo": PAPER_RATIO,
    }
    parts = ("steps", "tokens", "training_memory", "vllm_memory", "checkpoints", "row_dumps")
    if found is None:
        return values | dict.fromkeys(parts)
    tokens = asdict(found.context)
    for name in ("question", "draft_room"):  # JSON wants text for keys
        tokens[name] = {str(quantile): count for quantile, count in tokens[name].items()}
    values |= {"steps": found.steps, "tokens": tokens, "row_dumps": found.dumps}
    values["training_memory"] = _part(found.training, "total", capacity=found.capacity)
    values["vllm_memory"] = vllm = _part(found.vllm, "cache", engines=engines(config))
    if vllm is not None and found.vllm is not None:
        vllm["longest_at_once"] = found.vllm.at_once(found.vllm.max_model_len)
    folder = None if found.disk is None else str(found.disk.folder)
    values["checkpoints"] = _part(found.disk, "total", folder=folder)
    return values


def _part(part: Any, *properties: str, **more: Any) -> dict[str, Any] | None:
    """A dataclass as plain values, with properties and other values of it."""
    if part is None:
        return None
    return {**asdict(part), **{name: getattr(part, name) for name in properties}, **more}


def _layout(config: Config) -> str:
    """How the GPUs are used, in words."""
    split, spread = machines(config), parallel(config)
    sizes = [f"TP {spread.tensor}"]
    sizes += [f"PP {spread.pipeline}"] if spread.pipeline > 1 else []
    sizes += [f"CP {spread.context}"] if spread.context > 1 else []
    name = "Megatron-Core" if spread.backend == "megatron" else "DTensor (FSDP2)"
    where = "also generate" if split.colocated else "train"
    return f"{split.training} {where}: {name}, {', '.join(sizes)}, DP {replicas(config)}"
