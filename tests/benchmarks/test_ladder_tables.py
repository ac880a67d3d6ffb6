"""The tables of docs/results.md, on results that were made up."""

import dataclasses

import pytest

import ladder_tables
from query_experts.common import formatting as text
from query_experts.study.ladder.results import LadderResult


@pytest.fixture
def results(monkeypatch) -> list[LadderResult]:
    """Every run of the ladder's smallest rung; seed s of an arm has its place among the arms and s / 100 as loss."""
    ladder, _ = ladder_tables.ladder_of("cpu")
    first = ladder_tables.ladder_of("rates")[1][0]
    arms = ladder.arms()
    made = [
        dataclasses.replace(
            first, ladder="cpu", rung=run.rung, variant="", arm=run.arm, seed=run.seed, budget=budget,
            validation_loss=arms.index(run.arm) + run.seed / 100,
        )
        for run in ladder.runs() if run.rung == "d64" for budget in ladder.budgets
    ]  # fmt: skip
    found = ladder_tables.ladder_of
    monkeypatch.setattr(ladder_tables, "ladder_of", lambda name: (ladder, made) if name == "cpu" else found(name))
    return made


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def changed(results, **more):
    """Adds to the losses of arms: a number, or a function of the seed."""

    def loss(result):
        added = more.get(result.arm.replace("-", "_"), 0.0)
        return result.validation_loss + (added(result.seed) if callable(added) else added)

    results[:] = [dataclasses.replace(result, validation_loss=loss(result)) for result in results]


def differences(table: str) -> dict[str, list[str]]:
    return {row[1]: row[2:] for row in rows(table)[2:]}


def verdicts() -> dict[tuple[str, str], str]:
    """By arm and baseline, at the one complete rung."""
    head, _, *found = rows(ladder_tables.verdicts())
    assert {row[0] for row in found} == {"d64"}
    return {(row[1].strip("`"), base.split("`")[1]): cell for row in found
            for base, cell in zip(head[2:], row[2:], strict=True)}  # fmt: skip


def test_a_complete_rung_has_its_differences_at_every_budget(results):
    table = ladder_tables.gaps()
    assert rows(table)[0] == ["rung", "difference", "25% of the tokens", "50% of the tokens", "100% of the tokens"]
    found = differences(table)
    assert list(found)[:5] == ["`static` - `dense`", "`half` - `dense`", "`half` - `static`", "`gqe` - `dense`",
                               "`gqe` - `static`"]  # fmt: skip
    assert all(cell.startswith("+4.0000 [+4.0000, +4.0000] 10 pairs") for cell in found["`gqe` - `dense`"])
    assert all(cell.endswith("3 pairs") for cell in found["`gqe` - `frozen`"])
    assert {row[0]: row[3] for row in rows(ladder_tables.done())[2:]}["d64"] == "10 of 10"


def test_a_rung_that_lacks_a_run_at_a_budget_is_not_shown_there(results):
    missing = next(result for result in results if (result.arm, result.seed, result.budget) == ("gqe-m4", 9, 1))
    results.remove(missing)
    assert all(cells[2] == text.MISSING for cells in differences(ladder_tables.gaps()).values())
    assert "9 of 10" in ladder_tables.done()
    assert ladder_tables.largest() == ladder_tables.verdicts() == ladder_tables.NOTHING
    results.clear()
    assert ladder_tables.gaps() == ladder_tables.NOTHING


def test_arms_with_fewer_seeds_are_shown_once_they_are_complete(results):
    assert {"`gqe` - `frozen`", "`gqe-m8` - `static`"} < {*differences(ladder_tables.gaps())}
    results.remove(next(result for result in results if result.arm == "gqe-m8"))
    assert {"`gqe` - `frozen`", "`gqe-m8` - `static`"} & {*differences(ladder_tables.gaps())} == {"`gqe` - `frozen`"}


def test_the_largest_complete_rung_is_shown(results):
    table, says = ladder_tables.largest().split("\n\n")
    head, _, *found = rows(table)
    assert head[4:] == ["validation loss (range)", "against `dense`", "against `static`", "against `half`"]
    assert [row[0] for row in found] == ["`dense`", "`static`", "`half`", "`gqe`", "`gqe-m4`"]
    assert found[3][4] == "4.045 (4.000 to 4.090)"
    assert found[3][6].startswith("+3.0000 [+3.0000, +3.0000] 10 pairs")
    assert says.startswith("Rung d64: 117k parameters, ")
    assert says.endswith(
        "**Against `static`: `gqe` loses, `gqe-m4` loses. Against `half`: `gqe` loses, `gqe-m4` loses. "
        "Against `dense`: `gqe` loses, `gqe-m4` loses, `static` loses, `half` loses.** "
        "*Not known*: the interval holds zero."
    )
    changed(results, gqe=lambda seed: -2.9 + (-1) ** seed)
    says = "`static`: `gqe` not known, `gqe-m4` loses. Against `half`: `gqe` wins, `gqe-m4` loses. Against `dense`: "
    assert says in ladder_tables.largest()


def test_a_rung_of_another_ladder_in_the_same_folder_changes_nothing(results):
    before = [ladder_tables.gaps(), ladder_tables.largest(), ladder_tables.verdicts(), ladder_tables.done()]
    results.append(dataclasses.replace(results[0], rung="d256", parameters=4_000_000))
    assert before == [ladder_tables.gaps(), ladder_tables.largest(), ladder_tables.verdicts(), ladder_tables.done()]


def test_what_is_known_is_said_for_every_complete_rung(results):
    minus = "\N{MINUS SIGN}"
    assert verdicts()["gqe", "static"] == "loses, +3.0000 [+3.0000, +3.0000]"
    assert (verdicts()["static", "dense"], verdicts()["static", "half"]) == (
        "loses, +1.0000 [+1.0000, +1.0000]",
        text.MISSING,
    )
    changed(results, gqe=-9.0)
    assert verdicts()["gqe", "static"] == f"wins, {minus}6.0000 [{minus}6.0000, {minus}6.0000]"
    assert verdicts()["gqe-m4", "half"] == "loses, +4.0000 [+4.0000, +4.0000]"
    changed(results, gqe=lambda seed: 6.0 + (-1) ** seed)
    assert verdicts()["gqe", "static"] == f"not known, 0.0000 [{minus}0.7541, +0.7541]"


def test_runs_that_diverged_are_counted_and_too_few_pairs_say_nothing(results):
    results[:] = [
        dataclasses.replace(result, validation_loss=None, diverged_at_tokens=1)
        if result.arm == "gqe" and result.seed > 1 else result
        for result in results
    ]  # fmt: skip
    assert "10 of 10, 8 diverged" in ladder_tables.done()
    assert verdicts()["gqe", "static"] == "too few pairs"
    assert "8 diverged" in ladder_tables.largest()
    assert "**Against `static`: `gqe` too few pairs, `gqe-m4` loses." in ladder_tables.largest()


def test_the_warm_up_of_the_ladder_stands_beside_the_one_that_it_began_with(results):
    head, _, *found = rows(ladder_tables.warmup())
    assert head == ["rung", "arm", "short warm-up", "the ladder's", "the ladder's minus short"]
    assert {row[0] for row in found} == {"d64, 29 or 116 steps"}  # of d96 the made results have none
    assert [row[1] for row in found] == ["`dense`", "`static`", "`half`", "`gqe`", "`gqe-m4`"]
    assert found[0][4].endswith("7 pairs")
    assert found[0][2:4] == ["4.595 (4.487 to 4.625), 7 seeds", "0.045 (0.000 to 0.090), 10 seeds"]


def test_differences_of_arms_stand_under_either_warm_up_with_their_change(results):
    head, _, *found = rows(ladder_tables.warmup_gaps())
    assert head[2:] == ["short warm-up", "the ladder's", "the ladder's minus short"]
    static = next(row for row in found if row[1] == "`gqe` - `static`")
    assert static[0] == "d64"
    assert static[2].endswith("7 pairs")
    assert static[3] == "+3.0000 [+3.0000, +3.0000] 10 pairs"
    short = float(static[2].split()[0].replace("\N{MINUS SIGN}", "-"))
    change, *_, pairs, _ = static[4].split()
    assert (float(change), pairs) == (pytest.approx(3.0 - short, abs=1e-4), "7")


@pytest.mark.parametrize(("seeds", "arms"), [(2, []), (3, ["`static`", "`gqe`", "`gqe-m4`"])])
def test_a_short_warm_up_is_shown_from_three_seeds_on_for_the_arms_that_have_them(results, monkeypatch, seeds, arms):
    whole = [result for result in results if result.budget == 1]
    short = [dataclasses.replace(result, ladder="warmup-d96") for result in whole
             if (result.arm in ("static", "gqe", "gqe-m4")) and result.seed < seeds]  # fmt: skip
    short += [result for result in whole if (result.arm, result.seed) == ("dense", 0)]
    found = ladder_tables.ladder_of
    ladder = found("cpu")[0]
    monkeypatch.setattr(
        ladder_tables, "ladder_of", lambda name: (ladder, short) if name.startswith("warmup") else found(name)
    )
    monkeypatch.setattr(ladder_tables, "SHORT_WARMUP", ("warmup-d96",))
    assert [row[1] for row in rows(ladder_tables.warmup())[2:]] == arms
    pairs = [row[1] for row in rows(ladder_tables.warmup_gaps())[2:]]
    assert pairs == (["`gqe` - `static`", "`gqe-m4` - `static`"] if arms else [])


def test_the_plot_shows_complete_rungs_alone(results, tmp_path):
    ladder_tables.draw(tmp_path)
    plot = (tmp_path / "ladder.svg").read_text()
    assert "difference from static" in plot
    assert {arm for arm in ("gqe", "gqe-m4", "gqe-m8") if f">{arm}<" in plot} == {"gqe", "gqe-m4"}
    assert (tmp_path / "ladder.png").stat().st_size > 1000
    results += [dataclasses.replace(result, rung="d96") for result in results if result.seed != 9]
    ladder_tables.draw(tmp_path)
    assert (tmp_path / "ladder.svg").read_text() == plot
    results[:] = [result for result in results if result.seed != 9]
    ladder_tables.draw(tmp_path / "none")
    assert not (tmp_path / "none").exists()
