"""What only a CUDA device can show: FlexAttention backwards, bf16 kernels, compiled decoding. Skipped without one."""

import pytest
import torch
from transformers import StaticCache

from query_experts import GQEAttention, GQEConfig, GQEForCausalLM
from query_experts.ops.shared_decode import shared_decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tiny(**changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 101, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
    return GQEForCausalLM(GQEConfig(**settings | changes)).cuda()


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
    for ours, reference in zip(gradients["flex_attention"], gradients["sdpa"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-3, atol=2e-5)  # float32 kernels may use tf32


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
    y, own = half(x, output_routing=True)
    plain = eager(x)
    same = (own.indices == routing.indices).all(-1).all(-1)  # a token whose routing flipped can't be compared
    assert same.float().mean() > 0.9
    error, allowed = ((t.double() - reference)[same].abs().mean() for t in (y, plain))
    assert error <= 2 * allowed


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 1, 4097, 64), (8, 8, 2, 777, 128), (3, 2, 4, 65, 96)], ids=str)
def test_the_decode_kernel_errs_at_most_twice_as_much_as_the_plain_one(shape, dtype):
    fused = pytest.importorskip("query_experts.ops.fused_decode")
    B, G, k, S, d = shape
    torch.manual_seed(0)
    shapes = [(B, G, k, 1, d), (B, 1, d), (B, G, S, d), (B, G, S, d)]
    inputs = [torch.randn(*shape, device="cuda").to(dtype) for shape in shapes]
    mask = torch.rand(B, 1, 1, S, device="cuda") < 0.8
    mask[..., 0] = True
    exact = shared_decode(*(t.double() for t in inputs), mask, d**-0.5)[:2]
    plain = shared_decode(*inputs, mask, d**-0.5)[:2]
    for ours, usual, reference in zip(fused.fused_decode(*inputs, mask, d**-0.5), plain, exact, strict=True):
        error, allowed = ((t.double() - reference).abs().max() for t in (ours, usual))
        assert error <= 2 * allowed
