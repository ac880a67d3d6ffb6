"""The Triton kernels of `prepare` and `combine` as operators of torch, which torch.compile and CUDA graphs take.

Each operator checks nothing: `fused.py` calls it with what it takes. Tensors that the kernel can't read in place are
copied. Outputs are allocated and written once, in full.

Shapes: as in `triton_prepare` and `triton_combine`; B batch, T tokens, R = B*T.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from query_experts.ops import triton_combine, triton_prepare
from query_experts.ops.dtypes import wide
from query_experts.ops.kernels import interpreted

TILE = 4096  # numbers of a [tokens, groups, d] tile that a program holds at once: no register spills up to there
TILE_NORM = 2048  # with norms, whose backward pass holds more tiles
MOST_TOKENS = 16  # of a program
ALIGNED = 8  # numbers, 16 bytes in bf16: the most that a GPU's thread writes at once, and what fast products ask for
# without the second, the assembler spills a few bytes of some layouts to fit one more program into a processor
OPTIONS = {"num_warps": 4, "maxnreg": 255}

Operator = Callable[..., Any]


def launch(kernel: Any, programs: tuple[int, ...], device: Tensor, *args: Any, **constants: Any) -> None:
    """Runs a kernel on the device of a tensor.

    Raises:
        RuntimeError: where it doesn't compile, with the way out.
    """
    failures = (triton.TritonError, triton.CompilationError, triton.OutOfResources)
    try:
        with torch.cuda.device(device.device) if device.is_cuda else nullcontext():
            kernel[programs](*args, **constants)
    except failures as error:
        if interpreted():
            raise
        reason = next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise RuntimeError(
            f"kernels is 'triton', whose kernel {kernel.__name__} doesn't compile here ({reason}); kernels='torch' "
            "runs here"
        ) from error


def padded(number: int) -> int:
    return triton.next_power_of_2(max(1, number))


def tokens_a_program(G: int, M: int, d: int, norm: bool = False) -> int:
    return max(1, min(MOST_TOKENS, (TILE_NORM if norm else TILE) // (padded(G) * max(padded(d), padded(M)))))


def accumulator_of(tensor: Tensor) -> Any:
    """The dtype in which kernels compute, as Triton names it."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def define(schema: str, implementation: Operator, fake: Operator) -> None:
    """Registers an operator, with half the calling time of `torch.library.custom_op`."""
    name = schema.partition("(")[0]
    torch.library.define(f"query_experts::{name}", schema.removeprefix(name))
    torch.library.impl(f"query_experts::{name}", ("CPU", "CUDA"), implementation)
    torch.library.register_fake(f"query_experts::{name}", fake)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """A tensor whose last dimension is dense in memory."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _angles(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cos and sin [B or 1, T, r] in memory order, the step from one row of the batch to the next, and r."""
    if cos is None or sin is None:
        return None, None, 0, 0
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, cos.shape[-1]


def _sizes(G: int, M: int, d: int, r: int, norm: bool) -> dict[str, int]:
    return {
        "G_PAD": padded(G), "M_PAD": padded(M), "HALF": padded(r // 2), "REST": padded(d - r), "D_PAD": padded(d),
        "BLOCK": tokens_a_program(G, M, d, norm),
    }  # fmt: skip


def _prepare_into(
    query: Tensor, key: Tensor, value: Tensor, shared: Tensor | None, logits: Tensor | None, given: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
    keys: Tensor, values: Tensor, start: Tensor | None, num_tokens: int,
    G: int, M: int, k: int, copies: int, d: int, shared_key: bool, mean: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs `prepare` with keys and values [B, T or more, heads, d] to write to; returns heads and chosen indices."""
    query, key, value, shared, logits = map(_rows, (query, key, value, shared, logits))  # type: ignore[assignment]
    num_rows = query.shape[0]
    heads = query.new_empty(num_rows, G * k + copies, d)
    chosen = query.new_empty(num_rows if logits is not None and given is None else 0, G, k, dtype=torch.int64)
    indices = chosen if given is None else given.contiguous()
    cos, sin, cos_batch, r = _angles(cos, sin)
    sizes = _sizes(G, M, d, r, query_norm is not None)
    launch(
        triton_prepare.prepare, (triton.cdiv(num_rows, sizes["BLOCK"]),), query,
        query, key, value,
        *(query if t is None else t for t in (shared, logits, cos, sin, query_norm, key_norm, start)),
        heads, keys, values, indices,
        query.stride(0), key.stride(0), value.stride(0), 0 if shared is None else shared.stride(0),
        0 if logits is None else logits.stride(0), cos_batch, *keys.stride()[:3], *values.stride()[:3],
        num_tokens, num_rows, keys.shape[1], eps, G, M, k, copies, d, r, **sizes, NORM=query_norm is not None,
        ROUTED=logits is not None or given is not None, GIVEN=given is not None, SHARED_KEY=shared_key, MEAN=mean,
        CACHED=start is not None, WIDE=accumulator_of(query), **OPTIONS,
    )  # fmt: skip
    return heads, chosen


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, shared: Tensor | None, logits: Tensor | None, given: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
    batch: int, G: int, M: int, k: int, copies: int, d: int, shared_key: bool, mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens = query.shape[0] // batch
    keys, values = (query.new_empty(batch, num_tokens, G + shared_key, d) for _ in range(2))
    heads, chosen = _prepare_into(
        query, key, value, shared, logits, given, cos, sin, query_norm, key_norm, eps, keys, values, None, num_tokens,
        G, M, k, copies, d, shared_key, mean,
    )  # fmt: skip
    return heads.view(batch, num_tokens, -1, d), keys, values, chosen


def _prepare_fake(
    query: Tensor, key: Tensor, value: Tensor, shared: Tensor | None, logits: Tensor | None, given: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
    batch: int, G: int, M: int, k: int, copies: int, d: int, shared_key: bool, mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens = query.shape[0] // batch
    chosen = query.shape[0] if logits is not None and given is None else 0
    return (
        query.new_empty(batch, num_tokens, G * k + copies, d),
        query.new_empty(batch, num_tokens, G + shared_key, d),
        query.new_empty(batch, num_tokens, G + shared_key, d),
        query.new_empty(chosen, G, k, dtype=torch.int64),
    )


def _prepare_cached(
    query: Tensor, key: Tensor, value: Tensor, shared: Tensor | None, logits: Tensor | None, given: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
    keys: Tensor, values: Tensor, start: Tensor, G: int, M: int, k: int, copies: int, d: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = keys.shape[0]
    num_tokens = query.shape[0] // batch
    heads, chosen = _prepare_into(
        query, key, value, shared, logits, given, cos, sin, query_norm, key_norm, eps,
        keys.transpose(1, 2), values.transpose(1, 2), start, num_tokens, G, M, k, copies, d, False, True,
    )  # fmt: skip
    return heads.view(batch, num_tokens, -1, d), chosen


def _prepare_cached_fake(
    query: Tensor, key: Tensor, value: Tensor, shared: Tensor | None, logits: Tensor | None, given: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
    keys: Tensor, values: Tensor, start: Tensor, G: int, M: int, k: int, copies: int, d: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = keys.shape[0]
    chosen = query.shape[0] if logits is not None and given is None else 0
    return (
        query.new_empty(batch, query.shape[0] // batch, G * k + copies, d),
        query.new_empty(chosen, G, k, dtype=torch.int64),
    )


def packed_width(G: int, M: int, d: int, copies: int, logit_parts: int) -> int:
    """Numbers in a row of what `prepare_back` gives: of all projections, then of the logits' parts."""
    return (G * M + 2 * G + (copies > 0)) * d + logit_parts * G * M


def aligned(width: int) -> int:
    return triton.cdiv(width, ALIGNED) * ALIGNED


def _packed(like: Tensor, num_rows: int, width: int) -> Tensor:
    return like.new_empty(num_rows, aligned(width))[:, :width]


def _prepare_back(
    heads: Tensor, keys: Tensor, values: Tensor, logits: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    indices: Tensor | None, query: Tensor | None, key: Tensor | None, shared: Tensor | None,
    query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
    G: int, M: int, k: int, copies: int, d: int, shared_key: bool, mean: bool, logit_parts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, keys, values, logits, query, key, shared = map(  # type: ignore[assignment]
        _rows, (heads, keys, values, logits, query, key, shared)
    )
    indices = None if indices is None else indices.contiguous()
    batch, num_tokens = heads.shape[:2]
    num_rows = batch * num_tokens
    cos, sin, cos_batch, r = _angles(cos, sin)
    sizes = _sizes(G, M, d, r, query_norm is not None)
    programs = triton.cdiv(num_rows, sizes["BLOCK"])
    packed = _packed(heads, num_rows, packed_width(G, M, d, copies, logit_parts))
    norms = heads.new_empty(programs if query_norm is not None else 0, 2, d, dtype=wide(heads.dtype))
    launch(
        triton_prepare.prepare_back, (programs,), heads,
        heads, keys, values,
        *(heads if t is None else t for t in (logits, cos, sin, indices, query, key, shared, query_norm, key_norm)),
        packed, norms, *heads.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        *(0 if t is None else t.stride(0) for t in (logits, query, key, shared)), cos_batch, num_tokens, num_rows, eps,
        G, M, k, copies, d, r, **sizes, NORM=query_norm is not None, ROUTED=indices is not None,
        SHARED_KEY=shared_key, MEAN=mean, LOGIT_PARTS=logit_parts, STEP=packed.stride(0), WIDE=accumulator_of(heads),
        **OPTIONS,
    )  # fmt: skip
    return packed, norms


def _prepare_back_fake(
    heads: Tensor, keys: Tensor, values: Tensor, logits: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    indices: Tensor | None, query: Tensor | None, key: Tensor | None, shared: Tensor | None,
    query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
    G: int, M: int, k: int, copies: int, d: int, shared_key: bool, mean: bool, logit_parts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_rows = heads.shape[0] * heads.shape[1]
    block = tokens_a_program(G, M, d, norm=True)
    programs = (num_rows + block - 1) // block if query_norm is not None else 0
    return (
        _packed(heads, num_rows, packed_width(G, M, d, copies, logit_parts)),
        heads.new_empty(programs, 2, d, dtype=wide(heads.dtype)),
    )


def _combine(
    heads: Tensor, shared: Tensor | None, logits: Tensor | None, indices: Tensor | None,
    G: int, M: int, k: int, d: int, by_expert: bool, weighted_slot: bool, scaled: bool,
) -> Tensor:  # fmt: skip
    heads, shared, logits = heads.contiguous(), _rows(shared), _rows(logits)
    indices = None if indices is None else indices.contiguous()
    num_rows = heads.shape[0]
    slots = _combine_fake(heads, shared, logits, indices, G, M, k, d, by_expert, weighted_slot, scaled)
    behind = heads[:, min(G * k, heads.shape[1] - 1)] if shared is None else shared
    sizes = _combine_sizes(G, M, d)
    launch(
        triton_combine.combine, (triton.cdiv(num_rows, sizes["BLOCK"]),), heads,
        heads, behind, heads if logits is None else logits, heads if indices is None else indices, slots,
        heads.stride(0), behind.stride(0), 0 if logits is None else logits.stride(0), num_rows, G, M, k, d, **sizes,
        ROUTED=indices is not None, BY_EXPERT=by_expert, WEIGHTED_SLOT=weighted_slot, SCALED=scaled,
        WIDE=accumulator_of(heads), **OPTIONS,
    )  # fmt: skip
    return slots


def _combine_sizes(G: int, M: int, d: int) -> dict[str, int]:
    return {"G_PAD": padded(G), "M_PAD": padded(M), "D_PAD": padded(d), "BLOCK": tokens_a_program(G, M, d)}


def _combine_fake(
    heads: Tensor, shared: Tensor | None, logits: Tensor | None, indices: Tensor | None,
    G: int, M: int, k: int, d: int, by_expert: bool, weighted_slot: bool, scaled: bool,
) -> Tensor:  # fmt: skip
    slots = (G * M if by_expert else G * k) + 2 * weighted_slot
    return heads.new_empty(heads.shape[0], slots * d)


def _combine_back(
    slots: Tensor, heads: Tensor, logits: Tensor | None, indices: Tensor | None, shared_apart: bool,
    G: int, M: int, k: int, d: int, by_expert: bool, weighted_slot: bool, scaled: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    slots, heads, logits = _rows(slots), heads.contiguous(), _rows(logits)  # type: ignore[assignment]
    indices = None if indices is None else indices.contiguous()
    num_rows = heads.shape[0]
    of_heads, of_shared, of_logits = _combine_back_fake(
        slots, heads, logits, indices, shared_apart, G, M, k, d, by_expert, weighted_slot, scaled
    )
    behind = of_shared if shared_apart else of_heads[:, min(G * k, heads.shape[1] - 1)]
    sizes = _combine_sizes(G, M, d)
    launch(
        triton_combine.combine_back, (triton.cdiv(num_rows, sizes["BLOCK"]),), heads,
        slots, heads, heads if logits is None else logits, heads if indices is None else indices,
        of_heads, behind, of_logits, slots.stride(0), heads.stride(0), 0 if logits is None else logits.stride(0),
        of_heads.stride(0), behind.stride(0), num_rows, G, M, k, heads.shape[1] - G * k, d, **sizes,
        ROUTED=indices is not None, BY_EXPERT=by_expert, WEIGHTED_SLOT=weighted_slot, SCALED=scaled,
        WIDE=accumulator_of(heads), **OPTIONS,
    )  # fmt: skip
    return of_heads, of_shared, of_logits


def _combine_back_fake(
    slots: Tensor, heads: Tensor, logits: Tensor | None, indices: Tensor | None, shared_apart: bool,
    G: int, M: int, k: int, d: int, by_expert: bool, weighted_slot: bool, scaled: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows = heads.shape[0]
    return (
        heads.new_empty(heads.shape),
        heads.new_empty(num_rows if shared_apart else 0, d),
        heads.new_empty(num_rows if logits is not None else 0, G * M, dtype=wide(heads.dtype)),
    )


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? shared, Tensor? logits, Tensor? given, Tensor? cos, Tensor? sin, "
    "Tensor? query_norm, Tensor? key_norm, float eps"
)
_LAYOUT = "int G, int M, int k, int copies, int d"
_SLOTS = "int G, int M, int k, int d, bool by_expert, bool weighted_slot, bool scaled"
define(
    f"prepare({_INPUTS}, int batch, {_LAYOUT}, bool shared_key, bool mean) -> (Tensor, Tensor, Tensor, Tensor)",
    _prepare, _prepare_fake,
)  # fmt: skip
define(
    f"prepare_cached({_INPUTS}, Tensor(a!) keys, Tensor(b!) values, Tensor start, {_LAYOUT}) -> (Tensor, Tensor)",
    _prepare_cached, _prepare_cached_fake,
)  # fmt: skip
define(
    "prepare_back(Tensor heads, Tensor keys, Tensor values, Tensor? logits, Tensor? cos, Tensor? sin, "
    "Tensor? indices, Tensor? query, Tensor? key, Tensor? shared, Tensor? query_norm, Tensor? key_norm, float eps, "
    f"{_LAYOUT}, bool shared_key, bool mean, int logit_parts) -> (Tensor, Tensor)",
    _prepare_back, _prepare_back_fake,
)  # fmt: skip
define(
    f"combine(Tensor heads, Tensor? shared, Tensor? logits, Tensor? indices, {_SLOTS}) -> Tensor",
    _combine, _combine_fake,
)  # fmt: skip
define(
    f"combine_back(Tensor slots, Tensor heads, Tensor? logits, Tensor? indices, bool shared_apart, {_SLOTS}) "
    "-> (Tensor, Tensor, Tensor)",
    _combine_back, _combine_back_fake,
)  # fmt: skip
