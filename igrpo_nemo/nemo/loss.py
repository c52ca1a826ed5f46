"""NeMo-RL's clipped loss; exact entropy, Dr. GRPO's divisor, shaped rows and an objective of one's
own are its options.

    logits ─ next-token log-probs ─> ClippedPGLossFn  (value and gradient are NeMo-RL's)
           │                      └> clipped_surrogate: shaped rows; all rows of an own objective
           └ exact_entropy (Eq. 7) ─> metric `exact_entropy`, without gradient

NeMo-RL passes logits instead of log-probs to a loss whose `input_type` is LOGIT; what it would
have told its own log-prob code (vocabulary shards, chunks) is found here.
Shape legend: R rows, T tokens, V vocabulary (of this rank, where it is sharded).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from nemo_rl.algorithms.loss import ClippedPGLossFn
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
from nemo_rl.distributed.model_utils import (
    ChunkedDistributedEntropy,
    get_next_token_logprobs_from_logits,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from igrpo_nemo.by_path import function_at
from igrpo_nemo.errors import UserError
from igrpo_nemo.objectives.entropy import token_entropy
from igrpo_nemo.objectives.surrogate import (
    Normalizer,
    SurrogateConfig,
    SurrogateInputs,
    clipped_surrogate,
)

SHAPED = 1.0
"""Marks the tokens of shaped rows: it stands in the place of the log-probs that they were sampled
with, and no log-prob is positive. Of a row's message NeMo-RL's loss sees nothing else per token,
and what the tokens were sampled with, under another context, is of no use to it."""

FUSED = "use_fused_linear_logprobs"
"""NeMo-RL's key and attribute, since 0.8."""
ENTROPY_CHUNK = 1024
"""Positions whose distribution is held in fp32 at a time."""
PER_TOKEN_METRICS = (
    *("token_mult_prob_error", "gen_kl_error", "policy_kl_error", "js_divergence_error"),
    *("approx_entropy", "probs_ratio", "probs_ratio_clamped"),
    *("sampling_importance_ratio", "is_oob_ratio"),
)
"""Metrics that NeMo-RL divides by the number of tokens that it is given."""


@dataclass(frozen=True, slots=True)
class Shards:
    """The process groups that a model's logits are spread over; None where they are whole."""

    vocab_rank: int | None = None
    vocab_group: Any = None
    context_group: Any = None


class IGRPOLoss(ClippedPGLossFn):
    """`ClippedPGLossFn` with `exact_entropy`, `constant_length_divisor`, `shaping_gamma`, and
    `objective`, the path of a function.

    The divisor replaces the rows' own lengths (Dr. GRPO): sum over tokens / (rows x divisor)
    (arXiv 2503.20783). With gamma, tokens marked `SHAPED` have the objective p / (p + gamma) A
    (arXiv 2506.03106), without a ratio or a clip, averaged as the others are. An objective of
    one's own makes the loss that of the embedded engine; the metrics stay NeMo-RL's.

    `chunk_size` is `policy.logprob_chunk_size`, which a loss of logits is not told otherwise.
    Filtered sampling (top-k, top-p) is not for exact entropy: NeMo-RL then trains on filtered
    log-probs.
    """

    def __init__(
        self,
        cfg: Any,
        *,
        exact_entropy: bool = False,
        constant_length_divisor: int | None = None,
        shaping_gamma: float | None = None,
        objective: str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(cfg)
        own = {"constant_length_divisor": constant_length_divisor, "shaping_gamma": shaping_gamma}
        names = {field.name for field in fields(SurrogateConfig)} - own.keys()
        self.surrogate = SurrogateConfig(**{name: getattr(cfg, name) for name in names}, **own)
        self.exact_entropy = exact_entropy
        self.objective = objective
        self.chunk_size = chunk_size
        if exact_entropy:
            self.input_type = LossInputType.LOGIT
        if constant_length_divisor is not None:
            self.loss_type = LossType.TOKEN_LEVEL

    def __call__(  # type: ignore[override]
        self,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        next_token_logprobs: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """NeMo-RL's contract; gets `logits` with exact entropy and log-probs without."""
        entropy: Tensor | None = None
        if next_token_logprobs is None:
            assert logits is not None
            shards = shards_of_this_process()
            next_token_logprobs = self._logprobs(logits, data, shards)
            entropy = masked_entropy(logits, data, global_valid_toks, shards)
        logprobs, sequences, divisor = next_token_logprobs, global_valid_seqs, global_valid_toks
        constant, shaping = self.surrogate.constant_length_divisor, self.surrogate.shaping_gamma
        if constant is not None:
            divisor = sequences * constant
        plain = data if shaping is None else _without_shaped(data, logprobs)
        loss, metrics = super().__call__(logprobs, plain, sequences, divisor)
        if self.objective is not None or shaping is not None:
            ours = self._surrogate_loss(logprobs, data, sequences, global_valid_toks)
            loss = loss + ours if self.objective is None else ours
            metrics["loss"] = loss.item()
        if constant is not None:
            for name in metrics.keys() & PER_TOKEN_METRICS:
                metrics[name] *= float(divisor) / max(float(global_valid_toks), 1.0)
        if entropy is not None:
            metrics["exact_entropy"] = entropy.item()
        return loss, metrics

    def _surrogate_loss(
        self, logprobs_RT: Tensor, data: Any, sequences: Tensor, tokens: Tensor
    ) -> Tensor:
        """The embedded engine's: of all rows by one's own objective, or of the shaped ones, whose
        KL is NeMo-RL's."""
        inputs, surrogate, own = self._answers(logprobs_RT, data), self.surrogate, None
        if self.objective is not None:
            own = function_at(self.objective)
        else:
            weights_R = data["sample_mask"] * inputs.shaped_R
            inputs = replace(inputs, weights_R=weights_R, reference_logprobs_RT=None)
            surrogate = replace(surrogate, reference_policy_kl_penalty=0.0)
        normalizer = Normalizer(float(sequences) or 1.0, float(tokens) or 1.0)
        return clipped_surrogate(inputs, surrogate, normalizer, own)[0]

    def _answers(self, logprobs_RT: Tensor, data: Any) -> SurrogateInputs:
        """The trained tokens of each row, moved to column 0."""
        mask_RT = data["token_mask"][:, 1:] > 0
        lengths_R, starts_R = mask_RT.sum(dim=1), mask_RT.int().argmax(dim=1)
        columns = torch.arange(int(lengths_R.max()), device=mask_RT.device)
        places_RT = (starts_R[:, None] + columns).clamp(max=mask_RT.shape[1] - 1)
        shaped_RT = (data["generation_logprobs"][:, 1:] == SHAPED) & mask_RT
        reference = self.surrogate.reference_policy_kl_penalty

        def moved(name: str) -> Tensor:
            return data[name][:, 1:].gather(1, places_RT)

        current_RT = logprobs_RT.gather(1, places_RT)
        old_RT = current_RT.detach() if self.force_on_policy_ratio else moved("prev_logprobs")
        return SurrogateInputs(
            logprobs_RT=current_RT,
            old_logprobs_RT=old_RT,
            reference_logprobs_RT=moved("reference_policy_logprobs") if reference else None,
            advantages_R=moved("advantages")[:, 0],
            lengths_R=lengths_R,
            weights_R=data["sample_mask"],
            shaped_R=None if self.surrogate.shaping_gamma is None else shaped_RT.any(dim=1),
        )

    def _logprobs(self, logits: Tensor, data: Any, shards: Shards) -> Tensor:
        if shards.vocab_group is None and not isinstance(logits, DTensor):
            return next_token_logprobs(logits, data["input_ids"].to(logits.device))
        return get_next_token_logprobs_from_logits(
            input_ids=data["input_ids"],
            next_token_logits=logits,
            seq_index=data.get("seq_index", None),
            vocab_parallel_rank=shards.vocab_rank,
            vocab_parallel_group=shards.vocab_group,
            context_parallel_group=shards.context_group,
            chunk_size=self.chunk_size,
        )


def _without_shaped(data: Any, logprobs_RT: Tensor) -> Any:
    """The batch in which shaped tokens have no advantage, and ratios of 1 in every metric."""
    shaped_RT = data["generation_logprobs"] == SHAPED
    now_RT = torch.nn.functional.pad(logprobs_RT.detach(), (1, 0))
    replaced = {
        "generation_logprobs": torch.where(shaped_RT, now_RT, data["generation_logprobs"]),
        "prev_logprobs": torch.where(shaped_RT, now_RT, data["prev_logprobs"]),
        "advantages": torch.where(shaped_RT, 0.0, data["advantages"]),
    }
    return type(data)({**data, **replaced})


def next_token_logprobs(logits_RTV: Tensor, input_ids_RT: Tensor) -> Tensor:
    """[R, T - 1]: log-prob of each next token where the vocabulary is whole: NeMo-RL's unsharded
    path, which insists on a GPU, operation for operation."""
    logprobs_RTV = torch.nn.functional.log_softmax(logits_RTV[:, :-1].float(), dim=-1)
    return logprobs_RTV.gather(-1, input_ids_RT[:, 1:, None])[..., 0]


@torch.no_grad()
def masked_entropy(logits: Tensor, data: Any, tokens: Tensor, shards: Shards) -> Tensor:
    """This micro-batch's share of the mean entropy over all trained tokens, in nats."""
    entropy_RT = exact_entropy(logits, shards.vocab_group)[:, : data["input_ids"].shape[1] - 1]
    mask_RT = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    return (entropy_RT * mask_RT.to(entropy_RT.device)).sum() / tokens.to(entropy_RT.device)


@torch.no_grad()
def exact_entropy(logits_RTV: Tensor, vocab_group: Any = None) -> Tensor:
    """H = -sum_v p log p of every position (Eq. 7), [R, T] in nats, over the whole vocabulary.

    With a `vocab_group` each rank holds a share of the vocabulary; NeMo-RL's own distributed
    kernel adds up over the ranks. A `DTensor` brings its group along.
    """
    if isinstance(logits_RTV, DTensor):
        last = logits_RTV.ndim - 1
        places = [p.is_shard(dim=-1) or p.is_shard(dim=last) for p in logits_RTV.placements]
        mesh = logits_RTV.device_mesh
        vocab_group = mesh.get_group(places.index(True)) if any(places) else None
        logits_RTV = logits_RTV.to_local()
    if vocab_group is not None:
        return -ChunkedDistributedEntropy.apply(logits_RTV, ENTROPY_CHUNK, vocab_group, True)
    R, T, V = logits_RTV.shape
    return token_entropy(logits_RTV.reshape(R * T, V)).view(R, T)


def shards_of_this_process() -> Shards:
    """Megatron's tensor-parallel and context-parallel groups, where it runs in this process."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return Shards()
    return Shards(
        vocab_rank=state.get_tensor_model_parallel_rank(),
        vocab_group=state.get_tensor_model_parallel_group(),
        context_group=state.get_context_parallel_group(),
    )


def build_loss(
    made: ClippedPGLossFn, loss_cfg: Any, config: Any, policy: dict[str, Any]
) -> ClippedPGLossFn:
    """The loss of a project config: the one that NeMo-RL `made` where nothing is added to it."""
    exact = config.igrpo.entropy.exact
    names = ("constant_length_divisor", "shaping_gamma", "objective")
    added = {name: getattr(config.igrpo, name) for name in names}
    if not exact and not any(added.values()):
        return made
    size = policy.get("logprob_chunk_size")
    loss = IGRPOLoss(loss_cfg, exact_entropy=exact, chunk_size=size, **added)
    if getattr(made, FUSED, False):  # its policy returns log-probs in the place of logits
        if exact:
            raise UserError(
                f"igrpo.entropy.exact needs logits, which policy.megatron_cfg.{FUSED} does not "
                f"make: set policy.megatron_cfg.{FUSED}=false or igrpo.entropy.exact=false"
            )
        setattr(loss, FUSED, True)
    return loss
