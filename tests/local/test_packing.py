"""The packed forward against the padded one, its attention against a dense mask, and splitting."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_runs import FAMILIES

from igrpo_nemo.local import packing
from igrpo_nemo.local.fused import stream_attention as streams
from igrpo_nemo.local.fused.decoder import can_fuse
from igrpo_nemo.local.fused.group_attention import (
    expanded_attention,
    group_attention,
)
from igrpo_nemo.local.fused.group_layout import Sequences, group_layout
from igrpo_nemo.local.fused.stream_attention import StreamAttention, takes_stream
from igrpo_nemo.local.packing import (
    can_pack,
    completion_logprobs,
    enable_checkpointing,
    split_micro_batches,
)

# Groups of several, a group of one, a one-token context, completions of one token.
SHAPE = [(9, [5, 1, 7]), (1, [3, 2]), (14, [6]), (12, [1, 1]), (1, [1])]


def _loss_and_gradient(model, rows, *, packed, temperature=0.7):
    model.zero_grad()
    batch = completion_logprobs(model, rows, temperature=temperature, packed=packed)
    weights_RT = torch.linspace(-1, 1, batch.logprobs_RT.numel()).view_as(batch.logprobs_RT)
    loss = (batch.logprobs_RT * weights_RT).sum() / batch.lengths_R.sum()
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return batch.logprobs_RT.detach(), loss.item(), gradient


def _largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_packed_equals_padded_in_loss_and_gradient(family, make_model, make_rows):
    model, rows = make_model(family), make_rows(SHAPE)
    assert can_pack(model)
    logprobs, loss, gradient = _loss_and_gradient(model, rows, packed=True)
    padded_logprobs, padded_loss, padded_gradient = _loss_and_gradient(model, rows, packed=False)
    assert abs(loss - padded_loss) < 1e-6
    assert _largest_difference(gradient, padded_gradient) < 1e-6
    assert (logprobs - padded_logprobs).abs().max() < 5e-6


def test_fused_and_hooked_packing_agree(make_model, make_rows, monkeypatch):
    model, rows = make_model("qwen2"), make_rows(SHAPE)
    _, loss, gradient = _loss_and_gradient(model, rows, packed=True)
    monkeypatch.setattr(packing, "can_fuse", lambda model: False)
    _, hooked_loss, hooked_gradient = _loss_and_gradient(model, rows, packed=True)
    assert abs(loss - hooked_loss) < 1e-6
    assert _largest_difference(gradient, hooked_gradient) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_each_row_alone(family, make_model, make_rows):
    model, rows = make_model(family), make_rows(SHAPE)
    batch = completion_logprobs(model, rows, temperature=0.6, with_entropy=True)
    assert batch.entropy_RT is not None and not batch.entropy_RT.requires_grad
    for i, row in enumerate(rows):
        ids, start = row.context_ids + row.completion.token_ids, len(row.context_ids)
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0, start - 1 : -1] / 0.6
        log_TV = logits_TV.log_softmax(-1)
        length = len(row.completion.token_ids)
        expected_T = log_TV.gather(1, torch.tensor(row.completion.token_ids)[:, None])[:, 0]
        entropy_T = -(log_TV.exp() * log_TV).sum(-1)
        torch.testing.assert_close(batch.logprobs_RT[i, :length], expected_T, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.entropy_RT[i, :length], entropy_T, atol=1e-5, rtol=0)
        assert batch.lengths_R[i] == length
        assert not batch.logprobs_RT[i, length:].any() and not batch.entropy_RT[i, length:].any()


def test_mamba_hybrids_are_not_packed(make_model):
    model = make_model("nemotron_h")
    assert not can_pack(model) and not can_fuse(model)


@pytest.mark.parametrize("packed", [True, False])
def test_gradient_checkpointing_changes_no_gradient(packed, make_model, make_rows):
    model, rows = make_model("qwen3"), make_rows(SHAPE)
    _, loss, gradient = _loss_and_gradient(model, rows, packed=packed)
    enable_checkpointing(model)
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: runs.append(1))
    _, repeated_loss, repeated_gradient = _loss_and_gradient(model, rows, packed=packed)
    assert abs(loss - repeated_loss) < 1e-6
    assert _largest_difference(gradient, repeated_gradient) < 1e-6
    assert len(runs) == 2 and not model.model.layers[0].training


@pytest.mark.parametrize("with_entropy", [True, False])
def test_logits_in_chunks_change_nothing(with_entropy, make_model, make_rows, monkeypatch):
    model, rows = make_model("qwen3"), make_rows(SHAPE)
    whole = _loss_and_gradient(model, rows, packed=True)
    entropy_RT = completion_logprobs(model, rows, temperature=0.7, with_entropy=True).entropy_RT
    monkeypatch.setattr(packing, "_MOST_LOGITS", 4 * 320)
    chunked = _loss_and_gradient(model, rows, packed=True)
    assert torch.equal(whole[0], chunked[0])
    assert _largest_difference(whole[2], chunked[2]) < 1e-6
    again = completion_logprobs(model, rows, temperature=0.7, with_entropy=with_entropy)
    if with_entropy:
        torch.testing.assert_close(again.entropy_RT, entropy_RT)
    else:
        assert again.entropy_RT is None


def _stream_on_cpu(q, k, v, sequences, causal, scale):
    """What the GPU kernel computes: each sequence by itself."""
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
    for (a, b), _, scores, values in _each_sequence(q, k, v, sequences, causal, scale):
        out[a:b] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
        lse[:, a:b] = scores.logsumexp(-1)
    return out, lse, (torch.empty(0), torch.empty(0))


def _stream_backward_on_cpu(grad, q, k, v, out, lse, sequences, causal, state, scale):
    """As FlashAttention's backward: probabilities from the log-sum-exp that it is given."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    g = q.shape[1] // k.shape[1]
    for (a, b), (c, d), scores, values in _each_sequence(q, k, v, sequences, causal, scale):
        probs = (scores - lse[:, a:b, None]).exp()
        inner = torch.einsum("ihd,jhd->hij", grad[a:b], values)
        inner = probs * (inner - (grad[a:b] * out[a:b]).sum(-1).t()[..., None]) * scale
        keys = k[c:d].repeat_interleave(g, dim=1)
        dq[a:b] = torch.einsum("hij,jhd->ihd", inner, keys)
        full_k = torch.einsum("hij,ihd->jhd", inner, q[a:b])
        full_v = torch.einsum("hij,ihd->jhd", probs, grad[a:b])
        dk[c:d] = full_k.unflatten(1, (-1, g)).sum(2)
        dv[c:d] = full_v.unflatten(1, (-1, g)).sum(2)
    return dq, dk, dv


def _each_sequence(q, k, v, sequences, causal, scale):
    g = q.shape[1] // k.shape[1]
    ends = zip(pairwise(sequences.queries.tolist()), pairwise(sequences.keys.tolist()), strict=True)
    for (a, b), (c, d) in ends:
        keys, values = (x[c:d].repeat_interleave(g, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[a:b], keys) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones(b - a, d - c).bool().tril(), -torch.inf)
        yield (a, b), (c, d), scores, values


def test_pytorchs_own_kernels_take_these_calls():
    """Without a GPU: PyTorch's shapes of the calls that the stand-ins above replace."""
    q, k, v = (
        torch.empty(11, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)
    )
    sequences = Sequences.of([0, 4, 11], [0, 4, 11], torch.device("meta"))
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    for used in (None, lengths):
        out, lse, state = streams.stream(q, k, v, sequences, True, 0.25, key_lengths=used)
        assert out.shape == q.shape and lse.shape == (4, 11) and lse.dtype == torch.float32
    gradients = streams.stream_backward(q, q, k, v, out, lse, sequences, True, state, 0.25)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


def stream_attention(q, k, v, layout, scale):
    assert takes_stream(q, layout)
    return StreamAttention.apply(q, k, v, layout, scale)


@pytest.mark.parametrize("attend", [group_attention, expanded_attention, stream_attention])
def test_group_attention_equals_a_dense_mask(attend, monkeypatch):
    monkeypatch.setattr(streams, "stream", _stream_on_cpu)
    monkeypatch.setattr(streams, "stream_backward", _stream_backward_on_cpu)
    trunks, branches = [7, 1, 0, 5], [[3, 4, 1], [2, 2], [3, 1], []]
    if attend is stream_attention:  # it does not take the branches of an empty trunk
        trunks[2] = 3
    layout = group_layout(trunks, branches, torch.device("cpu"))
    owner, segment, order = [], [], []
    for number, length in enumerate(trunks):
        owner += [number] * length
        segment += [(number, -1)] * length
        order += range(length)
    for number, lengths in enumerate(branches):
        for branch, length in enumerate(lengths):
            owner += [number] * length
            segment += [(number, branch)] * length
            order += range(length)
    total = len(owner)
    visible = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        for j in range(total):
            same = segment[i] == segment[j] and order[j] <= order[i]
            visible[i, j] = same or (segment[j] == (owner[i], -1) and segment[i][1] >= 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (
        torch.randn(total, heads, 8, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2, 4)
    )
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, k, v, layout, 0.3)
    gradients = torch.autograd.grad((out * weights).sum(), tensors)
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, dim=1)) * 0.3
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    dense = torch.einsum("hij,jhd->ihd", probs, v.repeat_interleave(2, dim=1))
    dense_gradients = torch.autograd.grad((dense * weights).sum(), tensors)
    torch.testing.assert_close(out, dense, atol=1e-12, rtol=0)
    for gradient, expected in zip(gradients, dense_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fuse", [True, False])
def test_memory_for_the_backward_pass_is_linear_in_the_group(
    fuse, make_model, make_rows, monkeypatch
):
    model = make_model("qwen2")
    monkeypatch.setattr(packing, "can_fuse", lambda model: fuse)

    def saved_bytes(group_size):
        storages = {}

        def remember(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            rows = make_rows([(40, [20] * group_size)])
            completion_logprobs(model, rows, temperature=1.0).logprobs_RT.sum()
        return sum(storages.values())

    four, eight, sixteen = (saved_bytes(group_size) for group_size in (4, 8, 16))
    assert sixteen - eight <= 2.05 * (eight - four)


def test_the_models_own_attention_is_back_after_an_error(make_model, make_rows, monkeypatch):
    model = make_model("qwen3")
    before = model.config._attn_implementation

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(model.base_model.norm), "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        completion_logprobs(model, make_rows([(3, [2, 2])]), temperature=1.0)
    assert model.config._attn_implementation == before


def test_micro_batches_keep_groups_whole_where_they_fit(make_rows):
    rows = make_rows([(10, [5, 5, 5]), (20, [4, 4]), (6, [30, 30, 30])])
    batches = split_micro_batches(rows, max_tokens=70, max_rows=None)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        contexts = {rows[i].context_ids for i in batch}
        tokens = sum(len(context) for context in contexts)
        assert tokens + sum(len(rows[i].completion.token_ids) for i in batch) <= 70
    batches_of = {}
    for number, batch in enumerate(batches):
        for i in batch:
            batches_of.setdefault(len(rows[i].context_ids), set()).add(number)
    # Only the group of 6 + 90 tokens is split.
    assert [len(batches_of[length]) for length in (10, 20, 6)] == [1, 1, 2]


def test_micro_batches_respect_max_rows_and_single_rows_above_the_limit(make_rows):
    rows = make_rows([(10, [5] * 5), (9, [100])])
    by_rows = split_micro_batches(rows, max_tokens=None, max_rows=2)
    assert max(len(batch) for batch in by_rows) == 2 and sum(map(len, by_rows)) == 6
    by_tokens = split_micro_batches(rows, max_tokens=20, max_rows=None)
    assert sum(map(len, by_tokens)) == 6
    assert [len(b) for b in split_micro_batches(rows, max_tokens=None, max_rows=None)] == [6]
