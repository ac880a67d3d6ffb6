"""Decoding eager and compiled: all arms in both modes, over dense in its faster one."""

import pytest
import torch

import decode_compiled
from decode_compiled import COMPILED, EAGER, Point
from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings


@pytest.fixture
def _small(monkeypatch):
    """A small layer, and a compiler that leaves a call as it is."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr(
        decode_compiled,
        "settings",
        lambda mode: BenchSettings(
            device="cpu", compile=mode == COMPILED, hidden_size=64, num_attention_heads=4, num_key_value_heads=2
        ),
    )


@pytest.mark.usefixtures("_small")
def test_every_arm_is_timed_in_both_modes():
    point = decode_compiled.measure(batch=2, cached=8, repeats=2)
    assert [*point.seconds] == [*decode_compiled.ARMS]
    for modes in point.seconds.values():
        assert [*modes] == [EAGER, COMPILED]
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in modes.values())


@pytest.mark.usefixtures("_small")
def test_a_compiled_step_that_computes_something_else_is_not_timed(monkeypatch):
    cached = Layer.cached
    wrong = []

    def call(self, *args):
        step = cached(self, *args)
        wrong.append(self)
        return (lambda: step() + 0.5) if len(wrong) == 6 else step  # the last arm's, compiled

    monkeypatch.setattr(Layer, "cached", call)
    with pytest.raises(RuntimeError, match=r"gqe, compiled, differs from eager by 0\.5"):
        decode_compiled.measure(batch=2, cached=8, repeats=2)


def test_speed_is_over_the_faster_mode_of_dense():
    dense = {EAGER: [4.0, 5.0, 6.0], COMPILED: [1.0, 50.0, 60.0]}
    point = Point(1, 16, {"dense": dense, "gqe": {EAGER: [8.0, 5.0, 4.0], COMPILED: [2.0, 2.0, 3.0]}})
    assert point.dense_mode() == EAGER
    assert point.speed("gqe", COMPILED) == (2.0, 2.0, 2.5)
    assert point.speed("gqe", EAGER) == (1.0, 0.5, 1.5)


def test_the_committed_result_has_every_point():
    points = decode_compiled.read_decode_compiled().points
    assert [(point.batch, point.cached) for point in points] == [(b, n) for b in (1, 8) for n in (16, 1024, 4096)]
