"""The surrogate against closed forms written from the papers, in float64.

`closed_form` gives J and dJ / d log pi(o_jt) with loops over rows and tokens; nothing in it touches
autograd or the module under test.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from igrpo_nemo.objectives.advantage import group_advantages
from igrpo_nemo.objectives.entropy import token_logprobs
from igrpo_nemo.objectives.surrogate import (
    Normalizer,
    SurrogateConfig,
    SurrogateInputs,
    clipped_surrogate,
    finish_metrics,
)

GRPO = SurrogateConfig()
GRPO_KL = SurrogateConfig(reference_policy_kl_penalty=0.07)
DAPO = SurrogateConfig(
    ratio_clip_min=0.2, ratio_clip_max=0.28, ratio_clip_c=3.0, token_level_loss=True
)
GSPO = SurrogateConfig(
    ratio_clip_min=0.03, ratio_clip_max=0.04, sequence_level_importance_ratios=True
)
DR_GRPO = SurrogateConfig(constant_length_divisor=9)
OBJECTIVES = {"grpo": GRPO, "igrpo_kl": GRPO_KL, "dapo": DAPO, "gspo": GSPO, "dr_grpo": DR_GRPO}
SCALES = [0.05, 0.6, 2.0]
LENGTHS = [5, 3, 6, 1, 4, 6, 2, 5]
GROUPS = list("aaaabbbb")
REWARDS = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Batch:
    logprobs: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor
    advantages: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None = None
    shaped: torch.Tensor | None = None

    @property
    def row_weights(self) -> list[float]:
        return [1.0] * len(LENGTHS) if self.weights is None else self.weights.tolist()

    def is_shaped(self, row: int) -> bool:
        return self.shaped is not None and bool(self.shaped[row])

    def log_ratios(self, row: int) -> list[float]:
        length = int(self.lengths[row])
        return (self.logprobs - self.old)[row, :length].tolist()

    def log_rhos(self, row: int) -> list[float]:
        length = int(self.lengths[row])
        return (self.reference - self.logprobs)[row, :length].tolist()

    def inputs(self, logprobs: torch.Tensor | None = None) -> SurrogateInputs:
        logprobs = self.logprobs if logprobs is None else logprobs
        return SurrogateInputs(
            logprobs,
            self.old,
            self.reference,
            self.advantages,
            self.lengths,
            self.weights,
            self.shaped,
        )


def make_batch(log_ratio_scale: float = 0.6, seed: int = 0) -> Batch:
    """Two groups of four; ratios on both sides of every clip, under both signs of A."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        shape = (len(LENGTHS), max(LENGTHS))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.1
    return Batch(
        logprobs=(old + log_ratio_scale * normal()).requires_grad_(),
        old=old,
        reference=old + 0.5 * normal(),
        advantages=group_advantages(REWARDS, GROUPS, delta=0),
        lengths=torch.tensor(LENGTHS),
    )


def unclipped(ratio: float, advantage: float, config: SurrogateConfig) -> bool:
    """The indicator of Eq. 22, with DAPO's two epsilons and the dual clip's extra branch."""
    if advantage >= 0:
        return ratio <= 1 + config.ratio_clip_max
    if config.ratio_clip_c is not None and ratio > config.ratio_clip_c:
        return False
    return ratio >= 1 - config.ratio_clip_min


def closed_form(batch: Batch, config: SurrogateConfig) -> tuple[float, torch.Tensor]:
    """J of Eq. 5, and dJ / d log pi(o_jt) of every token, Eq. 29; and their counterparts for the
    other objectives."""
    value, got, weights = 0.0, torch.zeros_like(batch.old), batch.row_weights
    total_tokens = sum(w * length for w, length in zip(weights, LENGTHS, strict=True))
    beta = config.reference_policy_kl_penalty
    for j, length in enumerate(LENGTHS):
        A = float(batch.advantages[j])
        log_ratios, log_rhos = batch.log_ratios(j), batch.log_rhos(j)
        divisor = sum(weights) * (config.constant_length_divisor or length)
        share = weights[j] / (total_tokens if config.token_level_loss else divisor)
        for t in range(length):
            # s = exp(mean log r): ds / d log pi_t = s / |o| for each of the |o| equal terms.
            mean = sum(log_ratios) / length
            r = math.exp(mean if config.sequence_level_importance_ratios else log_ratios[t])
            term = min(r * A, min(max(r, 1 - config.ratio_clip_min), 1 + config.ratio_clip_max) * A)
            if config.ratio_clip_c is not None and A < 0:
                term = max(term, config.ratio_clip_c * A)
            slope = unclipped(r, A, config) * A * r
            if batch.is_shaped(j):
                # d p / (p + gamma) / d log p = gamma p / (p + gamma)^2 (arXiv 2506.03106).
                p, gamma = math.exp(float(batch.logprobs.detach()[j, t])), config.shaping_gamma
                term, slope = A * p / (p + gamma), A * gamma * p / (p + gamma) ** 2
            kl = math.exp(log_rhos[t]) - log_rhos[t] - 1
            value += share * (term - beta * kl)
            got[j, t] = share * (slope + beta * (math.exp(log_rhos[t]) - 1))
    return value, got


def gradient(
    batch: Batch, config: SurrogateConfig, normalizer: Normalizer | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = batch.logprobs.detach().clone().requires_grad_()
    weights = None if batch.weights is None else batch.weights.tolist()
    normalizer = normalizer or Normalizer.from_lengths(batch.lengths.tolist(), weights)
    loss, _ = clipped_surrogate(batch.inputs(logprobs), config, normalizer)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), grad


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", SCALES)
def test_value_and_gradient_equal_the_closed_form(name, scale):
    config, batch = OBJECTIVES[name], make_batch(scale)
    loss, grad = gradient(batch, config)
    value, coefficients = closed_form(batch, config)
    assert float((grad + coefficients).abs().max()) < 1e-10
    assert float(loss) == pytest.approx(-value, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gamma", [0.1, 0.7])
def test_weights_and_shaped_rows_equal_the_closed_form(name, scale, gamma):
    """Among the shaped rows are positive and negative advantages, and ratios beyond every clip."""
    config = replace(OBJECTIVES[name], shaping_gamma=gamma)
    shaped = torch.tensor([False, True, True, False, False, True, False, False])
    weights = torch.tensor([1, 4, 0, 1, 1, 2.5, 1, 0], dtype=torch.float64)
    batch = replace(make_batch(scale), weights=weights, shaped=shaped)
    assert batch.advantages[shaped].min() < 0 < batch.advantages[~shaped].max()
    loss, grad = gradient(batch, config)
    value, coefficients = closed_form(batch, config)
    assert float((grad + coefficients).abs().max()) < 1e-10
    assert float(loss) == pytest.approx(-value, abs=1e-12)
    with pytest.raises(ValueError, match="need shaping_gamma"):
        gradient(batch, OBJECTIVES[name])


def test_a_weight_of_one_changes_nothing_and_a_weight_counts_as_often_as_a_row():
    batch = make_batch()
    loss, grad = gradient(batch, GRPO)
    weighted = replace(batch, weights=torch.ones(len(LENGTHS), dtype=torch.float64))
    same_loss, same_grad = gradient(weighted, GRPO)
    assert loss.equal(same_loss) and grad.equal(same_grad)
    twice = replace(
        batch,
        **{
            name: torch.cat([getattr(batch, name), getattr(batch, name)[:1]]).detach()
            for name in ("logprobs", "old", "reference", "advantages", "lengths")
        },
    )
    weights = torch.tensor([2.0] + [1.0] * (len(LENGTHS) - 1), dtype=torch.float64)
    doubled, _ = gradient(twice, GRPO)
    once, _ = gradient(replace(batch, weights=weights), GRPO)
    assert float(doubled) == pytest.approx(float(once), abs=1e-15)


@pytest.mark.parametrize("extreme", [-1e4, 0.0])
def test_the_shaped_term_is_finite_for_hopeless_and_certain_tokens(extreme):
    batch = replace(make_batch(), shaped=torch.ones(len(LENGTHS), dtype=torch.bool))
    batch = replace(batch, logprobs=torch.full_like(batch.old, extreme))
    loss, grad = gradient(batch, replace(GRPO, shaping_gamma=0.1))
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(grad).all())


def test_a_shaped_row_has_no_ratio():
    """It counts as 1 in the metrics, however far the policy has moved."""
    batch = replace(make_batch(2.0), shaped=torch.ones(len(LENGTHS), dtype=torch.bool))
    config, normalizer = replace(GRPO, shaping_gamma=0.1), Normalizer.from_lengths(LENGTHS)
    got = finish_metrics([clipped_surrogate(batch.inputs(), config, normalizer)[1]])
    assert got["policy/ratio_mean"] == got["policy/ratio_max"] == 1.0
    assert got["policy/clip_fraction"] == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_batches_reach_every_branch_of_the_clip(name):
    """Otherwise the closed-form test would prove less than it says."""
    config = OBJECTIVES[name]
    seen, above_dual_clip = set(), False
    for batch in map(make_batch, SCALES):
        for j, length in enumerate(LENGTHS):
            log_ratio = (batch.logprobs - batch.old)[j, :length].detach()
            if config.sequence_level_importance_ratios:
                log_ratio = log_ratio.mean(0, keepdim=True)
            sign = int(batch.advantages[j].sign())
            for r in log_ratio.exp().tolist():
                side = (r > 1 + config.ratio_clip_max) - (r < 1 - config.ratio_clip_min)
                seen.add((sign, side))
                above_dual_clip |= sign < 0 and r > (config.ratio_clip_c or math.inf)
    assert seen >= {(sign, side) for sign in (-1, 1) for side in (-1, 0, 1)}
    assert above_dual_clip == (config.ratio_clip_c is not None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parameter_gradient_is_eq29_on_a_softmax_policy(name):
    """Down to the parameters: with logits z as parameters, grad log pi(o) = onehot(o) - pi."""
    config, batch = OBJECTIVES[name], make_batch()
    rows, tokens, vocabulary = len(LENGTHS), max(LENGTHS), 11
    generator = torch.Generator().manual_seed(3)
    shape = (rows * tokens, vocabulary)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(vocabulary, (rows * tokens,), generator=generator)
    logprobs = token_logprobs(z, ids, chunk_size=4).view(rows, tokens)
    shift = batch.logprobs.detach() - logprobs.detach()
    batch = replace(
        batch,
        logprobs=logprobs,
        old=batch.old - shift,
        reference=batch.reference - shift,
    )
    loss, _ = clipped_surrogate(batch.inputs(), config, Normalizer.from_lengths(LENGTHS))
    (grad,) = torch.autograd.grad(loss, z)
    score = torch.nn.functional.one_hot(ids, vocabulary) - z.detach().softmax(-1)
    wanted = -closed_form(batch, config)[1].view(-1, 1) * score
    assert float((grad - wanted).abs().max()) < 1e-10


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("cuts", [[8], [1] * 8, [3, 5], [6, 2], [2, 2, 4]])
def test_micro_batches_add_up_to_the_full_batch(name, cuts):
    config, batch = OBJECTIVES[name], make_batch()
    normalizer = Normalizer.from_lengths(LENGTHS)
    whole_loss, whole_grad = gradient(batch, config)
    _, whole_metrics = clipped_surrogate(batch.inputs(), config, normalizer)
    parts, losses, grads = [], [], torch.zeros_like(whole_grad)
    start = 0
    for size in cuts:
        rows = slice(start, start + size)
        columns = int(batch.lengths[rows].max())
        part = Batch(
            batch.logprobs[rows, :columns],
            batch.old[rows, :columns],
            batch.reference[rows, :columns],
            batch.advantages[rows],
            batch.lengths[rows],
        )
        loss, grad = gradient(part, config, normalizer)
        losses.append(loss)
        grads[rows, :columns] += grad
        parts.append(clipped_surrogate(part.inputs(), config, normalizer)[1])
        start += size
    assert float(sum(losses)) == pytest.approx(float(whole_loss), abs=1e-14)
    torch.testing.assert_close(grads, whole_grad, rtol=0, atol=1e-15)
    assert finish_metrics(parts) == pytest.approx(finish_metrics([whole_metrics]), abs=1e-13)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("filler", [math.nan, -math.inf, math.inf, 1e30])
def test_padding_may_hold_anything(name, filler):
    config, batch = OBJECTIVES[name], make_batch()
    padding = torch.arange(max(LENGTHS)) >= batch.lengths[:, None]
    loss, grad = gradient(batch, config)
    dirty = replace(
        batch,
        logprobs=batch.logprobs.detach().masked_fill(padding, filler),
        old=batch.old.masked_fill(padding, filler),
        reference=batch.reference.masked_fill(padding, filler),
    )
    dirty_loss, dirty_grad = gradient(dirty, config)
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(dirty_grad, grad)
    assert bool((dirty_grad[padding] == 0).all())
    metrics = clipped_surrogate(dirty.inputs(), config, Normalizer.from_lengths(LENGTHS))[1]
    assert all(math.isfinite(float(value)) for value in metrics.values())


def test_the_padding_of_an_objective_of_ones_own_may_hold_anything():
    batch = make_batch()
    padding = torch.arange(max(LENGTHS)) >= batch.lengths[:, None]

    def own(inputs, config):
        return (inputs.logprobs_RT * inputs.advantages_R[:, None]).masked_fill(padding, math.nan)

    loss, _ = clipped_surrogate(batch.inputs(), GRPO, Normalizer.from_lengths(LENGTHS), own)
    (grad,) = torch.autograd.grad(loss, batch.logprobs)
    assert math.isfinite(float(loss.detach())) and bool(torch.isfinite(grad).all())


def test_groups_without_spread_have_no_gradient_but_stay_in_the_denominator():
    batch = make_batch()
    silent = group_advantages(torch.where(torch.arange(8) < 4, 0.7, REWARDS), GROUPS, delta=0)
    half = replace(batch, advantages=silent)
    _, grad = gradient(batch, GRPO)
    _, half_grad = gradient(half, GRPO)
    assert bool((half_grad[:4] == 0).all())
    assert torch.equal(half_grad[4:], grad[4:])


def test_on_policy_loss_is_minus_the_mean_advantage_and_gradient_is_eq19():
    batch = make_batch()
    batch = replace(batch, logprobs=batch.old.clone())
    loss, grad = gradient(batch, GRPO)
    assert float(loss) == pytest.approx(0, abs=1e-15)
    for j, length in enumerate(LENGTHS):
        wanted = -float(batch.advantages[j]) / length / len(LENGTHS)
        assert grad[j, :length].tolist() == pytest.approx([wanted] * length, abs=1e-15)


def test_an_overflowing_ratio_sends_no_nan_through_the_clip():
    inputs = SurrogateInputs(
        torch.tensor([[-1.0]], requires_grad=True),
        torch.tensor([[-200.0]]),
        None,
        torch.tensor([1.0]),
        torch.tensor([1]),
    )
    loss, metrics = clipped_surrogate(inputs, GRPO, Normalizer(1, 1))
    (grad,) = torch.autograd.grad(loss, inputs.logprobs_RT)
    assert float(loss.detach()) == pytest.approx(-1.2)
    assert float(grad) == 0
    assert math.isfinite(float(metrics["ratio_max"]))


def test_low_precision_log_probs_are_computed_in_fp32():
    batch = make_batch()
    low = replace(batch, logprobs=batch.logprobs.detach().bfloat16(), old=batch.old.bfloat16())
    loss, metrics = clipped_surrogate(low.inputs(), GRPO, Normalizer.from_lengths(LENGTHS))
    assert loss.dtype == torch.float32
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_kl_types_and_clamps(kl_type):
    batch = make_batch()
    config = SurrogateConfig(
        reference_policy_kl_penalty=0.5,
        reference_policy_kl_type=kl_type,  # type: ignore[arg-type]
        kl_input_clamp_value=0.6,
        kl_output_clamp_value=0.15,
    )
    _, metrics = clipped_surrogate(batch.inputs(), config, Normalizer.from_lengths(LENGTHS))
    total, input_clamped, output_clamped = 0.0, 0, 0
    for j in range(len(LENGTHS)):
        for x in batch.log_rhos(j):
            input_clamped += abs(x) > 0.6
            x = min(max(x, -0.6), 0.6)
            kl = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1}[kl_type]
            output_clamped += abs(kl) > 0.15
            total += min(max(kl, -0.15), 0.15)
    assert input_clamped and output_clamped
    assert float(metrics["kl_sum"]) == pytest.approx(total, abs=1e-12)
    penalised, _ = gradient(batch, config)
    plain, _ = gradient(batch, replace(config, reference_policy_kl_penalty=0.0))
    token_mean = replace(config, token_level_loss=True)
    assert float(penalised) != pytest.approx(float(plain))
    penalised, _ = gradient(batch, token_mean)
    plain, _ = gradient(batch, replace(token_mean, reference_policy_kl_penalty=0.0))
    assert float(penalised - plain) == pytest.approx(0.5 * total / sum(LENGTHS), abs=1e-12)


def test_metrics_are_token_means_and_count_the_clipped_tokens():
    ratios = [[1.5, 0.5, 1.0], [1.5, 0.5, 9.0]]
    inputs = SurrogateInputs(
        torch.tensor(ratios, dtype=torch.float64).log(),
        torch.zeros(2, 3, dtype=torch.float64),
        None,
        torch.tensor([1.0, -1.0]),
        torch.tensor([3, 2]),
    )
    parts = [clipped_surrogate(inputs, GRPO, Normalizer(2, 5))[1]]
    got = finish_metrics(parts)
    kl = sum(r - 1 - math.log(r) for r in [1.5, 0.5, 1.0, 1.5, 0.5]) / 5
    assert got == pytest.approx(
        {
            "loss": -((1.2 + 0.5 + 1.0) / 3 + (-1.5 - 0.8) / 2) / 2,
            "policy/clip_fraction": 2 / 5,
            "policy/ratio_mean": 1.0,
            "policy/ratio_max": 1.5,
            "policy/kl": kl,
        }
    )
    dual = replace(GRPO, ratio_clip_c=1.4)
    parts = [clipped_surrogate(inputs, dual, Normalizer(2, 5))[1]]
    assert finish_metrics(parts)["policy/clip_fraction"] == pytest.approx(3 / 5)


def test_a_kl_without_reference_is_named():
    inputs = replace(make_batch().inputs(), reference_logprobs_RT=None)
    with pytest.raises(ValueError, match="needs reference_logprobs_RT"):
        clipped_surrogate(inputs, GRPO_KL, Normalizer.from_lengths(LENGTHS))
