"""`shared_decode` against its definition: grouped attention for the routed heads, and for the shared head attention
over the mean of the key and value heads, which the fast path never forms.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model_helpers import new_cache, random_tokens, tiny_model
from query_experts.layers.attention import GQEAttention
from query_experts.ops.select import project_selected_rows, reads_selected_rows, select_experts, selected_queries
from query_experts.ops.shared_decode import shared_decode

EXACT = {"rtol": 0.0, "atol": 1e-12}  # values of order 1, sums of up to 111 products in float64
SHAPES = [  # B, G, k, T, S, d
    (1, 1, 1, 1, 1, 2),
    (2, 2, 1, 1, 63, 4),
    (2, 3, 2, 1, 111, 5),
    (1, 4, 3, 8, 17, 6),
    (3, 2, 2, 5, 5, 3),
]
MASKS = ["none", "boolean", "boolean_one_row", "additive"]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """Routed queries [B, G, k, T, d], shared queries [B, T, d], keys and values [B, G, S, d]."""
    B, G, k, T, S, d = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, G, k, T, d), (B, T, d), (B, G, S, d), (B, G, S, d)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def draw_mask(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    """Every query sees some key."""
    B, _, _, T, S, _ = shape
    if kind == "none":
        return None
    rows = 1 if kind == "boolean_one_row" else B
    visible = torch.rand(rows, 1, T, S, generator=torch.Generator().manual_seed(7)) < 0.6
    visible[..., 0] = True
    return torch.zeros(visible.shape).double().masked_fill(~visible, -1e300) if kind == "additive" else visible


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention as Transformers' eager backend computes it in low precision: only the softmax is float32."""
    assert mask is None
    weights = (query @ key.mT * scale).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return weights.to(query.dtype) @ value


def by_definition(
    routed: Tensor, shared: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend=None
):
    """Plain attention for every head, the shared one over the mean K/V: both outputs as `shared_decode` gives them."""
    G, k = routed.shape[1:3]
    attend = attend or F.scaled_dot_product_attention
    heads = attend(
        routed.flatten(1, 2), key.repeat_interleave(k, 1), value.repeat_interleave(k, 1), mask, scale=scaling
    )
    mean = attend(shared[:, None], key.mean(1, keepdim=True), value.mean(1, keepdim=True), mask, scale=scaling)
    return heads.unflatten(1, (G, k)), mean[:, 0]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_attention_over_the_mean_keys_and_values(shape, mask):
    inputs, visible = draw(shape), draw_mask(mask, shape)
    routed, shared, weights = shared_decode(*inputs, visible, 0.37)
    for actual, expected in zip((routed, shared), by_definition(*inputs, visible, 0.37), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)
    B, G, k, T, S, _ = shape
    assert weights.shape == (B, G, k + 1, T, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, G, k + 1, T).double(), **EXACT)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gradient_equals_that_of_the_definition(shape, mask):
    def grads(function):
        inputs = tuple(t.requires_grad_() for t in draw(shape))
        outputs = function(*inputs, draw_mask(mask, shape), 0.37)[:2]
        cotangents = [torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).double() for o in outputs]
        return torch.autograd.grad(outputs, inputs, cotangents)

    for actual, expected in zip(grads(shared_decode), grads(by_definition), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_query_that_sees_no_key_gives_zeros_and_finite_gradients(shape):
    inputs = tuple(t.requires_grad_() for t in draw(shape))
    visible = draw_mask("boolean", shape)
    visible[0, :, -1] = False
    routed, shared, _ = shared_decode(*inputs, visible, 0.5)
    assert not routed[0, ..., -1, :].any()
    assert not shared[0, -1].any()
    expected = by_definition(*inputs, visible, 0.5)
    torch.testing.assert_close((routed, shared), expected, **EXACT)
    for gradient in torch.autograd.grad([routed.sum(), shared.sum()], inputs):
        assert gradient.isfinite().all()


def test_what_stands_at_hidden_keys_does_not_matter():
    shape = SHAPES[2]
    routed, shared, key, value = draw(shape)
    visible = draw_mask("boolean_one_row", shape)
    visible[..., -50:] = False
    expected = shared_decode(routed, shared, key, value, visible, 0.4)
    key[:, :, -50:], value[:, :, -50:] = 1e9, -1e9
    torch.testing.assert_close(shared_decode(routed, shared, key, value, visible, 0.4), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 111, 16), (2, 8, 1, 4, 63, 32), (1, 2, 4, 8, 200, 8)], ids=str)
def test_low_precision_is_at_most_twice_as_far_off_as_eager_attention_is(shape, dtype):
    scaling = shape[-1] ** -0.5
    exact = by_definition(*(t.to(dtype).double() for t in draw(shape)), None, scaling)
    plain = by_definition(*draw(shape, dtype), None, scaling, eager)
    ours = shared_decode(*draw(shape, dtype), None, scaling)[:2]
    for actual, usual, reference in zip(ours, plain, exact, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - reference).abs().max() <= 2 * (usual.double() - reference).abs().max()


def test_scores_beyond_float16_before_scaling_do_not_overflow():
    shape, scaling = (1, 2, 1, 1, 9, 64), 64**-0.5
    routed, shared, key, value = draw(shape)
    routed, shared, key = routed * 120, shared * 120, key * 120
    assert (routed[:, :, 0] @ key.mT).abs().max() > torch.finfo(torch.float16).max
    exact = shared_decode(routed, shared, key, value, None, scaling)[:2]
    half = shared_decode(*(t.half() for t in (routed, shared, key, value)), None, scaling)[:2]
    for actual, reference in zip(half, exact, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=0, atol=0.05)


class NewTensors(TorchDispatchMode):
    """Records how many elements each operation's newly allocated outputs hold."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                name = str(function)
                self.sizes[name] = max(self.sizes.get(name, 0), tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_allocates_nothing_of_the_caches_size(top_k, masked):
    """Beside the scores, [G*(k+1), S] float32 numbers against the cache's [G, S, d]; here d is large."""
    heads = {"num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 1}
    model = tiny_model(dtype=torch.float32, active_query_experts=top_k, **heads)
    ids, cache = random_tokens(1, 200), new_cache("static", model, 256)
    mask = torch.ones(1, 201, dtype=torch.long)
    mask[:, :2] = 0 if masked else 1
    with torch.no_grad():
        model(ids, attention_mask=mask[:, :200], past_key_values=cache)
        with NewTensors() as recorded:
            model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
    keys = cache.layers[0].keys
    one_head = keys[:, 0].numel() * keys.element_size()  # a mean over the cache would be this large
    assert recorded.sizes
    assert max(recorded.sizes.values()) < one_head, recorded.sizes


def test_decoding_over_the_mean_the_plain_way_would_be_noticed():
    """The check above, on the plain way: it must fail there."""
    _, shared, key, value = draw((1, 2, 1, 1, 256, 64), torch.float32)
    with NewTensors() as recorded:
        F.scaled_dot_product_attention(shared[:, None], key.mean(1, keepdim=True), value.mean(1, keepdim=True))
    assert max(recorded.sizes.values()) >= key[:, 0].numel() * key.element_size()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"variant": "hard_concat"}], ids=str)
@torch.no_grad()
def test_projecting_only_the_selected_rows_gives_the_queries_that_are_selected_from_all(options, bias):
    torch.manual_seed(0)
    layer = GQEAttention(24, 32, 2, head_dim=6, bias=bias, **options).double()
    x = torch.randn(1, 1, 24, dtype=torch.float64)
    indices = layer.route(x).indices
    expected = select_experts(layer.q_proj(x).view(1, 1, 2, 16, 6), indices)
    assert reads_selected_rows(layer.q_proj, x, indices, 16)
    torch.testing.assert_close(project_selected_rows(layer.q_proj, x, indices, 16), expected, **EXACT)
    torch.testing.assert_close(selected_queries(layer.q_proj, x, indices, 16), expected, **EXACT)


def test_only_selected_rows_are_projected_for_one_token_where_few_experts_are_active_and_no_weight_is_trained():
    def asked(layer, x):
        return reads_selected_rows(layer.q_proj, x, layer.route(x).indices, layer.experts_per_group)

    many = GQEAttention(24, 16, 2, head_dim=6)
    one = torch.randn(1, 1, 24)
    assert not asked(many, one)
    with torch.no_grad():
        assert asked(many, one)
        assert not asked(many, torch.randn(1, 2, 24))
        assert not asked(many, torch.randn(2, 1, 24))
        assert not asked(GQEAttention(24, 14, 2, head_dim=6), one)
        assert not asked(GQEAttention(24, 16, 2, top_k=2, head_dim=6), one)
        assert not asked(GQEAttention(24, 16, 2, top_k=8, head_dim=6, routing="none"), one)
        assert asked(many, one)
        hook = many.q_proj.register_forward_hook(lambda *args: None)
        assert not asked(many, one)
        hook.remove()
        many.q_proj.forward = many.q_proj.forward  # as accelerate's offloading does
        assert not asked(many, one)
        del many.q_proj.forward
        assert asked(many, one)
        many.q_proj = torch.nn.Linear(24, 96, bias=False, device="meta")
        assert not asked(many, one)
    biased = GQEAttention(24, 16, 2, head_dim=6, bias=True).requires_grad_(False)
    assert asked(biased, one)
    biased.q_proj.bias.requires_grad_()
    assert not asked(biased, one)
    many.q_proj = torch.nn.Sequential(many.q_proj)  # quantised or adapted
    with torch.no_grad():
        assert not asked(many, one)


def test_a_hidden_key_whose_score_overflows_does_not_matter():
    routed, shared, key, value = (t.half() for t in draw((1, 2, 1, 1, 9, 4)))
    key[:, :, 3], value[:, :, 3] = 60000, 1000
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 3] = False
    ours = shared_decode(100 * routed, 100 * shared, key, value, mask, 1.0)[:2]
    key[:, :, 3], value[:, :, 3] = 0, 0
    torch.testing.assert_close(ours, shared_decode(100 * routed, 100 * shared, key, value, mask, 1.0)[:2])


@torch.no_grad()
def test_a_model_of_many_experts_decodes_as_without_a_cache():
    model = tiny_model(num_attention_heads=16, num_key_value_heads=2).eval()
    tokens = random_tokens(1, 9)
    cache = new_cache("dynamic", model)
    expected = model(tokens).logits
    logits = [model(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(9)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-10)
