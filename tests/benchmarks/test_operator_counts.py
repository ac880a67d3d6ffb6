"""The kernels of one layer on the plain path stay within bounds, and the counter sees what it should."""

import json
from dataclasses import asdict
from functools import cache
from importlib.metadata import version

import pytest
import torch

import operator_counts

PREFILL, TRAINING, DECODING = "prefill with a cache", "training, forward and backward", "decoding, static cache"
BOUNDS = {
    "gqe": {PREFILL: 30, TRAINING: 75, DECODING: 45},
    "gqe, triton": {PREFILL: 8, TRAINING: 22, DECODING: 8},
    "dense-fused, triton": {PREFILL: 8, TRAINING: 22, DECODING: 8},
}


@cache
def measured(arm):
    if "triton" in arm:
        pytest.importorskip("triton")
    return {what: operator_counts.count(call) for what, call in operator_counts.calls(arm).items()}


@pytest.mark.parametrize("what", [PREFILL, TRAINING, DECODING])
@pytest.mark.parametrize("arm", BOUNDS)
def test_the_layer_runs_no_more_kernels_than_its_bound(arm, what):
    count = measured(arm)[what]
    assert count.total <= BOUNDS[arm][what], (count.kernels, count.launches)
    assert bool(count.launches) == ("triton" in arm)


def test_the_committed_counts_are_those_of_this_code():
    held = json.loads(operator_counts.RESULT.read_text(encoding="utf-8"))
    if held["environment"]["torch"] != version("torch"):
        pytest.skip(f"counted with torch {held['environment']['torch']}")
    for arm in BOUNDS:
        for what, count in measured(arm).items():
            assert held["counts"][what][arm] == asdict(count)


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
