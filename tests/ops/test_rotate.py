"""`rotate` against Llama's formula: values, gradients, tangents, batches of transforms, and what it keeps."""

import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

from query_experts.ops.rotate import rotary_cos_sin, rotate

SHAPE = (2, 7, 5, 8)  # B, T, heads, d


def draw(dtype=torch.float64, rotated=8, theta=100.0):
    """Heads [B, T, heads, d], and cos and sin whose halves differ, [B, T, r]."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    positions = torch.stack([torch.arange(7), torch.arange(7) + 20])
    cos, sin = rotary_cos_sin(positions, rotated, theta, torch.float64)
    scale = torch.rand(rotated, generator=generator, dtype=torch.float64) + 0.5
    return heads, ((cos * scale).to(dtype), (sin * scale).to(dtype))


def formula(heads, cos_sin):
    cos, sin = (t.unsqueeze(2) for t in cos_sin)
    rotated, kept = heads.split([cos.shape[-1], heads.shape[-1] - cos.shape[-1]], -1)
    return torch.cat([rotated * cos + rotate_half(rotated) * sin, kept], -1)


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_float32_and_float64_get_the_bits_of_the_formula(dtype, rotated):
    heads, cos_sin = draw(dtype, rotated)
    assert torch.equal(rotate(heads, cos_sin), formula(heads, cos_sin))
    assert torch.equal(rotate(heads.requires_grad_(), cos_sin), formula(heads, cos_sin))


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_bits_err_no_more_than_the_formula(dtype, rotated):
    heads, cos_sin = draw(dtype, rotated)
    exact = formula(heads.double(), [t.double() for t in cos_sin])
    ours, theirs = ((f(heads, cos_sin).double() - exact).square().mean() for f in (rotate, formula))
    assert 0 < ours <= theirs


@pytest.mark.parametrize("rotated", [8, 4])
def test_gradients_of_both_orders_are_those_of_the_formula(rotated):
    heads, cos_sin = draw(rotated=rotated)
    heads.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: rotate(h, cos_sin), heads)
    assert torch.autograd.gradgradcheck(lambda h: rotate(h, cos_sin).square(), heads)
    cotangent = torch.randn(SHAPE, dtype=torch.float64)
    ours, expected = (torch.autograd.grad(f(heads, cos_sin), heads, cotangent)[0] for f in (rotate, formula))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-15)


def test_angles_that_train_get_gradients():
    heads, cos_sin = draw()
    angles = [t.requires_grad_() for t in cos_sin]
    ours, expected = (torch.autograd.grad(f(heads, angles).square().sum(), angles) for f in (rotate, formula))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("graded", [False, True])
def test_it_is_transformed_as_the_formula_is(graded):
    heads, cos_sin = draw()
    heads.requires_grad_(graded)
    tangent = torch.randn(SHAPE, dtype=torch.float64)
    for transformed in (
        lambda f: torch.func.vmap(lambda h: f(h[None], [t[:1] for t in cos_sin]))(heads),
        lambda f: torch.func.vmap(lambda h, c, s: f(h[None], (c[None], s[None])))(heads, *cos_sin),
        lambda f: torch.func.jvp(lambda h: f(h, cos_sin), (heads,), (tangent,))[1],
        lambda f: torch.func.grad(lambda h: f(h, cos_sin).square().sum())(heads),
        lambda f: torch.func.jvp(torch.func.grad(lambda h: f(h, cos_sin).pow(3).sum()), (heads,), (tangent,))[1],
    ):
        torch.testing.assert_close(transformed(rotate), transformed(formula))


def test_angles_of_another_dtype_promote_as_in_the_formula():
    heads, cos_sin = draw(torch.bfloat16)
    wide = [t.float() for t in cos_sin]
    assert torch.equal(rotate(heads, wide), formula(heads, wide))


def test_the_backward_pass_keeps_the_angles_alone():
    heads, cos_sin = draw()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotate(heads.requires_grad_(), cos_sin)
    assert max(t.numel() for t in kept) == cos_sin[0].numel()
