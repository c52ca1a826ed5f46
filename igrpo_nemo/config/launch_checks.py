"""What engine `nemo_rl` and `nemo_rl_local` cannot run, found before anything is started.

config ─ launch_problems ─> one line each: what contradicts what, and a value that works

NeMo-RL 0.7.0 finds most of this only once Ray runs (`setup()`, its policy and generation workers,
`async_grpo_train`, `examples/run_grpo.py`); some of it (a batch that leaves rows out) never.
Pure functions, shared by preflight and launch. `rules` has what is a table; here are the sizes:
GPUs, replicas, batches, packs.
"""

from __future__ import annotations

from collections.abc import Iterator

from igrpo_nemo.config.derive import largest_divisor
from igrpo_nemo.config.machines import (
    TENSOR,
    generation_parallel,
    machines,
    parallel,
    replicas,
)
from igrpo_nemo.config.nemo_schema import open_key_problems
from igrpo_nemo.config.rules import broken_rules
from igrpo_nemo.config.schema import Config, all_keys, unread
from igrpo_nemo.config.section import at, shown
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback.protocol import memory_of

COLOCATED = "policy.generation.colocated"
VLLM = "policy.generation.vllm_cfg"
MEGATRON = "policy.megatron_cfg"


def check_launch(config: Config) -> None:
    """Raises `UserError` with the first thing that this engine cannot do, or NeMo-RL rejects."""
    for message in launch_problems(config):
        raise UserError(message)


def launch_problems(config: Config) -> list[str]:
    """Everything that stands against a launch; empty for engine `local`.

    A wrong type ends the list: what is computed from it would be noise.
    """
    if config.igrpo.engine == "local":
        return []
    if wrong := list(open_key_problems(config)):
        return wrong
    problems = [*broken_rules("NeMo-RL", config), *_method(config), *_unread(config)]
    if config.igrpo.engine == "nemo_rl":
        problems += _cluster(config)
    return problems


def _cluster(config: Config) -> list[str]:
    """What does not fit the machines; without usable machines the rest is not looked at."""
    if problems := [*broken_rules("backends", config), *_machines(config)]:
        return problems
    problems = list(_replica(config)) or list(_batch(config))
    problems += [*_packs(config), *broken_rules("machines", config), *_engines(config)]
    return problems


def _method(config: Config) -> Iterator[str]:
    igrpo = config.igrpo
    if memory := memory_of(config.feedback):
        yield (
            f"igrpo.feedback={igrpo.feedback} remembers earlier steps, which engine {igrpo.engine} "
            f"does not save: set {memory.off}, or use engine=local"
        )


def _unread(config: Config) -> Iterator[str]:
    """Keys of the embedded engine, where ignoring them would change what is measured."""
    known = {key.path: key.default for key in all_keys()}
    for path in unread(config):
        own = path.startswith("igrpo.validation.")
        why = ", which samples as in training, or greedily (igrpo.validation.temperature=0)"
        yield (
            f"{path}={at(config.to_dict(), path)} is not read by engine {config.igrpo.engine}"
            f"{why if own else ''}: set {path}={known[path]}"
        )


def _machines(config: Config) -> Iterator[str]:
    """`setup()` on `cluster` and `policy.generation.colocated`."""
    nodes, gpus = config.cluster.num_nodes, config.cluster.gpus_per_node
    colocated = config.policy.generation.colocated or {}
    if gpus < 1:
        yield "cluster.gpus_per_node=0: engine nemo_rl trains on GPUs; set cluster.gpus_per_node=8"
        return
    if colocated.get("enabled", True):
        return
    resources = colocated.get("resources") or {}
    share, key = resources.get("gpus_per_node"), f"{COLOCATED}.resources"
    if nodes == 1:
        if not share or share >= gpus:
            several = f"{key}.gpus_per_node={gpus // 2}"
            yield (
                f"no GPU is left for training: {key}.gpus_per_node={shown(share)} of one node's "
                f"{gpus} generate; set {several if gpus > 1 else f'{COLOCATED}.enabled=true'}"
            )
        elif resources.get("num_nodes") not in (None, 1):
            yield (
                f"{key}.num_nodes={resources['num_nodes']}, but the cluster has one node: set "
                f"{key}.num_nodes=1"
            )
        return
    count = resources.get("num_nodes") or 0
    if not 0 < count < nodes:
        left = "no GPU is left for training" if count >= nodes else "no GPU is left to generate"
        yield (
            f"{left}: {key}.num_nodes={shown(resources.get('num_nodes'))} of "
            f"cluster.num_nodes={nodes}; set {key}.num_nodes=1"
        )
    elif share != gpus:
        yield (
            f"{key}.gpus_per_node={shown(share)}, but with several nodes whole ones generate: "
            f"set {key}.gpus_per_node={gpus}"
        )


def _replica(config: Config) -> Iterator[str]:
    spread, world = parallel(config), machines(config).training
    if world % spread.replica == 0:
        return
    rest = spread.pipeline * spread.context
    message = f"{world} training GPUs are no multiple of the {spread.replica} of one model replica"
    if world % rest == 0:
        works = largest_divisor(world // rest, spread.tensor)
        yield f"{message}: set {spread.tensor_key}={works}"
    elif world % (spread.tensor * spread.context) == 0:
        yield f"{message}: set {MEGATRON}.pipeline_model_parallel_size=1"
    else:
        yield f"{message}: set {spread.prefix}.context_parallel_size=1"


def _batch(config: Config) -> Iterator[str]:
    policy, igrpo = config.policy, config.igrpo
    count, batch = replicas(config), policy.train_global_batch_size
    rows = config.grpo.num_generations_per_prompt
    if batch % count:
        updates = igrpo.updates_per_rollout
        step = _smallest_multiple(count * updates, rows)
        problems = max(round(config.grpo.num_prompts_per_step / step), 1) * step
        yield (
            f"policy.train_global_batch_size={batch} is no multiple of the {count} data-parallel "
            f"replicas: set grpo.num_prompts_per_step={problems}"
        )
        return
    micro, packed = policy.train_micro_batch_size, policy.sequence_packing.enabled
    dynamic = policy.dynamic.get("enabled")
    if not packed and not dynamic and (batch // count) % micro:
        yield (
            f"policy.train_micro_batch_size={micro} does not divide the {batch // count} rows of a "
            f"replica: set policy.train_micro_batch_size={largest_divisor(batch // count, micro)}"
        )
    # NeMo-RL: batch-variant kernels make log-probs of the two passes differ from TP 4 on.
    if parallel(config).tensor >= 4 and not config.loss_fn.force_on_policy_ratio:
        if policy.logprob_batch_size != micro:
            yield (
                f"policy.logprob_batch_size={shown(policy.logprob_batch_size)}: tensor parallelism "
                f"of 4 and more needs policy.train_micro_batch_size's {micro}; set "
                f"policy.logprob_batch_size={micro}"
            )


def _smallest_multiple(of: int, rows: int) -> int:
    """The smallest number of problems whose trained rows are a multiple of `of`."""
    return next(n for n in range(1, of + 1) if n * rows % of == 0)


def _packs(config: Config) -> Iterator[str]:
    policy, spread = config.policy, parallel(config)
    packing, total = policy.sequence_packing, policy.max_total_sequence_length
    sections = {
        "policy.sequence_packing": packing.model_dump() if packing.enabled else {},
        "policy.dynamic_batching": policy.dynamic if policy.dynamic.get("enabled") else {},
    }
    for section, values in sections.items():
        for name in ("train_mb_tokens", "logprob_mb_tokens"):
            tokens = values.get(name)
            same = name == "logprob_mb_tokens" and tokens == values.get("train_mb_tokens")
            if tokens is not None and tokens < total and not same:
                yield (
                    f"{section}.{name}={tokens} cannot hold the longest row, "
                    f"policy.max_total_sequence_length={total}: set {section}.{name}={total}"
                )
    factor = (2 * spread.context if spread.context > 1 else 1) * (
        spread.tensor if spread.tensor > 1 and spread.sequence else 1
    )
    multiple = policy.make_sequence_length_divisible_by or 1
    if spread.backend == "megatron" and packing.enabled and multiple % factor:
        yield (
            f"policy.make_sequence_length_divisible_by={multiple} is no multiple of the {factor} "
            f"parts of a row: set policy.make_sequence_length_divisible_by={factor}"
        )


def _engines(config: Config) -> Iterator[str]:
    """vLLM's, over the GPUs that generate."""
    if config.policy.generation.backend != "vllm":
        return
    vllm = config.policy.generation.vllm
    world, replica = machines(config).generation, generation_parallel(config)
    pipeline, tensor = vllm.get("pipeline_parallel_size", 1), vllm.get(TENSOR, 1)
    if world % pipeline:
        yield (
            f"{world} generation GPUs are no multiple of {VLLM}.pipeline_parallel_size="
            f"{pipeline}: set {VLLM}.pipeline_parallel_size=1"
        )
    elif world % replica:
        yield (
            f"{world} generation GPUs are no multiple of the {replica} of one vLLM engine: set "
            f"{VLLM}.{TENSOR}={largest_divisor(world // pipeline, tensor)}"
        )
    expert = vllm.get("expert_parallel_size", 1)
    if expert > 1 and expert % tensor:
        yield (
            f"{VLLM}.expert_parallel_size={expert} is no multiple of {VLLM}.{TENSOR}={tensor}: set "
            f"{VLLM}.expert_parallel_size=1"
        )
