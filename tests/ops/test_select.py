"""`select_experts` and `scatter_experts` against gather and scatter, forwards and backwards."""

import pytest
import torch
from torch import Tensor

from query_experts.ops.select import scatter_experts, select_experts

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 63, 3, 4, 2, 5), (1, 111, 2, 2, 1, 8), (3, 7, 2, 5, 5, 3)]  # B, T, G, M, k, d
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of all experts, rows of the selected ones, and the selected indices, in any order."""
    B, T, G, M, k, d = shape
    torch.manual_seed(0)
    indices = torch.rand(B, T, G, M).argsort(-1)[..., :k]
    return torch.randn(B, T, G, M, d, dtype=torch.float64), torch.randn(B, T, G, k, d, dtype=torch.float64), indices


@each_shape
def test_selecting_is_gathering(shape):
    rows, cotangent, indices = draw(shape)
    index = indices[..., None].expand_as(cotangent)
    ours, plain = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    out, expected = select_experts(ours, indices), plain.gather(3, index)
    assert torch.equal(out, expected)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert torch.equal(ours.grad, plain.grad)


@each_shape
def test_scattering_is_scattering_into_zeros(shape):
    cotangent, rows, indices = draw(shape)
    index = indices[..., None].expand_as(rows)
    ours, plain = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    out, expected = scatter_experts(ours, indices, shape[3]), torch.zeros_like(cotangent).scatter(3, index, plain)
    assert torch.equal(out, expected)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert torch.equal(ours.grad, plain.grad)


@each_shape
def test_selecting_undoes_scattering(shape):
    _, rows, indices = draw(shape)
    assert torch.equal(select_experts(scatter_experts(rows, indices, shape[3]), indices), rows)


def test_rows_need_not_be_contiguous():
    rows, selected, indices = draw(SHAPES[1])
    turned = rows.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(select_experts(turned, indices), select_experts(rows, indices))
    turned = selected.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(scatter_experts(turned, indices, 4), scatter_experts(selected, indices, 4))
