"""The benchmark of telemetry's cost: what it times, and what it makes of the times."""

import argparse

import pytest

import telemetry_cost
from query_experts.common.environment import environment
from study_helpers import tiny_train


def test_a_repeat_is_timed_with_and_without_telemetry(tmp_path):
    settings = tiny_train(tmp_path, num_hidden_layers=1, steps=3)
    rows = telemetry_cost.RandomRows(6, 16, 300)
    seconds, spent = telemetry_cost.timed(settings, rows, "without")
    assert seconds > spent == 0
    seconds, spent = telemetry_cost.timed(settings, rows, "brief")
    assert seconds > spent > 0


def test_shares_are_medians_over_the_repeats():
    cost = telemetry_cost.TelemetryCost(50, 512, environment("cpu", "float32"))
    cost.seconds = {"without": [10.0, 20.0, 10.0], "brief": [10.1, 22.0, 10.2], "detailed": []}
    cost.in_telemetry["brief"] = [0.1, 0.3, 0.2]
    assert cost.share("brief") == pytest.approx(0.02)
    assert cost.difference("brief") == pytest.approx(0.02)


def test_the_model_is_the_small_presets():
    chosen = argparse.Namespace(steps=50, batch_size=2, seq_len=256)
    settings = telemetry_cost.settings_of(chosen)
    assert (settings.hidden_size, settings.num_hidden_layers, settings.vocab_size) == (256, 6, 8192)
    assert (settings.steps, settings.tokens_per_step) == (52, 512)
