"""Owns the checks of the report: the numbers shown, the verdict's signs, and a page that stands alone."""

import io
import json
import re
import sys

import pytest

from query_experts.errors import SettingError
from query_experts.study.report import print_summary, summary_rows, verdict, write_plots, write_report

LOSSES = {
    "dense": {0: 4.30, 1: 4.28, 2: 4.29},
    "static": {0: 4.32, 1: 4.31, 2: 4.33},
    "gqe": {0: 4.29, 1: 4.26, 2: 4.26},
}
TOKENS = ["def", " f", "(", "<b>", "</script>", "\n", "&", " x"]


def run(arm, seed, loss):
    routed = arm.startswith("gqe")
    curve = [[tokens, loss + 1000 / tokens] for tokens in range(500, 10_001, 500)]
    return {
        "arm": arm,
        "seed": seed,
        "parameters": {"total": 2_400_000 if arm == "dense" else 2_300_000, "active": 2_200_000, "embedding": 9},
        "active_attention_heads": 8 if arm == "dense" else 5,
        "dense_attention_heads": 8,
        "flops_per_token": 1.2e7,
        "kv_bytes_per_token": 1024,
        "tokens_per_s": 1000.0 + 100 * seed,
        "train_seconds": 9.0,
        "train_tokens": 10_000,
        "validation_loss": loss,
        "train_curve": curve,
        "validation_curve": curve[4::5],
        "routing": {
            "load": [[[0.7, 0.3], [0.995, 0.005]]], "entropy": [[0.8, 0.2]], "dead": 1, "dead_below": 0.01,
        } if routed else None,
        "passage": {"tokens": TOKENS, "experts": [[[i % 2, 0] for i in range(len(TOKENS))]]} if routed else None,
    }  # fmt: skip


def comparison(losses=LOSSES, seeds=(0, 1, 2)):
    seconds = {"dense": [[2.0, 2.0, 2.2], [8.0, 8.0, 8.0]], "gqe": [[2.0, 2.5, 1.1], [5.0, 4.0, 6.4]]}
    return {
        "settings": {"preset": "demo", "arms": list(losses), "seeds": list(seeds), "num_attention_heads": 8,
                     "num_key_value_heads": 4, "active_query_experts": 1},
        "data": {"source": ["<docs>"], "data_hash": "sha256:abc", "epochs": 0.31},
        "environment": {"torch": "2.11.0", "hardware": "a CPU, 2 cores", "date": "2026-11-23"},
        "runs": [run(arm, s, loss) for arm, by_seed in losses.items() for s, loss in by_seed.items() if s in seeds],
        "prefill": {"lengths": [512, 2048], "repeats": 3, "dtype": "bfloat16", "limit": {"gqe": 1.6},
                    "seconds": {arm: times for arm, times in seconds.items() if arm in losses}},
    }  # fmt: skip


def with_gqe(shift):
    """The comparison with gqe this far above dense on every seed, give or take little."""
    shifted = {seed: loss + shift + 0.001 * seed for seed, loss in LOSSES["dense"].items()}
    return comparison({**LOSSES, "static": LOSSES["dense"], "gqe": shifted})


def row(arm, of=None):
    return next(row for row in summary_rows(comparison() if of is None else of) if row.arm == arm)


def printed(of, width):
    from rich.console import Console

    target = io.StringIO()
    print_summary(of, Console(file=target, width=width))
    return target.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    # Through JSON, as the real one comes.
    return write_report(json.loads(json.dumps(comparison())), path).read_text(encoding="utf-8")


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
    assert (speed.median, speed.low, speed.high) == pytest.approx((1.0, 0.8, 2.0))


def test_arms_come_in_the_order_of_the_study_and_unknown_ones_last():
    mixed = comparison({"mine": {0: 4.0}, "gqe": {0: 4.0}, "dense": {0: 4.0}})
    assert [row.arm for row in summary_rows(mixed)] == ["dense", "gqe", "mine"]


@pytest.mark.parametrize("width", [120, 80])
def test_the_printed_summary_fits_the_terminal_and_keeps_every_number(width):
    text = printed(comparison(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in ("4.2700", "\N{MINUS SIGN}0.0100", "5/8", "2.30M", "1,024", "1,100", "1.60"):
        assert number in text
    assert "+0.0048]" in text  # the upper end of the interval against dense


@pytest.mark.parametrize(("shift", "word", "other"), [(-0.02, "is better than", "loses to"),
                                                      (0.02, "loses to", "is better than")])  # fmt: skip
def test_the_verdict_turns_with_the_sign_of_the_difference(shift, word, other):
    text = " ".join(verdict(with_gqe(shift)))
    for base in ("dense", "static"):
        assert f"gqe {word} {base} on every one of the 3 seeds" in text
        assert f"gqe {other} {base}" not in text
    assert ("gqe lost to it, so routing did not pay" in text) == (shift > 0)
    assert ("speak for gqe at this scale" in text) == (shift < 0)
    assert "excludes zero" in text


def test_seeds_that_disagree_name_no_winner():
    losses = {**LOSSES, "gqe": {0: 4.29, 1: 4.29, 2: 4.29}}
    line = verdict(comparison(losses))[0]
    assert "no consistent winner: lower loss on 1 of 3 seeds, higher on 1" in line
    assert "includes zero, so chance alone may explain it" in line


def test_two_seeds_are_called_too_few_for_an_interval():
    lines = verdict(comparison(seeds=(0, 1)))
    assert "2 seeds are too few for a confidence interval." in lines
    assert not any("95%" in line for line in lines)


def test_one_seed_is_called_luck():
    lines = verdict(comparison(seeds=(0,)))
    assert lines[0] == "On the one seed that both have, gqe is better than dense by 0.0100."
    assert "One seed can't tell a difference between arms from luck." in lines


def test_the_verdict_says_when_seeds_differ_as_much_as_arms():
    close = {"dense": {0: 4.0, 1: 4.5}, "gqe": {0: 4.1, 1: 4.4}}
    assert any("Go by paired differences" in line for line in verdict(comparison(close)))
    apart = {"dense": {0: 4.0, 1: 4.01}, "gqe": {0: 4.5, 1: 4.51}}
    assert any("which says nothing of any one pair" in line for line in verdict(comparison(apart)))


def test_the_verdict_tells_clear_speed_from_noise():
    text = " ".join(verdict(comparison()))
    assert "Prefill of 2k tokens: gqe is faster than dense in every repeat" in text
    noisy = comparison()
    noisy["prefill"]["seconds"]["gqe"][1] = [9.0, 8.0, 7.0]
    assert "gqe is not reliably faster or slower than dense" in " ".join(verdict(noisy))
    slow = comparison()
    slow["prefill"]["seconds"]["gqe"][1] = [9.0, 10.0, 11.0]
    assert "gqe is slower than dense in every repeat" in " ".join(verdict(slow))


def test_the_verdict_names_what_limits_the_comparison():
    text = " ".join(verdict(comparison()))
    assert "The models are tiny (2.40M parameters, 10.0k training tokens)" in text
    assert "fewer parameters than dense" in text
    assert "gqe 1, 1 and 1 of 4" in text  # dead experts, seed by seed


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


def test_the_sections_come_in_the_promised_order(page):
    sections = ["verdict", "results", "loss", "prefill", "load", "passage", "run"]
    assert re.findall(r'<section aria-labelledby="(\w+)"', page) == sections


def test_the_same_comparison_gives_the_same_bytes(page, tmp_path):
    assert write_report(comparison(), tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_the_page_and_the_plots_render_without_baselines_curves_prefill_or_routing(tmp_path):
    part = comparison({"gqe": {0: 4.2}, "gqe-m4": {0: float("nan")}})
    part["settings"]["arms"] = ["static", "gqe", "gqe-m4"]
    part["settings"]["seeds"] = [0, 1]
    part["prefill"] = None
    for each in part["runs"]:
        each.update(train_curve=[], validation_curve=[], routing=None, passage=None)
    text = write_report(part, tmp_path / "report.html").read_text(encoding="utf-8")
    for line in ("No run of static.", "No run of gqe with seed 1.", "gqe-m4 diverged with seed 0",
                 "No run of dense, so no difference from it.", "Prefill was not timed.", "No run kept a loss curve.",
                 "No run with a router reports its load."):  # fmt: skip
        assert line in text
    assert "\N{EN DASH}" in printed(part, 100)
    assert write_plots(part, tmp_path) == []


def test_an_empty_comparison_renders_and_says_so(tmp_path):
    text = write_report({}, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No run has finished" in text
    assert "says nothing about the quality" in verdict({})[0]


def test_plots_are_written_as_svg_and_png_and_do_not_change_between_writes(tmp_path):
    first = write_plots(comparison(), tmp_path / "a")
    assert [path.name for path in first] == ["loss.svg", "loss.png", "prefill.svg", "prefill.png"]
    second = write_plots(comparison(), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("module", ["matplotlib.figure", "jinja2"])
def test_a_missing_library_names_the_extra_to_install(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingError, match=r"pip install query-experts\[study\]"):
        write_report(comparison(), tmp_path / "report.html")
