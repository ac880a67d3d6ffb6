"""`weighted_slot` against its definition in float64, in every dtype, and what it keeps for the backward pass."""

import pytest
import torch
from torch import Tensor

from query_experts.ops.combine import weighted_slot

SHAPES = [(1, 1, 1, 1, 1), (2, 63, 3, 2, 5), (1, 111, 8, 1, 16)]  # B, T, G, k, d
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [B, T, G, k, d], their probabilities [B, T, G, k], and a cotangent [B, T, d]."""
    B, T, G, k, d = shape
    generator = torch.Generator().manual_seed(0)
    routed = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    scores = torch.rand(B, T, G, k, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    return routed, scores, torch.randn(B, T, d, generator=generator, dtype=torch.float64).to(dtype)


def by_definition(routed: Tensor, scores: Tensor) -> Tensor:
    weights = scores / scores.sum((2, 3), keepdim=True)
    return torch.einsum("btgk,btgkd->btd", weights, routed)


def by_layer(routed: Tensor, scores: Tensor) -> Tensor:
    return weighted_slot(routed, scores.log())


def with_gradients(function, routed: Tensor, scores: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    routed, scores = routed.clone().requires_grad_(), scores.clone().requires_grad_()
    slot = function(routed, scores)
    return slot.detach(), *torch.autograd.grad(slot, (routed, scores), cotangent)


@each_shape
def test_the_slot_and_its_gradients_are_those_of_the_definition(shape):
    drawn = draw(shape, torch.float64)
    for actual, expected in zip(with_gradients(by_layer, *drawn), with_gradients(by_definition, *drawn), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_shape
def test_few_bits_cost_a_rounding_of_each_weight_each_product_and_each_result(shape, dtype):
    """Sums and the normalisation are float32, so they cost G*k + d roundings of float32 more."""
    routed, scores, cotangent = draw(shape, dtype)
    exact = with_gradients(by_definition, routed.double(), scores.double(), cotangent.double())
    ours = with_gradients(by_layer, routed, scores, cotangent)
    _, _, G, k, d = shape
    total = scores.double().sum((2, 3), keepdim=True)
    weights = scores.double() / total
    of_slot = (weights[..., None] * routed.double().abs()).sum((2, 3))  # the numbers that a sum is made of
    of_weights = (cotangent.double().abs()[:, :, None, None] * routed.double().abs()).sum(-1)
    of_scores = (of_weights + (weights * of_weights).sum((2, 3), keepdim=True)) / total
    roundings = (3, 2, 2)  # a weight, a product, the slot; a weight, the gradient; products, their sum
    for actual, expected, size, count in zip(ours, exact, (of_slot, exact[1].abs(), of_scores), roundings, strict=True):
        unit = torch.finfo(dtype).eps / 2 * count + (G * k + d + 8) * torch.finfo(torch.float32).eps
        smallest = torch.finfo(dtype).tiny  # float16 rounds numbers below it coarsely
        assert ((actual.double() - expected).abs() <= 1.01 * unit * size + smallest).all()
    assert [t.dtype for t in ours] == [dtype, dtype, scores.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_backward_pass_keeps_the_outputs_and_no_copy_of_them(dtype):
    routed, scores, _ = draw(SHAPES[1], dtype)
    routed.requires_grad_()
    scores.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        by_layer(routed, scores)
    large = [t for t in kept if t.numel() >= routed.numel()]
    assert [t.data_ptr() for t in large] == [routed.data_ptr()]
