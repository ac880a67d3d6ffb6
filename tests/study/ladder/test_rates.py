"""The best learning rate of a sweep."""

import dataclasses
import io

import pytest
from rich.console import Console

from ladder_helpers import run
from query_experts.study.ladder.rates import best_rate, excess, rates_table
from query_experts.study.report.table import print_table

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def sweep(best, arm="gqe", rates=RATES, seeds=(0, 1), budget=1.0, curvature=0.05):
    """Losses on a parabola in log2 of the rate; best: its minimum by seed."""
    from math import log2

    return [
        run(arm, seed=seed, budget=budget, loss=4 + curvature * (log2(rate) - log2(best[seed])) ** 2,
            variant=f"learning_rate={rate:g}")
        for seed in seeds
        for rate in rates
    ]  # fmt: skip


def test_the_vertex_of_the_parabola_is_found():
    (found,) = best_rate(sweep([2.6e-3, 2.6e-3]))
    assert found.optimum == pytest.approx(2.6e-3, rel=1e-3)
    assert found.inside
    assert found.by_seed == pytest.approx({0: 2.6e-3, 1: 2.6e-3}, rel=1e-3)
    assert found.spread == pytest.approx(0, abs=1e-6)


def test_what_another_rate_costs_is_read_from_the_parabola():
    (found,) = best_rate(sweep([2e-3, 2e-3], curvature=0.05))
    assert excess(found, 4e-3) == pytest.approx(0.05)
    assert excess(found, 1e-3) == pytest.approx(0.05)
    assert excess(found, 2e-3) == pytest.approx(0, abs=1e-9)
    (outside,) = best_rate(sweep([2e-4, 2e-4]))
    assert excess(outside, 1e-3) is None


def test_the_spread_of_the_optimum_is_that_of_its_seeds():
    (found,) = best_rate(sweep([1.5e-3, 3e-3]))
    assert found.by_seed == pytest.approx({0: 1.5e-3, 1: 3e-3}, rel=1e-3)
    assert found.spread == pytest.approx(1)
    assert 1.5e-3 < found.optimum < 3e-3


@pytest.mark.parametrize("best", [2e-4, 3e-2])
def test_an_optimum_beyond_the_grid_is_outside(best):
    (found,) = best_rate(sweep([best, best]))
    assert not found.inside
    assert found.optimum is None


def test_runs_that_diverged_are_counted_and_left_out():
    results = [*sweep([2e-3, 2e-3]), run(seed=0, loss=None, variant="learning_rate=0.016")]
    (found,) = best_rate(results)
    assert found.diverged == {1.6e-2: 1}
    assert found.optimum == pytest.approx(2e-3, rel=1e-3)


def test_one_run_has_no_optimum():
    (found,) = best_rate(sweep([2e-3], rates=(2e-3,), seeds=(0,)))
    assert found.optimum is None
    assert found.spread is None


def test_the_largest_budget_counts():
    (found,) = best_rate([*sweep([4e-3], seeds=(0,), budget=0.25), *sweep([2e-3], seeds=(0,))])
    assert found.budget == 1
    assert found.optimum == pytest.approx(2e-3, rel=1e-3)


def test_only_a_sweep_of_the_rate_counts():
    """Every result's settings hold a learning rate, those of other sweeps and of no sweep too."""
    others = [run(loss=1.0), run(loss=1.0, variant="router_aux_loss_coef=0.1")]
    (found,) = best_rate([*sweep([2e-3, 2e-3]), *others])
    assert found.optimum == pytest.approx(2e-3, rel=1e-3)
    assert min(found.losses.values()) > 3
    assert best_rate(others) == []


def test_a_rate_at_which_a_run_diverged_is_never_best():
    results = [
        run("gqe", seed=result.seed, loss=None, variant=result.variant) if (result.seed, result.swept_to) == (1, 2e-3)
        else result for result in sweep([2e-3, 2e-3])
    ]  # fmt: skip
    (found,) = best_rate(results)
    assert found.diverged == {2e-3: 1}
    assert 2e-3 not in found.losses
    assert found.losses.keys() == {5e-4, 1e-3, 4e-3, 8e-3}
    assert set(found.by_seed) == {0, 1}


def test_a_rate_that_only_good_seeds_finished_is_not_best_for_that():
    """Seed 1 is worse by a nat at every rate and lacks one rate: means over unequal seeds would prefer that."""
    results = [
        dataclasses.replace(result, validation_loss=result.validation_loss + result.seed)
        for result in sweep([2e-3, 2e-3])
        if (result.seed, result.swept_to) != (1, 4e-3)
    ]
    (found,) = best_rate(results)
    assert list(found.by_seed) == [0]
    assert found.optimum == pytest.approx(2e-3, rel=1e-3)


def test_without_a_seed_that_finished_at_every_rate_there_is_no_optimum():
    results = [result for result in sweep([2e-3, 2e-3]) if result.swept_to != RATES[2 * result.seed]]
    (found,) = best_rate(results)
    assert found.optimum is None
    assert "0.002" in rates_table([found]).body[0][2]


def test_the_table_says_whether_arms_differ_by_more_than_seeds():
    printed = io.StringIO()
    found = best_rate([*sweep([1.9e-3, 2.1e-3]), *sweep([1e-3, 1.05e-3], arm="dense"), *sweep([1e-5] * 2, "static")])
    print_table(rates_table(found), Console(file=printed, width=80))
    words = " ".join(printed.getvalue().split())
    assert "lie within 0.96 doublings, more than those of one arm's seeds (0.14)" in words
    assert "outside" in words
    assert max(map(len, printed.getvalue().splitlines())) <= 80
    assert [each.arm for each in found] == ["dense", "static", "gqe"]
