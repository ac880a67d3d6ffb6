"""The study of conversions (benchmarks/conversion.py), tiny, from a dense model to tables and a plot."""

import sys
from dataclasses import replace

import pytest

import conversion
import conversion_tables
from query_experts.cli import main
from query_experts.common import formatting as text
from study_helpers import options, write_text

pytestmark = pytest.mark.full
SIZES = ["--hidden_size", "32", "--num_attention_heads", "8", "--num_key_value_heads", "2", "--head_dim", "8"]
SHORT = ["--steps", "4", "--batch_size", "2", "--seq_len", "16", "--evaluations", "2", "--validation_sequences", "4"]


@pytest.fixture(scope="module")
def result_file(tmp_path_factory):
    """Of a static and a calibrated conversion, two seeds; and of one more case in a second call."""
    folder = tmp_path_factory.mktemp("study")
    file = write_text(folder / "text.txt")
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2}
    assert main(options("train", folder / "dense", file, arm="dense", **sizes)) == 0
    common = ["conversion.py", "--teacher", str(folder / "dense" / "model"), "--data", file, *SIZES, *SHORT]
    common += ["--out", str(folder / "out"), "--result", str(folder / "result.json"), "--device", "cpu"]
    common += ["--dtype", "float32", "--vocab_size", "300", "--num_hidden_layers", "2", "--intermediate_size", "48"]
    with pytest.MonkeyPatch.context() as patch:
        for asked in (
            ["--seeds", "0", "1", "--cases", "static", "expert-calibrated", "slot-random"],
            ["--seeds", "0", "--cases", "static", "expert-calibrated-gradual", "all-awake"],
        ):
            patch.setattr(sys, "argv", [*common, *asked])
            conversion.main()
    return folder / "result.json"


@pytest.fixture(scope="module")
def result(result_file):
    return conversion.read_conversions(result_file)


def test_a_later_call_adds_its_cases_and_repeats_none(result_file, result):
    held = [(run.case, run.seed) for run in result.runs]
    assert sorted(held) == [
        ("all-awake", 0), ("expert-calibrated", 0), ("expert-calibrated", 1), ("expert-calibrated-gradual", 0),
        ("slot-random", 0), ("slot-random", 1), ("static", 0), ("static", 1),
    ]  # fmt: skip
    assert not any(path in result_file.read_text() for path in ("/tmp", "text.txt/"))


def test_runs_start_where_their_conversion_does(result):
    runs = {(run.case, run.seed): run for run in result.runs}
    # one a group, one shared
    assert {run.active_heads for case, run in runs.items() if case[0] != "all-awake"} == {3}
    dense = runs["all-awake", 0]
    assert dense.kl_at_start == pytest.approx(0, abs=1e-6)
    assert dense.validation_curve[0][1] == pytest.approx(dense.teacher_loss, abs=1e-4)
    assert all(run.kl_at_start > 1e-5 for case, run in runs.items() if case[0] != "all-awake")
    assert [tokens for tokens, _ in dense.validation_curve] == [0, 64, 128]


def test_every_table_is_made_of_the_runs_and_the_plot_is_drawn(result, tmp_path, monkeypatch):
    losses = conversion_tables.losses(result).splitlines()
    assert len(losses) == 2 + 5
    assert "static, the strongest head" in losses[3]
    assert conversion_tables.paired(result).count("static, the strongest") == 1
    assert conversion_tables.fits(result).count("%") == 2 * 3
    assert "dense model" in conversion_tables.setting(result)
    monkeypatch.setattr(conversion_tables, "PLOTS", tmp_path)
    conversion_tables.draw(result)
    assert (tmp_path / "conversion.svg").stat().st_size > 1000


def test_rates_are_told_in_their_order(result):
    one = replace(result, runs=[run for run in result.runs if run.seed == 0])
    fast = replace(one, settings=replace(one.settings, learning_rate=0.5))
    head, _, low, high = conversion_tables.rates([fast, one]).splitlines()
    assert head.startswith("| learning rate | all four experts active | static")
    assert low.startswith(f"| {one.settings.learning_rate:g} | ")
    assert high.startswith("| 0.5 | ")
    assert low.count("|") == head.count("|")


def test_tokens_to_come_near_are_those_of_the_first_validation_that_does(result):
    curve = [(0, 4.5), (10, 4.03), (20, 4.05), (30, 4.01)]
    run = replace(result.runs[0], case="static", train_tokens=30, teacher_loss=4.0, validation_curve=curve)
    assert conversion_tables.reached(run, 0.01) == 10
    assert conversion_tables.reached(run, 0.003) == 30
    assert conversion_tables.reached(run, 0.001) is None
    # with the final top-k after half of the tokens
    gradual = replace(run, case="expert-calibrated-gradual", train_tokens=20)
    assert conversion_tables.reached(gradual, 0.02) == 20
    assert conversion_tables.tokens_in_words([10.0, None]) == f"10 / {text.DASH}"
    assert conversion_tables.tokens_in_words([None, None]) == "not reached"
