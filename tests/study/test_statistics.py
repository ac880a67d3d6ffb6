"""Owns the checks of the paired difference: pairing by seed, and the interval by hand."""

import math

import pytest

from query_experts.study.statistics import paired_difference


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
    result = paired_difference(dict.fromkeys(range(seeds), 1.0), dict.fromkeys(range(seeds), 3.0))
    assert (result.mean, result.low, result.high) == (-2.0, None, None)
    assert not result.excludes_zero


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
def test_a_seed_that_diverged_is_left_out_of_the_pairs(bad):
    assert paired_difference({0: 1.0, 1: bad}, {0: 2.0, 1: 2.0}).differences == {0: -1.0}


def test_arms_without_a_common_seed_have_no_difference():
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("near", [4e-5, -4e-5, 0.0])
def test_a_difference_that_rounds_to_zero_has_no_sign(near):
    assert not paired_difference({0: near}, {0: 0.0}).same_sign
    assert not paired_difference({0: 1.0, 1: near}, {0: 0.0, 1: 0.0}).same_sign
    assert not paired_difference(dict.fromkeys(range(3), near), dict.fromkeys(range(3), 0.0)).excludes_zero
    assert paired_difference({0: 6e-5, 1: 1.0}, {0: 0.0, 1: 0.0}).same_sign


def test_seeds_that_disagree_have_no_common_sign():
    assert not paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0}).same_sign
