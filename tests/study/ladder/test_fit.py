"""Laws, lines, predictions and extrapolations from ladders whose law is known, and from some that have none."""

import dataclasses
import math
import statistics

import pytest

from ladder_helpers import ALPHA, BETA, EMBEDDINGS, SEEDS, SIZES, A, B, E, ladder, law, run
from query_experts.study.ladder.fit import fit_ladder
from query_experts.study.ladder.gaps import cells_of
from query_experts.study.ladder.law import Law, NoLaw, fit_law
from query_experts.study.ladder.line import fit_line

THREE = {"d64": 5, "d96": 5, "d128": 4}
FOUR = THREE | {"d192": 3}
FIVE = SEEDS | {"d256": 3}
FLAT = {"dense": 0.0, "static": 0.0, "gqe": 0.0}


def fitted(results):
    found = fit_law(cells_of(results))
    assert isinstance(found, Law), found
    return found


def holds(estimate, value):
    return estimate.low <= value <= estimate.high


def test_without_noise_the_law_is_found_again():
    found = fitted(ladder(FLAT, noise=0.0))
    assert pytest.approx(E, abs=1e-3) == found.best.E
    assert found.best.alpha["gqe"] == pytest.approx(ALPHA, abs=1e-3)
    assert found.best.beta["gqe"] == pytest.approx(BETA, abs=1e-3)
    assert found.best.A["gqe"] == pytest.approx(A, rel=0.01)
    assert found.best.B["gqe"] == pytest.approx(B, rel=0.01)
    assert found.error < 1e-5


def test_a_law_of_one_arm_is_found_again():
    found = fitted(ladder({"gqe": 0.0}, noise=0.0))
    assert pytest.approx(E, abs=1e-3) == found.best.E


@pytest.mark.full
@pytest.mark.parametrize(("rungs", "scatter"), [(SEEDS, 0.0), (SEEDS, 0.02), (FIVE, 0.02)])
def test_most_intervals_hold_the_true_law_where_rungs_scatter_too(rungs, scatter):
    """19 of 20 in the mean over more ladders; here at least two thirds of each kind, and nine of ten of all."""
    better = lambda size, tokens: law(size, tokens, a=54, b=104)  # noqa: E731
    gap = better(1e9, 2e10) - law(1e9, 2e10)
    truths = {
        "E": (lambda c: c.E, E), "alpha": (lambda c: c.alpha["dense"], ALPHA), "beta": (lambda c: c.beta["gqe"], BETA),
        "loss at 1B": (lambda c: c.loss("dense", 1e9, 2e10), law(1e9, 2e10)),
        "gap at 1B": (lambda c: c.gap("gqe", "dense", 1e9, 2e10), gap),
    }  # fmt: skip
    held = dict.fromkeys(truths, 0)
    more = {"rungs": rungs, "scatter": scatter, "noise": 0.01}
    for random in range(6):
        dense = ladder({"dense": 0.0}, random=random, **more)
        found = fitted([*dense, *ladder({"gqe": 0.0}, loss=better, random=50 + random, **more)])
        for name, (value, truth) in truths.items():
            held[name] += holds(found.estimate(value), truth)
    assert min(held.values()) >= 4, held
    assert sum(held.values()) >= 27, held


@pytest.mark.parametrize("random", [1, 2])
def test_three_rungs_of_a_known_law_give_intervals_that_hold_it(random):
    better = lambda size, tokens: law(size, tokens, a=54, b=104)  # noqa: E731
    more = {"rungs": THREE, "noise": 0.01}
    gqe = ladder({"gqe": 0.0}, loss=better, random=50 + random, **more)
    found = fitted([*ladder({"dense": 0.0}, random=random, **more), *gqe])
    assert found.seeds_alone
    assert found.shared
    assert holds(found.estimate(lambda c: c.E), E)
    assert holds(found.estimate(lambda c: c.alpha["gqe"]), ALPHA)
    assert holds(found.estimate(lambda c: c.beta["gqe"]), BETA)
    gap = found.estimate(lambda c: c.gap("gqe", "dense", 2e6, 4e7))
    assert holds(gap, better(2e6, 4e7) - law(2e6, 4e7))
    assert gap.known == "lower"
    assert gap.half_width < 0.05


def test_intervals_of_three_rungs_grow_with_the_spread_of_seeds():
    widths = [
        fitted(ladder({"gqe": 0.0}, rungs=THREE, noise=noise)).estimate(lambda c: c.beta["gqe"]).half_width
        for noise in (0.0, 0.002, 0.02)
    ]
    assert widths[0] < 1e-4 < 3 * widths[1] < widths[2]


def test_the_scatter_of_rungs_widens_intervals_of_four_rungs_and_not_of_three():
    """So three rungs are said to leave it out."""
    loss = lambda found: found.of_rung("gqe", 5e6, 1e8).half_width  # noqa: E731
    three, scattered = (loss(fitted(ladder({"gqe": 0.0}, 0.001, THREE, scatter=s))) for s in (0.0, 0.01))
    four, scattered_four = (loss(fitted(ladder({"gqe": 0.0}, 0.001, FOUR, scatter=s))) for s in (0.0, 0.01))
    assert scattered < 3 * three
    assert scattered_four > 3 * four


def test_from_three_rungs_the_law_is_not_extrapolated():
    fit = fit_ladder(ladder({"dense": 0.0, "gqe": -0.02}, rungs=THREE))
    assert isinstance(fit.law, Law)
    assert {each.by for each in fit.extrapolations} == {"line"}


@pytest.mark.parametrize("random", range(3))
def test_from_three_rungs_of_one_loss_there_is_no_law(random):
    found = fit_law(cells_of(ladder(FLAT, rungs=THREE, loss=lambda size, tokens: 3.0, random=random)))
    assert isinstance(found, NoLaw)


def test_a_rung_whose_means_lack_different_seeds_is_drawn():
    results = [
        result for result in ladder({"dense": 0.0, "gqe": 0.0}, rungs=dict.fromkeys(THREE, 5), noise=0.005)
        if (result.arm, result.seed) not in {("gqe", 0), ("gqe", 1), ("dense", 4)}
    ]  # fmt: skip
    found = fitted(results)
    assert found.seed_freedom == 2
    assert all(math.isfinite(each.E) for each in found.others)
    assert holds(found.estimate(lambda c: c.beta["gqe"]), BETA)


def test_the_same_results_give_the_same_fit():
    results = ladder(FLAT)
    first, second = fitted(results), fitted(results[::-1])
    assert first.best == second.best
    assert first.others == second.others


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


def test_arms_are_compared_at_the_shape_of_a_rung_whatever_they_add_to_its_parameters():
    """Law, pairs and lines answer one question: what an arm gains at dense's shape."""
    results = [
        dataclasses.replace(result, parameters=round(1.3 * result.parameters)) if result.arm == "gqe" else result
        for result in ladder({"dense": 0.0, "gqe": 0.0}, noise=0.0)
    ]
    fit = fit_ladder(results)
    assert fit.law.best.gap("gqe", "dense", 1e6, 2e7) == pytest.approx(0, abs=1e-4)
    assert fit.lines[0].level == pytest.approx(0, abs=1e-9)
    assert {own.size for cell in fit.cells for own in cell.arms.values()} == {SIZES[rung] for rung in SEEDS}


def test_a_rung_without_dense_counts_the_arms_own_parameters():
    cells = cells_of([run("gqe", parameters=500_000), run("dense", "d96"), run("gqe", "d96", parameters=2_000_000)])
    assert [cell.arms["gqe"].size for cell in cells] == [500_000 - EMBEDDINGS, SIZES["d96"]]


def test_lines_and_extrapolations_share_one_rule_for_compute():
    fit = fit_ladder(ladder({"dense": 0.0, "gqe": lambda logs: -0.02 * logs}, noise=0.0))
    (line,) = fit.lines
    for point in line.points:
        assert point.compute == 6 * SIZES[point.rung] * point.tokens
    far = next(each for each in fit.extrapolations if each.by == "line")
    assert far.gap.value == pytest.approx(line.at(6 * 250e6 * 20 * 250e6).value)


@pytest.mark.parametrize("random", range(3))
def test_where_the_loss_is_constant_there_is_no_law(random):
    found = fit_law(cells_of(ladder(FLAT, loss=lambda size, tokens: 3.0, random=random)))
    assert isinstance(found, NoLaw)
    assert "doesn't fall" in found.why or "too little to be one" in found.why


def test_where_the_loss_goes_up_and_down_there_is_no_law():
    by_budget = {5: 1.0, 10: 2.2, 20: 1.0}  # falls with size, but no power of tokens
    zigzag = lambda size, tokens: law(size, tokens) * by_budget[tokens // size]  # noqa: E731
    found = fit_law(cells_of(ladder(FLAT, noise=0.002, loss=zigzag)))
    assert isinstance(found, NoLaw)
    assert "too little to be one" in found.why


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (ladder(FLAT, rungs={"d64": 5, "d96": 5}), "need three rungs where an arm has three seeds; there are 2."),
        (ladder(FLAT, rungs={**THREE, "d128": 2}), "need three rungs where an arm has three seeds; there are 2."),
        (ladder(FLAT, budgets=(1.0,)), "needs two budgets"),
        ([], "need three rungs"),
        ([run()], "need three rungs"),
    ],
    ids=["two rungs", "too few seeds", "one budget", "nothing", "one run"],
)
def test_too_little_for_a_law_is_said(results, why):
    found = fit_ladder(results)
    assert isinstance(found.law, NoLaw)
    assert why in found.law.why


def test_an_arm_of_three_rungs_stays_out_of_the_law():
    small = dict.fromkeys(THREE, 3)
    found = fitted([*ladder(FLAT, rungs=FOUR), *ladder({"hard": 0.0}, rungs=small)])
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


def test_a_line_needs_three_rungs_with_three_pairs_at_all_tokens():
    assert line(-0.02, rungs={"d64": 3, "d96": 3, "d128": 2}) is None
    assert line(-0.02, rungs=THREE, budgets=(0.25, 0.5)) is None
    assert line(-0.02, rungs=THREE) is not None


def test_rungs_of_one_size_have_no_line():
    assert line(-0.02, rungs={"d64-a": 3, "d64-b": 3, "d64-c": 3}) is None


def test_parts_of_the_tokens_change_no_line():
    """What more tokens do at a fixed size isn't what a larger model does."""
    results = [
        dataclasses.replace(result, validation_loss=result.validation_loss + 0.5 * (result.arm == "gqe"))
        if result.budget < 1
        else result
        for result in ladder({"dense": 0.0, "gqe": -0.02})
    ]
    whole = [result for result in results if result.budget == 1]
    with_parts, alone = (fit_line(cells_of(own), "gqe", "dense") for own in (results, whole))
    assert with_parts.trend == alone.trend
    assert len(with_parts.points) == 4


@pytest.mark.parametrize("rungs", [THREE, SEEDS, FIVE], ids=["3 rungs", "4 rungs", "5 rungs"])
@pytest.mark.parametrize("scatter", [0.0, 0.02])
def test_intervals_of_a_line_hold_the_truth_where_rungs_scatter_more_than_seeds(rungs, scatter):
    """19 of 20 in the mean; intervals over seeds alone hold it in a third of such ladders."""
    found = [
        line(-0.02, rungs=rungs, budgets=(1.0,), noise=0.01, scatter=scatter, random=random) for random in range(20)
    ]
    assert sum(holds(each.trend, 0.0) for each in found) >= 16
    assert sum(holds(each.at(each.centre), -0.02) for each in found) >= 16
    assert sum(holds(each.of_rung(1e19), -0.02) for each in found) >= 16


def test_the_scatter_of_rungs_is_found():
    found = [
        line(-0.02, rungs=FIVE, budgets=(1.0,), noise=0.001, scatter=0.02, random=random).scatter
        for random in range(20)
    ]
    assert 0.5 < statistics.fmean(found) / (2 * 0.02**2) < 2  # two arms scatter
    assert line(-0.02, noise=0.0).scatter < 1e-12


@pytest.mark.parametrize(("spread", "nearer"), [(0.3, True), (0.0, False)], ids=["as seeds explain", "beyond seeds"])
def test_a_point_weighs_as_much_as_its_pairs_where_seeds_explain_its_distance(spread, nearer):
    """The line lies nearer to the rung with more pairs, but not where rungs differ by more than seeds explain."""
    losses = {"d64": 0.0, "d96": -0.1, "d128": 0.0}
    results = [
        dataclasses.replace(
            result,
            validation_loss=4.0
            + (losses[result.rung] + spread * (result.seed % 3 - 1) if result.arm == "gqe" else 0.0),
        )
        for result in ladder({"dense": 0.0, "gqe": 0.0}, rungs={"d64": 3, "d96": 30, "d128": 3}, budgets=(1.0,))
    ]
    found = fit_line(cells_of(results), "gqe", "dense")
    at = {point.rung: point.compute for point in found.points}
    assert (found.at(at["d96"]).value == pytest.approx(-0.1, abs=0.02)) == nearer


def test_the_largest_rung_is_predicted_from_the_others():
    fit = fit_ladder(ladder({"dense": 0.0, "gqe": -0.02}, noise=0.01, rungs=FIVE))
    kinds = {(each.arm, each.base, each.by) for each in fit.predictions}
    assert kinds == {("dense", None, "law"), ("gqe", None, "law"), ("gqe", "dense", "line")}
    assert {each.rung for each in fit.predictions} == {"d256"}
    assert not any(each.seeds_alone for each in fit.predictions)
    assert all(each.held for each in fit.predictions)


def test_a_break_at_the_largest_rung_is_seen():
    results = [
        dataclasses.replace(result, validation_loss=result.validation_loss + 0.3)
        if result.rung == "d256" and result.arm == "gqe"
        else result
        for result in ladder({"dense": 0.0, "gqe": 0.0}, noise=0.005, rungs=FIVE)
    ]
    fit = fit_ladder(results)
    held = {(each.arm, each.base): each.held for each in fit.predictions}
    assert held == {("dense", None): True, ("gqe", None): False, ("gqe", "dense"): False}


def test_with_four_rungs_the_law_predicts_the_largest_from_seeds_alone_and_with_three_nothing_does():
    four, three = (fit_ladder(ladder({"dense": 0.0, "gqe": -0.02}, rungs=rungs, noise=0.01)) for rungs in (FOUR, THREE))
    assert {(each.by, each.seeds_alone) for each in four.predictions} == {("law", True), ("line", False)}
    assert all(each.held for each in four.predictions)
    assert three.predictions == []


def test_a_line_predicts_no_largest_rung_that_has_only_a_part_of_its_tokens():
    results = ladder({"dense": 0.0, "gqe": -0.02}, rungs=THREE)
    started = ladder({"dense": 0.0, "gqe": -0.02}, rungs={"d192": 3}, budgets=(0.25,))
    found = fit_ladder([*results, *started]).predictions
    assert {each.by for each in found} == {"law"}  # which knows what fewer tokens do


def test_extrapolations_of_nothing_are_not_known():
    """19 of 20 intervals hold zero; the limit allows for chance, as those of one ladder aren't independent."""
    found = fit_ladder(ladder(FLAT, random=0)).extrapolations
    assert {each.parameters for each in found} == {250_000_000, 1_000_000_000, 7_000_000_000}
    assert {(each.arm, each.by) for each in found} == {("gqe", "line"), ("gqe", "law")}
    assert all(each.gap.low is not None for each in found)
    assert sum(each.gap.known == "not known" for each in found) >= 0.8 * len(found)


def test_a_large_gap_that_grows_is_known_far_away_by_its_line():
    fit = fit_ladder(ladder({"dense": 0.0, "gqe": lambda logs: -0.05 * (logs - 12)}, noise=0.01))
    assert {each.gap.known for each in fit.extrapolations if each.by == "line"} == {"lower"}


def test_runs_that_diverged_change_no_fit():
    results = ladder(FLAT, rungs=FOUR)
    more = [run("gqe", rung, seed=90, budget=budget, loss=None) for rung in FOUR for budget in (0.25, 1.0)]
    with_them, without = fit_ladder([*results, *more]), fit_ladder(results)
    assert with_them.diverged == 8
    assert with_them.law.best == without.law.best
    assert with_them.lines[0].trend == without.lines[0].trend


def test_an_arm_with_fewer_seeds_is_fitted_beside_the_others():
    some = {rung: min(3, seeds) for rung, seeds in SEEDS.items()}
    found = fitted([*ladder({"dense": 0.0}), *ladder({"gqe": -0.02}, rungs=some)])
    assert found.arms == ["dense", "gqe"]
