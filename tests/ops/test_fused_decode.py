"""The decode kernel against `shared_decode`: in Triton's interpreter on a CPU, compiled on a GPU; in float32."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from model_helpers import random_tokens, tiny_model
from query_experts.layers.attention import GQEAttention
from query_experts.ops.shared_decode import shared_decode

pytest.importorskip("triton")
fused_module = pytest.importorskip("query_experts.ops.fused_decode")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 0.0, "atol": 3e-6}  # float32 softmax and sums of at most 333 products of order 1, in another order


def draw(B, G, k, S, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, G, k, 1, d), (B, 1, d), (B, G, S, d), (B, G, S, d)]
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def draw_mask(rows, S, seed=1):
    mask = torch.rand(rows, 1, 1, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 0] = True
    return mask.to(DEVICE)


def assert_equal_outputs(inputs, mask, scaling=0.3):
    expected = shared_decode(*inputs, mask, scaling)[:2]
    for actual, reference in zip(fused_module.fused_decode(*inputs, mask, scaling), expected, strict=True):
        torch.testing.assert_close(actual, reference, **CLOSE)


def test_it_equals_plain_decoding_over_random_shapes():
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the shapes")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        B=st.integers(1, 3), G=st.integers(1, 5), k=st.integers(1, 3), S=st.integers(1, 333), d=st.integers(1, 20),
        rows=st.sampled_from([None, 1, "B"]),
    )  # fmt: skip
    def check(B, G, k, S, d, rows):
        assert_equal_outputs(draw(B, G, k, S, d), None if rows is None else draw_mask(B if rows == "B" else 1, S))

    check()


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_any_number_of_pieces_gives_the_same(monkeypatch, piece):
    monkeypatch.setattr(fused_module, "PIECES_PER_PROCESSOR", piece)
    monkeypatch.setattr(fused_module, "TILE", 512)  # four keys of 8 heads of 16 numbers
    assert_equal_outputs(draw(1, 8, 1, 57, 16), draw_mask(1, 57))


def test_a_query_without_a_key_gives_zeros_and_large_scores_stay_finite():
    inputs, mask = draw(2, 2, 2, 40, 8), draw_mask(2, 40)
    mask[1] = False
    routed, shared = fused_module.fused_decode(*inputs, mask, 0.3)
    assert not routed[1].any()
    assert not shared[1].any()
    routed, shared, key, value = ((2 * t).round() for t in inputs)  # whole numbers, so that scores are exact
    assert_equal_outputs([1024 * routed, 1024 * shared, key, value], None, scaling=0.25)


def test_keys_and_values_are_read_in_any_memory_layout():
    routed, shared, key, value = draw(2, 3, 1, 30, 8)
    sliced = torch.cat([key, key], 2)[:, :, 3:33], value.transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal_outputs([routed, shared, *sliced], None)
    assert_equal_outputs([routed, shared, key.mT.contiguous().mT, value], None)


def test_a_mask_that_is_a_slice_of_a_wider_one_is_read_in_place():
    wide = draw_mask(2, 50)
    assert_equal_outputs(draw(2, 2, 1, 30, 8), wide[..., :30])
    with pytest.raises(ValueError, match="mask has 50 columns; it must have one for each of the 30 keys"):
        fused_module.fused_decode(*draw(2, 2, 1, 30, 8), wide, 0.3)


def test_the_operator_follows_torch_s_rules_for_custom_operators():
    routed, shared, key, value = draw(2, 2, 2, 20, 8)
    for mask in (torch.empty(0, dtype=torch.bool, device=DEVICE), draw_mask(2, 20)[:, 0, 0]):
        torch.library.opcheck(
            torch.ops.query_experts.fused_decode, (routed[:, :, :, 0], shared[:, 0], key, value, mask, 0.3)
        )


@pytest.fixture
def calls(monkeypatch):
    """Turns the kernel on and counts its calls."""
    counted = []
    original = fused_module.fused_decode
    monkeypatch.setattr(fused_module, "fused_decode", lambda *args: counted.append(1) or original(*args))
    monkeypatch.setattr(GQEAttention, "fused_decode", True)
    return counted


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{}, {"active_query_experts": 2, "output_projection": "expert"}], ids=str)
@torch.no_grad()
def test_a_model_decodes_with_it_as_without_a_cache(calls, kind, options):
    model = tiny_model(**options).float().to(DEVICE).eval()
    tokens = random_tokens(2, 20).to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(tokens, attention_mask=mask, position_ids=positions).logits
    model(tokens[:, :15], attention_mask=mask[:, :15], position_ids=positions[:, :15], past_key_values=cache)
    for at in range(15, 20):
        out = model(
            tokens[:, at : at + 1], attention_mask=mask[:, : at + 1], position_ids=positions[:, at : at + 1],
            past_key_values=cache,
        )  # fmt: skip
        torch.testing.assert_close(out.logits[:, 0], expected[:, at], rtol=0, atol=2e-5)
    assert len(calls) == 5 * model.config.num_hidden_layers


def test_what_it_does_not_support_is_decoded_without_it(calls):
    def step(x, **options):
        layer = GQEAttention(32, 4, 2, **options).to(DEVICE, x.dtype)
        cache = DynamicCache()
        layer(x, past_key_values=cache)
        return layer(x[:, :1], past_key_values=cache)

    x = torch.randn(1, 9, 32, device=DEVICE)
    assert step(x).requires_grad
    layer = GQEAttention(32, 4, 2).to(DEVICE).requires_grad_(False)
    layer.v_proj.requires_grad_(True)
    layer(x[:, :1], past_key_values=DynamicCache()).sum().backward()
    assert not calls
    with torch.no_grad():
        step(x.double())
        step(x, attn_implementation="eager")
        assert not calls
        step(x)
    assert len(calls) == 1


@torch.no_grad()
def test_compiled_decoding_calls_it(monkeypatch):
    monkeypatch.setattr(GQEAttention, "fused_decode", True)
    torch._dynamo.reset()
    model = tiny_model().float().to(DEVICE).eval()
    tokens = random_tokens(1, 12).to(DEVICE)
    expected = model(tokens).logits[:, -1]
    cache = StaticCache(model.config, max_cache_len=16)
    model(tokens[:, :11], past_key_values=cache)
    called = []

    def note(graph, _):
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    step = torch.compile(model, fullgraph=True, backend=note)
    torch.testing.assert_close(step(tokens[:, 11:], past_key_values=cache).logits[:, 0], expected, rtol=0, atol=2e-5)
    kernel = torch.ops.query_experts.fused_decode
    assert sum(target in (kernel, kernel.default) for target in called) == model.config.num_hidden_layers
