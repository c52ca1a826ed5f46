"""Memory of one process of the embedded engine, on a CPU in float32.

    weights, Adam's moments              always (the moments from the second step on)
    + sampling: folded weights, caches, one step's distributions       \\ whichever
    + update: fused weights, gradients, kept activations, logits       / is larger
    + what the allocator keeps of freed small tensors

It follows the tensors of `local/fused_sampler.py`, `local/packing.py`, `local/kernels.py` and
`objectives/entropy.py`. Completions are taken at their limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from igrpo_nemo.config import Config
from igrpo_nemo.preflight.lengths import Context
from igrpo_nemo.preflight.parameters import FP32, counts
from igrpo_nemo.preflight.questions import DRAFT_FRAME_TOKENS
from igrpo_nemo.preflight.shape import Shape

FUSED_FAMILIES = ("qwen2", "llama", "mistral")
"""What `local/decoder.py` fuses; others keep their own forward, which is not estimated."""

PROCESS = 525 * 2**20
"""Python, PyTorch, Transformers and the verifier's imports, before a model is loaded."""

LIBRARIES = 25 * 2**20
"""What oneDNN and autograd add once a model has been sampled from and trained."""
FRAGMENTATION = 0.2
"""Share of tensors below `_MAPPED` that stays resident beside them: glibc gives such memory back
from the end of its heap alone. Measured: 0.1 to 0.24."""
PADDED_FRAGMENTATION = 0.45
"""The same of an update with padded rows, whose many sizes tear the heap. Measured: 0.4 to 0.65."""
_MAPPED = 32 * 2**20
"""Tensors from this size on are mapped on their own, and returned when they are freed."""

_FIRST_CAPACITY = 64
"""Own tokens for which the sampler makes room at first; it doubles (`fused_sampler.py`)."""
_DRAW_BYTES = 33
"""A logit while a token is drawn: three float32 and two float64 copies, and a mask."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """One call of the sampler: `prompts` of `prompt_tokens`, `rows` for each."""

    prompts: int
    rows: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Update:
    """What the learner is given: `groups` of `rows` with one context each."""

    groups: int
    rows: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class LocalWork:
    """A step of the embedded engine. `micro_batch_tokens` bounds a packed micro-batch,
    `micro_batch_rows` a padded one."""

    samplings: tuple[Sampling, ...]
    updates: tuple[Update, ...]
    new_tokens: int
    packed: bool
    micro_batch_tokens: int
    micro_batch_rows: int
    reference: bool = False


@dataclass(frozen=True, slots=True)
class LocalMemory:
    """Bytes above a process that has imported everything. `sampling` and `update` include what the
    allocator keeps of their tensors."""

    weights: int
    optimizer: int
    reference: int
    sampling: int
    update: int

    @property
    def growth(self) -> int:
        static = self.weights + self.optimizer + self.reference
        return LIBRARIES + static + max(self.sampling, self.update)

    @property
    def total(self) -> int:
        return PROCESS + self.growth


def local_memory(shape: Shape, work: LocalWork) -> LocalMemory:
    """The peak of a step, from the second one on."""
    total = counts(shape).total
    return LocalMemory(
        weights=FP32 * total,
        optimizer=_bytes([(2, size) for size in _parameters(shape)]),
        reference=FP32 * total if work.reference else 0,
        sampling=max(_sampling(shape, each, work.new_tokens) for each in work.samplings),
        update=max(_update(shape, each, work) for each in work.updates),
    )


Tensors = list[tuple[float, float]]
"""(how many, float32 numbers of each)."""


def _bytes(tensors: Tensors, fragmentation: float = FRAGMENTATION) -> int:
    """Bytes of tensors that come and go, with what the allocator keeps of the small ones."""
    return round(
        sum(
            FP32 * count * size * (1.0 if FP32 * size >= _MAPPED else 1.0 + fragmentation)
            for count, size in tensors
        )
    )


def _parameters(shape: Shape) -> list[int]:
    """Sizes of the parameters that matter: matrices."""
    layer = [
        shape.hidden * shape.q_size,
        *[shape.hidden * shape.kv_size] * 2,
        shape.q_size * shape.hidden,
        *[shape.hidden * shape.intermediate] * 3,
    ]
    tables = [shape.vocab * shape.hidden] * (1 if shape.tied else 2)
    return [*layer * shape.depth, *tables]


def local_work(config: Config, context: Context) -> LocalWork:
    """What a config asks of the engine; prompts and completions at their longest."""
    igrpo, P = config.igrpo, config.grpo.num_prompts_per_step
    problems = round(P * config.grpo.batch_multiplier)
    question, new = context.question[1.0], context.new_tokens
    refined = min(context.total - new, question + DRAFT_FRAME_TOKENS + new)
    if igrpo.feedback == "none":
        samplings = [Sampling(problems, igrpo.budget, question)]
        updates = [Update(P, igrpo.budget, question)]
    else:
        samplings = [
            Sampling(problems, igrpo.num_drafts, question),
            Sampling(problems, igrpo.num_refinements, refined),
        ]
        updates = [Update(P, igrpo.num_refinements, refined)]
        if "draft" in igrpo.train_stages:
            updates.append(Update(P, igrpo.num_drafts, question))
    if config.grpo.val_period or config.grpo.val_at_start or config.grpo.val_at_end:
        batch = config.grpo.val_batch_size or config.grpo.max_val_samples or 500
        samplings.append(Sampling(batch, 1, question))
    packing = config.policy.sequence_packing
    return LocalWork(
        samplings=tuple(samplings),
        updates=tuple(updates),
        new_tokens=new,
        packed=packing.enabled,
        micro_batch_tokens=packing.train_mb_tokens,
        micro_batch_rows=config.policy.train_micro_batch_size,
        reference=config.loss_fn.reference_policy_kl_penalty > 0,
    )


def _fused(shape: Shape) -> tuple[int, int]:
    """Numbers of one layer's [q | k | v] matrix and of its [gate | up] matrix."""
    qkv = shape.hidden * (shape.q_size + 2 * shape.kv_size)
    return qkv, 2 * shape.hidden * shape.intermediate


def _sampling(shape: Shape, call: Sampling, new_tokens: int) -> int:
    """Folded weights, the caches at their end, and the larger of prefill and drawing."""
    qkv, gate_up = _fused(shape)
    prompt, rows = call.prompts * call.prompt_tokens, call.prompts * call.rows
    capacity = _FIRST_CAPACITY
    while capacity < new_tokens:
        capacity *= 2
    own = 2 * shape.kv_size * rows * capacity
    held: Tensors = [
        (shape.depth, qkv),
        (shape.depth, gate_up),
        (1, shape.vocab * shape.hidden),
        (2 * shape.depth, shape.kv_size * prompt),
        (shape.depth, own),
    ]
    if capacity > _FIRST_CAPACITY:
        held.append((0.5, own))  # the last layer's cache is copied when all others have grown
    channels = shape.q_size + 2 * shape.kv_size
    prefill: Tensors = [
        (3, prompt * shape.hidden),
        (2, prompt * channels),
        (2, prompt * shape.q_size),
    ]
    scores: Tensors = [(3, rows * shape.heads * (call.prompt_tokens + new_tokens))]
    drawing: Tensors = [(_DRAW_BYTES / FP32, rows * shape.vocab)]
    return max(_bytes([*held, *phase]) for phase in (prefill, scores, drawing))


def _update(shape: Shape, update: Update, work: LocalWork) -> int:
    """The largest of three moments: the logits' gradient, the first layers' gradients, the step."""
    tokens, predicting, batches = _micro_batch(update, work)
    qkv, gate_up = _fused(shape)
    table, channels = shape.vocab * shape.hidden, shape.q_size + 2 * shape.kv_size
    gradients: Tensors = [(1, size) for size in _parameters(shape)]
    held: Tensors = [(1, predicting * shape.hidden)]
    if work.packed:
        # Fused matrices of every layer; what `kernels` keeps: the norm's output, q k v, the
        # attention's output and log-sum-exps, and the residual before the feed-forward part.
        held += [(shape.depth, qkv), (shape.depth, gate_up)]
        held += [(2 * shape.depth, tokens * shape.hidden), (shape.depth, tokens * channels)]
        held += [(shape.depth, tokens * shape.q_size), (shape.depth, tokens * shape.heads)]
    else:
        # The model's own operations, one by one.
        held += [(6 * shape.depth, tokens * shape.hidden), (5 * shape.depth, tokens * shape.q_size)]
        held += [(4 * shape.depth, tokens * shape.intermediate)]
    if batches > 1:
        held += gradients
    logits: Tensors = [(2, predicting * shape.vocab)]
    head: Tensors = [
        (1, predicting * shape.vocab),
        (1, predicting * shape.hidden),
        (4, table),
    ]
    layer: Tensors = [
        (1, table),
        (3, qkv),
        (3, gate_up),
        (3, tokens * shape.hidden),
        (3, tokens * channels),
        (3, tokens * shape.q_size),
    ]
    step: Tensors = [*gradients, (2, max(table, gate_up))]
    moments = ([*held, *logits], [*held, *head], [*held, *layer], step)
    torn = FRAGMENTATION if work.packed else PADDED_FRAGMENTATION
    return max(_bytes(moment, torn) for moment in moments)


def _micro_batch(update: Update, work: LocalWork) -> tuple[int, int, int]:
    """Tokens and predicting tokens of the largest micro-batch, and how many there are."""
    new, context = work.new_tokens, update.context_tokens
    if not work.packed:
        rows = min(work.micro_batch_rows, update.rows * update.groups)
        batches = -(-update.rows * update.groups // rows)
        return rows * (context + new), rows * new, batches
    group = context + update.rows * new
    limit = work.micro_batch_tokens
    if group <= limit:
        groups = min(update.groups, limit // group)
        return groups * group, groups * update.rows * new, -(-update.groups // groups)
    rows = max(1, (limit - context) // new)
    batches = -(-update.rows // rows) * update.groups
    return context + rows * new, rows * new, batches
