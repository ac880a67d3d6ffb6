"""Owns the checks of the paired difference: pairing by seed, the interval by hand, and the t table by integration."""

import math

import pytest

from query_experts.study.statistics import paired_difference, t_quantile_975


def _t_distribution(x: float, degrees_of_freedom: int, steps: int = 4000) -> float:
    """P(T < x) for x > 0: a half plus Simpson's rule over the density."""
    n = degrees_of_freedom
    scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
    width = x / steps
    weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
    density = ((1 + (i * width) ** 2 / n) ** (-(n + 1) / 2) for i in range(steps + 1))
    return 0.5 + scale * width / 3 * math.fsum(w * d for w, d in zip(weights, density, strict=True))


@pytest.mark.parametrize(
    ("degrees_of_freedom", "tolerance"), [*((n, 2e-7) for n in range(1, 31)), *((n, 5e-6) for n in (31, 40, 120, 1000))]
)
def test_the_t_quantile_leaves_two_and_a_half_percent_above_it(degrees_of_freedom, tolerance):
    below = _t_distribution(t_quantile_975(degrees_of_freedom), degrees_of_freedom)
    assert below == pytest.approx(0.975, abs=tolerance)


def test_the_t_quantile_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile_975(0)


def test_three_seeds_give_the_interval_that_one_computes_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, so 2 +- 4.302653 / sqrt(3).
    result = paired_difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert result.differences == {0: 1.0, 1: 2.0, 2: 3.0}
    assert result.mean == pytest.approx(2.0)
    assert result.low == pytest.approx(2 - 2.484138, abs=1e-5)
    assert result.high == pytest.approx(2 + 2.484138, abs=1e-5)
    assert result.same_sign
    assert not result.excludes_zero


def test_seeds_are_paired_by_number_and_not_by_position():
    result = paired_difference({2: 5.0, 0: 1.0}, {0: 0.5, 1: 9.0, 2: 3.0})
    assert result.differences == {0: 0.5, 2: 2.0}


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_seeds_there_is_a_mean_and_no_interval(seeds):
    result = paired_difference([1.0] * seeds, [3.0] * seeds)
    assert (result.mean, result.low, result.high) == (-2.0, None, None)
    assert not result.excludes_zero


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
def test_a_seed_that_diverged_is_left_out_of_the_pairs(bad):
    assert paired_difference({0: 1.0, 1: bad}, {0: 2.0, 1: 2.0}).differences == {0: -1.0}


def test_arms_without_a_common_seed_have_no_difference():
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_seeds_that_disagree_have_no_common_sign():
    assert not paired_difference([1.0, 2.0], [2.0, 1.0]).same_sign
