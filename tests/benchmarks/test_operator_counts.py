"""The kernels of one layer on the plain path stay within bounds, and the counter sees what it should."""

import json
from functools import cache
from importlib.metadata import version

import pytest
import torch

import operator_counts

BOUNDS = {"prefill with a cache": 30, "training, forward and backward": 75, "decoding, static cache": 45}


@cache
def measured():
    return {what: operator_counts.count(call) for what, call in operator_counts.calls("gqe").items()}


@pytest.mark.parametrize("what", BOUNDS)
def test_the_layer_runs_no_more_kernels_than_its_bound(what):
    count = measured()[what]
    assert count.total <= BOUNDS[what], count.kernels


def test_the_committed_counts_are_those_of_this_code():
    held = json.loads(operator_counts.RESULT.read_text(encoding="utf-8"))
    if held["environment"]["torch"] != version("torch"):
        pytest.skip(f"counted with torch {held['environment']['torch']}")
    for what, count in measured().items():
        assert held["counts"][what]["gqe"]["kernels"] == count.kernels


def test_operators_inside_registered_operators_are_counted_and_views_apart():
    @torch.library.custom_op("query_experts::twice_plus_one", mutates_args=())
    def twice_plus_one(x: torch.Tensor) -> torch.Tensor:
        return (x.t() * 2 + 1).contiguous()

    x = torch.ones(3, 2)
    count = operator_counts.count(lambda: twice_plus_one(x) - 1)
    assert count.kernels == {"mul": 1, "add": 1, "clone": 1, "sub": 1}
    assert count.views >= 1


def test_launches_of_triton_kernels_are_counted():
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    def fill(target, size: tl.constexpr):
        tl.store(target + tl.arange(0, size), 1.0)

    kernel, target = interpreter.InterpretedFunction(fill), torch.zeros(8)

    def call():
        kernel[(1,)](target, 8)
        target.add_(1)

    count = operator_counts.count(call)
    assert (count.launches, count.kernels, count.total) == ({"fill": 1}, {"add_": 1}, 2)
