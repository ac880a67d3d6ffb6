"""`select_experts` and `scatter_experts` against gather and scatter, forwards and backwards."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from query_experts.ops import select
from query_experts.ops.select import (
    TransformableScatterRows,
    TransformableSelectRows,
    scatter_experts,
    select_experts,
    write_rows_by_addition,
    write_rows_by_comparison,
)

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 63, 3, 4, 2, 5), (1, 111, 2, 2, 1, 8), (3, 7, 2, 5, 5, 3)]  # B, T, G, M, k, d
# on a CPU, and elsewhere
SELECT = [select_experts, TransformableSelectRows.apply]
SCATTER = [scatter_experts, TransformableScatterRows.apply]
WAYS_OF_WRITING = [write_rows_by_addition, write_rows_by_comparison]
GATHERED = [0, select.GATHERED_NUMBERS]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=GATHERED, ids=["by rows", "by numbers"], autouse=True)
def way_of_reading(request, monkeypatch):
    """Shapes of tests are small, and rows are read in another way than numbers."""
    monkeypatch.setattr(select, "GATHERED_NUMBERS", request.param)


def draw(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of all experts, rows of the selected ones, and the selected indices, in any order."""
    B, T, G, M, k, d = shape
    torch.manual_seed(0)
    indices = torch.rand(B, T, G, M).argsort(-1)[..., :k]
    return torch.randn(B, T, G, M, d, dtype=torch.float64), torch.randn(B, T, G, k, d, dtype=torch.float64), indices


@pytest.mark.parametrize("selecting", SELECT)
@each_shape
def test_selecting_is_gathering(shape, selecting):
    rows, cotangent, indices = draw(shape)
    index = indices[..., None].expand_as(cotangent)
    ours, plain = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    out, expected = selecting(ours, indices), plain.gather(3, index)
    assert torch.equal(out, expected)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("scatter", SCATTER)
@each_shape
def test_scattering_is_scattering_into_zeros(shape, scatter):
    cotangent, rows, indices = draw(shape)
    index = indices[..., None].expand_as(rows)
    ours, plain = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    out, expected = scatter(ours, indices, shape[3]), torch.zeros_like(cotangent).scatter(3, index, plain)
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


@each_shape
def test_rows_are_written_by_addition_as_by_comparison(shape):
    _, rows, indices = draw(shape)
    by_addition, by_comparison = (write(rows, indices, shape[3]) for write in WAYS_OF_WRITING)
    assert torch.equal(by_addition, by_comparison)
    assert write_rows_by_comparison(rows.bfloat16(), indices, shape[3]).dtype == torch.bfloat16


@pytest.mark.parametrize("write", WAYS_OF_WRITING)
def test_what_is_not_finite_stays_in_its_row(write):
    _, rows, indices = draw(SHAPES[1])
    rows[...] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0])
    written = write(rows, indices, 4)
    selected = torch.zeros(written.shape[:4], dtype=torch.bool).scatter(3, indices, True)
    assert not written[~selected].any()


@pytest.mark.parametrize(("select", "scatter"), [*zip(SELECT, SCATTER, strict=True)], ids=["CPU", "elsewhere"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_gradients_of_every_order_and_mode_are_those_of_a_linear_map(shape, select, scatter):
    M = shape[3]
    rows, selected, indices = (t[:, :3].clone() for t in draw(shape))
    rows, selected = rows.requires_grad_(), selected.requires_grad_()
    for function, argument in (
        (lambda x: select(x, indices), rows),
        (lambda x: scatter(x, indices, M), selected),
    ):
        assert torch.autograd.gradcheck(function, argument, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x).square(), argument)


@pytest.mark.parametrize(("select", "scatter"), [*zip(SELECT, SCATTER, strict=True)], ids=["CPU", "elsewhere"])
def test_rows_map_over_a_batch_of_batches(select, scatter):
    rows, selected, indices = (torch.stack([t, t.flip(1)]) for t in draw(SHAPES[1]))
    each = torch.stack([select_experts(*pair) for pair in zip(rows, indices, strict=True)])
    assert torch.equal(torch.func.vmap(select)(rows, indices), each)
    each = torch.stack([scatter_experts(*pair, 4) for pair in zip(selected, indices, strict=True)])
    assert torch.equal(torch.func.vmap(lambda r, i: scatter(r, i, 4))(selected, indices), each)


def test_rows_without_data_have_shapes_and_gradients():
    rows, selected, indices = (t.to("meta").detach() for t in draw(SHAPES[1]))
    rows.requires_grad_()
    selected.requires_grad_()
    out = select_experts(rows, indices)
    assert out.shape == selected.shape
    assert torch.autograd.grad(out.sum(), rows)[0].shape == rows.shape
    out = scatter_experts(selected, indices, 4)
    assert out.shape == rows.shape
    assert torch.autograd.grad(out.sum(), selected)[0].shape == selected.shape


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_compiled_pass_writes_gradients_by_comparison_and_accumulates_nothing(shape):
    torch._dynamo.reset()
    rows, _, indices = draw(shape)
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    def through(x):
        return scatter_experts(select_experts(x, indices) * 2, indices, shape[3])

    ours, plain = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    out = torch.compile(through, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(ours)
    expected = through(plain)
    assert torch.equal(out, expected)
    out.backward(rows)
    expected.backward(rows)
    assert torch.equal(ours.grad, plain.grad)
    for operators in graphs:  # forwards, backwards
        assert {"aten.index_select.default", "aten.where.self"} <= operators
        assert not any("index_add" in name or "index_put" in name or "scatter" in name for name in operators)
