"""Errors and intervals against closed forms, and against what repeated experiments show."""

import itertools
import math

import numpy as np
import pytest

from igrpo_nemo.evaluation.statistics import (
    bayes_at_n,
    curve_points,
    estimate,
    macro_average,
    over_problems,
    over_seeds,
    paired_bootstrap,
    pass_at_k_curve,
    t_quantile,
)
from igrpo_nemo.metrics import pass_at_k


def covers(hits: int, trials: int, *, slack: float = 0.0) -> bool:
    """Whether `hits` of `trials` is 95 % within four standard errors, plus `slack`."""
    return abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials) + slack


def beta_rates(generator: np.random.Generator, P: int) -> np.ndarray:
    """Success rates of problems from easy to hopeless, with mean 0.4."""
    return generator.beta(0.8, 1.2, size=P)


def test_estimate_by_hand():
    result = estimate(np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]))
    means = [0.5, 0.25, 1.0]
    within = [1 / 3, 1 / 4, 0]  # sample variances of the rows
    assert result.mean == pytest.approx(sum(means) / 3)
    assert result.sampling == pytest.approx(math.sqrt(sum(within) / 4) / 3)
    center = sum(means) / 3
    assert result.problems == pytest.approx(
        math.sqrt(sum((m - center) ** 2 for m in means) / 2 / 3)
    )


def test_errors_that_cannot_be_known_are_none():
    assert estimate(np.array([[1.0], [0.0]])).sampling is None
    assert estimate(np.array([[1.0, 0.0]])).problems is None
    assert over_problems([1, 0, 0, 0]).sampling is None


def test_sampling_error_covers_with_problems_fixed():
    generator = np.random.default_rng(2)
    rates, trials, hits = beta_rates(generator, 30), 4000, 0
    for _ in range(trials):
        result = estimate(generator.random((30, 16)) < rates[:, None])
        hits += abs(result.mean - rates.mean()) < 1.96 * result.sampling
    assert covers(hits, trials, slack=0.01)


def test_error_over_problems_covers_with_problems_drawn():
    generator = np.random.default_rng(3)
    trials, hits, naive = 4000, 0, 0
    for _ in range(trials):
        correct = generator.random((30, 16)) < beta_rates(generator, 30)[:, None]
        result = estimate(correct)
        hits += abs(result.mean - 0.4) < t_quantile(0.975, 29) * result.problems
        naive += abs(result.mean - 0.4) < 1.96 * math.sqrt(result.mean * (1 - result.mean) / 480)
    assert covers(hits, trials)
    assert naive / trials < 0.7  # what P * K independent samples would promise


def test_macro_average_weighs_benchmarks_equally():
    small, large = estimate(np.eye(4)), estimate(np.ones((1000, 2)))
    both = macro_average([small, large])
    assert both.mean == pytest.approx((0.25 + 1.0) / 2)
    assert both.sampling == pytest.approx(small.sampling / 2)
    assert both.problems == pytest.approx(math.hypot(small.problems, large.problems) / 2)
    assert macro_average([small, over_problems([1, 0])]).sampling is None


def test_pass_at_k_curve_averages_problems():
    curve = pass_at_k_curve([0, 3, 6], 6)
    assert list(curve) == [1, 2, 4, 6] == curve_points(6)
    assert curve[1].mean == pytest.approx((0 + 0.5 + 1) / 3)
    assert curve[2].mean == pytest.approx((0 + pass_at_k(6, 3, 2) + 1) / 3)
    assert curve[6].mean == pytest.approx(2 / 3)
    assert pass_at_k_curve([1], 2, [2])[2].mean == 1.0


def test_pass_at_1_is_the_accuracy_with_its_errors():
    correct = np.random.default_rng(4).random((12, 9)) < 0.4
    first, whole = pass_at_k_curve(correct.sum(axis=1), 9)[1], estimate(correct)
    assert first.mean == pytest.approx(whole.mean)
    assert first.sampling == pytest.approx(whole.sampling)
    assert first.problems == pytest.approx(whole.problems)


def test_pass_at_256_keeps_its_digits():
    curve = pass_at_k_curve([1, 0], 256)
    assert list(curve)[-1] == 256
    for k, value in curve.items():
        assert value.mean == pytest.approx(k / 256 / 2, rel=1e-12)  # one right sample of 256
    assert curve[256].sampling is None


def test_pass_at_k_is_unbiased_and_the_plug_in_is_not():
    generator = np.random.default_rng(5)
    rates, n, k = beta_rates(generator, 20), 16, 8
    truth = (1 - (1 - rates) ** k).mean()
    estimates, plug_in = [], []
    for _ in range(2000):
        correct_P = generator.binomial(n, rates)
        estimates.append(pass_at_k_curve(correct_P, n, [k])[k].mean)
        plug_in.append((1 - (1 - correct_P / n) ** k).mean())
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 4 * error
    assert abs(np.mean(plug_in) - truth) > 8 * error


def test_bayes_at_n_is_the_posterior_of_each_problem():
    found = bayes_at_n([0, 3, 4], 4)
    assert found.mean == pytest.approx((1 / 6 + 4 / 6 + 5 / 6) / 3)
    beta = [(1, 5), (4, 2), (5, 1)]  # variance of Beta(a, b): ab / ((a+b)^2 (a+b+1))
    variance = sum(a * b / (36 * 7) for a, b in beta)
    assert found.sampling == pytest.approx(math.sqrt(variance) / 3)
    assert bayes_at_n([4, 4], 4).sampling > 0 == estimate(np.ones((2, 4))).sampling


def test_the_interval_over_seeds_is_students_and_welchs():
    found = over_seeds([0.5, 0.6, 0.7])
    half = t_quantile(0.975, 2) * 0.1 / math.sqrt(3)
    assert (found.mean, found.problems) == (pytest.approx(0.6), 3)
    assert found.high - found.mean == pytest.approx(half)
    generator, hits = np.random.default_rng(8), 0
    for _ in range(2000):
        ours, theirs = generator.normal(0.1, 0.03, 4), generator.normal(0, 0.01, 3)
        found = over_seeds(ours, theirs)
        hits += found.low < 0.1 < found.high
    assert covers(hits, 2000, slack=0.02)
    assert over_seeds([0.5], [0.4, 0.6]).low is None


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 2), (6, 1, 4), (7, 5, 3)])
def test_sampling_error_of_pass_at_k_is_the_jackknife(n, c, k):
    samples = [1] * c + [0] * (n - c)

    def passes(rest: list[int]) -> float:
        subsets = list(itertools.combinations(rest, k))
        return sum(map(any, subsets)) / len(subsets)

    left_out = [passes(samples[:i] + samples[i + 1 :]) for i in range(n)]
    expected = (n - 1) / n * sum((x - sum(left_out) / n) ** 2 for x in left_out)
    assert pass_at_k_curve([c], n, [k])[k].sampling == pytest.approx(math.sqrt(expected))


def test_bootstrap_interval_covers():
    """Two systems of unequal strength on shared problems: the truth is the mean of the shift."""
    generator = np.random.default_rng(30)
    trials, hits, P, K = 300, 0, 30, 8
    for trial in range(trials):
        base = beta_rates(generator, P)
        better = base + 0.3 * (1 - base) * generator.random(P)  # E = 0.3 * 0.6 * 0.5
        ours = generator.binomial(K, better) / K
        theirs = generator.binomial(K, base) / K
        found = paired_bootstrap({"b": ours}, {"b": theirs}, resamples=1000, seed=trial)
        hits += found.low < 0.09 < found.high
    assert covers(hits, trials)


def test_bootstrap_interval_of_a_macro_average_covers():
    generator = np.random.default_rng(6)
    trials, hits = 300, 0
    sizes = {"aime24": 30, "amc23": 40, "gsm8k": 400}
    for trial in range(trials):
        ours, theirs = {}, {}
        for name, P in sizes.items():
            base = beta_rates(generator, P)
            ours[name] = generator.binomial(4, base + 0.1 * (1 - base)) / 4
            theirs[name] = generator.binomial(4, base) / 4
        found = paired_bootstrap(ours, theirs, resamples=1000, seed=trial)
        hits += found.low < 0.06 < found.high
    assert covers(hits, trials)


def test_bootstrap_of_normal_differences_is_students_interval():
    """For normal data the corrected interval is the t-interval: here, on normal scores."""
    from statistics import NormalDist

    P = 12
    values = np.array([NormalDist(1.0, 2.0).inv_cdf((i + 0.5) / P) for i in range(P)])
    found = paired_bootstrap({"b": values}, {"b": np.zeros(P)}, resamples=40_000)
    half = t_quantile(0.975, P - 1) * values.std(ddof=1) / math.sqrt(P)
    assert found.mean == pytest.approx(1.0)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(P), rel=0.02)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.04)


def test_bootstrap_is_paired_and_seeded():
    generator = np.random.default_rng(7)
    base = generator.random(50)
    shifted = {"b": base + 0.1 + generator.normal(0, 1e-3, 50)}
    found = paired_bootstrap(shifted, {"b": base})
    assert found.excludes_zero and found.problems == 50
    assert found.high - found.low < 2e-3  # the spread of the problems cancels
    assert paired_bootstrap(shifted, {"b": base}) == found
    assert paired_bootstrap(shifted, {"b": base}, seed=1) != found
    unpaired = {"b": generator.permutation(base)}
    wide = paired_bootstrap(shifted, unpaired)
    assert wide.high - wide.low > 0.1


def test_bootstrap_without_spread_or_without_problems():
    same = paired_bootstrap({"b": np.ones(5)}, {"b": np.ones(5)})
    assert (same.mean, same.low, same.high, same.excludes_zero) == (0.0, 0.0, 0.0, False)
    single = paired_bootstrap({"b": np.ones(1)}, {"b": np.zeros(1)})
    assert (single.mean, single.stderr, single.low, single.high) == (1.0, None, None, None)


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [(0.975, 1, 12.7062047), (0.975, 29, 2.0452296), (0.95, 7, 1.8945786), (0.975, 5000, 1.9600)],
)
def test_t_quantile_equals_tables(probability, degrees, value):
    assert t_quantile(probability, degrees) == pytest.approx(value, rel=2e-4)
