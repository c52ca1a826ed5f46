"""Decoding on a GPU: buffers that stay in place, steps that never wait for the host.

    prefill: prompts but for their last tokens, in one flat stream -> every row's keys and values
    step:    tokens_R -> the model's own forward, attention over a row's buffer -> draw -> tokens_R
    advance: some steps, replayed as a CUDA graph -> tokens and log-probs to the host, once

What changes between steps (tokens, positions, the column of the draws) lies in tensors, so that a
captured step is right for the next one. Graphs are captured once per number of rows and width of
the buffer that is read, both rounded up. A row that has ended runs on until the rows that are left
fit a smaller number; what it draws is thrown away.

Shape legend: R rows (slots of the buffers), w tokens of a slot that are read, P prompts, T prompt
tokens, L flat prompt tokens, V vocabulary, N steps at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from igrpo_nemo.local.fused.group_layout import Sequences, group_layout
from igrpo_nemo.local.packing import attention_of, head_of
from igrpo_nemo.local.sampling import SamplingParams, UniformTable, draw
from igrpo_nemo.local.static_attention import (
    IMPLEMENTATION,
    PrefillState,
    RowBuffers,
    StepState,
    heads_of,
)

_STEPS = 16
"""Steps between two looks of the host; divides the block of uniforms."""


class StaticDecoder:
    """Decodes with a model's weights as they are at each `start`; keeps buffers and graphs.

    Under autocast it decodes with a copy of the model in that precision, which is refreshed at
    each start. `graphs` None captures steps where there is CUDA.
    """

    def __init__(self, model: PreTrainedModel, *, graphs: bool | None = None) -> None:
        self._live = model
        self._copy: PreTrainedModel | None = None
        self._graphs = model.device.type == "cuda" if graphs is None else graphs
        self._buffers: RowBuffers | None = None

    def start(
        self,
        prompts: Sequence[tuple[int, ...]],
        rows_per_prompt: Sequence[int],
        names: list[tuple[str, int]],
        params: SamplingParams,
    ) -> StaticBatch:
        """A batch of rows; `names` are those of their uniforms."""
        model = self._current()
        longest = max(len(prompt) for prompt in prompts)
        width = _rounded_width(longest + params.max_new_tokens + 2 * _STEPS)
        rows = _rounded_rows(sum(rows_per_prompt))
        held = self._buffers
        if held is not None and held.model is not model:
            held = None
        shape = held.shape if held else (0, 0)
        if held is None or rows > shape[0] or width > shape[1]:
            held = self._buffers = None  # before the new ones are made
            held = RowBuffers.of(model, max(rows, shape[0]), max(width, shape[1]))
            self._buffers = held
        return StaticBatch(held, prompts, rows_per_prompt, names, params, self._graphs)

    def rows_that_fit(self, prompt_tokens: int, params: SamplingParams) -> int | None:
        """Rows whose keys and values fit in half of the memory that is free; None: any number."""
        if self._live.device.type != "cuda":
            return None
        heads, size = heads_of(self._live)
        width = _rounded_width(prompt_tokens + params.max_new_tokens + 2 * _STEPS)
        layers = self._live.config.num_hidden_layers
        row = 2 * layers * heads * size * width * self._dtype().itemsize
        held = self._buffers.num_bytes if self._buffers else 0
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + cached + held
        fitting = max(8, int(0.5 * free / row))
        return 1 << (fitting.bit_length() - 1)

    def release(self) -> None:
        """Gives the buffers up where they are large: training needs the memory."""
        if self._buffers is None or self._live.device.type != "cuda":
            return
        if self._buffers.num_bytes > 0.1 * torch.cuda.mem_get_info()[1]:
            self._buffers = None

    def _dtype(self) -> torch.dtype:
        """The precision that is decoded in."""
        device = self._live.device.type
        autocast = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else self._live.dtype

    def _current(self) -> PreTrainedModel:
        """The model to decode with, its weights as they are now."""
        dtype = self._dtype()
        if dtype == self._live.dtype:
            return self._live
        if self._copy is None:
            self._copy = _copy_in(self._live, dtype)
        pairs = zip(self._copy.parameters(), self._live.parameters(), strict=True)
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)
        return self._copy


def _copy_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy whose parameters have another precision. Buffers keep theirs: rotary frequencies
    need it."""
    parameters = {
        id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, parameters)


class StaticBatch:
    """Rows being decoded, numbered prompt by prompt."""

    def __init__(
        self,
        buffers: RowBuffers,
        prompts: Sequence[tuple[int, ...]],
        rows_per_prompt: Sequence[int],
        names: list[tuple[str, int]],
        params: SamplingParams,
        graphs: bool,
    ) -> None:
        self._model, self._buffers, self._params = buffers.model, buffers, params
        self._graphs = graphs
        rows = [p for p, count in enumerate(rows_per_prompt) for _ in range(count)]
        self._slots = list(range(len(rows)))
        self._num_slots = _rounded_rows(len(rows))
        self._uniforms = UniformTable(names) if params.temperature else None
        self._column, self._steps, self._ahead = UniformTable.BLOCK, 0, 0
        self._longest = max(len(prompt) for prompt in prompts)
        padded = rows + [rows[-1]] * (self._num_slots - len(rows))
        self._prefill(prompts, padded)
        last = [(prompts[p][-1], len(prompts[p]) - 1) for p in padded]
        tokens, positions = torch.tensor(last, device=self._model.device).t()
        buffers.tokens_R[: self._num_slots] = tokens
        buffers.positions_R[: self._num_slots] = positions

    def advance(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens of the live rows and their log-probs, 1 to `most` of each: [R, N].

        The steps after these are launched before it returns: the device goes on while the host
        looks at the tokens.
        """
        if not self._ahead:
            self._launch(most)
        steps, self._ahead = self._ahead, 0
        columns = slice(self._column - steps, self._column)
        tokens = self._buffers.drawn_RB[: self._num_slots, columns].cpu().numpy()
        logprobs = self._buffers.logprobs_RB[: self._num_slots, columns].cpu().numpy()
        # At the end of a block stand its last tokens until the next call.
        if steps < most and self._column < UniformTable.BLOCK:
            self._launch(most - steps)
        return tokens[self._slots], logprobs[self._slots]

    def _launch(self, most: int) -> None:
        buffers, block = self._buffers, UniformTable.BLOCK
        if self._column == block:
            self._column = 0
            buffers.column.zero_()
            if self._uniforms is not None:
                uniforms_RB = self._uniforms.next_block()
                buffers.uniforms_RB[: len(uniforms_RB)] = uniforms_RB.to(buffers.column.device)
        self._ahead = min(_STEPS, most, block - self._column)
        width = buffers.shape[1]
        if not buffers.reads_lengths:
            width = min(width, _rounded_width(self._longest + self._steps + self._ahead))
        step = self._step(width)
        for _ in range(self._ahead):
            step()
        self._column += self._ahead
        self._steps += self._ahead

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these of the live rows, renumbered in this order (which is ascending)."""
        self._slots = [self._slots[row] for row in rows]
        num_slots = _rounded_rows(len(rows))
        if num_slots >= self._num_slots:
            return
        if self._uniforms is not None:
            self._uniforms.keep(self._slots)
        padded = self._slots + [self._slots[-1]] * (num_slots - len(rows))
        index = torch.tensor(padded, device=self._model.device)
        held = self._buffers
        blocks = (held.uniforms_RB, held.drawn_RB, held.logprobs_RB)
        for tensor in (*held.keys, *held.values, *blocks, held.tokens_R, held.positions_R):
            tensor[:num_slots] = tensor[index]
        self._slots, self._num_slots = list(range(len(rows))), num_slots

    @torch.no_grad()
    def _prefill(self, prompts: Sequence[tuple[int, ...]], rows: Sequence[int]) -> None:
        """Keys and values of all but the last tokens, for every row (`rows`: its prompt)."""
        lengths = [len(prompt) - 1 for prompt in prompts]
        if not any(lengths):
            return
        device = self._model.device
        flat = [token for prompt in prompts for token in prompt[:-1]]
        starts_P = torch.tensor([0, *accumulate(lengths)][:-1])
        # Behind a prompt's end stands what is masked, and overwritten.
        source_PT = starts_P[:, None] + torch.arange(max(lengths))
        source_RT = source_PT.clamp(max=len(flat) - 1)[list(rows)].to(device)
        positions_L = torch.cat([torch.arange(length) for length in lengths]).to(device)
        layout = group_layout(lengths, [[]] * len(prompts), device)
        with _no_autocast(device), attention_of(self._model, IMPLEMENTATION):
            self._model.base_model(
                input_ids=torch.tensor([flat], device=device),
                position_ids=positions_L[None],
                use_cache=False,
                static=PrefillState(self._buffers, layout, source_RT),
            )

    def _step(self, width: int) -> Callable[[], None]:
        """One step of all slots, captured where that is wanted."""
        params = self._params
        key = (self._num_slots, width, params.temperature, params.top_p, params.top_k)
        graphs = self._buffers.graphs
        if key not in graphs:
            graphs[key] = self._captured(width) if self._graphs else self._stepper(width)
        return graphs[key]

    def _stepper(self, width: int) -> Callable[[], None]:
        model, buffers, params = self._model, self._buffers, self._params
        R, device = self._num_slots, model.device
        rows_R = torch.arange(R, device=device)
        columns_w = torch.arange(width, device=device)
        sequences = None
        if buffers.reads_lengths:
            size = buffers.shape[1]
            ends = list(range(R + 1))
            sequences = Sequences.of(ends, [size * end for end in ends], device)
        tokens_R, positions_R = buffers.tokens_R[:R], buffers.positions_R[:R]
        head = head_of(model)

        @torch.no_grad()
        def step() -> None:
            if sequences is None:
                bias_Rw = torch.zeros(R, width, dtype=model.dtype, device=device)
                bias_Rw.masked_fill_(columns_w > positions_R[:, None], -torch.inf)
                state = StepState(buffers, rows_R, width, bias_R11w=bias_Rw[:, None, None, :])
            else:
                lengths_R = (positions_R + 1).int()
                state = StepState(buffers, rows_R, width, sequences=sequences, lengths_R=lengths_R)
            with (
                _no_autocast(device),
                sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
                attention_of(model, IMPLEMENTATION),
            ):
                output = model.base_model(
                    input_ids=tokens_R[:, None],
                    position_ids=positions_R[:, None],
                    use_cache=False,
                    static=state,
                )
                logits_RV = head(output.last_hidden_state[:, 0])
            uniforms_R = None
            if params.temperature:
                uniforms_R = buffers.uniforms_RB[:R].index_select(1, buffers.column)[:, 0]
            drawn_R, logprobs_R = draw(logits_RV, uniforms_R, params)
            buffers.drawn_RB[:R].index_copy_(1, buffers.column, drawn_R[:, None])
            buffers.logprobs_RB[:R].index_copy_(1, buffers.column, logprobs_R[:, None])
            tokens_R.copy_(drawn_R)
            positions_R.add_(1)
            buffers.column.add_(1)

        return step

    def _captured(self, width: int) -> Callable[[], None]:
        """The step as a CUDA graph. The run before the capture (libraries set themselves up in
        it) is undone; the keys and values that it wrote are written again."""
        step = self._stepper(width)
        buffers = self._buffers
        changed = (buffers.tokens_R, buffers.positions_R, buffers.column)
        before = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile.
        with torch.cuda.graph(graph, buffers.pool, capture_error_mode="thread_local"):
            step()
        buffers.pool = graph.pool()

        def replay() -> None:
            graph.replay()

        # The graph reads tensors of the step's, which must live as long.
        replay.step = step  # type: ignore[attr-defined]
        return replay


def _no_autocast(device: torch.device) -> torch.autocast:
    """The model at hand has the precision that it is to run in."""
    return torch.autocast(device.type, enabled=False)


def _rounded_rows(count: int) -> int:
    """Rounded up by a third at most: few numbers of rows, so that few graphs are captured."""
    multiple = max(8, 1 << ((count - 1).bit_length() - 2)) if count > 8 else 8
    return -(-count // multiple) * multiple


def _rounded_width(tokens: int) -> int:
    multiple = 128 if tokens <= 1024 else 512
    return -(-tokens // multiple) * multiple
