"""Sweeps of a setting other than the learning rate."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from ladder_helpers import run
from query_experts.study.ladder import read
from query_experts.study.ladder.settings import read_ladder
from query_experts.study.ladder.sweeps import sweep_tables, swept_values
from queue_helpers import RUNG, scaling, write_ladder

PLAN = {"rungs": ["d64"], "arms": ["gqe"], "seeds": 3, "vary": {"router_aux_loss_coef": [0.001, 0.01, 0.1]}}
VALUES = {0.001: 0.03, 0.1: -0.02}  # difference from the rung's own value


def balance(value, seed, loss, **fields):
    return run("gqe", seed=seed, loss=loss, variant=f"router_aux_loss_coef={value:g}", **fields)


def sweep(seeds=3):
    own = [run("gqe", seed=seed, loss=4.0 + 0.1 * seed) for seed in range(seeds)]
    swept = [
        balance(value, seed, 4.0 + 0.1 * seed + more + 0.001 * seed)
        for value, more in VALUES.items()
        for seed in range(seeds)
    ]
    return [*own, *swept]


def test_a_value_is_compared_with_the_rungs_own_seed_by_seed():
    low, high = swept_values(sweep())
    assert (low.setting, low.value, high.value) == ("router_aux_loss_coef", 0.001, 0.1)
    assert low.mean == pytest.approx(4.131)
    assert low.gap.difference.mean == pytest.approx(0.031)
    assert (low.gap.known, high.gap.known) == ("higher", "lower")
    assert high.gap.pairs == 3


def test_without_runs_of_the_rungs_own_value_there_is_a_mean_and_no_difference():
    low, _ = swept_values([result for result in sweep() if result.variant])
    assert low.mean == pytest.approx(4.131)
    assert low.gap.difference is None


def test_where_the_rungs_own_value_is_one_of_the_swept_ones_its_runs_are_the_base(tmp_path):
    ladder = read_ladder(write_ladder(tmp_path, rungs={"d64": RUNG}, plan=[PLAN]))
    swept = [*sweep(), *(balance(0.01, seed, 4.0 + 0.1 * seed) for seed in range(3))]
    swept = [result for result in swept if result.variant]
    low, own, high = swept_values(swept, ladder)
    assert [each.gap.difference.mean for each in (low, own, high)] == pytest.approx([0.031, 0.0, -0.019])
    elsewhere = [dataclasses.replace(result, rung="d96") for result in swept]
    assert {each.gap.difference for each in swept_values(elsewhere, ladder)} == {None}


def test_runs_that_diverged_and_those_of_other_code_are_counted_and_left_out():
    results = [*sweep(), balance(0.1, 3, None), run("gqe", seed=3)]
    results[3] = dataclasses.replace(results[3], tag="ladder-0")
    low, high = swept_values(results)
    assert high.diverged == [3]
    assert sorted(high.losses) == [0, 1, 2]
    assert low.gap.other_tag == [0]
    (table,) = sweep_tables([low, high])
    assert table.body[0][3:] == ["4.1310\n3", "+0.0315\n2 pairs\n1 other tag"]
    assert table.body[1][3].endswith("3 (1x)")
    assert "Other tag: " in table.note


def test_the_learning_rate_is_left_to_its_own_table():
    assert swept_values([run(variant="learning_rate=0.1"), run()]) == []


@pytest.mark.parametrize("own", [True, False], ids=["with the rung's own runs", "sweeps alone"])
def test_terminal_and_page_show_every_sweep(tmp_path, own):
    results = [result for result in sweep() if own or result.variant]
    results += [run("gqe", seed=0, loss=4 + abs(rate - 2), variant=f"learning_rate={rate}") for rate in (1, 2, 3)]
    file = write_ladder(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "all.json").write_text(json.dumps([*map(dataclasses.asdict, results)]))
    for action, show in (("fit", read.print_laws), ("report", read.report)):
        printed = io.StringIO()
        show(scaling(file, action), Console(file=printed, width=80))
        assert "Learning rates" in printed.getvalue()
        assert "Sweep of router_aux_loss_coef" in printed.getvalue()
        assert ("Cost and routing" in printed.getvalue()) == own
        assert max(map(len, printed.getvalue().splitlines()[:-1])) <= 80
    page = next(tmp_path.rglob("ladder.html")).read_text(encoding="utf-8")
    assert "Learning rates</h3>" in page
    assert "Sweep of router_aux_loss_coef</h3>" in page
    assert ("Its results are those of sweeps." in page) != own
