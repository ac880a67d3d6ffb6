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


def test_a_complete_rung_has_its_differences_at_every_budget(results):
    head, _, *found = rows(ladder_tables.gaps())
    assert head[2:5] == ["`gqe` - `static`", "`gqe` - `dense`", "`gqe` - `half`"]
    assert [row[0] for row in found] == ["d64"] * 3
    assert all(row[3].startswith("+4.0000 [+4.0000, +4.0000] 10 pairs") for row in found)
    assert not any(text.MISSING in cell for row in found for cell in row)
    assert {row[0]: row[3] for row in rows(ladder_tables.done())[2:]}["d64"] == "10 of 10"


def test_a_rung_that_lacks_a_run_at_a_budget_is_not_shown_there(results):
    missing = next(result for result in results if (result.arm, result.seed, result.budget) == ("gqe-m4", 9, 1))
    results.remove(missing)
    assert len(rows(ladder_tables.gaps())) == 2 + 2
    assert "9 of 10" in ladder_tables.done()
    results.clear()
    assert ladder_tables.gaps() == "No rung is complete yet, so nothing is known."


def test_other_arms_need_not_be_complete(results):
    results.remove(next(result for result in results if result.arm == "gqe-m8"))
    assert len(rows(ladder_tables.gaps())) == 2 + 3


def test_the_largest_complete_rung_is_shown_with_what_it_says(results):
    table, says = ladder_tables.largest().split("\n\n")
    head, _, *found = rows(table)
    assert head[4:] == ["validation loss (range)", "against `dense`", "against `static`", "against `half`"]
    assert [row[0] for row in found] == ["`dense`", "`static`", "`half`", "`gqe`", "`gqe-m4`"]
    assert found[3][4] == "4.045 (4.000 to 4.090)"
    assert found[3][6].startswith("+3.0000 [+3.0000, +3.0000] 10 pairs")
    assert "Rung d64: 117k parameters without embeddings" in says
    assert "At this size routing loses" in says
    assert "weak baseline" not in says
    lower = {"gqe": -9.0, "half": -9.0}
    results[:] = [
        dataclasses.replace(result, validation_loss=result.validation_loss + lower.get(result.arm, 0.0))
        for result in results
    ]
    says = ladder_tables.largest().split("\n\n")[1]
    assert "At this size routing wins" in says
    assert "`dense` is a weak baseline here" in says
    results.remove(next(result for result in results if (result.arm, result.seed, result.budget) == ("half", 3, 1)))
    assert ladder_tables.largest() == ladder_tables.NOTHING


def test_an_interval_that_holds_zero_tells_no_effect(results):
    wide = {("gqe", seed): (-1) ** seed - 3 for seed in range(10)}
    results[:] = [
        dataclasses.replace(result, validation_loss=result.validation_loss + wide.get((result.arm, result.seed), 0.0))
        for result in results
    ]
    assert "At this size no effect of routing is known" in ladder_tables.largest()
