"""The benchmark: predictions against counted FLOPs, the correctness check, the timed calls, and whole tiny runs."""

import functools
import json
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

import sparse_projection
from query_experts import GQEConfig
from query_experts.bench import run as bench_module
from query_experts.bench import settings as bench_settings
from query_experts.bench.breakdown import uniform_routing
from query_experts.bench.correctness import check_layer
from query_experts.bench.models import Layer, Model
from query_experts.bench.report import place_of
from query_experts.bench.results import Point
from query_experts.bench.run import bench, check_correctness, points_of, predicted_speedup
from query_experts.bench.settings import SUITES, BenchSettings
from query_experts.cli import main
from query_experts.common import timing
from query_experts.common.device import has_bfloat16
from query_experts.common.errors import SettingError
from query_experts.common.formatting import TIMES
from query_experts.layers import attention
from query_experts.layers.attention import GQEAttention
from query_experts.model import costs
from query_experts.ops import attend, select
from query_experts.ops.attend import CausalKernel
from study_helpers import quiet, said

SMALL = BenchSettings(
    device="cpu", dtype="float32", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8,
    intermediate_size=96, num_hidden_layers=2, vocab_size=128, lengths=[64, 128], chunk_size=32, train_lengths=[64],
    cached_lengths=[64, 128], batch_sizes=[1, 2], repeats=2,
)  # fmt: skip
ARMS = ["dense", "static", "gqe", "gqe-expert", "gqe-m4"]


def on_meta(arm, backward):
    """FLOPs that torch counts in one layer with eager attention: every product, over the full square; and weights."""
    layer = Layer(replace(SMALL, attn_implementation="eager"), arm, "cpu", 128)
    layer.module.to("meta")
    x = torch.empty(2, 24, 64, device="meta", requires_grad=backward)
    angles = torch.empty(1, 24, 8, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = layer.module(x, position_embeddings=(angles, angles), attention_mask=None)[0]
        if backward:
            y.backward(torch.empty_like(y))
    return counter.get_total_flops(), sum(p.numel() for p in layer.module.parameters())


def weighted_slots(config, tokens, backward=False):
    """FLOPs of the weighted slot, which torch doesn't count: 2d for each selected head; two gradients, or one where
    nothing is routed."""
    if not isinstance(config, GQEConfig) or config.variant != "gqe":
        return 0
    times = 1 if not backward else 2 if config.routing == "none" else 3
    return times * tokens * 2 * config.head_dim * (costs.heads(config).active - 1)


@pytest.mark.parametrize("arm", ARMS)
def test_flops_and_weights_of_a_layer_are_those_that_torch_counts(arm):
    config = SMALL.config(arm, 128)
    counted, weights = on_meta(arm, backward=False)
    assert costs.layer_work(config, 2, 24, causal=False).flops == counted + weighted_slots(config, 2 * 24)
    assert costs.layer_work(config, 1, 0).bytes == 2 * weights


@pytest.mark.parametrize("arm", [*ARMS, "frozen", "hard", "weighted"])
def test_flops_forwards_and_backwards_are_those_that_torch_counts_but_for_the_flash_kernels_second_scores(arm):
    config = SMALL.config(arm, 128)
    both, forward = (costs.layer_work(config, 2, 24, causal=False, backward=b) for b in (True, False))
    counted = on_meta(arm, backward=True)[0] + weighted_slots(config, 2 * 24, backward=True)
    assert both.projection_flops + 3 * forward.attention_flops == counted
    assert both.attention_flops == 3.5 * forward.attention_flops


def test_causal_work_leaves_out_the_pairs_that_a_token_cannot_see():
    config = SMALL.config("dense", 128)
    square, causal = (costs.layer_work(config, 3, 24, 10, causal=c).attention_flops for c in (False, True))
    assert square - causal == 3 * 4 * 8 * 8 * 24 * 23 / 2
    one = costs.layer_work(config, 1, 1, 99).attention_flops
    assert one == 4 * 8 * 8 * 100


def test_a_models_flops_are_those_that_torch_counts_but_for_the_masked_half_and_the_other_tokens_logits():
    for arm in ARMS:
        model = Model(SMALL, arm, "cpu", 128)
        model.module.set_attn_implementation("eager")
        tokens = model.tokens(1, 24)
        with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
            model.module(tokens, use_cache=False, logits_to_keep=1)
        rotary = counter.get_flop_counts().get(f"{type(model.module).__name__}.model.rotary_emb", {})
        masked = 2 * 4 * 8 * costs.heads(model.config).active * 24 * 23 / 2
        counted = counter.get_total_flops() + 2 * weighted_slots(model.config, 24)
        assert costs.model_work(model.config, 1, 24).flops == counted - masked - sum(rotary.values())


def test_predictions_are_ratios_of_work():
    settings = BenchSettings(lengths=[10**6], cached_lengths=[10**6])
    assert predicted_speedup(Point("prefill", 10**6), "gqe", settings) == pytest.approx(16 / 9, abs=0.01)
    assert predicted_speedup(Point("train", 10**6), "gqe", settings) == pytest.approx(16 / 9, abs=0.01)
    assert predicted_speedup(Point("decode", 10**6, 1, "static"), "gqe", settings) == pytest.approx(1, abs=0.01)
    assert predicted_speedup(Point("prefill", 1), "dense", settings) == 1
    for suite in ("prefill", "chunk", "decode", "train", "model", "model-train"):
        assert 0.9 < predicted_speedup(Point(suite, 4096, 1, "static"), "gqe", settings) < 16 / 9


@pytest.mark.parametrize("arm", ARMS)
def test_the_correctness_check_passes_correct_arms(arm):
    for dtype in ("float32", "bfloat16"):
        settings = replace(SMALL, dtype=dtype)
        checks = list(check_layer(Layer(settings, arm, "cpu", 1024), arm, SUITES))
        whats = [check.what for check in checks]
        decoding = ["decoding, dynamic cache", "decoding, static cache", "decoding one sequence"]
        assert whats[:5] == ["prefill", "a chunk", *decoding]
        assert {"the gradient of x", "the gradient of q_proj.weight"} <= set(whats)
        assert ("the gradient of router.weight" in whats) == (arm not in ("dense", "static"))
        assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_correctness_check_stops_a_slightly_wrong_arm_before_anything_is_timed(monkeypatch, dtype):
    attend = CausalKernel.forward

    def wrong(self, *args, **kwargs):
        out, weights = attend(self, *args, **kwargs)
        return out * (1.1 if self.config._attn_implementation == "sdpa" else 1), weights

    monkeypatch.setattr(CausalKernel, "forward", wrong)
    with pytest.raises(SettingError, match=r"arms holds gqe, which is wrong in prefill: .* nothing is timed"):
        check_correctness(replace(SMALL, arms=["dense", "gqe"], dtype=dtype), "cpu")
    monkeypatch.setattr(bench_module, "measure", lambda *args: pytest.fail("timed"))
    with pytest.raises(SettingError, match="nothing is timed"):
        bench(replace(SMALL, arms=["dense", "gqe"], dtype=dtype), quiet())


def zeroed_where(condition):
    """route_and_attend of the layer, its output zeroed where `condition(x, cache)` holds."""
    original = GQEAttention.route_and_attend

    def zeroed(self, x, mask, cos_sin, cache, **kwargs):
        y, *rest = original(self, x, mask, cos_sin, cache, **kwargs)
        return y * (0 if condition(x, cache) else 1), *rest

    return zeroed


@pytest.mark.parametrize(
    ("what", "condition"),
    [
        ("a chunk", lambda x, cache: cache is not None and x.shape[1] == 101),
        ("decoding, dynamic cache", lambda x, cache: isinstance(cache, DynamicCache) and x.shape[:2] == (2, 1)),
        ("decoding one sequence", lambda x, cache: isinstance(cache, DynamicCache) and x.shape[:2] == (1, 1)),
        ("decoding, static cache", lambda x, cache: isinstance(cache, StaticCache) and x.shape[1] == 1),
    ],
)
def test_the_correctness_check_covers_every_path_that_is_timed(monkeypatch, what, condition):
    monkeypatch.setattr(GQEAttention, "route_and_attend", zeroed_where(condition))
    assert [c.what for c in check_layer(Layer(SMALL, "gqe", "cpu", 1024), "gqe", SUITES) if not c.passed] == [what]


def test_the_correctness_check_covers_no_more_than_is_timed():
    for suites, whats in {("prefill",): ["prefill"], ("model", "chunk"): ["prefill", "a chunk"]}.items():
        assert [c.what for c in check_layer(Layer(SMALL, "gqe", "cpu", 1024), "gqe", suites)] == whats


def test_the_correctness_check_covers_the_projection_of_only_the_selected_experts(monkeypatch):
    project = select.project_selected_rows
    monkeypatch.setattr(select, "project_selected_rows", lambda *args: project(*args) * 0)
    layer = Layer(replace(SMALL, num_attention_heads=16), "gqe", "cpu", 1024)
    assert [c.what for c in check_layer(layer, "gqe", SUITES) if not c.passed] == ["decoding one sequence"]


def test_the_correctness_check_covers_gradients(monkeypatch):
    project = GQEAttention.project_queries

    def without_gradient(self, *args):
        queries = project(self, *args)
        return [query.detach() for query in queries] if self.config._attn_implementation == "sdpa" else queries

    monkeypatch.setattr(GQEAttention, "project_queries", without_gradient)
    layer = Layer(SMALL, "gqe", "cpu", 1024)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        list(check_layer(layer, "gqe", SUITES))


def test_the_correctness_check_covers_the_selection_of_experts(monkeypatch):
    monkeypatch.setattr(attention, "select_top_k", lambda logits, k: logits.argmin(-1, keepdim=True))
    assert not next(iter(check_layer(Layer(SMALL, "gqe", "cpu", 1024), "gqe", SUITES))).passed


def test_the_correctness_check_covers_gqe_where_only_its_parts_are_timed(monkeypatch):
    monkeypatch.setattr(attention, "select_top_k", lambda logits, k: logits.argmin(-1, keepdim=True))
    with pytest.raises(SettingError, match="arms holds gqe, which is wrong in prefill"):
        check_correctness(replace(SMALL, arms=["dense"], suites=["parts"]), "cpu")


@pytest.mark.full
def test_a_compiled_arm_is_compiled_at_every_point(monkeypatch):
    """A Python profiler sees whether the layer's own code runs, as it does where Dynamo falls back to eager."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = replace(SMALL, compile=True, suites=["prefill", "decode"])
    eager = []

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_name == "route_and_attend":
            eager.append(point)

    check_correctness(settings, "cpu")
    for point in points_of(settings):
        call = bench_module.call_of(point, Layer(settings, "gqe", "cpu", 200), settings)
        call()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    assert eager == []


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("arm", ["dense", "gqe"])
@pytest.mark.parametrize("new", [1, 12])
def test_a_timed_call_leaves_its_cache_unchanged(arm, kind, new):
    call = Layer(SMALL, arm, "cpu", 128).cached(kind, 2, 40, new)
    first = call()
    for _ in range(3):
        torch.testing.assert_close(call(), first, rtol=0, atol=0)


@pytest.mark.parametrize("arm", ["dense", "static", "gqe"])
def test_a_timed_call_gives_the_same_with_both_caches(arm):
    layer = Layer(SMALL, arm, "cpu", 128)
    static, dynamic = (layer.cached(kind, 2, 40, 3)() for kind in ("static", "dynamic"))
    torch.testing.assert_close(static, dynamic, rtol=0, atol=1e-5)


def test_training_calls_form_all_gradients_and_leave_none():
    layer = Layer(SMALL, "gqe", "cpu", 128)
    formed = set()
    for name, weight in layer.module.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda p, name=name: formed.add(name) if p.grad.any() else None)
    layer.train(1, 24)()
    assert formed == {name for name, _ in layer.module.named_parameters()}
    assert all(weight.grad is None for weight in layer.module.parameters())


def test_arms_take_turns_in_going_first():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    timing.LEAST_SECONDS, kept = 0.0, timing.LEAST_SECONDS
    try:
        timing.time_interleaved(calls, 3, "cpu")
    finally:
        timing.LEAST_SECONDS = kept
    assert order == list("abc" * 2 + "abc" + "bca" + "cab")


def test_a_short_call_is_repeated_next_to_a_long_one():
    counts = Counter()

    def call(name, seconds):
        counts[name] += 1
        time.sleep(seconds)

    timing.time_interleaved(
        {name: lambda n=name, s=s: call(n, s) for name, s in [("long", 0.03), ("short", 0.001)]}, 2, "cpu"
    )
    assert counts["long"] == 4
    assert 20 <= counts["short"] <= 42


def test_each_call_has_the_same_number_of_timings():
    seconds = timing.time_interleaved({name: lambda: None for name in "abc"}, 3, "cpu")
    assert [len(times) for times in seconds.values()] == [3, 3, 3]


def test_peak_memory_is_what_a_call_takes_beyond_what_was_allocated():
    allocated = torch.ones(1_000_000)
    assert timing.peak_bytes(lambda: (allocated[:500_000] + 1).sum(), "cpu") == pytest.approx(2e6, abs=1e3)
    assert timing.peak_bytes(lambda: allocated.sum(), "cpu") < 1e3
    assert timing.peak_bytes(lambda: (allocated + 1, allocated + 2), "cpu") == pytest.approx(8e6, abs=1e3)


def test_peak_memory_of_training_counts_the_gradients():
    layer = Layer(SMALL, "dense", "cpu", 128)
    weights = sum(4 * p.numel() for p in layer.module.parameters())
    inputs = 4 * 64 * 64
    assert timing.peak_bytes(layer.train(1, 64), "cpu") > weights + inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["prefill", "train"])
def test_gqe_takes_no_more_memory_than_dense(kind, dtype):
    """At the paper's proportions, with D = N * d."""
    if dtype == "bfloat16" and not has_bfloat16("cpu"):
        pytest.skip("this processor has no instructions for bf16, and emulating them takes additional scratch space")
    settings = replace(SMALL, dtype=dtype, hidden_size=128, num_attention_heads=16, num_key_value_heads=8)
    dense, gqe = (
        timing.peak_bytes(getattr(Layer(settings, arm, "cpu", 2048), kind)(1, 2048), "cpu") for arm in ("dense", "gqe")
    )
    assert gqe < dense


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["prefill", "train"])
def test_gqe_takes_no_more_memory_than_dense_in_one_call_of_attention_either(kind, dtype, length, monkeypatch):
    """In the paper's layout."""
    if dtype == "bfloat16" and not has_bfloat16("cpu"):
        pytest.skip("this processor has no instructions for bf16, and emulating them takes additional scratch space")
    if (dtype, length) == ("bfloat16", 1024) and torch.cpu._is_amx_tile_supported():
        pytest.skip("attention by AMX takes scratch space for each thread, whatever the length")
    monkeypatch.setattr(attend, "ONE_CALL_TOKENS_CPU", 8192)
    settings = BenchSettings(device="cpu", dtype=dtype)
    dense, gqe = (
        timing.peak_bytes(getattr(Layer(settings, arm, "cpu", length), kind)(1, length), "cpu")
        for arm in ("dense", "gqe")
    )
    assert gqe < dense


def test_uniform_routing_selects_every_expert_equally_often():
    routing = Layer(SMALL, "gqe", "cpu", 128).module.route(torch.randn(1, 64, 64))
    uniform = uniform_routing(routing)
    assert uniform.indices.shape == routing.indices.shape
    counts = torch.nn.functional.one_hot(uniform.indices, 4).sum((0, 1, 3))
    assert (counts == 16).all()


def test_every_suite_has_its_points():
    points = list(points_of(replace(SMALL, suites=list(SUITES))))
    assert [(p.suite, p.length) for p in points if p.suite != "decode"] == [
        ("prefill", 64), ("prefill", 128), ("chunk", 64), ("chunk", 128), ("train", 64), ("parts", 64), ("parts", 128),
        ("model", 64), ("model", 128), ("model-train", 64),
    ]  # fmt: skip
    assert len([p for p in points if p.suite == "decode"]) == 2 * 2 * 2
    (batched,) = points_of(replace(SMALL, suites=["train"], train_batch_size=8))
    assert (batched.batch, place_of(batched)) == (8, f"8{TIMES}64")


@pytest.mark.full
def test_the_command_measures_every_suite_and_ends_with_a_table_a_plot_and_one_json_line(tmp_path, capsys):
    assert main(["bench", "--preset", "tiny", "--out", str(tmp_path), "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.strip().splitlines()[-1])
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert {point["suite"] for point in result["points"]} == set(SUITES)
    assert result["environment"]["hardware"]
    assert all(check["passed"] for check in result["checks"])
    for point in result["points"]:
        assert all(len(times) == 1 and times[0] > 0 for times in point["seconds"].values())
        if point["suite"] != "parts":
            assert point["seconds"].keys() == point["peak_bytes"].keys() == point["predicted"].keys()
            assert point["predicted"]["dense"] == 1
    for suite in SUITES:
        assert f"{suite}: " in printed
    assert (tmp_path / "bench.svg").stat().st_size > 1000
    again = ["bench", "--preset", "tiny", "--out", str(tmp_path), "--repeats", "1", "--suites", "prefill"]
    assert main(again) == 0
    earlier = [json.loads(path.read_text()) for path in tmp_path.glob("bench-*.json")]
    assert earlier == [result]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"suites": ["prefil"]}, "suites holds 'prefil'; allowed are prefill"),
        ({"arms": ["gqe"]}, "must hold dense"),
        ({"arms": ["dense", "moe"]}, "arms holds 'moe'"),
        ({"caches": ["paged"]}, "caches holds 'paged'; allowed are static, dynamic"),
        ({"cuda_graph": True}, "cuda_graph is True, which needs a CUDA device; it must be False"),
        ({"lengths": []}, "lengths holds"),
        ({"batch_sizes": [0]}, "batch_sizes holds"),
        ({"repeats": 0}, "repeats is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"chunk_size": 64}, "chunk_size is 64; it must be below"),
        ({"active_query_experts": 9}, "active_query_experts"),
        ({"arms": ["dense"], "num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"suites": []}, "suites is empty"),
        ({"caches": []}, "caches is empty"),
        ({"attn_implementation": "nonsense"}, "attn_implementation is 'nonsense'; it must be one of"),
        ({"attn_implementation": "eager"}, "attn_implementation is 'eager'"),
        ({"compile": True}, "suites holds 'parts'"),
        ({"sdpa_backend": "fast"}, "sdpa_backend is 'fast'; it must be flash, cudnn, efficient, math or none"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4; it must be 1 or more"),
        ({"active_query_experts": 0}, "active_query_experts is 0; it must be 1 or more"),
        ({"head_dim": 15}, "head_dim is 15; rotary position embedding needs an even number"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000; with it .* need about"),
        ({"arms": ["dense", "gqe", "gqe"]}, "it must hold each once"),
        ({"lengths": [8, 8]}, "it must hold each number once"),
        ({"out": ""}, "out is empty"),
        (
            {"sdpa_backend": "cudnn", "device": "cpu"},
            "sdpa_backend is 'cudnn', which can't do what suites asks for on cpu",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(changes, sentence):
    with pytest.raises(SettingError, match=sentence):
        bench(replace(SMALL, **changes), quiet())


@pytest.mark.full
def test_tables_fit_eighty_columns(tmp_path):
    console = quiet()
    console.width = 80
    bench(
        replace(
            SMALL, out=str(tmp_path), suites=["prefill", "decode", "parts"], lengths=[64, 128, 192], repeats=1,
            arms=["dense", "dense-fused", "gqe"],
        ),
        console,
    )  # fmt: skip
    lines = said(console).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(("dtype", "native"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_emulated_bf16_prints_a_warning(tmp_path, monkeypatch, dtype, native):
    monkeypatch.setattr(bench_module, "has_bfloat16", lambda device: native)
    console = quiet()
    bench(replace(SMALL, out=str(tmp_path), suites=["prefill"], lengths=[64], repeats=1, dtype=dtype), console)
    assert ("has no instructions" in " ".join(said(console).split())) == (dtype == "bfloat16" and not native)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"suites": ["decode", "train"]}, r"suites holds \['decode', 'train'\]; with cuda_graph it must hold prefill"),
        ({"suites": ["decode"]}, r"caches holds \['static', 'dynamic'\]; with cuda_graph it must be static"),
    ],
)
def test_what_a_cuda_graph_cannot_replay_is_refused(monkeypatch, changes, sentence):
    monkeypatch.setattr(bench_settings, "check_device", lambda device: None)
    with pytest.raises(SettingError, match=sentence):
        replace(SMALL, device="cuda", cuda_graph=True, **changes).check()


def test_the_benchmark_of_sparse_projection_times_each_of_the_two_projections(monkeypatch):
    monkeypatch.setattr(select, "reads_selected_rows", select.reads_selected_rows)  # which the benchmark replaces
    project, projected = select.project_selected_rows, []
    monkeypatch.setattr(select, "project_selected_rows", lambda *args: projected.append(kind) or project(*args))
    calls = {}
    monkeypatch.setattr(sparse_projection, "time_interleaved", lambda timed, *_: calls.update(timed) or {})
    monkeypatch.setattr(sparse_projection, "CACHED", 16)
    sparse_projection.measure(heads=16)
    for kind in [*calls, *reversed(calls)]:
        calls[kind]()
    assert list(calls) == ["dense", "all", "woken"]
    assert projected == ["woken", "woken"]
