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


def verdicts() -> dict[str, str]:
    head, _, row = rows(ladder_tables.verdicts())
    return dict(zip(head, row, strict=True))


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
        "**`gqe` loses to `dense`, `static` and `half`; `gqe-m4` loses to `dense`, `static` and `half`.** "
        "Wins or loses: the interval excludes zero, as one in twenty does by chance."
    )
    changed(results, gqe=lambda seed: -2.9 + (-1) ** seed)
    assert "**`gqe` loses to `dense`, not known against `static`, wins against `half`;" in ladder_tables.largest()


def test_a_rung_of_another_ladder_in_the_same_folder_changes_nothing(results):
    before = [ladder_tables.gaps(), ladder_tables.largest(), ladder_tables.verdicts(), ladder_tables.done()]
    results.append(dataclasses.replace(results[0], rung="d256", parameters=4_000_000))
    assert before == [ladder_tables.gaps(), ladder_tables.largest(), ladder_tables.verdicts(), ladder_tables.done()]


def test_what_is_known_of_routing_is_said_for_every_complete_rung(results):
    assert verdicts()["rung"] == "d64"
    assert verdicts()["`gqe` against `static`"] == "loses by 3.0000 [3.0000, 3.0000]"
    changed(results, gqe=-9.0)
    assert verdicts()["`gqe` against `static`"] == "wins by 6.0000 [6.0000, 6.0000]"
    assert verdicts()["`gqe-m4` against `half`"] == "loses by 4.0000 [4.0000, 4.0000]"
    changed(results, gqe=lambda seed: 6.0 + (-1) ** seed)
    minus = "\N{MINUS SIGN}"
    assert verdicts()["`gqe` against `static`"] == f"not known, 0.0000 [{minus}0.7541, +0.7541]"


def test_runs_that_diverged_are_counted_and_too_few_pairs_say_nothing(results):
    results[:] = [
        dataclasses.replace(result, validation_loss=None, diverged_at_tokens=1)
        if result.arm == "gqe" and result.seed > 1 else result
        for result in results
    ]  # fmt: skip
    assert "10 of 10, 8 diverged" in ladder_tables.done()
    assert verdicts()["`gqe` against `static`"] == "too few pairs"
    assert "8 diverged" in ladder_tables.largest()


def test_the_warm_up_of_the_ladder_stands_beside_the_one_that_it_began_with(results):
    head, _, *found = rows(ladder_tables.warmup())
    assert head == ["rung", "arm", "short warm-up", "the ladder's", "the ladder's minus short"]
    assert {row[0] for row in found} == {"d64, 29 or 116 steps"}  # of d96 the made results have none
    assert [row[1] for row in found] == ["`dense`", "`static`", "`half`", "`gqe`", "`gqe-m4`"]
    assert found[0][4].endswith("7 pairs")
    assert found[0][2:4] == ["4.595 (4.487 to 4.625), 7 seeds", "0.045 (0.000 to 0.090), 10 seeds"]


def test_differences_of_arms_stand_under_either_warm_up(results):
    _, _, *found = rows(ladder_tables.warmup_gaps())
    static = next(row for row in found if row[1] == "`gqe` - `static`")
    assert static[0] == "d64"
    assert static[2].endswith("7 pairs")
    assert static[3] == "+3.0000 [+3.0000, +3.0000] 10 pairs"


def test_the_plot_shows_complete_rungs_alone(results, tmp_path):
    ladder_tables.draw(tmp_path)
    plot = (tmp_path / "ladder.svg").read_text()
    assert "difference from static" in plot
    assert {arm for arm in ("gqe", "gqe-m4", "gqe-m8") if f">{arm}<" in plot} == {"gqe", "gqe-m4"}
    assert (tmp_path / "ladder.png").stat().st_size > 1000
    results[:] = [result for result in results if result.seed != 9]
    ladder_tables.draw(tmp_path / "none")
    assert not (tmp_path / "none").exists()
