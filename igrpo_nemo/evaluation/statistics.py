"""Means of k samples a problem with their errors, and differences of two systems.

    values_P_K ----estimate---------> mean, sampling error, error over problems
    correct_P, n --pass_at_k_curve--> the same for every k
    ours, theirs --paired_bootstrap-> mean difference with its interval over problems

Samples of one problem are not independent, so P * K values hold much less than P * K independent
ones. Two errors answer two questions (arXiv 2411.00640, sections 2 and 3): with the problems fixed,
how much would other samples move the mean (`sampling`); and how much would other problems of this
kind (`problems`, which includes the former). Dimensions: P problems, K samples a problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from igrpo_nemo.metrics import pass_at_k

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Draws of a bootstrap: the ends of a 95 % interval then move by about 1 % of its width."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its two standard errors; None where the data cannot tell.

    `sampling`: the problems fixed, the samples drawn anew. `problems`: problems and samples anew.
    """

    mean: float
    sampling: float | None
    problems: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of two systems on the same problems, and its interval over problems.

    `stderr` (the bootstrap's), `low` and `high` are None for a single problem. `problems` counts
    the pairs, over all benchmarks.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    problems: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(values_P_K: np.ndarray) -> Estimate:
    """Mean of the problems' means: accuracy, rate of missing answers, tokens; P, K >= 1.

    problems^2 = s^2(m_P) / P for the problems' means m_P, the cluster-robust variance with the
    factor P / (P - 1); None for P = 1. sampling^2 = sum_p s_p^2 / K / P^2 for the variances s_p^2
    within problems; None for K = 1. Both use sample variances (ddof = 1).
    """
    values_P_K = np.asarray(values_P_K, dtype=float)
    P, K = values_P_K.shape
    means_P = values_P_K.mean(axis=1)
    sampling = None
    if K > 1:
        sampling = math.sqrt(float(values_P_K.var(axis=1, ddof=1).sum()) / K) / P
    return Estimate(float(means_P.mean()), sampling, _stderr(means_P))


def over_problems(scores_P: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of one score a problem, such as the majority vote's, without a sampling error."""
    return estimate(np.asarray(scores_P, dtype=float)[:, None])


def _stderr(means_P: np.ndarray) -> float | None:
    """s(m_P) / sqrt(P), which contains the choice of problems and the noise of sampling."""
    P = len(means_P)
    return float(np.std(means_P, ddof=1)) / math.sqrt(P) if P > 1 else None


def macro_average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean over benchmarks; the benchmarks are fixed and independent of each other.

    Each error is sqrt(sum of squares) / number of benchmarks, None if one of them is.
    """
    B = len(estimates)
    return Estimate(
        math.fsum(each.mean for each in estimates) / B,
        _joined([each.sampling for each in estimates], B),
        _joined([each.problems for each in estimates], B),
    )


def _joined(errors: Sequence[float | None], divisor: float) -> float | None:
    """Error of a sum of independent parts over a divisor; None where one of them is."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / divisor if len(known) == len(errors) else None


def pass_at_k_curve(
    correct_P: Sequence[int] | np.ndarray, n: int, ks: Sequence[int] | None = None
) -> dict[int, Estimate]:
    """Mean unbiased pass@k over problems with n samples each (arXiv 2107.03374, Eq. 1).

    `correct_P` counts the right samples of each problem; ks defaults to `curve_points(n)`.
    `sampling` is the jackknife over the samples of each problem,
    var_p = (n - 1) / n * c (n - c) / n * (pass(n-1, c, k) - pass(n-1, c-1, k))^2:
    `estimate`'s at k = 1, on the high side beyond, None at k = n.
    """
    counts_P = [int(c) for c in correct_P]

    def variance(c: int, k: int) -> float:
        if c in (0, n):
            return 0.0
        step = pass_at_k(n - 1, c, k) - pass_at_k(n - 1, c - 1, k)
        return (n - 1) / n * c * (n - c) / n * step * step

    curve = {}
    for k in curve_points(n) if ks is None else ks:
        value = {c: pass_at_k(n, c, k) for c in set(counts_P)}
        scores_P = np.array([value[c] for c in counts_P])
        sampling = None
        if k < n:
            of_count = {c: variance(c, k) for c in value}
            sampling = math.sqrt(math.fsum(of_count[c] for c in counts_P)) / len(counts_P)
        curve[k] = Estimate(float(scores_P.mean()), sampling, _stderr(scores_P))
    return curve


def bayes_at_n(correct_P: Sequence[int] | np.ndarray, n: int) -> Estimate:
    """Bayes@N (arXiv 2510.04265, for right and wrong, a uniform prior): the posterior mean of the
    success rate, (c + 1) / (n + 2) a problem.

    `sampling` is its posterior deviation, which all right or all wrong samples do not make 0:
    sqrt(sum_p (c + 1) (n - c + 1) / ((n + 2)^2 (n + 3))) / P.
    """
    right_P = np.asarray(correct_P, dtype=float) + 1
    variance_P = right_P * (n + 2 - right_P) / ((n + 2) ** 2 * (n + 3))
    rates_P = right_P / (n + 2)
    sampling = math.sqrt(float(variance_P.sum())) / len(rates_P)
    return Estimate(float(rates_P.mean()), sampling, _stderr(rates_P))


def over_seeds(
    ours_S: Sequence[float],
    theirs_S: Sequence[float] | None = None,
    *,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Mean over S training seeds, less that of others, with Student's interval (Welch's degrees of
    freedom); `problems` counts our seeds. One seed gives no interval."""
    parts = [np.asarray(part, dtype=float) for part in (ours_S, theirs_S) if part is not None]
    mean = float(parts[0].mean()) - (float(parts[1].mean()) if theirs_S is not None else 0.0)
    if any(len(part) < 2 for part in parts):
        return Difference(mean, None, None, None, len(ours_S))
    stderr = math.sqrt(sum(float(part.var(ddof=1)) / len(part) for part in parts))
    half = t_quantile(0.5 + confidence / 2, max(_welch_degrees(parts), 1)) * stderr
    return Difference(mean, stderr, mean - half, mean + half, len(ours_S))


def curve_points(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself: the ks of a pass@k curve."""
    return sorted({2**power for power in range(n.bit_length())} | {n})


def paired_bootstrap(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """ours - theirs, averaged over benchmarks, with a 95 % interval from resampled problems.

    `ours` and `theirs`: benchmark -> means_P, row p being the same problem in both. Every resample
    draws P problems with replacement within each benchmark, a pair at a time; samples are not drawn
    again, their noise is in the means_P already.

    The interval is the percentile one, expanded for few problems (Hesterberg, arXiv 1411.5279:
    without it an interval from 30 problems is about 6 % too short): deviations are
    scaled by sqrt(P / (P - 1)), and the tail is Student's t's with Welch's degrees of freedom.
    """
    pairs = {name: np.subtract(ours[name], theirs[name], dtype=float) for name in sorted(ours)}
    means = {name: float(values.mean()) for name, values in pairs.items()}
    mean, problems = math.fsum(means.values()) / len(pairs), sum(map(len, pairs.values()))
    if any(len(values) < 2 for values in pairs.values()):
        return Difference(mean, None, None, None, problems)
    generator = np.random.default_rng(seed)
    deviations = np.zeros(resamples)
    for name, values in pairs.items():
        P = len(values)
        # Means of few samples take few values: the counts of each are multinomial, which draws the
        # same distribution as P indices at a fraction of the cost.
        distinct, counts = np.unique(values, return_counts=True)
        drawn = generator.multinomial(P, counts / P, size=resamples) @ distinct / P
        deviations += (drawn - means[name]) * math.sqrt(P / (P - 1)) / len(pairs)
    degrees = _welch_degrees(list(pairs.values()))
    tail = NormalDist().cdf(-t_quantile(0.5 + CONFIDENCE / 2, degrees))
    low, high = (mean + float(end) for end in np.quantile(deviations, [tail, 1 - tail]))
    return Difference(mean, float(deviations.std()), low, high, problems)


def _welch_degrees(parts: Sequence[np.ndarray]) -> int:
    """Welch's degrees of freedom of a sum of means: whole ones, so that rounding widens intervals;
    as many as make Student's t normal where nothing varies."""
    shares = [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in parts]
    total = math.fsum(variance for variance, _ in shares)
    if total == 0:
        return 1_000_000
    return int(total**2 / math.fsum(variance**2 / df for variance, df in shares) + 1e-6)


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, for probabilities in [0.5, 1).

    With t = sqrt(v) tan(u) the density becomes cos(u)^(v-1) on a finite interval: its integral
    (Simpson) is solved for u by bisection. Accurate to about 1e-8 up to 1,000 degrees; beyond, the
    normal quantile, which is 0.1 % smaller there, takes its place.
    """
    if degrees > 1000:
        return NormalDist().inv_cdf(probability)

    def mass(upper: float) -> float:
        pieces = 400
        width = upper / pieces
        terms = [math.cos(i * width) ** (degrees - 1) for i in range(pieces + 1)]
        return (terms[0] + terms[-1] + 4 * sum(terms[1:-1:2]) + 2 * sum(terms[2:-1:2])) * width / 3

    target = (2 * probability - 1) * mass(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < target else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
