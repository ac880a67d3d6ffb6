"""The committed ladders: their rungs follow one rule, and their results hold no paths."""

import dataclasses
import json
from pathlib import Path

import pytest

from query_experts.study.ladder.results import absolute_paths, read_results
from query_experts.study.ladder.settings import Run, parameters_without_embeddings, read_ladder

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
LADDERS = BENCHMARKS / "ladder"
FILES = sorted(LADDERS.glob("*.yaml"))
SMALLEST = 117_056  # parameters of dense at D = 64, without embeddings
NARROWER = {"d512": 1344}  # so that four epochs suffice


@pytest.mark.parametrize(
    ("name", "rung"), [(name, rung) for name in ("cpu", "gpu") for rung in read_ladder(LADDERS / f"{name}.yaml").rungs]
)
def test_rungs_follow_the_rule(name, rung):
    ladder = read_ladder(LADDERS / f"{name}.yaml")
    settings = ladder.run_settings(Run(rung, "dense", 0))
    width, ratio = settings.hidden_size, parameters_without_embeddings(settings.model_size()) / SMALLEST
    assert settings.intermediate_size == NARROWER.get(rung, 2.75 * width)
    assert settings.num_hidden_layers == max(2, width // 64)
    assert (settings.num_attention_heads, settings.num_key_value_heads) == (8, 4)
    assert settings.head_dim == max(16, width // 8)
    assert settings.initializer_range == pytest.approx(0.02 * (768 / width) ** 0.5, rel=0.03)
    assert settings.learning_rate == pytest.approx(0.007 * ratio ** (-1 / 3), rel=0.03)
    assert settings.tokens_per_step == pytest.approx(2048 * ratio ** (2 / 3), rel=0.08)
    assert ladder.tokens_per_parameter == 20
    assert (ladder.budgets, ladder.warmup) == ([0.25, 0.5, 1], 0.4)


def test_all_ladders_have_the_same_text_and_tokenizer():
    ladders = [read_ladder(file) for file in FILES]
    assert len(FILES) == 6
    assert len({(*ladder.data, *ladder.validation, ladder.settings["vocab_size"]) for ladder in ladders}) == 1


@pytest.mark.parametrize("folder", sorted(BENCHMARKS.glob("results/ladder*/")), ids=lambda folder: folder.name)
def test_committed_results_hold_no_paths_and_no_key_twice(folder):
    files = [*folder.glob("*.json")]
    for file in files:
        assert absolute_paths(json.loads(file.read_text())) == []
    assert len(read_results(folder)) >= len(files)


@pytest.mark.parametrize("rung", ["d64", "d96"])
def test_rates_were_swept_in_runs_that_differ_from_the_ladder_s_in_nothing_else(rung):
    whole = []
    for name in ("rates", "cpu"):
        ladder = read_ladder(LADDERS / f"{name}.yaml")
        whole.append(ladder.branch_settings(ladder.run_settings(Run(rung, "dense", 0)), 1.0))
    swept = {"learning_rate", "validation_sequences"}
    differ = {f.name for f in dataclasses.fields(whole[0]) if getattr(whole[0], f.name) != getattr(whole[1], f.name)}
    assert differ == swept


@pytest.mark.parametrize(("name", "rung"), [("warmup", "d64"), ("warmup-d96", "d96")])
def test_runs_with_a_short_warm_up_are_those_of_the_ladder_with_another_warm_up(name, rung):
    short, own = (read_ladder(LADDERS / f"{each}.yaml") for each in (name, "cpu"))
    run = Run(rung, "gqe", 0)
    assert short.run_settings(run) == own.run_settings(run)
    assert (short.budgets, short.warmup, own.warmup) == (own.budgets, 0.1, 0.4)
