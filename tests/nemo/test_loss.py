"""NeMo-RL's loss with exact entropy and Dr. GRPO's divisor; sharded over two processes too."""

from __future__ import annotations

import socket
import sys
import types

import own_objective
import pytest
import torch
import torch.multiprocessing as mp
from nemo_rl.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.cpu.policy import next_token_logprobs
from igrpo_nemo.nemo.loss import (
    SHAPED,
    IGRPOLoss,
    Shards,
    exact_entropy,
    masked_entropy,
)
from igrpo_nemo.objectives.surrogate import (
    Normalizer,
    SurrogateConfig,
    SurrogateInputs,
    clipped_surrogate,
)

R, T, V = 3, 7, 12


def _config(**values):
    base = {
        "reference_policy_kl_penalty": 0.0,
        "reference_policy_kl_type": "k3",
        "kl_input_clamp_value": None,
        "kl_output_clamp_value": None,
        "ratio_clip_min": 0.2,
        "ratio_clip_max": 0.28,
        "ratio_clip_c": None,
        "use_on_policy_kl_approximation": False,
        "use_importance_sampling_correction": False,
        "truncated_importance_sampling_ratio": None,
        "token_level_loss": False,
    }
    return ClippedPGLossConfig(**{**base, **values})


def _batch():
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(R, T)
    for row, (start, end) in enumerate([(2, 6), (3, 7), (1, 4)]):
        mask[row, start:end] = 1
    draw = lambda: -torch.rand(R, T, generator=generator)  # noqa: E731
    data = BatchedDataDict(
        {
            "input_ids": torch.randint(0, V, (R, T), generator=generator),
            "advantages": torch.tensor([1.2, -0.7, 0.4])[:, None].expand(R, T),
            "prev_logprobs": draw(),
            "generation_logprobs": draw(),
            "reference_policy_logprobs": draw(),
            "token_mask": mask,
            "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
        }
    )
    logits = torch.randn(R, T, V, generator=generator) * 3
    tokens = (mask[:, 1:] * data["sample_mask"][:, None]).sum()
    return data, logits, data["sample_mask"].sum(), tokens


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"token_level_loss": True},
        {"sequence_level_importance_ratios": True},
        {"reference_policy_kl_penalty": 0.1},
        {"ratio_clip_c": 3.0},
    ],
)
def test_exact_entropy_changes_neither_loss_nor_gradient_nor_metrics(values):
    """Bit for bit NeMo-RL's."""
    data, logits, sequences, tokens = _batch()
    plain, theirs = ClippedPGLossFn(_config(**values)), logits.clone().requires_grad_()
    loss, metrics = plain(next_token_logprobs(theirs, data["input_ids"]), data, sequences, tokens)
    loss.backward()
    ours = logits.clone().requires_grad_()
    loss_fn = IGRPOLoss(_config(**values), exact_entropy=True)
    got, measured = loss_fn(data, sequences, tokens, logits=ours)
    got.backward()
    assert torch.equal(got, loss)
    assert torch.equal(ours.grad, theirs.grad)
    assert {name: measured[name] for name in metrics} == metrics
    assert set(measured) - set(metrics) == {"exact_entropy"}


def test_exact_entropy_is_equation_7():
    """Mean over the trained tokens of -sum p log p, by the definition in float64."""
    data, logits, _, tokens = _batch()
    log_p = torch.log_softmax(logits.double(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[:, :-1]
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    measured = masked_entropy(logits, data, tokens, Shards())
    assert float(measured) == pytest.approx(float((entropy * mask).sum() / mask.sum()), rel=1e-6)


def test_micro_batches_add_up_to_the_whole_entropy():
    data, logits, sequences, tokens = _batch()
    loss_fn = IGRPOLoss(_config(), exact_entropy=True)
    _, whole = loss_fn(data, sequences, tokens, logits=logits)
    parts = [
        loss_fn(data.slice(r, r + 1), sequences, tokens, logits=logits[r : r + 1])[1]
        for r in range(R)
    ]
    total = sum(part["exact_entropy"] for part in parts)
    assert total == pytest.approx(whole["exact_entropy"], rel=1e-6)


def test_dr_grpo_divides_by_a_constant():
    """sum over tokens of the clipped term / (sequences x divisor), written out."""
    data, logits, sequences, tokens = _batch()
    logprobs = next_token_logprobs(logits, data["input_ids"])
    loss_fn = IGRPOLoss(_config(), constant_length_divisor=50)
    loss, metrics = loss_fn(data, sequences, tokens, next_token_logprobs=logprobs)
    ratio = (logprobs - data["prev_logprobs"][:, 1:]).exp()
    advantages = data["advantages"][:, 1:]
    term = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    assert float(loss) == pytest.approx(float((term * mask).sum() / (sequences * 50)), rel=1e-6)
    plain = ClippedPGLossFn(_config(token_level_loss=True))
    _, expected = plain(logprobs, data, sequences, tokens)
    for name in ("approx_entropy", "probs_ratio", "gen_kl_error", "token_mult_prob_error"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)


COLUMNS = [(2, 6), (3, 7), (1, 4)]
"""Of the answers in the batch's rows."""


def _weighted(shaped=None):
    """The batch with rows of several weights, and rows that are marked as shaped; its log-probs,
    with gradient; its numbers of rows and of tokens."""
    data, logits, _, _ = _batch()
    data["sample_mask"] = weights = torch.tensor([1.0, 2.0, 0.5])
    if shaped is not None:
        marked = torch.tensor(shaped)[:, None] & (data["token_mask"] > 0)
        data["generation_logprobs"] = torch.where(marked, SHAPED, data["generation_logprobs"])
    tokens = (data["token_mask"][:, 1:] * weights[:, None]).sum()
    logprobs = next_token_logprobs(logits, data["input_ids"]).requires_grad_()
    return data, logprobs, weights.sum(), tokens


def _is_the_embedded_engines(
    loss, data, logprobs, *, shaped=None, own=None, forced=False, **values
):
    """Value and gradient of the same rows, weights included."""
    loss.backward()
    ours, old, reference = torch.zeros(3, R, 4)
    for row, (start, end) in enumerate(COLUMNS):
        ours[row, : end - start] = logprobs.detach()[row, start - 1 : end - 1]
        old[row, : end - start] = data["prev_logprobs"][row, start:end]
        reference[row, : end - start] = data["reference_policy_logprobs"][row, start:end]
    ours.requires_grad_()
    lengths = [end - start for start, end in COLUMNS]
    inputs = SurrogateInputs(
        ours,
        ours.detach() if forced else old,
        reference if "reference_policy_kl_penalty" in values else None,
        data["advantages"][:, 0],
        torch.tensor(lengths),
        data["sample_mask"],
        None if shaped is None else torch.tensor(shaped),
    )
    config = SurrogateConfig(ratio_clip_max=0.28, **values)
    normalizer = Normalizer.from_lengths(lengths, data["sample_mask"].tolist())
    expected, _ = clipped_surrogate(inputs, config, normalizer, own)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for row, (start, end) in enumerate(COLUMNS):
        torch.testing.assert_close(
            logprobs.grad[row, start - 1 : end - 1], ours.grad[row, : end - start]
        )


@pytest.mark.parametrize("gamma", [0.1, 0.6])
@pytest.mark.parametrize(
    "values",
    [{}, {"token_level_loss": True}, {"ratio_clip_c": 3.0}, {"constant_length_divisor": 50}],
)
def test_marked_rows_take_the_shaped_term_and_the_others_nemo_rls(gamma, values):
    shaped, divisor = [False, True, True], values.get("constant_length_divisor")
    cfg = _config(**{k: v for k, v in values.items() if k != "constant_length_divisor"})
    data, logprobs, rows, tokens = _weighted(shaped)
    loss_fn = IGRPOLoss(cfg, shaping_gamma=gamma, constant_length_divisor=divisor)
    loss, metrics = loss_fn(data, rows, tokens, next_token_logprobs=logprobs)
    assert loss.item() == metrics["loss"]
    _is_the_embedded_engines(loss, data, logprobs, shaped=shaped, shaping_gamma=gamma, **values)
    _, unmarked = IGRPOLoss(cfg, constant_length_divisor=divisor)(
        data.slice(0, 1), rows, tokens, next_token_logprobs=logprobs[:1]
    )
    marked = (data["generation_logprobs"] == SHAPED).sum(dim=1) * data["sample_mask"]
    ratio_one = float(marked.sum() / tokens)
    assert metrics["probs_ratio"] == pytest.approx(unmarked["probs_ratio"] + ratio_one, rel=1e-5)


@pytest.mark.parametrize("gamma", [None, 0.6])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    "values", [{}, {"token_level_loss": True}, {"reference_policy_kl_penalty": 0.1}]
)
def test_an_objective_of_ones_own_makes_the_embedded_engines_loss(gamma, forced, values):
    """Shaped rows and KL included; the metrics stay NeMo-RL's."""
    shaped = [False, False, True] if gamma else None
    data, logprobs, rows, tokens = _weighted(shaped)
    cfg = _config(force_on_policy_ratio=forced, **values)
    (_, theirs), (loss, metrics) = (
        IGRPOLoss(cfg, shaping_gamma=gamma, objective=own)(
            data, rows, tokens, next_token_logprobs=logprobs
        )
        for own in (None, "own_objective:tilted")
    )
    assert {**metrics, "loss": 0} == {**theirs, "loss": 0} and loss.item() == metrics["loss"]
    given = {"own": own_objective.tilted, "forced": forced, "shaping_gamma": gamma}
    _is_the_embedded_engines(loss, data, logprobs, shaped=shaped, **given, **values)


def test_an_objective_of_ones_own_that_is_no_value_a_token_is_named(ray_cluster):
    """In one line, from a worker too, where it is imported by its path."""
    import ray

    from igrpo_nemo.nemo.failure import named_errors

    data, logits, sequences, tokens = _batch()
    logprobs = next_token_logprobs(logits, data["input_ids"])
    loss_fn = IGRPOLoss(_config(), objective="own_objective:narrow")
    worker = ray.remote(num_cpus=0)(lambda: loss_fn(data, sequences, tokens, logprobs))
    with pytest.raises(UserError, match=r"^igrpo.objective returned a tensor of shape \(3,\)"):
        with named_errors():
            ray.get(worker.remote())


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _packed(rank, port, queue):
    """One of two tensor-parallel ranks, each with half of the vocabulary: NeMo-RL's wrapper for
    packed rows around both losses, and the entropy alone."""
    from functools import partial

    from nemo_rl.algorithms.loss import SequencePackingLossWrapper, prepare_loss_input

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    world, alone = torch.distributed.group.WORLD, _groups_of_one()[rank]
    _pretend_megatron(rank, world, alone)
    data, logits, sequences, tokens = _batch()
    starts, padded = torch.tensor([0, 6, 13, 17]), torch.tensor([0, 8, 16, 24])
    packed = torch.nn.functional.pad(logits, (0, 0, 0, 1)).view(1, 24, V)
    half = slice(rank * V // 2, (rank + 1) * V // 2)
    results = []
    for loss_fn in (
        ClippedPGLossFn(_config()),
        IGRPOLoss(_config(), exact_entropy=True, chunk_size=4),
    ):
        mine = packed[..., half].clone().requires_grad_()
        prepare = partial(prepare_loss_input, sampling_params=None, d2t=None, chunk_size=4)
        wrapper = SequencePackingLossWrapper(loss_fn, prepare, starts, padded, rank, world, alone)
        loss, metrics = wrapper(mine, data, sequences, tokens)
        loss.backward()
        results.append((loss.detach(), mine.grad, metrics))
    (loss, gradient, metrics), (ours, our_gradient, measured) = results
    same = torch.equal(ours, loss) and torch.equal(our_gradient, gradient)
    same = same and all(measured[name] == value for name, value in metrics.items())
    entropy = exact_entropy(logits[..., half].contiguous(), world)
    queue.put((same and bool(gradient.any()), measured["exact_entropy"], entropy.numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _groups_of_one():
    return [torch.distributed.new_group([rank]) for rank in range(2)]


def _pretend_megatron(rank, tensor_parallel, context_parallel):
    """Its process groups, as a worker of NeMo-RL's has them."""
    state = types.ModuleType("megatron.core.parallel_state")
    state.model_parallel_is_initialized = lambda: True
    state.get_tensor_model_parallel_rank = lambda: rank
    state.get_tensor_model_parallel_group = lambda: tensor_parallel
    state.get_context_parallel_group = lambda: context_parallel
    sys.modules["megatron.core.parallel_state"] = state


def test_two_tensor_parallel_processes_have_nemo_rls_loss_and_gradient_of_packed_rows():
    """To the last bit on either, and the exact entropy is that of the whole vocabulary."""
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_packed, args=(_free_port(), queue), nprocs=2, join=True)
    data, logits, _, tokens = _batch()
    expected = float(masked_entropy(logits, data, tokens, Shards()))
    for _ in range(2):
        same, entropy, entropy_RT = queue.get()
        assert same
        assert entropy == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(
            torch.from_numpy(entropy_RT), exact_entropy(logits), rtol=1e-6, atol=1e-6
        )


def test_the_loss_travels_to_workers():
    import pickle

    loss_fn = IGRPOLoss(_config(), exact_entropy=True, constant_length_divisor=9)
    copied = pickle.loads(pickle.dumps(loss_fn))
    assert (copied.exact_entropy, copied.surrogate.constant_length_divisor) == (True, 9)
    assert copied.input_type == loss_fn.input_type
