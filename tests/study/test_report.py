"""The report: its numbers, the signs and the certainty of its findings, and a page that needs no other file."""

import errno
import html
import io
import json
import re
import sys
from pathlib import Path

import pytest

import demo_table
from query_experts.common.errors import SettingError
from query_experts.study.report import print_summary, write_plots, write_report
from query_experts.study.report.charts import loss_figure, smooth
from query_experts.study.report.findings import findings, limits
from query_experts.study.report.rows import missing_parts, runs_by_arm, summary_rows
from query_experts.study.report.tables import findings_table, tables
from query_experts.study.results import parse_comparison

LOSSES = {
    "dense": {0: 4.30, 1: 4.28, 2: 4.29},
    "static": {0: 4.32, 1: 4.31, 2: 4.33},
    "gqe": {0: 4.29, 1: 4.26, 2: 4.26},
}
DIVERGED = {**LOSSES, "static": dict.fromkeys(range(3)), "gqe": {0: 4.29, 1: None, 2: 4.26}}  # None: it diverged
HERE = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "query_experts": "0.1.0", "device": "cpu",
        "hardware": "a CPU, 2 cores", "dtype": "bfloat16", "date": "2026-11-23"}  # fmt: skip
THERE = {**HERE, "hardware": "NVIDIA H100", "device": "cuda"}
DATA = {
    "source": ["<docs>"], "data_hash": "sha256:abc", "tokenizer": "trained", "validation": "held-out documents",
    "validation_fraction": 0.02, "max_bytes": None, "text_field": "text", "duplicate_documents": 0, "vocab_size": 300,
    "train_documents": 9, "train_tokens": 99, "train_bytes": 999, "validation_documents": 2, "validation_tokens": 33,
    "validation_bytes": 333, "seq_len": 16, "epochs": 0.31,
}  # fmt: skip
PREFILL = "Prefill speed relative to dense"
MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
TOKENS = ["def", " f", "(", "<b>", "</script>", "\n", "&", " x"]


def run(arm, seed, loss):
    """loss None: a run that diverged after 4,000 tokens."""
    routed = arm.startswith("gqe") and loss is not None
    tokens = 4_000 if loss is None else 10_000
    curve = [[at, (loss or 5) + 1000 / at] for at in range(500, tokens + 1, 500)]
    return {
        "arm": arm,
        "seed": seed,
        "parameters": {"total": 2_400_000 if arm == "dense" else 2_300_000, "active": 2_200_000, "embedding": 9},
        "active_attention_heads": 8 if arm == "dense" else 5,
        "dense_attention_heads": 8,
        "flops_per_token": 1.2e7,
        "kv_bytes_per_token": 1024,
        "tokens_per_s": 9.0 if loss is None else 1000.0 + 100 * seed,
        "train_seconds": 9.0,
        "train_tokens": tokens,
        "diverged_at_tokens": tokens if loss is None else None,
        "pieces": [{"first_step": 0, **HERE}],
        "validation_loss": loss,
        "train_curve": curve,
        "validation_curve": curve[4::5],
        "routing": {
            "load": [[[0.7, 0.3], [0.995, 0.005]]], "entropy": [[0.8, 0.2]], "dead": 1, "dead_below": 0.01,
        } if routed else None,
        "passage": {"tokens": TOKENS, "experts": [[[i % 2, 0] for i in range(len(TOKENS))]]} if routed else None,
    }  # fmt: skip


def comparison(losses=LOSSES, seeds=(0, 1, 2)):
    """The content of a comparison.json."""
    seconds = {"dense": [[2.0, 2.0, 2.2], [8.0, 8.0, 8.0]], "gqe": [[2.0, 2.5, 1.95], [5.0, 4.5, 5.4]]}
    return {
        "settings": {"preset": "demo", "arms": list(losses), "seeds": list(seeds), "num_attention_heads": 8,
                     "num_key_value_heads": 4, "active_query_experts": 1},
        "data": dict(DATA),
        "environment": dict(HERE),
        "runs": [run(arm, s, loss) for arm, by_seed in losses.items() for s, loss in by_seed.items() if s in seeds],
        "prefill": {"lengths": [512, 2048], "repeats": 3, "dtype": "bfloat16", "limit": {"gqe": 1.6},
                    "seconds": {arm: times for arm, times in seconds.items() if arm in losses}},
    }  # fmt: skip


def with_gqe(shift):
    """The comparison with gqe this far above dense on every seed, give or take little."""
    shifted = {seed: loss + shift + 0.001 * seed for seed, loss in LOSSES["dense"].items()}
    return comparison({**LOSSES, "static": LOSSES["dense"], "gqe": shifted})


def read(of):
    return parse_comparison(json.dumps(of))


def row(arm, of=None):
    return next(row for row in summary_rows(read(comparison() if of is None else of)) if row.arm == arm)


def finding(of, arm="gqe", baseline="dense"):
    return next(found for found in findings(read(of)) if (found.arm, found.baseline) == (arm, baseline))


def finding_cells(of, arm="gqe", baseline="dense"):
    """The cells of a finding after its arm and its baseline: loss, difference, lower on, certainty."""
    return next(cells[2:] for cells in findings_table(read(of)).body if cells[:2] == [arm, baseline])


def limits_of(of):
    return " ".join(limits(read(of)))


def table(of, title):
    return next(table for table in tables(read(of)) if table.title == title)


def cells(of, title="Quality"):
    """A table's cells, by arm."""
    return {line[0]: line[1:] for line in table(of, title).body}


def on_page(of, tmp_path):
    """The words of the page."""
    write_report(read(of), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])).split())


def trained_on(of, tmp_path):
    write_report(read(of), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    return re.findall(r"<li>(.*?)</li>", page.partition("<h3>Trained on</h3>")[2])


def printed(of, width):
    from rich.console import Console

    target = io.StringIO()
    print_summary(read(of), Console(file=target, width=width))
    return target.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(read(comparison()), path)
    return path.read_text(encoding="utf-8")


def test_rows_hold_means_medians_and_differences_paired_by_seed():
    gqe = row("gqe")
    assert gqe.loss_mean == pytest.approx(4.27)
    assert gqe.loss_spread == pytest.approx(0.03)
    assert gqe.tokens_per_s == 1100
    assert gqe.active_heads == "5/8"
    assert gqe.versus["dense"].differences == pytest.approx({0: -0.01, 1: -0.02, 2: -0.03})
    assert gqe.versus["dense"].high == pytest.approx(-0.02 + 4.302653 * 0.01 / 3**0.5)
    assert gqe.versus["static"].mean == pytest.approx(-0.05)


def test_a_baseline_has_no_difference_from_itself():
    assert row("dense").versus["dense"] is None
    assert row("static").versus["static"] is None


def test_prefill_ratios_are_taken_repeat_by_repeat():
    speed = row("gqe").prefill[512]
    assert (speed.median, speed.low, speed.high) == pytest.approx((1.0, 0.8, 2.2 / 1.95))


def test_arms_come_in_the_order_of_the_study():
    mixed = comparison({"gqe": {0: 4.0}, "static": {0: 4.0}, "dense": {0: 4.0}})
    assert [row.arm for row in summary_rows(read(mixed))] == ["dense", "static", "gqe"]


@pytest.mark.parametrize("width", [120, 80])
def test_the_printed_summary_fits_the_terminal_and_keeps_every_number(width):
    text = printed(comparison(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in ("4.2700", f"{MINUS}0.0100", "5/8", "2.30M", "1,024", "1,100", "1.60"):
        assert number in text


@pytest.mark.parametrize("width", [120, 80])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("lost", [None, 1], ids=["all finished", "one diverged"])
def test_nothing_in_the_printed_quality_wraps_inside_a_number_or_a_bracket(width, count, lost):
    seeds = range(count)
    arms = ("dense", "static", "gqe", "gqe-expert")
    losses = {arm: {s: 5.5 + s / 70 + i * (1 + s) / 7 for s in seeds} for i, arm in enumerate(arms)}
    losses["gqe"] |= {} if lost is None else {lost: None}
    of = comparison(losses, seeds)
    text = printed(of, width)
    assert max(map(len, text.splitlines())) <= width
    whole = re.compile(r"\[[^]]*\]|[^\s\[\]]+")  # brackets with what they hold, and words
    shown = set(whole.findall(text))
    drawn = [*cells(of).values(), *findings_table(read(of)).body]
    assert {piece for row in drawn for cell in row for piece in whole.findall(cell)} <= shown
    assert any(cell.count("\n") == 2 for row in cells(of).values() for cell in row) == (count > 2)


def test_cells_of_quality_hold_the_mean_its_interval_and_each_seed_on_lines_of_their_own():
    assert cells(comparison())["gqe"][:2] == [
        "mean 4.2700\n4.2900 4.2600 4.2600",
        f"mean {MINUS}0.0200\n[{MINUS}0.0448, +0.0048]\n{MINUS}0.0100 {MINUS}0.0200 {MINUS}0.0300",
    ]
    assert cells(comparison(seeds=(0,)))["gqe"][:2] == ["4.2900", f"{MINUS}0.0100"]


def test_an_arm_that_diverged_keeps_its_row_and_says_so_seed_by_seed():
    assert cells(comparison(DIVERGED)) == {
        "dense": ["mean 4.2900\n4.3000 4.2800 4.2900", DASH, DASH],
        "static": ["diverged", DASH, DASH],
        "gqe": ["mean 4.2750\n4.2900 diverged 4.2600", f"mean {MINUS}0.0200\n{MINUS}0.0100 diverged {MINUS}0.0300",
                DASH],
    }  # fmt: skip


def test_a_seed_that_is_still_to_be_run_has_a_dash_in_its_place():
    of = comparison({"dense": LOSSES["dense"], "gqe": {0: 4.29, 2: 4.26}})
    assert cells(of)["gqe"][0] == f"mean 4.2750\n4.2900 {DASH} 4.2600"
    assert cells(of)["gqe"][1].endswith(f"{MINUS}0.0100 {DASH} {MINUS}0.0300")


def test_the_table_of_the_demo_says_seed_by_seed_what_diverged():
    markdown = demo_table.table(read(comparison(DIVERGED)))
    assert f"| 4.290 / diverged / 4.260 | {MINUS}0.010 / diverged / {MINUS}0.030 | {DASH} |" in markdown
    assert "| diverged / diverged / diverged |" in markdown


def test_the_verdict_names_the_seeds_that_diverged(tmp_path):
    of = comparison(DIVERGED)
    found = finding(of)
    assert (found.verdict, found.certainty) == ("lower", "too few seeds")
    assert (found.lower_on, found.higher_on, found.seeds, found.asked) == (2, 0, 2, 3)
    assert found.mean == pytest.approx(-0.02)
    assert found.diverged == {"gqe": [1]}
    certainty = "too few seeds for an interval\nof 3 seeds, 1 diverged (gqe, seed 1)"
    assert finding_cells(of) == ["lower", f"{MINUS}0.0200", "2 of 2\n(3 asked)", certainty]
    found = finding(of, baseline="static")
    assert (found.verdict, found.certainty, found.mean, found.seeds) == ("not comparable", None, None, 0)
    assert found.diverged == {"gqe": [1], "static": [0, 1, 2]}
    certainty = "of 3 seeds, 3 diverged (gqe, seed 1; static, seeds 0, 1 and 2)"
    assert finding_cells(of, baseline="static") == [DASH, DASH, DASH, certainty]
    sentence = "gqe diverged with seed 1: its loss was no finite number after 4.00k tokens."
    assert sentence in table(of, "Quality").note
    page = on_page(of, tmp_path)
    assert sentence in page
    assert f"gqe dense lower {MINUS}0.0200 2 of 2 (3 asked) too few seeds for an interval of 3 seeds, 1 div" in page
    assert f"gqe static {DASH} {DASH} {DASH} {certainty}" in page


def test_a_seed_that_neither_ran_nor_diverged_is_no_seed_that_both_have():
    of = comparison({"dense": LOSSES["dense"], "gqe": {0: 4.29, 1: 4.26}})
    found = finding(of)
    assert (found.verdict, found.lower_on, found.seeds, found.asked) == ("lower", 2, 2, 3)
    assert found.diverged == {}
    assert finding_cells(of)[2:] == ["2 of 2\n(3 asked)", "too few seeds for an interval"]
    assert finding_cells(comparison({"dense": {0: 4.0}, "gqe": {1: 4.0}}))[3] == "no seed has both losses"


def test_gqe_that_diverged_with_every_seed_is_a_result():
    of = comparison({**LOSSES, "gqe": dict.fromkeys(range(3))})
    assert finding(of).verdict == "not comparable"
    assert finding_cells(of)[3] == "of 3 seeds, 3 diverged (gqe, seeds 0, 1 and 2)"


def test_runs_that_diverged_count_neither_as_unequal_training_nor_in_speeds():
    of = comparison(DIVERGED)
    assert "unequal numbers of tokens" not in limits_of(of)
    assert row("gqe", of).training_speed.changes == pytest.approx({0: 0.0, 2: 0.0})
    assert row("gqe", of).tokens_per_s == 1100
    assert cells(of, "Cost")["gqe"][-1] == "1,100\nas dense\n+0% +0%"
    assert cells(of, "Cost")["static"][-1] == DASH
    assert missing_parts(read(of)) == []  # a run that diverged is a result, and leaves no model to time
    short = comparison()
    short["runs"][0]["train_tokens"] = 4_000
    assert "Runs saw unequal numbers of tokens (4.00k to 10.0k)" in limits_of(short)


def test_a_run_that_diverged_does_not_stretch_the_loss_chart_and_ends_in_a_cross():
    of = comparison(DIVERGED)
    of["runs"][-2]["train_curve"][-1][1] = 1e6
    figure = loss_figure(runs_by_arm(read(of)))
    upper, lower = figure.axes
    assert upper.get_ylim()[1] < 10
    crosses = [line for line in upper.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [4_000] * 4  # static thrice, gqe once
    assert all(line.get_ydata()[0] <= upper.get_ylim()[1] for line in crosses)
    assert len(lower.lines) == 5
    assert "diverged" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_page_names_the_machine_and_versions_that_every_run_was_trained_with(tmp_path):
    whole = "a CPU, 2 cores, torch 2.13.0, transformers 5.23.0, query-experts 0.1.0, python 3.11.7 (every run)"
    assert trained_on(comparison(), tmp_path) == [whole]


def test_the_page_tells_the_machines_of_a_run_in_pieces_apart(tmp_path):
    of = comparison({"dense": LOSSES["dense"], "gqe": LOSSES["gqe"]}, seeds=(0, 1))
    later = {**HERE, "date": "2026-11-24"}  # another day is no other machine
    newer = {**HERE, "torch": "2.14.0"}
    of["runs"][2]["pieces"] = [{"first_step": 0, **HERE}, {"first_step": 60, **later}, {"first_step": 120, **THERE}]
    of["runs"][3]["pieces"] = [{"first_step": 0, **newer}]
    assert trained_on(of, tmp_path) == [
        "a CPU, 2 cores, torch 2.13.0, transformers 5.23.0, query-experts 0.1.0, python 3.11.7 (dense seeds 0 and 1; "
        "gqe seed 0 to step 120)",
        "NVIDIA H100, torch 2.13.0, transformers 5.23.0, query-experts 0.1.0, python 3.11.7 (gqe seed 0 from step 120)",
        "a CPU, 2 cores, torch 2.14.0, transformers 5.23.0, query-experts 0.1.0, python 3.11.7 (gqe seed 1)",
    ]


def test_result_files_without_pieces_or_divergence_are_read_as_before(tmp_path):
    of = comparison()
    for each in of["runs"]:
        del each["pieces"], each["diverged_at_tokens"]
    assert trained_on(of, tmp_path) == []
    known = comparison()
    assert findings(read(of)) == findings(read(known))
    assert limits(read(of)) == limits(read(known))
    for title in ("Quality", "Prefill speed relative to dense", "Load"):
        assert table(of, title) == table(known, title)
    assert [line[:-1] for line in table(of, "Cost").body] == [line[:-1] for line in table(known, "Cost").body]
    of["runs"][0] = comparison()["runs"][0]
    assert trained_on(of, tmp_path)[1].startswith("not recorded (dense seeds 1 and 2; static seeds 0, 1 and 2; ")


def test_training_speeds_of_different_hardware_are_not_compared(tmp_path):
    of = comparison()
    assert "different hardware" not in table(of, "Cost").note
    assert cells(of, "Cost")["gqe"][-1] == "1,100\nas dense\n+0% +0% +0%"
    of["runs"][-1]["pieces"] = [{"first_step": 0, **THERE}]
    sentence = "runs were trained on different hardware (a CPU, 2 cores; NVIDIA H100), so speeds don't compare."
    assert sentence in table(of, "Cost").note
    assert cells(of, "Cost")["gqe"][-1] == "1,100"
    assert sentence in on_page(of, tmp_path)


def test_differences_that_round_to_zero_are_no_wins():
    near = {seed: loss - 4e-5 for seed, loss in LOSSES["dense"].items()}
    of = comparison({"dense": LOSSES["dense"], "gqe": near})
    found = finding(of)
    assert (found.verdict, found.certainty, found.lower_on, found.higher_on, found.seeds) == ("same", None, 0, 0, 3)
    assert finding_cells(of) == ["same", "0.0000\n[0.0000, 0.0000]", "0 of 3", "no difference at four digits"]
    assert "Lowest mean: dense and gqe (4.2900)." in table(of, "Quality").note
    mixed = finding(comparison({"dense": LOSSES["dense"], "gqe": {**near, 2: 4.2}}))
    assert (mixed.verdict, mixed.lower_on, mixed.higher_on) == ("mixed", 1, 0)
    one = comparison({"dense": LOSSES["dense"], "gqe": near}, seeds=(0,))
    assert finding_cells(one) == ["same", "0.0000", "0 of 1", "no difference at four digits"]


@pytest.mark.parametrize(("shift", "word"), [(-0.02, "lower"), (0.02, "higher")])
def test_two_seeds_of_one_sign_say_what_was_measured_and_no_more(shift, word):
    of = with_gqe(shift)
    of["runs"], of["settings"]["seeds"] = [run for run in of["runs"] if run["seed"] < 2], [0, 1]
    found = finding(of, baseline="static")
    assert (found.verdict, found.certainty, found.seeds) == (word, "too few seeds", 2)
    assert (found.low, found.high) == (None, None)
    assert finding_cells(of, baseline="static")[3] == "too few seeds for an interval"


@pytest.mark.parametrize(("shift", "word", "other"), [(-0.02, "is better than", "loses to"),
                                                      (0.02, "loses to", "is better than")])  # fmt: skip
def test_the_verdict_turns_with_the_sign_of_the_difference(shift, word, other, tmp_path):
    verdict = {"is better than": "lower", "loses to": "higher"}
    of = with_gqe(shift)
    page = on_page(of, tmp_path)
    for base in ("dense", "static"):
        found = finding(of, baseline=base)
        assert (found.verdict, found.certainty) == (verdict[word], "excludes zero")
        assert (found.lower_on, found.higher_on) == ((3, 0) if shift < 0 else (0, 3))
        assert found.mean == pytest.approx(shift + 0.001)
        assert (found.low > 0) == (found.high > 0) == (shift > 0)
        assert f"gqe {base} {verdict[word]} {'+' if shift > 0 else MINUS}" in page
        assert f"gqe {base} {verdict[other]}" not in page
        assert finding_cells(of, baseline=base)[3] == "interval excludes zero"


def test_seeds_that_disagree_name_no_winner(tmp_path):
    of = comparison({**LOSSES, "gqe": {0: 4.29, 1: 4.29, 2: 4.29}})
    found = finding(of)
    assert (found.verdict, found.lower_on, found.higher_on, found.seeds) == ("mixed", 1, 1, 3)
    assert found.certainty == "includes zero"
    page = on_page(of, tmp_path)
    assert re.search(r"gqe dense mixed \S+ \[[^]]*\] 1 of 3 interval includes zero: chance may explain it", page)


def test_two_seeds_are_called_too_few_for_an_interval():
    of = comparison(seeds=(0, 1))
    for base in ("dense", "static"):
        assert finding(of, baseline=base).certainty == "too few seeds"
        assert finding_cells(of, baseline=base)[3] == "too few seeds for an interval"
        assert "[" not in finding_cells(of, baseline=base)[1]


def test_one_seed_is_called_luck():
    of = comparison(seeds=(0,))
    found = finding(of)
    assert (found.verdict, found.certainty, found.mean) == ("lower", "one seed", pytest.approx(-0.01))
    assert finding_cells(of) == ["lower", f"{MINUS}0.0100", "1 of 1", "one seed: luck may explain it"]


def test_the_verdict_says_when_seeds_differ_as_much_as_arms():
    def note(losses):
        return table(comparison(losses), "Quality").note

    close = {"dense": {0: 4.0, 1: 4.5}, "gqe": {0: 4.1, 1: 4.4}}
    assert "differ by up to 0.0000, no more than the seeds of one arm do (0.5000, dense)" in note(close)
    equal = {"dense": {0: 4.0, 1: 4.5}, "gqe": {0: 4.5, 1: 5.0}}
    assert ", no more than the seeds of one arm do" in note(equal)
    apart = {"dense": {0: 4.0, 1: 4.01}, "gqe": {0: 4.5, 1: 4.51}}
    assert ", more than the seeds of one arm do" in note(apart)
    for losses in (close, equal, apart):
        assert "compare paired differences, not means" in note(losses)


def test_the_verdict_tells_clear_speed_from_noise():
    def outcome(of):
        return row("gqe", of).prefill[2048].outcome, cells(of, PREFILL)["gqe"][-1]

    assert table(comparison(), PREFILL).head[-1] == "at 2k tokens"
    assert outcome(comparison()) == ("faster", "faster")
    noisy = comparison()
    noisy["prefill"]["seconds"]["gqe"][1] = [9.0, 8.0, 7.0]
    assert outcome(noisy) == ("unclear", "unclear")
    slow = comparison()
    slow["prefill"]["seconds"]["gqe"][1] = [9.0, 10.0, 11.0]
    assert outcome(slow) == ("slower", "slower")
    assert "Faster or slower: in every repeat; otherwise unclear." in table(slow, PREFILL).note


def test_a_prefill_that_other_work_disturbed_is_called_so():
    busy = comparison()
    busy["prefill"]["seconds"]["gqe"][1] = [5.0, 4.5, 5.9]  # 1.31 times the quickest
    assert row("gqe", busy).prefill[2048].outcome == "disturbed"
    drawn = table(busy, PREFILL)
    assert drawn.body[-1][-1] == "disturbed"
    assert drawn.body[-1][2].startswith(f"1.60{TIMES}\n")
    assert "(disturbed)" in drawn.body[-1][2]
    assert "Disturbed: a repeat took over 1.3 times as long as another of the same arm" in drawn.note
    assert "isturbed" not in str(table(comparison(), PREFILL))


def test_prefill_is_compared_with_static_too():
    of = comparison()
    of["prefill"]["seconds"]["static"] = [[2.0, 2.0, 2.0], [6.0, 6.0, 6.0]]
    assert cells(of, PREFILL)["gqe"][-1] == f"faster\n1.20{TIMES} static"
    assert cells(of, PREFILL)["static"][-1] == "faster"
    assert cells(of, PREFILL)["dense"][-1] == DASH


def test_every_arm_of_the_method_has_its_sentences_and_absent_baselines_one_remark():
    losses = {"half": LOSSES["dense"], "gqe-m4": LOSSES["gqe"], "gqe-expert": LOSSES["static"]}
    of = comparison({"dense": LOSSES["dense"], **losses})
    found = finding(of, "gqe-m4")
    assert (found.verdict, found.lower_on, found.seeds) == ("lower", 3, 3)
    assert cells(of)["gqe-m4"][1].endswith(f"\n{MINUS}0.0100 {MINUS}0.0200 {MINUS}0.0300")
    found = finding(of, "gqe-expert")
    assert (found.verdict, found.higher_on, found.mean) == ("higher", 3, pytest.approx(0.03))
    assert cells(of, "Cost")["gqe-m4"][-1] == "1,100\nas dense\n+0% +0% +0%"
    assert {found.arm for found in findings(read(of))} == {"gqe-m4", "gqe-expert"}  # half is a control
    remarks = [line for line in limits(read(of)) if "static" in line]
    assert remarks == ["No arm is compared with static, which was not asked for."]
    assert not any("static" in line for line in missing_parts(read(of)))
    neither = limits_of(comparison(losses))
    assert "No arm is compared with dense and static, which were not asked for." in neither


def test_every_studied_arm_is_compared_with_every_control_that_has_a_run():
    arms = ("dense", "static", "half", "frozen", "gqe", "hard")
    of = comparison({arm: {seed: 4 + 0.1 * i + seed for seed in range(3)} for i, arm in enumerate(arms)})
    pairs = [(found.arm, found.baseline, found.verdict) for found in findings(read(of))]
    assert pairs == [(arm, base, "higher") for arm in arms[4:] for base in arms[:4]]
    note = findings_table(read(of)).note
    assert "Only a lower loss than frozen is evidence of learned routing." in note
    assert "frozen" not in findings_table(read(comparison())).note


def test_the_page_says_what_spread_is_left_between_seeds():
    of = comparison({"static": {0: 4.0, 1: 4.1, 2: 4.2}, "gqe": {0: 4.01, 1: 4.12, 2: 4.23}})
    reach = 4.302653 * 0.01 / 3**0.5  # Student's t with two degrees of freedom, at 97.5%
    assert (
        "Between seeds, gqe minus static varies with a standard deviation of 0.0100: here a mean difference of less "
        f"than {reach:.4f} can't be told from none." in limits_of(of)
    )
    assert "Between seeds" not in limits_of(comparison(seeds=(0, 1)))


def test_the_widest_spread_is_told_where_several_arms_are_studied():
    even = {seed: loss + 0.01 for seed, loss in LOSSES["static"].items()}
    uneven = {seed: loss + 0.01 * seed for seed, loss in LOSSES["static"].items()}
    of = comparison({"static": LOSSES["static"], "gqe": even, "hard": uneven})
    assert "Between seeds, hard minus static varies" in limits_of(of)
    assert limits_of(of).count("Between seeds") == 1


def test_the_limits_are_six_lines_at_most():
    of = comparison({"static": LOSSES["static"], "gqe": LOSSES["gqe"], "hard": LOSSES["gqe"]})
    of["runs"][0]["train_tokens"] = 4_000
    of["data"] |= {"epochs": 39, "validation_tokens_used": 1536}
    assert len(limits(read(of))) == 6


def test_one_seed_and_one_repeat_are_written_in_the_singular(tmp_path):
    alone = comparison(seeds=(0,))
    alone["prefill"] |= {"repeats": 1, "seconds": {"dense": [[2.0], [8.0]], "gqe": [[2.0], [5.0]]}}
    assert cells(alone, "Cost")["gqe"][-1] == "1,000\nas dense\n+0%"
    assert cells(alone, PREFILL)["gqe"][1:] == [f"1.60{TIMES}\n5.00 s", f"1.60{TIMES}", "faster"]
    note = table(alone, PREFILL).note
    assert "Speed relative to dense, then the arm's own time." in note
    assert not re.search("every|seeds that|repeats", note)
    assert "Comparison of 3 arms over 1 seed," in on_page(alone, tmp_path)


@pytest.mark.parametrize(
    ("changes", "pace"),
    [
        ((0.029, -0.029, 0.0), "about as fast as dense"),
        ((0.031, 0.001, 0.001), "faster than dense on every seed"),
        ((-0.031, -0.001, -0.001), "slower than dense on every seed"),
        ((0.031, -0.001, 0.001), "faster than dense on some seeds and slower on others"),
    ],
)
def test_the_verdict_on_training_speed_goes_seed_by_seed_and_calls_three_percent_the_same(changes, pace):
    outcomes = {"about as fast as dense": "same", "faster than dense on every seed": "faster",
                "slower than dense on every seed": "slower",
                "faster than dense on some seeds and slower on others": "mixed"}  # fmt: skip
    of = comparison()
    for each in of["runs"]:
        each["tokens_per_s"] *= 1 + (changes[each["seed"]] if each["arm"] == "gqe" else 0)
    speed = row("gqe", of).training_speed
    assert speed.changes == pytest.approx(dict(enumerate(changes)))
    assert speed.outcome == outcomes[pace]
    shown = cells(of, "Cost")["gqe"][-1].split("\n")
    assert shown[1] == {"same": "as dense"}.get(outcomes[pace], outcomes[pace])
    assert shown[2] == " ".join(f"{change:+.0%}".replace("-", MINUS) for change in changes)


@pytest.mark.parametrize(("size", "told"), [(49_999_999, True), (50_000_000, False)])
def test_the_verdict_calls_models_below_fifty_million_parameters_tiny(size, told):
    of = comparison()
    of["runs"][0]["parameters"]["total"] = size
    assert ("The models are tiny" in limits_of(of)) == told


@pytest.mark.parametrize(("size", "told"), [(556, True), (555, False)])
def test_the_verdict_says_where_training_stopped_well_before_twenty_tokens_a_parameter(size, told):
    of = comparison()
    for each in of["runs"]:
        each["parameters"]["total"] = size
    assert ("Training stopped at 18 tokens a parameter" in limits_of(of)) == told


@pytest.mark.parametrize(("size", "told"), [(10_051, "more"), (10_049, None), (9_951, None), (9_949, "fewer")])
def test_the_verdict_names_a_difference_in_size_from_half_a_percent_on(size, told):
    of = comparison()
    for each in of["runs"]:
        each["parameters"]["total"] = size if each["arm"] == "gqe" else 10_000
    named = re.findall(r"[\w-]+ has [^:]*: losses are not at equal size\.", table(of, "Cost").note)
    assert named == [f"gqe has 0.5% {told} parameters than {base}: losses are not at equal size."
                     for base in ("dense", "static") if told]  # fmt: skip


def test_the_verdict_names_what_limits_the_comparison(tmp_path):
    page = on_page(comparison(), tmp_path)
    assert "The models are tiny (2.40M parameters, 10.0k training tokens)" in page
    assert "fewer parameters than dense" in page
    assert cells(comparison(), "Load")["gqe"] == ["4", "1 1 1", "0.50 0.50 0.50"]  # dead experts, seed by seed
    assert "gqe 4 1 1 1 0.50 0.50 0.50" in page
    assert "Dead: selected by less than 1% of held-out tokens." in page


def test_the_page_stands_alone(page):
    assert not re.search(r"<(script|img|iframe|link|source)\b[^>]*\b(src|href)\s*=", page)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", page)
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) == {"https://arxiv.org/abs/2606.20945"}
    assert len(page) < 2_000_000


def test_the_page_escapes_text_that_looks_like_markup(page):
    assert "&lt;b&gt;" in page
    assert "&lt;docs&gt;" in page
    assert "<b>" not in page
    data = re.search(r'<script type="application/json" id="passage-data">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(data)[0]["tokens"] == TOKENS


def test_ids_in_the_page_are_unique_and_every_reference_is_met(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'href="#([^"]+)"', page), *re.findall(r"url\(#([^)]+)\)", page)} <= set(ids)


def test_charts_have_a_title_for_those_who_do_not_see_them(page):
    charts = re.findall(r"<svg[^>]*>(.{20})", page)
    assert len(charts) == 4  # loss, differences, prefill, load of gqe
    assert all(start.startswith("<title") for start in charts)


def test_prefill_shows_the_median_time_of_each_arm_at_each_length(page):
    shown = cells(comparison(), PREFILL)
    assert shown["dense"][:2] == [f"1.00{TIMES}\n2.00 s", f"1.00{TIMES}\n8.00 s"]
    assert shown["gqe"][0] == f"1.00{TIMES}\n0.80 to 1.13\n2.00 s"
    fast = comparison()
    fast["prefill"]["seconds"]["gqe"][1] = [0.031, 0.0299, 0.029]
    assert cells(fast, PREFILL)["gqe"][1].endswith("\n29.9 ms")
    assert "<span>5.00 s</span>" in page


def test_without_dense_prefill_shows_times_alone():
    of = comparison({"gqe": LOSSES["gqe"]})
    assert cells(of, PREFILL)["gqe"][:2] == ["2.00 s", "5.00 s"]


def test_prefill_that_was_stopped_midway_has_dashes_for_the_lengths_to_come():
    of = comparison()
    of["prefill"]["seconds"] = {arm: seconds[:1] for arm, seconds in of["prefill"]["seconds"].items()}
    assert cells(of, PREFILL)["gqe"][1] == DASH
    assert table(of, PREFILL).head[-1] == "at 512 tokens"
    assert cells(of, PREFILL)["gqe"][-1] == "unclear"


def test_how_much_was_held_out_is_among_the_facts(tmp_path):
    of = comparison()
    of["data"] |= {"validation_sequences_used": 128, "validation_tokens_used": 32_768}
    write_report(read(of), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<dt>validation sequences used</dt><dd>128</dd><dt>validation tokens used</dt><dd>32,768</dd>" in page


def test_routing_over_training_is_on_the_page_of_runs_that_recorded_it_and_of_no_others(page, tmp_path):
    recorded = comparison(seeds=(0,))
    for each in recorded["runs"]:
        if each["arm"] == "gqe":
            each["routing_curve"] = [
                {"tokens": at, "entropy": 0.9, "entropy_lowest": 0.8, "highest_load": 0.6, "dead": at // 5_000}
                for at in range(500, 10_001, 500)
            ]
    assert "Routing over training. Entropy" in on_page(recorded, tmp_path)
    assert "Routing over training" not in page


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def no_room(self, text, **kwargs):
        with self.open("w") as file:
            file.write(text[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_room)
    with pytest.raises(OSError, match="No space"):
        write_report(read(comparison()), path)
    assert path.read_text() == "old"


def test_the_sections_come_in_the_promised_order(page):
    sections = ["findings", "results", "loss", "prefill", "load", "passage", "run"]
    assert re.findall(r'<section aria-labelledby="(\w+)"', page) == sections


def test_the_same_comparison_gives_the_same_bytes(page, tmp_path):
    write_report(read(comparison()), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_the_page_and_the_plots_render_without_baselines_curves_prefill_or_routing(tmp_path):
    part = comparison({"gqe": {0: 4.2}, "gqe-m4": {0: None}})
    part["settings"]["arms"] = ["static", "gqe", "gqe-m4"]
    part["settings"]["seeds"] = [0, 1]
    part["prefill"] = None
    for each in part["runs"]:
        each.update(train_curve=[], validation_curve=[], routing=None, passage=None)
    text = on_page(part, tmp_path)
    for line in ("No run of static.", "No run of gqe with seed 1.", "gqe-m4 diverged with seed 0",
                 "No arm is compared with dense, which was not asked for.", "Prefill was not timed.",
                 "No run kept a loss curve.",
                 "No run with a router reports its load."):  # fmt: skip
        assert line in text
    assert DASH in printed(part, 100)
    assert write_plots(read(part), tmp_path) == []


def test_an_empty_comparison_renders_and_says_so(tmp_path):
    text = on_page({"runs": []}, tmp_path)
    assert "No run has finished" in text
    assert "No arm of the method has finished a run, so this comparison says nothing about its quality." in text
    assert findings(read({"runs": []})) == []
    assert "Findings" not in printed({"runs": []}, 80)


def test_plots_are_written_as_svg_and_png_and_do_not_change_between_writes(tmp_path):
    first = write_plots(read(comparison()), tmp_path / "a")
    assert [path.name for path in first] == ["loss.svg", "loss.png", "prefill.svg", "prefill.png"]
    second = write_plots(read(comparison()), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("module", ["matplotlib.figure", "jinja2"])
def test_a_missing_library_names_the_extra_to_install(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingError, match=r"pip install query-experts\[study\]"):
        write_report(read(comparison()), tmp_path / "report.html")


@pytest.mark.parametrize(("held_out", "told"), [(1_536, True), (19_999, True), (20_000, False)])
def test_the_verdict_says_where_little_text_is_held_out(held_out, told):
    of = comparison()
    of["data"]["validation_tokens_used"] = held_out
    assert (f"taken over {held_out:,} held-out tokens" in limits_of(of)) == told


@pytest.mark.parametrize(("epochs", "told"), [(38.8, "39"), (388.2, "388"), (4.01, "4.0"), (4, None)])
def test_the_verdict_says_where_the_text_was_seen_many_times(epochs, told):
    of = comparison()
    of["data"]["epochs"] = epochs
    found = re.findall(r"The training text is repeated (\S+) times", limits_of(of))
    assert found == [told] * (told is not None)


def test_where_every_run_diverged_nothing_is_said_of_the_text_that_they_were_measured_on():
    of = comparison({arm: dict.fromkeys(seeds) for arm, seeds in LOSSES.items()})
    of["data"] |= {"epochs": 39, "validation_tokens_used": 1536}
    assert not re.search("taken over|repeated", limits_of(of))


def test_machines_that_were_not_recorded_are_said_to_be_so():
    of = comparison()
    for each in of["runs"]:
        del each["pieces"]
    assert "it isn't recorded where every run was trained" in table(of, "Cost").note
    assert "different hardware" not in table(of, "Cost").note
    assert cells(of, "Cost")["gqe"][-1] == "1,100"


def test_a_smoothed_line_ends_in_a_mean_and_not_in_the_last_point():
    points = [(float(at), 5.0) for at in range(100)] + [(100.0, 9.0)]
    smoothed = smooth(points)
    assert smoothed[-1] == (97.0, pytest.approx(5 + 4 / 7))
    assert smooth(points[-5:]) == points[-5:]
