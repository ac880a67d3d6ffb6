"""Laws, lines, predictions and extrapolations from ladders whose law is known, and from some that have none."""

import dataclasses

import pytest

from ladder_helpers import ALPHA, BETA, SEEDS, A, B, E, ladder, law, run
from query_experts.study.ladder.fit import fit_ladder
from query_experts.study.ladder.gaps import cells_of
from query_experts.study.ladder.law import Law, NoLaw, fit_law
from query_experts.study.ladder.line import fit_line

DRAWS = 40
THREE = {"d64": 5, "d96": 5, "d128": 4}
FLAT = {"dense": 0.0, "static": 0.0, "gqe": 0.0}


def fitted(results, count="all", draws=DRAWS):
    found = fit_law(cells_of(results), count, draws)
    assert isinstance(found, Law), found
    return found


def holds(estimate, value):
    return estimate.low <= value <= estimate.high


def test_without_noise_the_law_is_found_again():
    found = fitted(ladder(FLAT, noise=0.0), draws=5)
    assert pytest.approx(E, abs=1e-3) == found.best.E
    assert found.best.alpha["gqe"] == pytest.approx(ALPHA, abs=1e-3)
    assert found.best.beta["gqe"] == pytest.approx(BETA, abs=1e-3)
    assert found.best.A["gqe"] == pytest.approx(A, rel=0.01)
    assert found.best.B["gqe"] == pytest.approx(B, rel=0.01)
    assert found.error < 1e-5


def test_a_law_of_one_arm_is_found_again():
    found = fitted(ladder({"gqe": 0.0}, noise=0.0), draws=5)
    assert pytest.approx(E, abs=1e-3) == found.best.E


def test_most_intervals_hold_the_true_law():
    """Nine of ten in the mean over more ladders; here at least half of each kind, and four fifths of all."""
    better = lambda size, tokens: law(size, tokens, a=54, b=104)  # noqa: E731
    gap = better(1e9, 2e10) - law(1e9, 2e10)
    truths = {
        "E": (lambda c: c.E, E), "alpha": (lambda c: c.alpha["dense"], ALPHA), "beta": (lambda c: c.beta["gqe"], BETA),
        "loss at 1B": (lambda c: c.loss("dense", 1e9, 2e10), law(1e9, 2e10)),
        "gap at 1B": (lambda c: c.gap("gqe", "dense", 1e9, 2e10), gap),
    }  # fmt: skip
    held = dict.fromkeys(truths, 0)
    for random in range(6):
        results = [*ladder({"dense": 0.0}, random=random), *ladder({"gqe": 0.0}, loss=better, random=50 + random)]
        found = fitted(results)
        for name, (value, truth) in truths.items():
            held[name] += holds(found.estimate(value), truth)
    assert min(held.values()) >= 3, held
    assert sum(held.values()) >= 24, held


def test_the_same_results_give_the_same_fit():
    results = ladder(FLAT)
    first, second = fitted(results, draws=5), fitted(results[::-1], draws=5)
    assert first.best == second.best
    assert first.drawn == second.drawn


def test_exponents_are_shared_unless_the_data_tell_them_apart():
    steeper = lambda size, tokens: law(size, tokens, a=9000, alpha=0.75)  # noqa: E731
    better = lambda size, tokens: law(size, tokens, a=54, b=104)  # noqa: E731
    dense = ladder({"dense": 0.0}, noise=0.005)
    alike = [*dense, *ladder({"gqe": 0.0}, noise=0.005, loss=better, random=1)]
    apart = [*dense, *ladder({"gqe": 0.0}, noise=0.005, loss=steeper, random=1)]
    assert fitted(alike).shared
    found = fitted(apart)
    assert not found.shared
    assert found.best.alpha["gqe"] > found.best.alpha["dense"] + 0.1


def test_size_may_be_counted_without_embeddings():
    size = lambda result: result.parameters - result.embedding_parameters  # noqa: E731
    results = [
        dataclasses.replace(result, validation_loss=law(size(result), result.train_tokens))
        for result in ladder(FLAT, noise=0.0)
    ]
    assert fitted(results, "without embeddings", 5).best.alpha["gqe"] == pytest.approx(ALPHA, abs=1e-3)
    assert fitted(results, "all", 5).error > 1e-5


@pytest.mark.parametrize("random", range(3))
def test_where_the_loss_is_constant_there_is_no_law(random):
    found = fit_law(cells_of(ladder(FLAT, loss=lambda size, tokens: 3.0, random=random)), "all", DRAWS)
    assert isinstance(found, NoLaw)
    assert "doesn't fall" in found.why


def test_where_the_loss_goes_up_and_down_there_is_no_law():
    by_budget = {5: 3.0, 10: 3.6, 20: 2.7}  # lower in the end, but no power of anything
    zigzag = lambda size, tokens: by_budget[tokens // size]  # noqa: E731
    found = fit_law(cells_of(ladder(FLAT, noise=0.002, loss=zigzag)), "all", DRAWS)
    assert isinstance(found, NoLaw)
    assert "too little to be one" in found.why


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (ladder(FLAT, rungs={"d64": 3, "d96": 3}), "needs three rungs"),
        (ladder(FLAT, rungs={**THREE, "d128": 2}), "needs three rungs"),
        (ladder(FLAT, budgets=(1.0,)), "needs two budgets"),
        ([], "needs three rungs"),
        ([run()], "needs three rungs"),
    ],
    ids=["two rungs", "too few seeds", "one budget", "nothing", "one run"],
)
def test_too_little_for_a_law_is_said(results, why):
    found = fit_ladder(results, draws=DRAWS)
    assert isinstance(found.law, NoLaw)
    assert why in found.law.why


def test_an_arm_of_two_rungs_stays_out_of_the_law():
    small = dict.fromkeys(("d64", "d96"), 3)
    found = fitted([*ladder(FLAT, rungs=THREE), *ladder({"hard": 0.0}, rungs=small)], draws=5)
    assert found.arms == ["dense", "static", "gqe"]


def line(gap, **more):
    return fit_line(cells_of(ladder({"dense": 0.0, "gqe": gap}, **more)), "gqe", "dense")


def test_a_gap_that_falls_with_compute_has_a_falling_line():
    found = line(lambda logs: -0.02 - 0.02 * (logs - 14), noise=0.01)
    assert found.trend.known == "lower"
    assert holds(found.trend, -0.02)
    assert holds(found.at(1e14), -0.02)
    assert holds(found.at(1e16), -0.06)


def test_a_constant_gap_has_a_line_whose_trend_is_not_known():
    """19 of 20 intervals hold no trend; the limit allows for chance."""
    found = [line(-0.02, noise=0.01, random=random) for random in range(20)]
    assert sum(each.trend.known == "not known" for each in found) >= 16
    assert sum(holds(each.at(1e14), -0.02) for each in found) >= 16


def test_a_line_needs_two_rungs_with_three_pairs():
    assert line(-0.02, rungs={"d64": 3, "d96": 2}) is None
    assert line(-0.02, rungs={"d64": 3, "d96": 3}) is not None


def test_a_point_weighs_as_much_as_its_pairs():
    """The line lies nearer to the rung with more pairs."""
    losses = {"d64": 0.0, "d96": -0.1, "d128": 0.0}
    results = [
        dataclasses.replace(result, validation_loss=4.0 + (losses[result.rung] if result.arm == "gqe" else 0.0))
        for result in ladder({"dense": 0.0, "gqe": 0.0}, rungs={"d64": 3, "d96": 30, "d128": 3}, budgets=(1.0,))
    ]
    found = fit_line(cells_of(results), "gqe", "dense")
    at = {point.rung: point.flops for point in found.points}
    assert found.at(at["d96"]).value == pytest.approx(-0.1, abs=0.02)


def test_the_largest_rung_is_predicted_from_the_others():
    fit = fit_ladder(ladder({"dense": 0.0, "gqe": -0.02}, noise=0.01), draws=DRAWS)
    kinds = {(each.arm, each.base, each.by) for each in fit.predictions}
    assert kinds == {("dense", None, "law"), ("gqe", None, "law"), ("gqe", "dense", "line")}
    assert {each.rung for each in fit.predictions} == {"d192"}
    assert all(each.held for each in fit.predictions)


def test_a_break_at_the_largest_rung_is_seen():
    results = [
        dataclasses.replace(result, validation_loss=result.validation_loss + 0.3)
        if result.rung == "d192" and result.arm == "gqe"
        else result
        for result in ladder({"dense": 0.0, "gqe": 0.0}, noise=0.005)
    ]
    fit = fit_ladder(results, draws=DRAWS)
    held = {(each.arm, each.base): each.held for each in fit.predictions}
    assert held == {("dense", None): True, ("gqe", None): False, ("gqe", "dense"): False}


def test_with_three_rungs_only_lines_are_checked():
    fit = fit_ladder(ladder({"dense": 0.0, "gqe": -0.02}, rungs=THREE), draws=DRAWS)
    assert {each.by for each in fit.predictions} == {"line"}


def test_extrapolations_of_nothing_are_not_known():
    """19 of 20 intervals hold zero; the limit allows for chance, as those of one ladder aren't independent."""
    fits = [fit_ladder(ladder(FLAT, random=random), draws=DRAWS) for random in range(3)]
    found = [each for fit in fits for each in fit.extrapolations]
    assert {each.parameters for each in found} == {250_000_000, 1_000_000_000, 7_000_000_000}
    assert {(each.arm, each.by) for each in found} == {("gqe", "line"), ("gqe", "law")}
    assert all(each.gap.low is not None for each in found)
    assert sum(each.gap.known == "not known" for each in found) >= 0.8 * len(found)


def test_a_large_gap_that_grows_is_known_far_away_by_its_line():
    fit = fit_ladder(ladder({"dense": 0.0, "gqe": lambda logs: -0.05 * (logs - 12)}, noise=0.01), draws=DRAWS)
    assert {each.gap.known for each in fit.extrapolations if each.by == "line"} == {"lower"}


def test_runs_that_diverged_change_no_fit():
    results = ladder(FLAT, rungs=THREE)
    more = [run("gqe", rung, seed=90, budget=budget, loss=None) for rung in THREE for budget in (0.25, 1.0)]
    with_them, without = fit_ladder([*results, *more], draws=5), fit_ladder(results, draws=5)
    assert with_them.diverged == 6
    assert with_them.law.best == without.law.best
    assert with_them.lines[0].trend == without.lines[0].trend


def test_an_arm_with_fewer_seeds_is_fitted_beside_the_others():
    some = {rung: min(3, seeds) for rung, seeds in SEEDS.items()}
    found = fitted([*ladder({"dense": 0.0}), *ladder({"gqe": -0.02}, rungs=some)], draws=10)
    assert found.arms == ["dense", "gqe"]
