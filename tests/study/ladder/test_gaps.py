"""Gaps between arms: what makes a pair, what is left out, and what is called known."""

import dataclasses

import pytest

from ladder_helpers import HERE, ladder, run
from query_experts.study.ladder.fit import fit_ladder
from query_experts.study.ladder.gaps import cells_of, compared, rungs_by_size, what_is_known
from query_experts.study.ladder.limits import limits
from query_experts.study.results import Piece


def pairs(gap=-0.02, seeds=4, **fields):
    """Runs of dense and gqe; `fields` are those of gqe's."""
    dense = [run("dense", seed=seed, loss=4.0 + 0.1 * seed) for seed in range(seeds)]
    gqe = [run("gqe", seed=seed, loss=4.0 + 0.1 * seed + gap + 0.001 * seed, **fields) for seed in range(seeds)]
    return [*dense, *gqe]


def gap_of(results):
    (cell,) = cells_of(results)
    return cell.gap("gqe", "dense")


def test_runs_are_paired_by_seed():
    gap = gap_of(pairs())
    assert gap.difference.mean == pytest.approx(-0.02 + 0.0015)
    assert gap.difference.high < 0
    assert gap.known == "lower"
    assert gap.pairs == 4


def test_a_seed_without_its_partner_makes_no_pair():
    gap = gap_of(pairs()[1:])
    assert sorted(gap.difference.differences) == [1, 2, 3]


def test_runs_of_different_tags_make_no_pair():
    results = pairs()
    results[-1] = dataclasses.replace(results[-1], tag="ladder-2")
    gap = gap_of(results)
    assert gap.other_tag == [3]
    assert sorted(gap.difference.differences) == [0, 1, 2]


def test_runs_of_different_tokens_make_no_pair():
    results = pairs()
    results[-1] = dataclasses.replace(results[-1], data_hash="sha256:def")
    gap = gap_of(results)
    assert gap.other_tokens == [3]
    assert gap.other_tag == []
    assert sorted(gap.difference.differences) == [0, 1, 2]
    assert "1 pair left out, as the tokens of the two runs have different hashes." in limits(fit_ladder(results))


@pytest.mark.parametrize("versions", [["2.12.0"], ["2.13.0", "2.12.0"]])
def test_a_pair_of_different_versions_of_torch_is_kept_and_marked(versions):
    results = pairs()
    pieces = [Piece(first_step=10 * i, **HERE | {"torch": version}) for i, version in enumerate(versions)]
    results[5] = dataclasses.replace(results[5], pieces=pieces)
    gap = gap_of(results)
    assert gap.marked == [1]
    assert gap.pairs == 4


def test_a_rung_wholly_on_another_tag_has_pairs():
    results = [dataclasses.replace(result, tag="ladder-2") for result in pairs()]
    assert gap_of(results).pairs == 4


@pytest.mark.parametrize(("one", "other"), [("AVX512_BF16", "AVX2"), ("mixed", "mixed")])
def test_a_pair_of_different_instructions_is_kept_and_marked(one, other):
    results = pairs()
    results[0] = dataclasses.replace(results[0], instructions=one)
    results[4] = dataclasses.replace(results[4], instructions=other)
    gap = gap_of(results)
    assert gap.marked == [0]
    assert gap.pairs == 4


def test_runs_that_diverged_are_counted_and_left_out():
    results = pairs()
    results[5] = run("gqe", seed=1, loss=None)
    (cell,) = cells_of(results)
    assert cell.arms["gqe"].diverged == [1]
    assert sorted(cell.arms["gqe"].losses) == [0, 2, 3]
    assert sorted(cell.gap("gqe", "dense").difference.differences) == [0, 2, 3]


def test_an_arm_whose_runs_all_diverged_has_no_mean_and_no_gap():
    (cell,) = cells_of([run("dense"), run("gqe", loss=None)])
    assert cell.arms["gqe"].mean is None
    assert cell.gap("gqe", "dense").difference is None
    assert cell.gap("gqe", "dense").known == "not known"


def test_without_three_pairs_nothing_is_known():
    assert gap_of(pairs(seeds=2)).known == "not known"
    assert gap_of(pairs(seeds=3)).known == "lower"


@pytest.mark.parametrize(
    ("low", "high", "known"),
    [(-0.3, -0.1, "lower"), (0.1, 0.3, "higher"), (-0.1, 0.3, "not known"), (None, None, "not known"),
     (-0.3, -1e-6, "not known"), (0.0, 0.0, "not known")],
)  # fmt: skip
def test_an_interval_that_holds_both_signs_is_not_known(low, high, known):
    assert what_is_known(low, high) == known


def test_every_two_arms_are_compared_once():
    assert compared(["dense", "static", "half", "gqe"]) == [
        ("static", "dense"), ("half", "dense"), ("half", "static"), ("gqe", "dense"), ("gqe", "static"),
        ("gqe", "half"),
    ]  # fmt: skip


def test_rungs_and_budgets_come_smallest_first():
    results = [run(rung=rung, budget=budget) for rung in ("d192", "d64", "d128") for budget in (1.0, 0.25)]
    assert rungs_by_size(results) == ["d64", "d128", "d192"]
    assert [(cell.rung, cell.budget) for cell in cells_of(results)][:3] == [("d64", 0.25), ("d64", 1.0), ("d128", 0.25)]


def test_a_gap_of_known_size_lies_in_about_nineteen_of_twenty_intervals():
    gaps = [
        gap
        for random in range(10)
        for cell in cells_of(ladder({"dense": 0.0, "gqe": -0.02}, budgets=(1.0,), random=random))
        if (gap := cell.gap("gqe", "dense"))
    ]
    held = sum(gap.difference.low <= -0.02 <= gap.difference.high for gap in gaps)
    assert len(gaps) == 40
    assert held >= 34


def test_learned_routing_is_compared_with_a_random_router_and_the_other_arms_are_not():
    assert ("gqe", "frozen") in compared(["dense", "frozen", "gqe", "gqe-m4"])
    assert {arm for arm, base in compared(["dense", "frozen", "gqe", "gqe-m4"]) if base == "frozen"} == {"gqe"}
    (cell,) = cells_of([run(arm, seed=seed, loss=4.0 + 0.1 * seed + (arm == "frozen") * 0.03)
                        for arm in ("dense", "frozen", "gqe") for seed in range(3)])  # fmt: skip
    assert cell.gap("gqe", "frozen").difference.mean == pytest.approx(-0.03)
    assert cell.gap("gqe", "frozen").known == "lower"


def runs_of(losses, rung="d64"):
    """Three seeds of each arm around its loss."""
    return [run(arm, rung, seed, loss=loss + width * (seed - 1))
            for arm, (loss, width) in losses.items() for seed in range(3)]  # fmt: skip


def test_a_weak_dense_arm_is_named_where_fewer_heads_without_routing_beat_it():
    even = {"dense": (4.0, 0.001), "static": (4.0005, 0.0013), "half": (3.9995, 0.0008), "gqe": (3.9, 0.001)}
    assert "dense's says nothing" not in " ".join(limits(fit_ladder(runs_of(even))))
    lines = limits(fit_ladder([*runs_of(even | {"half": (3.9, 0.001)}), *runs_of(even, "d96")]))
    (weak,) = [line for line in lines if "says nothing about routing" in line]
    assert weak.startswith("At d64, 100% of its tokens, half without routing has a lower loss than dense:")
    lines = limits(fit_ladder(runs_of(even | {"half": (3.9, 0.001), "static": (3.8, 0.001)})))
    assert any("static and half without routing have a lower loss than dense" in line for line in lines)


def test_an_arm_whose_seeds_lie_far_apart_is_named():
    even = {"dense": (4.0, 0.01), "static": (4.0, 0.011), "half": (4.0, 0.012), "gqe": (4.0, 0.03)}
    assert "range over" not in " ".join(limits(fit_ladder(runs_of(even))))
    (wide,) = [line for line in limits(fit_ladder(runs_of(even | {"dense": (4.0, 0.09)}))) if "range over" in line]
    assert wide.startswith("The losses of dense at d64, 100% of its tokens, range over 0.180 nats")


def test_without_a_tag_a_pair_of_different_commits_is_marked_and_with_one_it_is_not():
    def of(tag, *commits):
        pieces = [[Piece(first_step=0, **HERE | {"commit": commit})] for commit in commits]
        return [run(arm, seed=seed, loss=4.0, tag=tag, pieces=own)
                for arm, own in zip(("dense", "gqe"), pieces, strict=True) for seed in range(3)]  # fmt: skip

    assert gap_of(of(None, "abc", "def")).marked == [0, 1, 2]
    assert gap_of(of(None, "abc", "abc")).marked == []
    assert gap_of(of(None, "abc+", "abc+")).marked == [0, 1, 2]
    assert gap_of(of("one", "abc", "def")).marked == []
