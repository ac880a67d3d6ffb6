"""The kernels of a benchmark: dense attention by those of GQE, what ran, and speed over both baselines."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch

from query_experts.bench import correctness
from query_experts.bench.correctness import check_layer
from query_experts.bench.models import Layer, Model
from query_experts.bench.report import header
from query_experts.bench.results import PointResult, read_bench
from query_experts.bench.run import bench, predicted_speedup
from query_experts.bench.settings import SUITES, BenchSettings
from query_experts.common.errors import SettingError
from query_experts.common.formatting import DASH, TIMES
from query_experts.layers import fused
from query_experts.layers.attention import GQEAttention
from query_experts.ops import kernels
from study_helpers import quiet, said

SMALL = BenchSettings(
    device="cpu", dtype="float32", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, num_hidden_layers=1, vocab_size=64, lengths=[16], chunk_size=8, train_lengths=[16],
    cached_lengths=[16], batch_sizes=[1], repeats=2, arms=["dense", "dense-fused", "gqe"],
)  # fmt: skip


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the Triton kernels computed a layer."""
    calls, original = [], fused.fused_attention

    def spy(layer, *args, **kwargs):
        calls.append(layer)
        return original(layer, *args, **kwargs)

    monkeypatch.setattr(fused, "fused_attention", spy)
    return calls


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_dense_fused_computes_what_stock_llama_computes_from_the_same_weights(kind, fused_calls):
    settings = replace(SMALL, kernels=kind)
    outputs, gradients = [], []
    for arm in ("dense", "dense-fused"):
        model = Model(settings, arm, "cpu", 64).module.double()
        tokens = torch.arange(14).view(2, 7) + 1
        out = model(tokens, labels=tokens)
        out.loss.backward()
        outputs.append(out.logits)
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert bool(fused_calls) == (kind == "triton")


def test_dense_fused_has_the_costs_of_dense():
    for suite in SUITES:
        if suite != "parts":
            point = PointResult(suite, 16, 1, "static", seconds={"dense": [1.0]}, peak_bytes={"dense": 1},
                                predicted={"dense": 1.0})  # fmt: skip
            assert predicted_speedup(point, "dense-fused", SMALL) == 1


@pytest.mark.parametrize(("kind", "arm"), [("torch", "dense-fused"), ("triton", "dense-fused"), ("triton", "gqe")])
def test_the_correctness_check_passes_the_kernels(kind, arm, fused_calls, monkeypatch):
    monkeypatch.setattr(correctness, "LENGTH", 33)  # as Triton's interpreter takes its time
    suites = ["prefill", "decode", "train"]
    checks = list(check_layer(Layer(replace(SMALL, kernels=kind), arm, "cpu", 64), arm, suites))
    assert {"prefill", "decoding, static cache", "decoding one sequence", "the gradient of q_proj.weight"} <= {
        c.what for c in checks
    }
    assert all(check.passed for check in checks), checks
    assert bool(fused_calls) == (kind == "triton")


@pytest.mark.parametrize("arm", ["dense-fused", "gqe"])
def test_the_correctness_check_stops_wrong_kernels(monkeypatch, arm):
    monkeypatch.setattr(correctness, "LENGTH", 33)
    combine = fused.combine
    monkeypatch.setattr(fused, "combine", lambda *args: combine(*args) * 1.1)
    checks = check_layer(Layer(replace(SMALL, kernels="triton"), arm, "cpu", 1024), arm, ["prefill"])
    assert [check.passed for check in checks] == [False]


def test_the_correctness_check_stops_a_wrong_dense_fused_on_the_plain_path(monkeypatch):
    project = GQEAttention.project_queries
    monkeypatch.setattr(GQEAttention, "project_queries", lambda *args: [query * 1.1 for query in project(*args)])
    checks = check_layer(Layer(SMALL, "dense-fused", "cpu", 1024), "dense-fused", ["prefill"])
    assert [check.passed for check in checks] == [False]


def test_a_benchmark_says_what_ran_and_prints_speed_over_both_baselines(tmp_path):
    console = quiet()
    bench(replace(SMALL, out=str(tmp_path), suites=["prefill"]), console)
    printed = " ".join(said(console).split())
    assert "All arms: sdpa, eager calls, float32, on " in printed
    assert "Stock Llama: dense. Kernels: auto, which is torch for dense-fused, gqe." in printed
    assert f"{TIMES} dense {TIMES} fused" in printed
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["settings"]["kernels"] == "auto"
    assert result["kernels"] == {"dense": "stock", "dense-fused": "torch", "gqe": "torch"}
    assert "gqe over dense-fused" in (tmp_path / "bench.svg").read_text()
    (point,) = read_bench(tmp_path / "bench.json").speed_points()
    low = min(own / other for own, other in zip(point.seconds["dense-fused"], point.seconds["gqe"], strict=True))
    assert f"{low:.2f}{DASH}" in said(console)


def test_the_header_names_the_backend_the_mode_and_what_the_kernels_are(tmp_path):
    bench(replace(SMALL, out=str(tmp_path), suites=["prefill"], arms=["dense", "gqe"], kernels="torch"), quiet())
    result = read_bench(tmp_path / "bench.json")
    settings = replace(result.settings, sdpa_backend="flash", compile=True, cuda_graph=True)
    told = header(dataclasses.replace(result, settings=settings, kernels={"dense": "stock", "gqe": "triton"}))
    assert told.startswith("All arms: sdpa (flash), compiled in CUDA graphs, float32, on ")
    assert "Stock Llama: dense. Kernels: triton for gqe. Triton interprets its kernels on a CPU" in told
    assert "Kernels" not in header(dataclasses.replace(result, kernels=None))


def test_without_dense_fused_there_is_no_speed_over_it():
    seconds = {"dense": [2.0], "gqe": [1.0]}
    point = PointResult("prefill", 16, seconds=seconds, peak_bytes=dict.fromkeys(seconds, 1),
                        predicted=dict.fromkeys(seconds, 1.0))  # fmt: skip
    assert point.speedup_over_fused("gqe") is None
    seconds = {"dense": [2.0], "dense-fused": [1.5], "gqe": [1.0]}
    point = replace(point, seconds=seconds, peak_bytes=dict.fromkeys(seconds, 1), predicted=dict.fromkeys(seconds, 1.0))
    assert point.speedup_over_fused("gqe") == (1.5, 1.5, 1.5)
    assert point.speedup_over_fused("dense-fused") is None


@pytest.mark.parametrize("value", [["True"], ["False"], []])
def test_fused_decode_ends_in_a_sentence_that_names_kernels(refused, value):
    refused(["bench", "--fused_decode", *value], "fused_decode is ", "kernels")


def test_triton_where_it_cannot_run_is_refused_before_anything_is_written(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    argv = ["bench", "--device", "cpu", "--kernels", "triton", "--out", tmp_path / "out"]
    refused(argv, "kernels is 'triton', which needs an NVIDIA GPU, where the device is cpu; it must be torch or auto")
    assert not (tmp_path / "out").exists()
    refused(["bench", "--kernels", "cuda"], "kernels is 'cuda'; it must be auto, torch or triton")


def test_triton_for_a_layout_that_it_does_not_cover_is_refused():
    with pytest.raises(SettingError, match="kernels is 'triton', which takes head_dim up to 256, where it is 512"):
        replace(SMALL, head_dim=512, kernels="triton").check()


def test_stages_alone_are_refused_by_triton_which_has_none(refused):
    refused(["bench", "--suites", "parts", "--kernels", "triton"], "kernels is 'triton'", "it must be torch or auto")
    with pytest.raises(SettingError, match="'parts' times the plain path's stages"):
        replace(SMALL, suites=["parts"], kernels="triton").check()
