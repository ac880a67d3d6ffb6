"""What terminal and page of a ladder show: complete on whatever there is, and no more certain than the numbers."""

import dataclasses
import io
import re

import matplotlib.axes
import pytest
from rich.console import Console

from ladder_helpers import SEEDS, ladder, run
from query_experts.common.formatting import join_words
from query_experts.common.plots import ARM_COLOURS
from query_experts.model.arms import ARMS
from query_experts.study.ladder import charts
from query_experts.study.ladder.fit import fit_ladder
from query_experts.study.ladder.limits import limits
from query_experts.study.ladder.page import page_of, write_page
from query_experts.study.ladder.tables import cost_table, findings_table, further_tables, gap_table, tables
from query_experts.study.ladder.terminal import print_fit
from query_experts.study.results import PartLoss

ARMS_SHOWN = {"dense": 0.0, "static": 0.01, "half": -0.01, "gqe": -0.06, "gqe-m4": 0.0}
FEW = {
    "nothing": [],
    "one run": [run()],
    "one run of dense": [run("dense", budget=0.25)],
    "one seed": ladder(ARMS_SHOWN, rungs={"d64": 1}),
    "one rung": ladder(ARMS_SHOWN, rungs={"d64": 3}),
    "no baseline": ladder({"gqe": 0.0, "hard": 0.0}, rungs={"d64": 3, "d96": 3, "d128": 3}),
    "an arm missing on a rung": [*ladder({"dense": 0.0, "gqe": 0.0}, rungs={"d64": 3}), run("gqe", "d96")],
    "only a quarter": ladder(ARMS_SHOWN, rungs=dict.fromkeys(SEEDS, 3), budgets=(0.25,)),
    "all diverged": [run(arm, loss=None, seed=seed) for arm in ("dense", "gqe") for seed in range(3)],
}
QUICK = ("nothing", "one run", "one rung")


def whole():
    """Results of four rungs: one run diverged, one on other instructions, one on another tag."""
    results = ladder(ARMS_SHOWN, noise=0.01)
    change = {
        ("d64", "half", 4): {"diverged_at_tokens": 9, "validation_loss": None, "bits_per_byte": None},
        ("d96", "gqe", 1): {"instructions": "AVX2"},
        ("d96", "gqe-m4", 2): {"tag": "ladder-0"},
    }
    return [dataclasses.replace(result, **change.get((result.rung, result.arm, result.seed), {})) for result in results]


@pytest.fixture(scope="module")
def results():
    return whole()


@pytest.fixture(scope="module")
def fit(results):
    return fit_ladder(results)


@pytest.fixture(scope="module")
def page(results, fit, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "ladder.html"
    write_page(results, fit, path, ["d192: 2 runs of <gqe-m8>."])
    return path.read_text(encoding="utf-8")


def printed(fit):
    out = io.StringIO()
    print_fit(fit, Console(file=out, width=80))
    return out.getvalue()


def test_the_page_stands_alone(page):
    assert not re.search(r"<(script|img|iframe|link|source)\b[^>]*\b(src|href)\s*=", page)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", page)
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) == {"https://arxiv.org/abs/2606.20945"}
    assert len(page) < 2_000_000


def test_ids_in_the_page_are_unique_and_every_reference_is_met(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'href="#([^"]+)"', page), *re.findall(r"url\(#([^)]+)\)", page)} <= set(ids)
    assert set(re.findall(r'aria-(?:labelledby|describedby)="([^" ]+)"', page)) <= set(ids)


def test_charts_have_a_title_for_those_who_do_not_see_them(page):
    found = re.findall(r"<svg[^>]*>(.{20})", page)
    assert len(found) == 5  # laws, gaps by compute and tokens, costs, routing
    assert all(start.startswith("<title") for start in found)


def test_charts_follow_the_scheme_of_the_page(page):
    assert "var(--arm-gqe, #0067b0)" in page
    assert "@media screen and (prefers-color-scheme: dark)" in page
    texts = re.findall(r"<text[^>]*>", page)
    assert len(texts) > 50
    assert not [text for text in texts if "fill: var(--" not in text]


def test_tables_and_charts_scroll_by_keyboard(page):
    scrolling = re.findall(r'<div class="scroll" tabindex="0" role="region" aria-label[^>]*>\s*<(table|svg)', page)
    assert scrolling.count("table") == page.count("<table")
    assert scrolling.count("svg") == page.count("<svg")


def test_the_page_lists_what_is_missing_and_escapes_it(page):
    assert "d192: 2 runs of &lt;gqe-m8&gt;." in page


@pytest.mark.full
def test_the_same_results_give_the_same_bytes(results, fit, page, tmp_path):
    write_page(results, fit, tmp_path / "again.html", ["d192: 2 runs of <gqe-m8>."])
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in FEW])
def test_terminal_and_page_work_on_whatever_there_is(name, tmp_path):
    few = fit_ladder(FEW[name])
    write_page(FEW[name], few, tmp_path / "ladder.html")
    page = (tmp_path / "ladder.html").read_text(encoding="utf-8")
    assert "What it says" in page
    assert max(map(len, printed(few).splitlines())) <= 80


def test_without_results_both_say_so(tmp_path):
    empty = fit_ladder([])
    write_page([], empty, tmp_path / "ladder.html")
    assert "Nothing has run yet." in (tmp_path / "ladder.html").read_text(encoding="utf-8")
    assert "No run has finished, so there is nothing to fit." in printed(empty)


def test_the_terminal_shows_every_table_in_80_columns(fit):
    out = printed(fit)
    assert max(map(len, out.splitlines())) <= 80
    for table in [findings_table(fit), cost_table(fit), *tables(fit), *map(gap_table, fit.cells)]:
        assert table.title in out
        for cell in (line for row in table.body for cells in row for line in cells.split("\n")):
            assert cell in out


def test_a_gap_is_lower_only_if_its_interval_is(fit):
    rows = {row[0]: row for row in findings_table(fit).body}
    assert list(rows) == ["gqe", "gqe-m4"]
    assert rows["gqe"][1] == "d192\n100%"
    assert rows["gqe"][2].startswith("lower\n")
    assert rows["gqe-m4"][2].startswith("not known\n")


def test_an_arm_of_the_smallest_rungs_is_judged_where_it_has_three_pairs():
    results = [*ladder({"dense": 0.0, "gqe": 0.0}, rungs={"d64": 3}), run("gqe", "d96"), run("dense", "d96")]
    assert findings_table(fit_ladder(results)).body[0][1] == "d64\n100%"


def test_extrapolations_say_not_known_beside_an_interval_of_both_signs(fit):
    (table,) = [table for table in tables(fit) if table.title == "Far beyond the ladder"]
    assert table.head == ["arm", "from", "250M", "1B", "7B"]
    cells = [cell.split("\n") for row in table.body for cell in row[2:]]
    assert {word for word, _ in cells} >= {"not known"}
    for word, interval in cells:
        signs = {number[0] for number in interval.strip("[]").split(", ")}  # 0 for what rounds to zero
        assert word == {"\N{MINUS SIGN}": "lower", "+": "higher"}.get("".join(signs), "not known"), interval


def test_what_limits_the_fit_is_counted(fit):
    lines = " ".join(limits(fit))
    assert "3 results of runs that diverged, left out of means and fits: half at d64, seed 4." in lines
    assert "9 of " in lines  # gqe on other instructions, against three baselines at three budgets; dense has none
    assert "9 pairs left out, as the code of the two runs has different tags." in lines
    assert "about 250M parameters, 48 times as many" in lines


def test_marked_and_unpaired_seeds_stand_in_their_cell(fit):
    cell = next(cell for cell in fit.cells if (cell.rung, cell.budget) == ("d96", 1.0))
    table = gap_table(cell)
    rows = {row[0]: row for row in table.body}
    assert "10 pairs\n1 marked" in rows["gqe"][2]
    assert "9 pairs\n1 other tag" in rows["gqe-m4"][2]
    assert "Marked: " in table.note
    assert "Other tag: " in table.note


def test_a_missing_law_is_explained_in_terminal_and_page():
    few = fit_ladder(FEW["only a quarter"])
    assert "No law: A law needs two budgets" in printed(few)
    assert page_of([], few).no_law.startswith("A law needs two budgets")


def test_the_law_table_says_what_is_shared_and_how_much_is_missed(fit):
    (table,) = [table for table in tables(fit) if table.title == "Scaling law"]
    assert "Exponents: shared by all arms." in table.note
    assert "Student's t on 3" in table.note
    assert [row[0] for row in table.body] == list(ARMS_SHOWN)


@pytest.fixture(scope="module")
def three():
    return fit_ladder(ladder({"dense": 0.0, "gqe": -0.06}, noise=0.01, rungs={"d64": 4, "d96": 4, "d128": 3}))


def test_a_law_of_three_rungs_says_that_its_intervals_hold_seeds_alone(three):
    out, page = " ".join(printed(three).split()), page_of([], three)
    table = next(table for table in page.fits if table.title == "Scaling law")
    for shown in (out, table.note):
        assert "bootstrap over seeds alone" in shown
        assert "leave that out and are too narrow" in shown
    assert "hold the spread of seeds alone and no scatter of rungs" in " ".join(page.limits)
    assert "far beyond the ladder is not known" in " ".join(page.limits)
    far = next(table for table in page.fits if table.title == "Far beyond the ladder")
    assert [row[1] for row in far.body] == ["dense\nline"]


def test_a_law_of_four_rungs_does_not_say_so(fit):
    said = " ".join([*limits(fit), *(table.note for table in tables(fit) if table.title == "Scaling law")])
    assert "seeds alone" not in said


def test_a_prediction_by_a_law_of_three_rungs_says_what_its_interval_leaves_out(fit):
    table = next(table for table in tables(fit) if table.title == "d192, left out and predicted")
    assert "The law's predicted intervals hold seeds alone" in table.note


def test_cost_and_routing_stand_beside_each_other(fit):
    rows = {(row[0], row[1]): row[2:] for row in cost_table(fit).body}
    assert rows["gqe", "d64"] == ["471k", "5", "0.015", "0.0143", "1.0", "0.55", "0.99", "1"]
    assert rows["dense", "d64"][-3:] == ["\N{EN DASH}"] * 3
    assert len(rows) == 4 * len(ARMS_SHOWN)


def test_learning_rates_of_arms_are_told_where_they_differ(results, fit):
    assert "rates of their own" not in cost_table(fit).note
    own = [
        dataclasses.replace(
            each, settings={"learning_rate": 0.0035 if (each.arm, each.rung) == ("gqe", "d64") else 0.002}
        )
        for each in results
    ]
    note = cost_table(fit_ladder(own)).note
    others = [arm for arm in ARMS_SHOWN if arm != "gqe"]
    assert note.endswith(f" Arms have learning rates of their own. d64: {join_words(others)} 0.002, gqe 0.0035.")


def test_every_arm_has_a_colour():
    assert set(ARMS) <= set(ARM_COLOURS)


def test_the_charts_hold_every_mean(fit):
    laws, gaps, costs = charts.law_figure(fit), charts.gap_figure(fit, "compute"), charts.cost_figure(fit)
    means = [own.mean for cell in fit.cells for own in cell.arms.values()]
    drawn = [float(line.get_ydata()[0]) for line in laws.axes[0].lines if len(line.get_ydata()) == 1]
    assert sorted(drawn) == sorted(means)
    assert [axes.get_title(loc="left") for axes in gaps.axes] == [f"difference from {base}" for base in
                                                                 ("dense", "static", "half")]  # fmt: skip
    assert len(costs.axes) == 8


def test_against_compute_stand_whole_runs_alone_and_against_tokens_all(fit):
    points = [figure.axes[0] for figure in (charts.gap_figure(fit, "compute"), charts.gap_figure(fit, "tokens"))]
    marked = [[line for line in axes.lines if line.get_marker() not in ("None", None)] for axes in points]
    assert [len(lines) for lines in marked] == [4 * (len(ARMS_SHOWN) - 1), 12 * (len(ARMS_SHOWN) - 1)]


def test_against_compute_every_rung_is_named_at_its_place(fit):
    axes = charts.gap_figure(fit, "compute").axes[-1]
    named = dict(zip([label.get_text().split()[0] for label in axes.get_xticklabels()], axes.get_xticks(), strict=True))
    assert named == {cell.rung: cell.compute("dense") for cell in fit.cells if cell.budget == 1}
    assert not [*axes.get_xticklabels(minor=True)]


def test_against_tokens_the_lines_of_a_rung_have_the_style_that_the_legend_gives_it(fit, monkeypatch):
    drawn = []
    plot = matplotlib.axes.Axes.plot

    def record(axes, x, *args, **look):
        if "linewidth" in look and len(x) == 3:
            drawn.append(look["linestyle"])
        return plot(axes, x, *args, **look)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    legend = charts.gap_figure(fit, "tokens").legends[0]
    assert [each.get_text() for each in legend.get_texts()][-len(fit.rungs) :] == [*fit.rungs]
    styles = [charts.SEED_STYLES[number] for number in range(len(fit.rungs))]
    assert drawn[: len(fit.rungs)] == styles  # an arm's lines, the smallest rung first
    dashes = [handle._dash_pattern[1] for handle in legend.legend_handles[-len(fit.rungs) :]]
    assert dashes[0] is None
    assert all(pattern == pytest.approx([1.3 * each for each in style[1]]) for pattern, style in
               zip(dashes[1:], styles[1:], strict=True))  # fmt: skip


def test_routing_over_training_is_the_mean_over_seeds():
    curve = run().routing_curve
    other = [dataclasses.replace(point, entropy=point.entropy - 0.2) for point in curve]
    figure = charts.routing_figure([run(seed=0), run(seed=1, routing_curve=other), run(budget=0.25)], ["d64"])
    (line,) = figure.axes[0].lines
    assert line.get_ydata()[-1] == pytest.approx(curve[-1].entropy - 0.1)


def test_without_routers_there_is_no_chart_of_routing():
    assert charts.routing_figure([run("dense")], ["d64"]) is None


def test_learned_against_random_routing_and_held_out_files_have_tables():
    def made(arm, seed, loss):
        parts = [PartLoss(name=name, loss=loss, bits_per_byte=loss / 2 + more, predicted_tokens=10)
                 for name, more in (("books.valid", 0.0), ("wiki.valid", 0.25))]  # fmt: skip
        return run(arm, seed=seed, loss=loss, parts=parts)

    results = [made(arm, seed, 4 + seed + more) for arm, more in (("dense", 0), ("frozen", 0.5), ("gqe", 0.25))
               for seed in range(3)]  # fmt: skip
    random, parts = further_tables(fit_ladder(results))
    assert random.body == [
        ["d64", "100%", "\N{MINUS SIGN}0.2500\n[\N{MINUS SIGN}0.2500, \N{MINUS SIGN}0.2500]\n3 pairs"]
    ]
    assert parts.head == ["arm", "rung", "books.valid", "wiki.valid"]
    assert parts.body[0] == ["dense", "d64", "2.5000", "2.7500"]
    out = " ".join(printed(fit_ladder(results)).split())
    assert "Learned against random routing" in out
    assert "By held-out file" in out
    assert page_of(results, fit_ladder(results)).further == [random, parts]
    assert further_tables(fit_ladder([run("dense"), run("gqe")])) == []


def test_means_over_other_seeds_are_said_not_to_compare():
    results = [run(arm, seed=seed, loss=4.0) for arm in ("dense", "gqe") for seed in range(3)]
    (cell,) = fit_ladder(results).cells
    assert "don't compare" not in gap_table(cell).note
    (cell,) = fit_ladder(results[1:]).cells
    assert "Means of different seeds don't compare" in gap_table(cell).note
