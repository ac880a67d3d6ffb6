"""The operators of `triton_operators` under autograd: before attention and behind it, with gradients.

Shapes: B batch, T tokens, R = B*T, D hidden size, G groups, M experts in a group, k selected in a group, d head dim,
C copies of the shared query, H = G*k + C query heads, GK = G + 1 key heads with the shared one, else G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from query_experts.ops import triton_operators as _triton_operators  # noqa: F401 - registers the operators

operators = torch.ops.query_experts


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses to be differentiated, where torch would leave its part out of a sum in silence."""
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # by create_graph=True
            raise RuntimeError(
                "kernels is 'triton', which gives no second derivative; kernels='torch' does where attention does "
                "(attn_implementation='eager')"
            )
        return once(ctx, *gradients)

    return checked


@dataclass(frozen=True)
class Layout:
    """What the kernels need to know of a layer and of this call.

    Attributes:
        batch: B.
        copies: C, 0 without a shared head.
        shared_key: whether keys and values get one more head, which the shared query reads.
        mean: that head is the mean over all groups', else the first one's.
        eps: of the norms of queries and keys.
    """

    batch: int
    G: int
    M: int
    k: int
    copies: int
    d: int
    shared_key: bool
    mean: bool
    eps: float

    @property
    def heads(self) -> tuple[int, int, int, int, int]:
        return self.G, self.M, self.k, self.copies, self.d

    @property
    def widths(self) -> list[int]:
        """Of the projections: query, key, value, shared query."""
        return [self.G * self.M * self.d, self.G * self.d, self.G * self.d, self.d * (self.copies > 0)]


class Prepare(torch.autograd.Function):
    """`prepare` after projections by their modules: with hooks or adapters, quantised, under autocast."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, shared: Tensor | None, logits: Tensor | None,
        given: Tensor | None, cos: Tensor | None, sin: Tensor | None, query_norm: Tensor | None,
        key_norm: Tensor | None, layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        heads, keys, values, chosen = operators.prepare(
            query, key, value, shared, logits, given, cos, sin, query_norm, key_norm, layout.eps, layout.batch,
            *layout.heads, layout.shared_key, layout.mean,
        )  # fmt: skip
        indices = given if given is not None or logits is None else chosen
        normed = (query, key, shared) if query_norm is not None else (None, None, None)
        ctx.save_for_backward(cos, sin, indices, *normed, query_norm, key_norm)
        ctx.layout = layout
        ctx.mark_non_differentiable(chosen)
        return heads, keys, values, chosen

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, heads: Tensor, keys: Tensor, values: Tensor, _: None) -> tuple[Tensor | None, ...]:
        layout, saved = ctx.layout, ctx.saved_tensors
        packed, norms = _prepare_back(heads, keys, values, None, saved, layout, 0)
        query, key, value, shared = packed.split(layout.widths, 1)
        norm_gradients = _norm_gradients(norms, saved[-2:])
        return query, key, value, shared if layout.copies else None, None, None, None, None, *norm_gradients, None


def _prepare_back(
    heads: Tensor, keys: Tensor, values: Tensor, logits: Tensor | None, saved: tuple[Tensor | None, ...],
    layout: Layout, logit_parts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """saved: cos, sin, indices; query, key and shared where there are norms; the norms' weights."""
    return operators.prepare_back(
        heads, keys, values, logits, *saved, layout.eps, *layout.heads, layout.shared_key, layout.mean, logit_parts
    )


def _norm_gradients(partial: Tensor, weights: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Partial sums [programs, 2, d] -> gradients of the norms' weights."""
    if weights[0] is None:
        return [None, None]
    return [g.to(weight.dtype) for g, weight in zip(partial.sum(0), weights, strict=True) if weight is not None]


class ProjectAndPrepare(torch.autograd.Function):
    """The projections and `prepare` as one function, for plain linear maps of the dtype of x.

    Its backward pass gets the gradients of all projections side by side: one product gives those of all weights, and
    those of x are added up by the products. The logits are an output, since the balance loss reads them too.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor,
        shared_weight: Tensor | None, query_bias: Tensor | None, key_bias: Tensor | None, value_bias: Tensor | None,
        shared_bias: Tensor | None, router: Tensor | None, given: Tensor | None, cos: Tensor | None,
        sin: Tensor | None, query_norm: Tensor | None, key_norm: Tensor | None, layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
        logits = None if router is None else wide_product(rows, router)
        query, key, value = (
            F.linear(rows, weight, bias)
            for weight, bias in (
                (query_weight, query_bias), (key_weight, key_bias), (value_weight, value_bias)
            )
        )  # fmt: skip
        shared = None if shared_weight is None else F.linear(rows, shared_weight, shared_bias)
        heads, keys, values, chosen = operators.prepare(
            query, key, value, shared, logits, given, cos, sin, query_norm, key_norm, layout.eps, layout.batch,
            *layout.heads, layout.shared_key, layout.mean,
        )  # fmt: skip
        indices = given if given is not None or logits is None else chosen
        normed = (query, key, shared) if query_norm is not None else (None, None, None)
        ctx.save_for_backward(
            rows, query_weight, key_weight, value_weight, shared_weight, router,
            cos, sin, indices, *normed, query_norm, key_norm,
        )  # fmt: skip
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen)
        return heads, keys, values, logits, chosen

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, heads: Tensor | None, keys: Tensor | None, values: Tensor | None, logits: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        rows, *rest = ctx.saved_tensors
        weights, router, saved = rest[:4], rest[4], rest[5:]
        layout = ctx.layout
        heads, keys, values = _given_or_zero(rows, layout, heads, keys, values)
        narrow = logits is not None and logits.dtype != rows.dtype
        packed, norms = _prepare_back(heads, keys, values, logits, tuple(saved), layout, (logits is not None) + narrow)
        widths = [*layout.widths, *[layout.G * layout.M] * ((logits is not None) + narrow)]
        columns = list(packed.split(widths, 1))
        need = ctx.needs_input_grad
        of_rows = _input_gradient(columns[: len(widths) - narrow], [*weights, router]) if need[0] else None
        of_weights = _weight_gradients(packed, columns, rows, widths, need[1:5], bool(need[9]), narrow)
        of_biases = [c.sum(0) if wanted else None for c, wanted in zip(columns, need[5:9], strict=False)]
        norm_gradients = _norm_gradients(norms, tuple(saved[-2:]))
        return of_rows, *of_weights[:4], *of_biases, of_weights[4], None, None, None, *norm_gradients, None


def _given_or_zero(rows: Tensor, layout: Layout, *gradients: Tensor | None) -> list[Tensor]:
    """Gradients of heads, keys and values, with zeros for those that no loss reads."""
    heads = layout.G * layout.k + layout.copies
    key_heads = layout.G + layout.shared_key
    return [
        rows.new_zeros(layout.batch, rows.shape[0] // layout.batch, count, layout.d) if gradient is None else gradient
        for gradient, count in zip(gradients, (heads, key_heads, key_heads), strict=True)
    ]


def _input_gradient(columns: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    """The sum of columns[i] @ weights[i], [R, D], by products that add to one tensor."""
    pairs = [(c, w) for c, w in zip(columns, weights, strict=False) if w is not None and c.shape[1]]
    total = pairs[0][0] @ pairs[0][1]
    for column, weight in pairs[1:]:
        total.addmm_(column, weight)
    return total


def _weight_gradients(
    packed: Tensor, columns: list[Tensor], rows: Tensor, widths: list[int], need: tuple[bool, ...], need_router: bool,
    narrow: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the weights of query, key, value, shared query and router: columns.T @ rows, in one product if all
    are needed. The router's are sums of products of float32 logits' gradients, which are in two parts where narrow."""
    router = None
    if need_router and len(widths) > 4 and narrow:
        high, low = wide_product(packed[:, -2 * widths[4] :].mT, rows.mT).split(widths[4], 0)
        router = torch.add(high, low, out=torch.empty_like(high, dtype=rows.dtype))
    together = widths[:4] if narrow or not need_router else widths
    if all(n or not width for n, width in zip(need, widths[:4], strict=False)):
        gradients: list[Tensor | None] = [*(packed[:, : sum(together)].mT @ rows).split(together, 0)]
    else:
        wanted = [*need, need_router]
        gradients = [c.mT @ rows if w else None for c, w in zip(columns[: len(together)], wanted, strict=False)]
    gradients = [g if width else None for g, width in zip(gradients, together, strict=True)]
    return [*gradients[:4], router if len(gradients) < 5 else gradients[4]]


def wide_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, D] @ weight [N, D].T -> [R, N], in float32 or wider, of products that aren't rounded."""
    if rows.dtype in (torch.float32, torch.float64):
        return rows @ weight.mT
    if rows.is_cuda:
        return torch.mm(rows, weight.mT, out_dtype=torch.float32)  # without a float32 copy of the rows
    return rows.float() @ weight.float().mT


class Combine(torch.autograd.Function):
    """`combine`: outputs of the heads [R, H, d], and of the shared head [R, d] if it is apart, to slots [R, ...]."""

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, shared: Tensor | None, logits: Tensor | None, indices: Tensor | None, *layout: Any
    ) -> Tensor:
        ctx.save_for_backward(heads, logits, indices)
        ctx.layout, ctx.shared_apart = layout, shared is not None
        return operators.combine(heads, shared, logits, indices, *layout)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, slots: Tensor) -> tuple[Tensor | None, ...]:
        heads, logits, indices = ctx.saved_tensors
        of_heads, of_shared, of_logits = operators.combine_back(
            slots, heads, logits, indices, ctx.shared_apart, *ctx.layout
        )
        shared = of_shared if ctx.shared_apart else None
        return of_heads, shared, None if logits is None else of_logits, None, *[None] * 7
