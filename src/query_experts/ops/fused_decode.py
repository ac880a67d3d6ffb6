"""`shared_decode` for one new token as a Triton kernel that splits the cache over the processors of a GPU.

Batched matrix products give each KV head of each sequence to one processor, so that a long cache in a small batch is
read by few of them. Here every program takes a piece of the keys of all heads, which the shared head needs together
anyway, and reads its part of the cache once; the pieces' softmax sums are joined afterwards (flash decoding).

Shapes: B batch, G groups, k routed queries in a group, H = G*k, S keys, d head dim, P pieces.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # numbers of the keys' tile [H, keys, d] that a program holds at once
PIECES_PER_PROCESSOR = 4
LOW = tl.constexpr(-1e30)  # below every score, and finite: a difference of two is a number


@triton.jit
def _decode_piece(
    query, shared_query, key, value, mask, sums, tops, totals,
    key_b, key_g, key_s, value_b, value_g, value_s, mask_b, num_keys, keys_a_piece, scaling,
    k: tl.constexpr, H: tl.constexpr, d: tl.constexpr, masked: tl.constexpr,
    H_pad: tl.constexpr, d_pad: tl.constexpr, S_tile: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one piece of the keys: sums [B, P, H+1, d], tops and totals [B, P, H+1], the shared head last."""
    b, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = b * tl.num_programs(1) + piece
    h, c = tl.arange(0, H_pad), tl.arange(0, d_pad)
    real = (h[:, None] < H) & (c[None, :] < d)  # [H, d]
    group = (h // k).to(tl.int64)
    q = tl.load(query + b * H * d + h[:, None] * d + c[None, :], real, 0.0).to(tl.float32) * scaling  # [H, d]
    # every KV head is read k times, once for each of its queries, so the mean over heads is that over KV heads
    q_shared = tl.load(shared_query + b * d + c, c < d, 0.0).to(tl.float32) * (scaling / H)  # [d]

    top, total = tl.full([H_pad], LOW, tl.float32), tl.zeros([H_pad], tl.float32)
    top_shared, total_shared = tl.max(tl.full([1], LOW, tl.float32), 0), tl.sum(tl.zeros([1], tl.float32), 0)
    out, out_shared = tl.zeros([H_pad, d_pad], tl.float32), tl.zeros([d_pad], tl.float32)
    begin = piece * keys_a_piece
    for start in range(begin, tl.minimum(begin + keys_a_piece, num_keys), S_tile):
        s = start + tl.arange(0, S_tile)
        there = (s < begin + keys_a_piece) & (s < num_keys)
        seen = there
        if masked:
            seen = there & (tl.load(mask + b * mask_b + s, there, 0) != 0)
        tile = real[:, None, :] & there[None, :, None]  # [H, S, d]
        at = s[None, :, None].to(tl.int64)
        keys = tl.load(
            key + b * key_b + group[:, None, None] * key_g + at * key_s + c[None, None, :], tile, 0.0
        ).to(tl.float32)  # fmt: skip
        score = tl.where(seen[None, :], tl.sum(keys * q[:, None, :], 2), float("-inf"))  # [H, S]
        score_shared = tl.where(seen, tl.sum(tl.sum(keys * q_shared[None, None, :], 2), 0), float("-inf"))  # [S]

        new_top = tl.maximum(top, tl.max(score, 1))
        weight, kept = tl.exp(score - new_top[:, None]), tl.exp(top - new_top)
        new_top_shared = tl.maximum(top_shared, tl.max(score_shared, 0))
        weight_shared, kept_shared = tl.exp(score_shared - new_top_shared), tl.exp(top_shared - new_top_shared)
        values = tl.load(
            value + b * value_b + group[:, None, None] * value_g + at * value_s + c[None, None, :], tile, 0.0
        ).to(tl.float32)  # fmt: skip
        out = out * kept[:, None] + tl.sum(values * weight[:, :, None], 1)
        out_shared = out_shared * kept_shared + tl.sum(tl.sum(values * weight_shared[None, :, None], 1), 0) / H
        top, total = new_top, total * kept + tl.sum(weight, 1)
        top_shared, total_shared = new_top_shared, total_shared * kept_shared + tl.sum(weight_shared, 0)

    here = row * (H + 1)
    tl.store(sums + (here + h[:, None]) * d + c[None, :], out, real)
    tl.store(sums + (here + H) * d + c, out_shared, c < d)
    tl.store(tops + here + h, top, h < H)
    tl.store(totals + here + h, total, h < H)
    tl.store(tops + here + H, top_shared)
    tl.store(totals + here + H, total_shared)


@torch.library.custom_op("query_experts::fused_decode", mutates_args=())
def _fused_decode(query: Tensor, shared: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """query [B, G, k, d], shared [B, d], key and value [B, G, S, d], mask [B or 1, S] or empty -> [B, H+1, d]."""
    B, G, k, d = query.shape
    S, H = key.shape[2], G * k
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    mask = mask.contiguous()
    if mask.ndim == 2 and mask.shape[1] != S:
        raise ValueError(f"mask has {mask.shape[1]} columns; it must have one for each of the {S} keys")
    H_pad, d_pad = triton.next_power_of_2(H), triton.next_power_of_2(d)
    S_tile = max(1, TILE // (H_pad * d_pad))
    processors = torch.cuda.get_device_properties(key.device).multi_processor_count if key.is_cuda else 2
    pieces = max(1, min(triton.cdiv(S, S_tile), PIECES_PER_PROCESSOR * processors // B))
    keys_a_piece = triton.cdiv(triton.cdiv(S, pieces), S_tile) * S_tile
    pieces = triton.cdiv(S, keys_a_piece)
    sums = torch.empty(B, pieces, H + 1, d, device=key.device, dtype=torch.float32)
    tops, totals = (torch.empty(B, pieces, H + 1, device=key.device, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device(key.device) if key.is_cuda else nullcontext():
        _decode_piece[(B, pieces)](
            query.contiguous(), shared.contiguous(), key, value, mask, sums, tops, totals,
            *key.stride()[:3], *value.stride()[:3], mask.stride(0) if mask.ndim == 2 and mask.shape[0] > 1 else 0,
            S, keys_a_piece, scaling, k, H, d, mask.ndim == 2, H_pad, d_pad, S_tile, num_warps=8,
        )  # fmt: skip
    share = (tops - tops.amax(1, keepdim=True)).exp()  # [B, P, H+1]
    total = (totals * share).sum(1)
    out = (sums * share[..., None]).sum(1) / torch.where(total > 0, total, 1)[..., None]
    return out.to(value.dtype)


@_fused_decode.register_fake
def _(query: Tensor, shared: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    B, G, k, d = query.shape
    return value.new_empty(B, G * k + 1, d)


def fused_decode(
    routed_BGkTd: Tensor,
    shared_BTd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """As `shared_decode` for T = 1, forwards only: outputs [B, G, k, 1, d] and [B, 1, d], no weights.

    mask: boolean [B or 1, 1, 1, S], or None. Scores, softmax and sums are float32.
    """
    B, G, k, _, d = routed_BGkTd.shape
    keys_seen = mask[:, 0, 0] if mask is not None else torch.empty(0, dtype=torch.bool, device=key_BGSd.device)
    out = _fused_decode(routed_BGkTd[:, :, :, 0], shared_BTd[:, 0], key_BGSd, value_BGSd, keys_seen, scaling)
    return out[:, :-1].view(B, G, k, 1, d), out[:, -1:]
