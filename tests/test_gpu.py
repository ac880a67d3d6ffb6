"""Tests that need a CUDA device, the most wanted first: the GPU suite may cut off what comes last."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache, TrainingArguments

from query_experts import GQEAttention, GQEConfig, GQEForCausalLM
from query_experts.bench.correctness import check_layer
from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings
from query_experts.common.timing import as_cuda_graph
from query_experts.convert import convert_model, from_dense
from query_experts.distillation import DistillationTrainer, TopKSchedule
from query_experts.ops import attend
from query_experts.ops.select import scatter_experts, select_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


SIZE = {"vocab_size": 101, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    return GQEForCausalLM(GQEConfig(**SIZE | changes)).cuda()


def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, initializer_range=0.1)).cuda().eval()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("arm", "shape"),
    [("gqe", {}), ("gqe", {"num_attention_heads": 12, "num_key_value_heads": 3, "active_query_experts": 2}),
     ("gqe-expert", {"num_attention_heads": 32, "head_dim": 128}), ("dense-fused", {})],
    ids=["paper", "odd", "expert", "dense"],
)  # fmt: skip
def test_the_kernels_err_at_most_twice_as_much_as_a_plain_run_forwards_backwards_and_in_decoding(arm, shape, dtype):
    settings = BenchSettings(device="cuda", dtype=dtype, kernels="triton", **shape)
    layer = Layer(settings, arm, "cuda", 1024)
    assert layer.kernels == "triton"
    checks = list(check_layer(layer, arm, ["chunk", "decode", "train"]))
    assert len(checks) > 9
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


def test_two_runs_by_the_kernels_are_bit_equal():
    """With attention by matrix products: the backward passes of flash and cuDNN add in any order."""
    layer = Layer(BenchSettings(device="cuda", kernels="triton", sdpa_backend="math"), "gqe", "cuda", 1024)
    x = layer.hidden(2, 333).requires_grad_()
    wanted = [x, *layer.module.parameters()]
    runs = [torch.autograd.grad(layer.forward(x, layer.inputs(x, 0, None)).square().sum(), wanted) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_step_replayed_as_a_cuda_graph_gives_the_output_of_the_call(kernels):
    settings = BenchSettings(device="cuda", dtype="float32", kernels=kernels)
    layer = Layer(settings, "gqe", "cuda", 300)
    call = layer.cached("static", 2, 256, 1)
    outputs = []
    replay = as_cuda_graph(lambda: outputs.append(call()))
    outputs[-1].zero_()
    replay()
    torch.testing.assert_close(outputs[-1], call())


def test_one_call_of_attention_and_two_have_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    layer = GQEAttention(128, 8, 4, rope_theta=10_000.0).cuda().double()
    x = torch.randn(2, 333, 128, device="cuda", dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    one = torch.autograd.grad(layer(x).square().sum(), inputs)
    monkeypatch.setattr(attend, "ONE_CALL_TOKENS", 0)
    two = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_are_selected_and_written_with_their_gradients_as_on_a_cpu(top_k):
    torch.manual_seed(0)
    rows = torch.randn(2, 63, 3, 4, 40)
    indices = torch.rand(rows.shape[:4]).argsort(-1)[..., :top_k]
    results = {}
    for device in ("cpu", "cuda"):
        at, index = rows.to(device).requires_grad_(), indices.to(device)
        selected = select_experts(at, index)
        written = scatter_experts(selected.sin(), index, 4)
        results[device] = [t.cpu() for t in (selected, written, *torch.autograd.grad(written.square().sum(), at))]
    torch.testing.assert_close(results["cuda"], results["cpu"])


def test_a_bf16_layer_errs_at_most_twice_as_much_as_a_plain_bf16_run():
    torch.manual_seed(0)
    layer = GQEAttention(128, 8, 4, rope_theta=10_000.0).cuda().double()
    x = torch.randn(2, 333, 128, device="cuda", dtype=torch.float64).bfloat16()
    reference, routing = layer(x.double(), output_routing=True)
    half = GQEAttention(128, 8, 4, rope_theta=10_000.0).cuda()
    half.load_state_dict(layer.state_dict())
    half.bfloat16()
    eager = GQEAttention(128, 8, 4, rope_theta=10_000.0, attn_implementation="eager").cuda()
    eager.load_state_dict(layer.state_dict())
    eager.bfloat16()
    y, half_routing = half(x, output_routing=True)
    plain = eager(x)
    same = (half_routing.indices == routing.indices).all(-1).all(-1)  # a token with other experts can't be compared
    assert same.float().mean() > 0.9
    error, plain_error = ((t.double() - reference)[same].abs().mean() for t in (y, plain))
    assert error <= 2 * plain_error


@torch.no_grad()
def test_a_converted_model_gives_the_logits_and_the_tokens_of_the_dense_one():
    model = dense().double()
    converted = from_dense(model)
    tokens = torch.randint(1, 101, (2, 63), device="cuda")
    torch.testing.assert_close(converted(tokens).logits, model(tokens).logits, rtol=0, atol=1e-9)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(converted.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("output_projection", ["expert", "slot"])
def test_calibrating_on_a_gpu_gives_the_result_of_the_cpu(output_projection):
    text = torch.randint(1, 101, (10, 128))
    models, reports = {}, {}
    for device in ("cuda", "cpu"):
        models[device], reports[device] = convert_model(
            dense().double().to(device), 1, output_projection=output_projection, calibration=text
        )
    assert reports["cuda"].kl == pytest.approx(reports["cpu"].kl, rel=1e-4)
    expected = models["cpu"].state_dict()
    for name, tensor in models["cuda"].state_dict().items():
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=1e-4, atol=1e-4, msg=name)  # fitted in float32


def test_distilling_in_bf16_brings_a_sparse_model_closer_to_its_teacher(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    teacher = dense()
    student = from_dense(teacher, 1)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 101, (32, 64))]
    trainer = DistillationTrainer(
        model=student, teacher=teacher, weight=1.0, train_dataset=rows, callbacks=[TopKSchedule(1, 0.25)],
        args=TrainingArguments(
            str(tmp_path), bf16=True, max_steps=40, learning_rate=3e-3, per_device_train_batch_size=8,
            logging_steps=10, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    tokens = torch.stack([row["input_ids"] for row in rows]).cuda()

    @torch.no_grad()
    def divergence(model):
        logs = [m.eval()(tokens).logits.log_softmax(-1) for m in (model, teacher)]
        return float(torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True))

    before = divergence(from_dense(teacher, 1))
    trainer.train()
    assert student.config.active_query_experts == 1
    assert divergence(student) < 0.8 * before


def test_compiled_decoding_over_a_static_cache_equals_uncached_logits():
    model = tiny().eval()
    tokens = torch.randint(1, 101, (2, 40), device="cuda")
    with torch.no_grad():
        expected = model(tokens).logits
        cache = StaticCache(config=model.config, max_cache_len=64)
        step = torch.compile(model, fullgraph=True)
        logits = [model(tokens[:, :20], past_key_values=cache).logits]
        logits += [step(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(20, 40)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_flex_attention_has_the_gradients_of_sdpa(top_k):
    model = tiny(active_query_experts=top_k)
    tokens = torch.randint(1, 101, (2, 255), device="cuda")
    positions = torch.cat([torch.arange(100), torch.arange(155)]).expand(2, -1).cuda()
    gradients = {}
    for backend in ("sdpa", "flex_attention"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        model(tokens, position_ids=positions, labels=tokens, use_cache=False).loss.backward()
        gradients[backend] = [p.grad.clone() for p in model.parameters()]
    for actual, expected in zip(gradients["flex_attention"], gradients["sdpa"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-5)  # float32 kernels may compute in tf32
