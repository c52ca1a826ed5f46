"""A plan as tables for a terminal, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from igrpo_nemo.config.machines import machines
from igrpo_nemo.preflight import paper
from igrpo_nemo.preflight.checks import usable
from igrpo_nemo.preflight.cost import Cost
from igrpo_nemo.preflight.estimate import Estimates
from igrpo_nemo.preflight.gpu import GIB
from igrpo_nemo.preflight.plan import Plan, layout
from igrpo_nemo.preflight.vllm_memory import engines

_LABEL = 22


def plan_text(plan: Plan) -> str:
    """The whole plan, the verdict last."""
    lines = [*_run(plan)]
    found = plan.estimates
    if found is not None:
        lines += ["", *_tokens(plan, found)]
        if found.training is not None:
            lines += ["", *_training(found)]
        if found.vllm is not None:
            lines += ["", *_vllm(plan, found)]
        if found.local is not None:
            lines += ["", *_local(found)]
    if plan.cost is not None and plan.other is not None:
        lines += ["", *_cost(plan, plan.cost, plan.other)]
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    lines += ["", *_verdict(plan)]
    return "\n".join(lines) + "\n"


def _row(label: str, text: object) -> str:
    return f"  {label:<{_LABEL}}{text}"


def _run(plan: Plan) -> Iterator[str]:
    config, grpo, igrpo = plan.config, plan.config.grpo, plan.config.igrpo
    size = f", {plan.parameters / 1e9:.3f}e9 parameters" if plan.parameters else ""
    if plan.parameters and plan.parameters < 1e8:
        size = f", {plan.parameters:,} parameters"
    yield f"{config.logger.log_dir}: engine {igrpo.engine}"
    yield _row("model", f"{config.policy.model_name}{size}")
    if igrpo.feedback == "none":
        method = f"GRPO: {igrpo.budget} completions of q a problem"
    else:
        method = f"{igrpo.num_drafts} drafts and {igrpo.num_refinements} refinements a problem"
    yield _row("method", method)
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
            "machines", f"{split.total} x {plan.estimates.gpu.name}: {layout(config)}{apart}"
        )
    if plan.estimates and plan.estimates.steps is not None:
        yield _row("steps", _steps(plan, plan.estimates))


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
    if plan.config.igrpo.feedback != "none":
        room = budget.draft_room
        clipped = f", {100 * budget.clipped:.0f} % shortened" if budget.clipped else ""
        yield _row(
            "draft in q'",
            f"room for {room[0.5]:,} behind a median q, {room[1.0]:,} behind the longest{clipped}",
        )
    yield _row("context", f"{budget.total:,} of {_context(plan)}")
    evaluation = plan.config.igrpo.evaluation
    if plan.shape is not None:
        reply = min(evaluation.max_tokens, plan.shape.context - q[0.5])
        yield _row("evaluation", f"replies of at most {reply:,}")


def _context(plan: Plan) -> str:
    return "an unknown number" if plan.shape is None else f"{plan.shape.context:,}"


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
    two = plan.config.igrpo.feedback != "none"
    prompt = found.context.mean_refinement_prompt if two else found.context.mean_question
    mean = prompt + plan.config.igrpo.preflight.response_share * found.context.new_tokens
    what = "q' + refinement" if two else "q + completion"
    yield _row(
        "at once an engine",
        f"{memory.at_once(memory.max_model_len)} of the longest {what} "
        f"({memory.max_model_len:,}), {memory.at_once(mean)} of the mean ({mean:,.0f}); "
        f"max_num_seqs {memory.max_num_seqs}",
    )


def _local(found: Estimates) -> Iterator[str]:
    memory = found.local
    assert memory is not None
    yield "memory of the process, MiB"
    mib = 2**20
    for label, size in (
        ("weights", memory.weights),
        ("Adam", memory.optimizer),
        ("reference", memory.reference),
        ("sampling", memory.sampling),
        ("or update", memory.update),
    ):
        if size:
            yield _row(label, f"{size / mib:8,.0f}")
    yield _row("model and training", f"{memory.growth / mib:8,.0f}")
    yield _row("with the libraries", f"{memory.total / mib:8,.0f} of {found.capacity / mib:,.0f}")


def _cost(plan: Plan, cost: Cost, other: Cost) -> Iterator[str]:
    two_stages = plan.config.igrpo.feedback != "none"
    first, second = (other, cost) if two_stages else (cost, other)
    yield "seconds of a step by the roofline        GRPO     iGRPO   (the same budget)"
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
        f"  iGRPO / GRPO in GPU-hours: {plan.ratio:.2f} here; Table S.3 measured "
        f"{paper.GPU_HOURS['igrpo']:g} / {paper.GPU_HOURS['grpo']:g} = {paper.RATIO:.2f}"
    )
    yield f"  assumed: {_assumptions(plan)}"


def _assumptions(plan: Plan) -> str:
    """The keys of `igrpo.preflight` behind the cost."""
    assumed = plan.config.igrpo.preflight
    names = ("train_mfu", "prefill_mfu", "decode_bandwidth", "decode_overhead_ms", "response_sigma")
    return ", ".join(f"{name} {getattr(assumed, name):g}" for name in names)


def _verdict(plan: Plan) -> Sequence[str]:
    if plan.fits:
        return ["it fits"]
    return ["it does not fit:", *(f"  {problem}" for problem in plan.problems)]


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens; absent parts are null."""
    found = plan.estimates
    values: dict[str, Any] = {
        "log_dir": plan.config.logger.log_dir,
        "model": plan.config.policy.model_name,
        "engine": plan.config.igrpo.engine,
        "fits": plan.fits,
        "problems": plan.problems,
        "notes": plan.notes,
        "parameters": plan.parameters,
        "assumed": plan.config.igrpo.preflight.model_dump(),
        "tokens": None,
        "steps": None,
        "warmup_steps": plan.warmup_steps,
        "training_memory": None,
        "vllm_memory": None,
        "local_memory": None,
        "cost": _cost_values(plan.cost),
        "cost_of_other_method": _cost_values(plan.other),
        "gpu_hours_igrpo_over_grpo": plan.ratio,
        "published_gpu_hours_igrpo_over_grpo": paper.RATIO,
    }
    if found is None:
        return values
    values |= {"steps": found.steps, "tokens": _plain(asdict(found.context))}
    if found.training is not None:
        values["training_memory"] = {
            **asdict(found.training),
            "total": found.training.total,
            "capacity": found.capacity,
        }
    if found.vllm is not None:
        values["vllm_memory"] = {
            **asdict(found.vllm),
            "cache": found.vllm.cache,
            "engines": engines(plan.config),
            "longest_at_once": found.vllm.at_once(found.vllm.max_model_len),
        }
    if found.local is not None:
        values["local_memory"] = {
            **asdict(found.local),
            "growth": found.local.growth,
            "total": found.local.total,
            "capacity": found.capacity,
        }
    return values


def _cost_values(cost: Cost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {**asdict(cost), "step": cost.step, "hours": cost.hours, "gpu_hours": cost.gpu_hours}


def _plain(value: Any) -> Any:
    """Keys as text, as JSON wants them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
