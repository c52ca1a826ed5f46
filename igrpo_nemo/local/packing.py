"""Log-probabilities of trained completions, each context computed once.

    rows -> pack_rows -> PackedRows: [contexts || completions] in one flat stream, no padding
         -> model.base_model(..., group_layout) -> hidden states -> head where a completion token
            is predicted -> token log-probs -> [R, T], padded with 0 on the right

Models whose layers mix tokens otherwise (Mamba, sliding windows) take a padded forward instead.

Shape legend: R rows, T completion tokens, L flat input tokens, A predicted tokens of all rows,
I hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from igrpo_nemo.local.fused.decoder import (
    can_fuse,
    can_pack,
    decode,
    decoder_logits,
    decoder_weights,
    rotary_tables,
)
from igrpo_nemo.local.fused.group_attention import group_attention_forward
from igrpo_nemo.local.fused.group_layout import GroupLayout, group_layout
from igrpo_nemo.objectives.entropy import token_entropy, token_logprobs
from igrpo_nemo.types import TrainingRow

_GROUP_ATTENTION = "igrpo_group"
AttentionInterface.register(_GROUP_ATTENTION, group_attention_forward)

# Logits that are held at once; half a GB in bfloat16.
_MOST_LOGITS = 1 << 28


@dataclass(frozen=True, slots=True)
class LogprobBatch:
    """What `completion_logprobs` returns, rows in the order they were given.

    `logprobs_RT` are nats under softmax(logits / temperature), 0 behind a row's length; the
    gradient flows through them. `entropy_RT` is detached, likewise padded.
    """

    logprobs_RT: Tensor
    lengths_R: Tensor
    entropy_RT: Tensor | None

    def each_row(self) -> list[Tensor]:
        """The log-probs of each row, without what stands behind them: [T]."""
        of_rows = zip(self.logprobs_RT, self.lengths_R.tolist(), strict=True)
        return [logprobs_T[:length] for logprobs_T, length in of_rows]


@dataclass(frozen=True, slots=True)
class Predictions:
    """Where the completion tokens of a batch are predicted, row after row.

    `predicting_A`: index into the input tokens; `target_A`: the token predicted there;
    `slot_A`: its place in the flattened [R * T].
    """

    predicting_A: Tensor
    target_A: Tensor
    slot_A: Tensor
    lengths_R: Tensor

    def to_rows(self, values_A: Tensor) -> Tensor:
        """[A] -> [R, T], 0 behind a row's end."""
        R, T = len(self.lengths_R), int(self.lengths_R.max())
        return values_A.new_zeros(R * T).index_copy(0, self.slot_A, values_A).view(R, T)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows with equal contexts side by side, in one flat stream.

    A context with several completions is a trunk without its last token, which each of its
    branches begins with: so branches hold exactly the predicting tokens. A context with a single
    completion is one segment with it. A completion's last token predicts nothing and is left out.
    `positions_L` restart at each context and continue after it in each of its completions.
    """

    input_L: Tensor
    positions_L: Tensor
    layout: GroupLayout
    predictions: Predictions


def pack_rows(rows: Sequence[TrainingRow], device: torch.device | str = "cpu") -> PackedRows:
    """Lay rows out so that each distinct context stands once."""
    device = torch.device(device)
    # Contexts with several completions first: the layout keeps the others in its tail.
    groups = sorted(_groups(rows).items(), key=lambda group: len(group[1]) == 1)
    trunks, branches = [], []
    for context, indices in groups:
        inputs = [rows[i].completion.token_ids[:-1] for i in indices]
        alone = len(indices) == 1
        trunks.append(context + inputs[0] if alone else context[:-1])
        branches.append([] if alone else [context[-1:] + ids for ids in inputs])
    positions = [range(len(trunk)) for trunk in trunks]
    predicting: list[range] = [range(0)] * len(rows)
    ends = list(accumulate(map(len, trunks)))
    start = ends[-1]
    for (context, indices), trunk, end, group in zip(groups, trunks, ends, branches, strict=True):
        first = len(context) - 1
        if not group:
            predicting[indices[0]] = range(end - len(trunk) + first, end)
        for i, branch in zip(indices, group, strict=False):
            predicting[i] = range(start, start + len(branch))
            positions.append(range(first, first + len(branch)))
            start += len(branch)
    lengths = [[len(branch) for branch in group] for group in branches]
    return PackedRows(
        input_L=_integers(chain(*trunks, *chain(*branches)), device),
        positions_L=_integers(chain(*positions), device),
        layout=group_layout([len(trunk) for trunk in trunks], lengths, device),
        predictions=_predictions(rows, predicting, device),
    )


def _groups(rows: Sequence[TrainingRow]) -> dict[tuple[int, ...], list[int]]:
    """Indices of the rows by context, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.context_ids, []).append(i)
    return groups


def _predictions(
    rows: Sequence[TrainingRow], predicting: Sequence[Sequence[int]], device: torch.device
) -> Predictions:
    completions = [row.completion.token_ids for row in rows]
    width = max(map(len, completions))
    slots = (range(i * width, i * width + len(ids)) for i, ids in enumerate(completions))
    return Predictions(
        _integers(chain(*predicting), device),
        _integers(chain(*completions), device),
        _integers(chain(*slots), device),
        _integers(map(len, completions), device),
    )


def _integers(values: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long, device=device)


def completion_logprobs(
    model: PreTrainedModel,
    rows: Sequence[TrainingRow],
    *,
    temperature: float,
    packed: bool = True,
    with_entropy: bool = False,
) -> LogprobBatch:
    """log p(completion token | context, earlier tokens) of each row, with gradient.

    `packed` computes each context once where the model family allows it (`can_pack`); the result
    is the same but for rounding. The head is applied only where a completion token is predicted.
    There is at least one row; contexts and completions have a token or more.
    """
    if packed and can_pack(model):
        batch = pack_rows(rows, model.device)
        predictions = batch.predictions
        if _fuses(model):
            weights = decoder_weights(model)
            rotary = rotary_tables(model, batch.positions_L, weights.norm)
            hidden_LI = decode(weights, batch.input_L, rotary, batch.layout)
            hidden_AI = hidden_LI[predictions.predicting_A - batch.layout.tail]
            head, hidden_AI = None, decoder_logits(weights, hidden_AI)
        else:
            head, hidden_AI = head_of(model), _packed_hidden(model, batch)
    else:
        head = None
        hidden_AI, predictions = _padded_logits(model, rows)
    logprobs_A, entropy_A = _through_head(
        head, hidden_AI, predictions.target_A, temperature, with_entropy
    )
    entropy_RT = predictions.to_rows(entropy_A) if entropy_A is not None else None
    return LogprobBatch(predictions.to_rows(logprobs_A), predictions.lengths_R, entropy_RT)


def _through_head(
    head: nn.Module | None,
    hidden_AI: Tensor,
    target_A: Tensor,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets, and the entropies where they are asked for: [A] each.

    Where all logits at once would be many they are made chunk by chunk, and made anew in the
    backward pass. Without a head `hidden_AI` are logits.
    """

    def of_chunk(hidden_CI: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor | None]:
        logits_CV = hidden_CI if head is None else head(hidden_CI)
        logprobs_C = token_logprobs(logits_CV, target_C, temperature=temperature)
        if not with_entropy:
            return logprobs_C, None
        return logprobs_C, token_entropy(logits_CV.detach(), temperature=temperature)

    vocabulary = getattr(head, "out_features", 1)
    if len(target_A) * vocabulary <= _MOST_LOGITS:
        return of_chunk(hidden_AI, target_A)
    size = max(1, _MOST_LOGITS // vocabulary)
    chunks = zip(hidden_AI.split(size), target_A.split(size), strict=True)
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    logprobs_A = torch.cat([logprobs for logprobs, _ in parts])
    return logprobs_A, torch.cat([e for _, e in parts]) if with_entropy else None


def _fuses(model: PreTrainedModel) -> bool:
    """On a CPU in full precision; elsewhere the model's own kernels and autocast serve better."""
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and can_fuse(model)
    )


def _packed_hidden(model: PreTrainedModel, batch: PackedRows) -> Tensor:
    """Hidden states where completion tokens are predicted: [A, I]."""
    with attention_of(model, _GROUP_ATTENTION), _checkpointed(model):
        output = model.base_model(
            input_ids=batch.input_L[None],
            position_ids=batch.positions_L[None],
            use_cache=False,
            group_layout=batch.layout,
        )
    return output.last_hidden_state[0][batch.predictions.predicting_A]


def head_of(model: PreTrainedModel) -> nn.Module:
    """The layer behind the last hidden states, which gives logits."""
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    return head


_switching = threading.RLock()


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another attention function, by its name in `AttentionInterface`."""
    with _switching:
        before = model.config._attn_implementation
        model.config._attn_implementation = implementation
        try:
            yield
        finally:
            model.config._attn_implementation = before


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Layers keep their inputs alone and run again in the backward pass: less memory, more time.

    They run again with the attention of their forward pass.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), attention_of(model, model.config._attn_implementation or "sdpa")

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Transformers checkpoints layers that are in training; a policy is not, for its dropout."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = layer.training or layer.gradient_checkpointing
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def _padded_logits(
    model: PreTrainedModel, rows: Sequence[TrainingRow]
) -> tuple[Tensor, Predictions]:
    """Right-padded rows through the model as it is; the mask comes from lengths alone."""
    sequences = [row.context_ids + row.completion.token_ids[:-1] for row in rows]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    if model.device.type == "cuda":
        # With a mask of 129 columns in float32, PyTorch 2.11's kernel was a nat off in the last.
        width = -(-width // 8) * 8
    input_RW = torch.zeros(len(rows), width, dtype=torch.long)
    for row_W, sequence in zip(input_RW, sequences, strict=True):
        row_W[: len(sequence)] = torch.tensor(sequence)
    mask_RW = (torch.arange(width) < lengths[:, None]).long()
    # The last columns, from the first that predicts a completion token. The model's own forward,
    # not its head alone: some families scale or cap their logits behind it.
    kept = width + 1 - min(len(row.context_ids) for row in rows)
    with _checkpointed(model):
        output = model(
            input_ids=input_RW.to(model.device),
            attention_mask=mask_RW.to(model.device),
            use_cache=False,
            logits_to_keep=kept,
        )
    starts = [i * kept + len(row.context_ids) - 1 - (width - kept) for i, row in enumerate(rows)]
    predicting = [
        range(start, start + len(row.completion.token_ids))
        for start, row in zip(starts, rows, strict=True)
    ]
    predictions = _predictions(rows, predicting, model.device)
    return output.logits.flatten(0, 1)[predictions.predicting_A], predictions


def split_micro_batches(
    rows: Sequence[TrainingRow], *, max_tokens: int | None, max_rows: int | None
) -> list[list[int]]:
    """Indices of the rows of each micro-batch, contexts kept whole where they fit.

    Rows with an equal context go together as long as context and completions stay within
    `max_tokens` and `max_rows`; a group that does not fit is split, which repeats its context.
    A single row above `max_tokens` is a micro-batch of its own. None means no limit.
    """
    most_tokens, most_rows = max_tokens or math.inf, max_rows or math.inf
    batches: list[list[int]] = [[]]
    tokens = 0
    for context, indices in _groups(rows).items():
        lengths = [len(rows[i].completion.token_ids) for i in indices]
        fits = tokens + len(context) + sum(lengths) <= most_tokens
        here = fits and len(batches[-1]) + len(indices) <= most_rows
        begun = False
        for i, length in zip(indices, lengths, strict=True):
            more = length if begun else len(context) + length
            full = tokens + more > most_tokens or len(batches[-1]) >= most_rows
            if batches[-1] and (full or not here and not begun):
                batches.append([])
                tokens, more = 0, len(context) + length
            batches[-1].append(i)
            tokens += more
            begun = True
    return batches
