"""Attention of one new token, and the slots that W_O takes, as two Triton kernels: flash decoding over pieces.

`_piece` reads its part of the cache once, for the routed heads and the shared head together, and leaves softmax sums;
`_join` adds the pieces up and makes the slots, which for the plain path are `shared_decode` and `GQEAttention.combine`.

The shared head reads the mean over groups, so a program holds all groups of its keys. Each lane of a tile [keys, d]
keeps softmax sums of its own keys, and nothing is reduced over lanes before the loop's end: no barrier stands in it
(but for 16 groups of head dim 128, where a key takes more than a warp's threads).

Lengths and strides are arguments on whose value nothing is specialised: no length compiles anew. The number of pieces
follows from shapes alone, as a CUDA graph requires. The pieces take tiles of keys in turn, so that the filled part of a
static cache is shared out among them; what the mask hides isn't read.

Shapes: B batch, G groups, M experts in a group, k selected experts in a group, S keys, d head dim, P pieces; H heads,
G*k routed and the shared one last, if any.
"""
# Triton takes neither starred tuples nor one condition of compile time and run time, and static loops lengthen tuples:
# ruff: noqa: RUF005, SIM102
# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from query_experts.ops.dtypes import wide
from query_experts.ops.triton_operators import accumulator_of, define, launch

PROGRAMS_OF_ALL_GROUPS = 3  # of `_piece` on one processor of a GPU: for so many at once it has registers
PROGRAMS_OF_ONE_GROUP = 5  # likewise; each has fewer loads in flight
CPU_PROCESSORS = 2  # for Triton's interpreter
NUM_WARPS = 4
MOST_REGISTERS = 170  # for the heads of a program of `_piece`: query and sums, and 3 for a head's softmax
JOINED_COLUMNS = 8  # of d numbers, in a program of `_join`: 32 bytes, the least that a GPU reads at once
JOINED_NUMBERS = 32  # numbers of the pieces' tile [P, H, columns] in a thread of `_join`
LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU has 2**x, so scores are multiplied by it
LOW = tl.constexpr(-1e30)  # below every score, and finite: a difference of two is a number


@triton.jit
def _keep_up(top, total, score):
    """Takes a score into a running softmax: the new top and total, the score's weight, the factor of old sums."""
    new_top = tl.maximum(top, score)
    weight, kept = tl.exp2(score - new_top), tl.exp2(top - new_top)
    return new_top, total * kept + weight, weight, kept


@triton.jit
def _store_sums(partial, rows, row, sums, tops, totals, column, real, d: tl.constexpr):
    """Joins the lanes of one head, [keys, d] and [keys], and stores its row of `partial`."""
    top = tl.max(tops, 0)
    share = tl.exp2(tops - top)
    tl.store(partial + row * d + column, tl.sum(sums * share[:, None], 0), real)
    tl.store(partial + rows * d + row, top)
    tl.store(partial + rows * (d + 1) + row, tl.sum(totals * share, 0))


@triton.jit(
    do_not_specialize=[
        "query_b", "query_h", "key_b", "key_g", "key_s", "value_b", "value_g", "value_s", "mask_b", "num_keys",
    ]
)  # fmt: skip
def _piece(
    query, key, value, mask, partial,
    query_b: tl.int64, query_h: tl.int64, key_b: tl.int64, key_g: tl.int64, key_s: tl.int64,
    value_b: tl.int64, value_g: tl.int64, value_s: tl.int64, mask_b: tl.int64, num_keys,
    G: tl.constexpr, groups: tl.constexpr, k: tl.constexpr, ranks: tl.constexpr, d: tl.constexpr,
    shared_groups: tl.constexpr, scaling: tl.constexpr, masked: tl.constexpr, unit: tl.constexpr,
    accumulator: tl.constexpr, S_tile: tl.constexpr, d_pad: tl.constexpr,
):  # fmt: skip
    """One piece of the keys of one sequence, for `groups` groups and `ranks` of the k selected experts of each.

    With a shared head a program takes all G groups, else one. Many heads' sums don't fit into a program's registers;
    then several programs share out the ranks.

    query [B, H, d], key and value [B, G, S, d], mask [B or 1, S]. Strides of keys and values are in units of `unit`
    numbers, so that the compiler knows what divides them. The shared head reads the mean of the first `shared_groups`.
    partial: sums [B, P, H, d], then tops [B, P, H], then totals [B, P, H], all in `accumulator`.
    """
    b, part, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first_group, first_rank = part // (k // ranks) * groups, part % (k // ranks) * ranks
    step = tl.num_programs(2) * S_tile
    has_shared: tl.constexpr = shared_groups > 0
    routed: tl.constexpr = groups * ranks  # heads of this program, and then the shared one
    heads: tl.constexpr = G * k + has_shared
    first_head = first_group * k + first_rank
    lane, column = tl.arange(0, S_tile), tl.arange(0, d_pad)
    real = column < d
    query += b * query_b.to(tl.int64)
    key += b * key_b.to(tl.int64) * unit + first_group * key_g.to(tl.int64) * unit
    value += b * value_b.to(tl.int64) * unit + first_group * value_g.to(tl.int64) * unit
    mask += b * mask_b.to(tl.int64)

    sums, tops, totals = (), (), ()
    for _ in tl.static_range(routed + has_shared):
        sums = sums + (tl.zeros([S_tile, d_pad], accumulator),)
        tops = tops + (tl.full([S_tile], LOW, accumulator),)
        totals = totals + (tl.zeros([S_tile], accumulator),)

    for start in range(piece * S_tile, num_keys, step):
        s = start + lane
        seen = s < num_keys
        if masked:
            seen = seen & (tl.load(mask + s, seen, 0) != 0)
        tile = seen[:, None] & real[None, :]
        s = s.to(tl.int64)[:, None]
        new_tops, new_totals, weights, old_sums = (), (), (), ()
        shared_keys = tl.zeros([S_tile, d_pad], accumulator)
        for g in tl.static_range(groups):
            at = g * key_g.to(tl.int64) * unit + s * (key_s.to(tl.int64) * unit) + column[None, :]
            keys = tl.load(key + at, tile, 0.0).to(accumulator)
            if g < shared_groups:
                shared_keys += keys
            for i in tl.static_range(ranks):
                q = tl.load(query + (first_head + g * k + i) * query_h.to(tl.int64) + column, real, 0.0).to(accumulator)
                score = tl.where(seen, tl.sum(keys * q[None, :], 1) * (scaling * LOG2_E), float("-inf"))
                top, total, weight, kept = _keep_up(tops[g * ranks + i], totals[g * ranks + i], score)
                new_tops, new_totals, weights = new_tops + (top,), new_totals + (total,), weights + (weight,)
                old_sums = old_sums + (sums[g * ranks + i] * kept[:, None],)
        if has_shared:
            q = tl.load(query + G * k * query_h.to(tl.int64) + column, real, 0.0).to(accumulator)
            score = tl.sum(shared_keys * q[None, :], 1) * (scaling * LOG2_E / shared_groups)
            score = tl.where(seen, score, float("-inf"))
            top, total, weight, kept = _keep_up(tops[routed], totals[routed], score)
            new_tops, new_totals, weights = new_tops + (top,), new_totals + (total,), weights + (weight,)
            old_sums = old_sums + (sums[routed] * kept[:, None],)

        new_sums = ()
        shared_values = tl.zeros([S_tile, d_pad], accumulator)
        for g in tl.static_range(groups):
            at = g * value_g.to(tl.int64) * unit + s * (value_s.to(tl.int64) * unit) + column[None, :]
            values = tl.load(value + at, tile, 0.0).to(accumulator)
            if g < shared_groups:
                shared_values += values
            for i in tl.static_range(ranks):
                new_sums = new_sums + (old_sums[g * ranks + i] + values * weights[g * ranks + i][:, None],)
        if has_shared:
            new_sums = new_sums + (old_sums[routed] + shared_values * weights[routed][:, None],)
        sums, tops, totals = new_sums, new_tops, new_totals

    rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * heads
    row = (b * tl.num_programs(2) + piece) * heads
    for h in tl.static_range(routed):
        at = row + first_head + h // ranks * k + h % ranks
        _store_sums(partial, rows, at, sums[h], tops[h], totals[h], column, real, d)
    if has_shared:
        if part == 0:
            shared = sums[routed] / shared_groups
            _store_sums(partial, rows, row + G * k, shared, tops[routed], totals[routed], column, real, d)


@triton.jit
def _log_probabilities(logits, expert, group, real, M: tl.constexpr, M_pad: tl.constexpr, accumulator: tl.constexpr):
    """log2 of the probability of each head's expert in its group, from the logits [G, M]; -inf where not real."""
    m = tl.arange(0, M_pad)
    there = real[:, None] & (m < M)[None, :]
    all_logits = tl.load(logits + group[:, None] * M + m[None, :], there, float("-inf")).to(accumulator)  # [H, M]
    top = tl.where(real, tl.max(all_logits, 1), 0.0)
    own = tl.load(logits + group * M + expert, real, float("-inf")).to(accumulator)
    total = tl.sum(tl.exp2((all_logits - top[:, None]) * LOG2_E), 1)
    return (own - top) * LOG2_E - tl.log2(tl.where(real, total, 1.0))


@triton.jit(do_not_specialize=["num_pieces"])
def _join(
    partial, logits, indices, output, num_pieces,
    G: tl.constexpr, M: tl.constexpr, k: tl.constexpr, d: tl.constexpr, has_shared: tl.constexpr,
    learned: tl.constexpr, scaled: tl.constexpr, by_expert: tl.constexpr, accumulator: tl.constexpr,
    P_tile: tl.constexpr, H_pad: tl.constexpr, M_pad: tl.constexpr, N_pad: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Some columns of one sequence's slots, from all pieces.

    partial: from `_piece`. logits [B, G, M], read if `learned`. indices [B, G, k], read if `learned` or `by_expert`.
    output [B, slots*d]: hard slots, by rank or by expert, the weighted slot and the shared head's where there is one.
    """
    b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * columns
    routed: tl.constexpr = G * k
    heads: tl.constexpr = routed + has_shared
    hard: tl.constexpr = G * M if by_expert else routed
    p, h, column = tl.arange(0, P_tile), tl.arange(0, H_pad), first + tl.arange(0, columns)
    rows = tl.num_programs(0).to(tl.int64) * num_pieces * heads

    sums = tl.zeros([P_tile, H_pad, columns], accumulator)
    tops, totals = tl.full([P_tile, H_pad], LOW, accumulator), tl.zeros([P_tile, H_pad], accumulator)
    for start in range(0, num_pieces, P_tile):
        there = (start + p < num_pieces)[:, None] & (h < heads)[None, :]
        row = (b * num_pieces + start + p)[:, None] * heads + h[None, :]  # [P, H]
        top = tl.load(partial + rows * d + row, there, LOW)
        total = tl.load(partial + rows * (d + 1) + row, there, 0.0)
        tile = there[:, :, None] & (column < d)[None, None, :]
        more = tl.load(partial + row[:, :, None] * d + column[None, None, :], tile, 0.0)
        new_tops = tl.maximum(tops, top)
        kept, weight = tl.exp2(tops - new_tops), tl.exp2(top - new_tops)
        sums = sums * kept[:, :, None] + more * weight[:, :, None]
        totals = totals * kept + total * weight
        tops = new_tops
    share = tl.exp2(tops - tl.max(tops, 0)[None, :])
    total = tl.sum(totals * share, 0)  # zero where the mask hides every key
    out = tl.sum(sums * share[:, :, None], 0) / tl.where(total > 0, total, 1.0)[:, None]  # [H, columns]

    is_routed = h < routed
    group = tl.minimum(h // k, G - 1)
    expert = h % k
    if learned or by_expert:  # clamped, so that indices from NaN logits stay in bounds
        expert = tl.minimum(tl.maximum(tl.load(indices + b * routed + h, is_routed, 0), 0), M - 1)
    if learned:
        log_probability = _log_probabilities(logits + b * (G * M), expert, group, is_routed, M, M_pad, accumulator)
    else:
        log_probability = tl.where(is_routed, tl.log2(tl.full([H_pad], 1 / M, accumulator)), float("-inf"))
    output += b * ((hard + 2 * has_shared) * d)
    kind = output.dtype.element_ty
    inside = column < d
    if has_shared:
        weight = tl.exp2(log_probability - tl.max(log_probability, 0))  # right too where every probability underflows
        weight = weight / tl.sum(weight, 0)
        weighted = tl.sum(tl.where(is_routed[:, None], out * weight[:, None], 0.0), 0)
        tl.store(output + hard * d + column, weighted.to(kind), inside)
    if scaled:
        out = tl.where(is_routed[:, None], out * tl.exp2(log_probability)[:, None], out)
    slot = group * M + expert if by_expert else h
    slot = tl.where(is_routed, slot, hard + 1)
    tl.store(output + slot[:, None] * d + column[None, :], out.to(kind), (h < heads)[:, None] & inside[None, :])
    if by_expert:
        n = tl.arange(0, N_pad)
        free = n < G * M
        for i in tl.static_range(k):
            chosen = tl.load(indices + b * routed + tl.minimum(n // M, G - 1) * k + i)
            free = free & (tl.minimum(tl.maximum(chosen, 0), M - 1) != n % M)
        zeros = tl.zeros([N_pad, columns], kind)
        tl.store(output + n[:, None] * d + column[None, :], zeros, free[:, None] & inside[None, :])


def ranks_and_tile(groups: int, k: int, has_shared: bool, d: int) -> tuple[int, int]:
    """How many of k ranks a program of `_piece` takes, and how many keys at a time, so that it fits into registers.

    A thread holds 8 numbers of each head, one load of 16 bytes in bf16, or 4 for more heads. Then a key of up to 128
    numbers stays within a warp's 32 threads: a sum over d is a matter of shuffles, not of barriers. Where even 4 don't
    fit, ranks are shared out among programs that read the same keys at about the same time; only then fewer are held.
    """
    d_pad = triton.next_power_of_2(d)
    for fewest in (max(4, d_pad // 32), 1):
        for ranks in (n for n in range(k, 0, -1) if k % n == 0):
            for numbers in (n for n in (8, 4, 2, 1) if n >= fewest):
                if (groups * ranks + has_shared) * (2 * numbers + 3) <= MOST_REGISTERS:
                    return ranks, max(1, 32 * NUM_WARPS * numbers // d_pad)
    return 1, max(1, 32 * NUM_WARPS // d_pad)


def unit_of(d: int, *strides: int) -> int:
    """The largest power of two, up to 16, that divides d and the strides. It doesn't change with the length."""
    return next(unit for unit in (16, 8, 4, 2, 1) if not any(n % unit for n in (d, *strides)))


@lru_cache
def num_processors(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_slots(heads: int, variant: str, output_projection: str, logits: Tensor | None) -> int:
    """The rows of d numbers that W_O takes."""
    if output_projection == "slot" or logits is None:
        return heads + (variant == "gqe")
    return logits.shape[1] * logits.shape[2] + 2 * (variant == "gqe")


def piece_constants(
    G: int, k: int, d: int, shared_groups: int, scaling: float, masked: bool, unit: int, accumulator: tl.dtype
) -> dict:
    """The compile-time arguments of `_piece`."""
    groups = G if shared_groups else 1
    ranks, S_tile = ranks_and_tile(groups, k, shared_groups > 0, d)
    return {
        "G": G, "groups": groups, "k": k, "ranks": ranks, "d": d, "shared_groups": shared_groups, "scaling": scaling,
        "masked": masked, "unit": unit, "accumulator": accumulator, "S_tile": S_tile,
        "d_pad": triton.next_power_of_2(d),
    }  # fmt: skip


def join_constants(
    G: int, M: int, k: int, d: int, variant: str, learned: bool, by_expert: bool, accumulator: tl.dtype
) -> dict:
    """The compile-time arguments of `_join`."""
    has_shared = variant == "gqe"
    H_pad = triton.next_power_of_2(G * k + has_shared)
    return {
        "G": G, "M": M, "k": k, "d": d, "has_shared": has_shared, "accumulator": accumulator, "by_expert": by_expert,
        "learned": learned and variant != "hard_concat", "scaled": variant == "weighted_concat",
        "P_tile": max(1, 32 * NUM_WARPS * JOINED_NUMBERS // (H_pad * JOINED_COLUMNS)), "H_pad": H_pad,
        "M_pad": triton.next_power_of_2(M), "N_pad": triton.next_power_of_2(G * M), "columns": JOINED_COLUMNS,
    }  # fmt: skip


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, logits: Tensor | None, indices: Tensor | None,
    scaling: float, variant: str, output_projection: str, shared_head_kv: str,
) -> Tensor:  # fmt: skip
    B, H, d = query.shape
    G, S = key.shape[1:3]
    if mask is not None and mask.shape[1] != S:
        raise ValueError(f"mask has {mask.shape[1]} columns; it must have one for each of the {S} keys")
    has_shared = variant == "gqe"
    k = (H - has_shared) // G
    output = value.new_empty(B, num_slots(H, variant, output_projection, logits) * d)
    if output.numel() == 0:
        return output
    query, key, value, mask = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, mask)
    )
    logits, indices = (t.contiguous() if t is not None else None for t in (logits, indices))
    sums = accumulator_of(query)
    unit = unit_of(d, *key.stride()[:3], *value.stride()[:3])
    shared_groups = 0 if not has_shared else G if shared_head_kv == "mean" else 1
    constants = piece_constants(G, k, d, shared_groups, scaling, mask is not None, unit, sums)
    parts = G // constants["groups"] * (k // constants["ranks"])
    wanted = (PROGRAMS_OF_ALL_GROUPS if has_shared else PROGRAMS_OF_ONE_GROUP) * num_processors(key.device)
    pieces = max(1, min(triton.cdiv(S, constants["S_tile"]), wanted // (B * parts)))
    partial = query.new_empty(B * pieces * H * (d + 2), dtype=wide(query.dtype))
    strides = [stride // unit for t in (key, value) for stride in t.stride()[:3]]
    M = logits.shape[2] if logits is not None else k
    by_expert = output_projection == "expert" and logits is not None
    launch(
        _piece, (B, parts, pieces), key,
        query, key, value, mask if mask is not None else query, partial, *query.stride()[:2], *strides,
        mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0, S, **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        _join, (B, triton.cdiv(d, JOINED_COLUMNS)), key,
        partial, logits if logits is not None else partial, indices if indices is not None else partial, output,
        pieces, **join_constants(G, M, k, d, variant, logits is not None, by_expert, sums),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return output


def _decode_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, logits: Tensor | None, indices: Tensor | None,
    scaling: float, variant: str, output_projection: str, shared_head_kv: str,
) -> Tensor:  # fmt: skip
    return value.new_empty(
        query.shape[0], num_slots(query.shape[1], variant, output_projection, logits) * query.shape[2]
    )


define(
    "decode(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? logits, Tensor? indices, float scaling, "
    "str variant, str output_projection, str shared_head_kv) -> Tensor",
    _decode, _decode_fake,
)  # fmt: skip


def triton_decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, logits: Tensor | None, indices: Tensor | None,
    scaling: float, variant: str = "gqe", output_projection: str = "slot", shared_head_kv: str = "mean",
) -> Tensor:  # fmt: skip
    """Attends with one new token of each sequence, and makes the slots that W_O takes; forwards only.

    Args:
        query: [B, H, d], the selected experts' queries group by group, then the shared head's where variant is `gqe`.
        key: [B, G, S, d], in any memory layout; read in place where the last dim is contiguous.
        value: [B, G, S, d], likewise.
        mask: bool [B or 1, S], True for visible keys; None where all are. Where it hides every key, the slots are 0.
        logits: of the router, float32 [B, G, M]; None for no router: k = M, and every expert is as probable.
        indices: int64 [B, G, k], the selected experts, no two of a group equal; None only without logits.
        scaling: factor of the scores.
        variant: as in `GQEAttention`.
        output_projection: as in `GQEAttention`.
        shared_head_kv: as in `GQEAttention`.

    Returns:
        [B, slots*d] in the dtype of the values. Scores, softmax and sums are float32 (float64 for float64).
    """
    return torch.ops.query_experts.decode(
        query, key, value, mask, logits, indices, scaling, variant, output_projection, shared_head_kv
    )
