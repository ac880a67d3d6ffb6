"""GQEAttention as a part of somebody's own PyTorch model."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, LlamaConfig, StaticCache

from model_helpers import no_router_warning
from query_experts import GQEAttention
from query_experts.layers.masks import AttentionBackend, causal_mask


def static_cache(hidden_size, heads, kv_heads, layers=1):
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden_size, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    return StaticCache(config=config, max_cache_len=24)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mask_from", ["nothing", "padding", "positions"])
def test_stacked_layers_that_share_one_cache_give_what_they_give_without_it(kind, mask_from):
    torch.manual_seed(0)
    layers = nn.ModuleList(GQEAttention(32, 8, 4, rope_theta=1e4, layer_idx=i) for i in range(3)).double()
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(9), torch.arange(12)]).expand(2, -1)
    given = {
        "nothing": lambda a, b: {},
        "padding": lambda a, b: {"attention_mask": mask[:, :b]},
        "positions": lambda a, b: {"position_ids": positions[:, a:b]},
    }[mask_from]

    def run(a, b, cache=None):
        h = x[:, a:b]
        for layer in layers:
            h = h + layer(h, past_key_values=cache, **given(a, b))
        return h

    expected = run(0, 21)
    cache = DynamicCache() if kind == "dynamic" else static_cache(32, 8, 4, layers=3)
    cached = torch.cat([run(a, b, cache) for a, b in ((0, 10), (10, 11), (11, 20), (20, 21))], 1)
    real = mask.bool() if mask_from == "padding" else torch.ones_like(mask).bool()
    torch.testing.assert_close(cached[real], expected[real], rtol=0, atol=1e-12)


def test_a_bf16_layer_keeps_the_angles_of_far_positions_exact():
    torch.manual_seed(0)
    layer = GQEAttention(64, 4, 2, rope_theta=1e4).double()
    half = GQEAttention(64, 4, 2, rope_theta=1e4)
    half.load_state_dict(layer.state_dict())
    half.bfloat16()
    x = torch.randn(1, 16, 64).bfloat16()
    near, far = (half(x, position_ids=torch.arange(16)[None] + start) for start in (0, 60_000))
    reference = layer(x.double(), position_ids=torch.arange(16)[None] + 60_000)
    error = (far.double() - reference).abs().max()
    assert error <= 2 * (near.double() - layer(x.double())).abs().max()


def test_a_document_that_begins_above_position_zero_after_padding_is_separate_too():
    torch.manual_seed(0)
    layer = GQEAttention(32, 8, 4).double()
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    given = {"attention_mask": torch.tensor([[1, 1, 0, 1, 1]]), "position_ids": torch.tensor([[3, 4, 0, 3, 4]])}
    y = layer(x, **given)
    x[:, :2] += 1
    torch.testing.assert_close(layer(x, **given)[:, 3:], y[:, 3:], rtol=0, atol=1e-12)


def test_a_fresh_layers_router_is_small_and_random_and_never_ties():
    layer = GQEAttention(24, 8, 2, head_dim=4)
    probs = layer(torch.randn(1, 50, 24), output_routing=True)[1].probs
    assert 0 < layer.router.weight.std() < 0.05
    assert (probs.sort(-1).values.diff(dim=-1) > 0).all()


def flash(position_ids, **changes):
    settings = {"x": torch.zeros(1, position_ids.shape[1], 8, dtype=torch.bfloat16), "attention_mask": None}
    settings |= {"past_key_values": None, "position_ids": position_ids}
    return causal_mask(AttentionBackend("flash_attention_2"), **settings | changes)


@pytest.mark.parametrize("rows", [[0, 1, 2, 0, 1], [1, 2, 1, 2, 3], [4, 5, 6, 7, 8]])
def test_flash_attention_takes_documents_that_begin_where_it_cuts(rows):
    assert flash(torch.tensor([rows])) is None


@pytest.mark.parametrize("rows", [[0, 1, 2, 1, 2], [37, 38, 0, 1, 0], [0, 1, 2, 2, 3]])
def test_flash_attention_is_refused_where_it_would_cut_elsewhere(rows):
    with pytest.raises(ValueError, match=r"position_ids: documents begin at .* same position"):
        flash(torch.tensor([rows]))


def test_flash_attention_is_refused_where_it_separates_nothing_and_for_float32():
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="only in a batch of one row"):
        flash(packed, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="only in a batch of one row"):
        flash(packed, x=torch.zeros(2, 5, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"dtype is torch\.float32; flash_attention_2 takes float16 or bfloat16"):
        flash(packed, x=torch.zeros(1, 5, 8))


def test_compiled_flash_attention_says_what_it_cannot_look_at():
    compiled = torch.compile(flash, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([[0, 1, 2, 0, 1]])) is None
    unpacked = torch.arange(5).expand(2, 5)
    assert flash(unpacked, x=torch.zeros(2, 5, 8, dtype=torch.bfloat16)) is None
    for changes in (
        {"x": torch.zeros(2, 5, 8, dtype=torch.bfloat16)},
        {"attention_mask": torch.ones(1, 5)},
        {"past_key_values": DynamicCache()},
    ):
        with pytest.raises(Exception, match=r"under torch\.compile, leave out position_ids that separate nothing"):
            compiled(torch.arange(5)[None], **changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_compiles_once_for_all_lengths_and_exports(dtype):
    router = GQEAttention(24, 8, 2, head_dim=4).to(dtype).router
    counter = CompileCounter()
    compiled = torch.compile(router, dynamic=True, fullgraph=True, backend=counter)
    for length in (7, 300, 511, 513, 1500, 3000):
        x = torch.randn(2, length, 24).to(dtype)
        torch.testing.assert_close(compiled(x), router(x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    exported = torch.export.export(router, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=4096)},))
    assert exported.module()(x).shape == (6000, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_has_the_gradients_of_a_float32_copy_and_keeps_none(dtype):
    torch.manual_seed(0)
    router = GQEAttention(24, 8, 2, head_dim=4).router
    x, cotangent = torch.randn(3, 400, 24).to(dtype), torch.randn(1200, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = x.clone().requires_grad_()
        logits = router(ours)
    of_x, of_weight = torch.autograd.grad(logits, [ours, router.weight], cotangent)
    plain = x.clone().requires_grad_()
    logits = nn.functional.linear(plain.flatten(0, 1).float(), router.weight)
    expected_of_x, expected_of_weight = torch.autograd.grad(logits, [plain, router.weight], cotangent)
    torch.testing.assert_close(of_x, expected_of_x, rtol=0, atol=0)
    torch.testing.assert_close(of_weight, expected_of_weight, rtol=1e-5, atol=1e-4)
    assert {t.dtype for t in kept if t.shape[0] == 1200} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_exports_for_any_length(dtype):
    layer = GQEAttention(64, 8, 4, rope_theta=1e4).to(dtype).eval()
    x = torch.randn(2, 20, 64).to(dtype)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=4096)},))
    for length in (3, 40):
        x = torch.randn(2, length, 64).to(dtype)
        torch.testing.assert_close(exported.module()(x), layer(x), rtol=2e-2, atol=2e-2)


def test_the_router_goes_through_functional_transforms_in_few_bits():
    router = GQEAttention(24, 8, 2, head_dim=4).router
    x = torch.randn(5, 1, 7, 24).bfloat16()

    def loss(weight, x):
        return torch.func.functional_call(router, {"weight": weight}, (x,)).square().sum()

    weight = router.weight.detach()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    expected = torch.stack([torch.func.grad(loss)(weight, one.float()) for one in x])
    torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-3)
    direction = torch.randn_like(weight)
    moved = torch.func.jvp(lambda w: loss(w, x[0]), (weight,), (direction,))[1]
    torch.testing.assert_close(moved, (torch.func.grad(loss)(weight, x[0]) * direction).sum(), rtol=1e-3, atol=1e-3)


def test_counts_of_any_integer_type_make_the_same_layer():
    layer = GQEAttention(64, np.int64(8), np.int64(4), np.int64(1), np.int64(8))
    assert {type(n) for n in (layer.num_query_experts, layer.num_kv_heads, layer.top_k, layer.head_dim)} == {int}


def test_flash_attention_takes_float32_under_autocast_on_the_same_device():
    with torch.autocast("cpu", torch.bfloat16):
        assert flash(torch.tensor([[0, 1, 2, 0, 1]]), x=torch.zeros(1, 5, 8)) is None


def test_flash_attention_separates_documents_in_an_empty_cache_and_is_refused_after_cached_keys():
    packed, cache = torch.tensor([[0, 1, 2, 0, 1]]), DynamicCache()
    assert flash(packed, past_key_values=cache) is None
    cache.update(*torch.zeros(2, 1, 1, 3, 8), 0)
    with pytest.raises(ValueError, match="before anything is cached"):
        flash(packed, past_key_values=cache)


EMPTY = [(0, 5), (0, 1), (2, 0), (0, 0)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gqe", "hard_concat", "weighted_concat"])
def test_an_empty_batch_and_no_tokens_give_an_empty_output_and_zero_gradients(shape, dtype, variant):
    with no_router_warning():
        layer = GQEAttention(16, 8, 2, variant=variant, output_projection="expert", rope_theta=1e4).to(dtype)
    x = torch.randn(*shape, 16, dtype=dtype, requires_grad=True)
    given = {"attention_mask": torch.ones(shape).bool(), "position_ids": torch.zeros(shape).long()}
    for arguments in ({}, given, {"past_key_values": DynamicCache()}):
        y, routing = layer(x, output_routing=True, **arguments)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert routing.balance_loss == 0
        (y.sum() + routing.balance_loss).backward()
    assert not x.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_no_new_tokens_leave_a_filled_cache_as_it_is(backend):
    layer = GQEAttention(16, 8, 2, attn_implementation=backend)
    for cache in (DynamicCache(), static_cache(16, 8, 2)):
        layer.config._attn_implementation = "sdpa"
        layer(torch.randn(2, 3, 16), past_key_values=cache)
        layer.config._attn_implementation = backend
        assert layer(torch.randn(2, 0, 16), past_key_values=cache).shape == (2, 0, 16)
        assert cache.get_seq_length() == 3


DEFERRED = [
    {"qk_norm": True, "bias": True},
    {"routing": "frozen", "output_projection": "expert"},
    {"routing": "none", "top_k": 4},
    {"variant": "weighted_concat"},
]


def build_on_meta(**arguments):
    with torch.device("meta"):
        return GQEAttention(16, 8, 2, **arguments).to_empty(device="cpu")


@pytest.mark.parametrize("arguments", DEFERRED, ids=str)
@pytest.mark.parametrize(
    "build",
    [
        build_on_meta,
        lambda **arguments: GQEAttention(16, 8, 2, device="meta", **arguments).to_empty(device="cpu"),
        lambda **arguments: nn.utils.skip_init(GQEAttention, 16, 8, 2, **arguments),
    ],
    ids=["under torch.device", "with device", "skip_init"],
)
def test_a_layer_built_without_weights_draws_those_of_a_new_layer_later(build, arguments):
    layer = build(**arguments)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(float("nan"))
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    new = GQEAttention(16, 8, 2, **arguments)
    torch.testing.assert_close(layer.state_dict(), new.state_dict(), rtol=0, atol=0)
    assert layer(torch.randn(1, 3, 16)).isfinite().all()


def test_a_layer_takes_a_device_and_a_dtype_as_its_parts_do():
    layer = GQEAttention(16, 8, 2, qk_norm=True, routing="frozen", device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in layer.state_dict().values())
