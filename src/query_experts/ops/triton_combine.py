"""Triton kernels between attention and the output projection: the slots, forwards and backwards.

Shapes: R = B*T rows (tokens), G groups, M experts in a group, k selected in a group, d head dim. heads [R, G*k + C, d]
hold the outputs of the selected experts, then of C copies of the shared head, of which the first counts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log_probabilities(
    logits, row, in_group, logits_row, g, e, M: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The logarithms of the softmax over each group's experts, [tokens, groups, M_PAD]; all the same without logits."""
    if GIVEN:
        at = row[:, None, None] * logits_row + (g * M)[None, :, None] + e[None, None, :]
        score = tl.load(logits + at, in_group[:, :, None] & (e < M)[None, None, :], float("-inf")).to(WIDE)
        score = tl.where(in_group[:, :, None], score, 0.0)
        score = score - tl.max(score, 2)[:, :, None]
        log_probability = score - tl.log(tl.sum(tl.exp(score), 2))[:, :, None]
    else:
        log_probability = tl.zeros([row.shape[0], g.shape[0], e.shape[0]], WIDE) - tl.log(tl.zeros([1], WIDE) + M)
    return log_probability


@triton.jit
def _selected(
    indices, place, in_group, log_probability, rank: tl.constexpr, e, ROUTED: tl.constexpr
):  # fmt: skip
    """The expert of a rank and the logarithm of its probability, [tokens, groups]; -inf where there is no group."""
    if ROUTED:
        expert = tl.load(indices + place, in_group, 0)
    else:
        expert = tl.zeros([place.shape[0], place.shape[1]], tl.int64) + rank
    own = e[None, None, :] == expert[:, :, None]
    return expert, tl.where(in_group, tl.sum(tl.where(own, log_probability, 0.0), 2), float("-inf"))


@triton.jit
def _scale(
    indices, row, live, in_group, log_probability, g, e,
    G: tl.constexpr, k: tl.constexpr, ROUTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """log of the sum of a token's selected probabilities, [tokens, 1]; finite where each of them underflows."""
    top = tl.full([row.shape[0]], float("-inf"), WIDE)
    for rank in tl.static_range(k):
        place = row[:, None] * (G * k) + (g * k)[None, :] + rank
        _, log_weight = _selected(indices, place, in_group, log_probability, rank, e, ROUTED)
        top = tl.maximum(top, tl.max(log_weight, 1))
    top = tl.where(live, top, 0.0)
    total = tl.zeros([row.shape[0]], WIDE)
    for rank in tl.static_range(k):
        place = row[:, None] * (G * k) + (g * k)[None, :] + rank
        _, log_weight = _selected(indices, place, in_group, log_probability, rank, e, ROUTED)
        total += tl.sum(tl.exp(log_weight - top[:, None]), 1)
    return (top + tl.log(tl.where(live, total, 1.0)))[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def combine(
    heads, shared, logits, indices, slots, heads_row, shared_row, logits_row, num_rows,
    G: tl.constexpr, M: tl.constexpr, k: tl.constexpr, d: tl.constexpr,
    G_PAD: tl.constexpr, M_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    ROUTED: tl.constexpr, BY_EXPERT: tl.constexpr, WEIGHTED_SLOT: tl.constexpr, SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """heads and the shared head's rows [R, d] -> slots [R, (G*k or G*M) + 2 with WEIGHTED_SLOT, d], each written once.

    WEIGHTED_SLOT adds the weighted slot, sum of w o with w = p / sum of all selected p, and the shared head. w comes
    from logarithms, so that it is right where each p underflows, as those of replayed experts may. SCALED scales each
    expert's output by its probability p. BY_EXPERT puts outputs at their experts' places, among zeros.
    """
    hard: tl.constexpr = G * M if BY_EXPERT else G * k
    width: tl.constexpr = (hard + (2 if WEIGHTED_SLOT else 0)) * d
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    g, e, c = tl.arange(0, G_PAD), tl.arange(0, M_PAD), tl.arange(0, D_PAD)
    in_group = live[:, None] & (g < G)[None, :]
    in_row = live[:, None] & (c < d)[None, :]
    in_head = in_group[:, :, None] & (c < d)[None, None, :]
    weighed: tl.constexpr = ROUTED and (WEIGHTED_SLOT or SCALED)
    log_probability = _log_probabilities(logits, row, in_group, logits_row, g, e, M, weighed, WIDE)
    if WEIGHTED_SLOT:
        scale = _scale(indices, row, live, in_group, log_probability, g, e, G, k, ROUTED, WIDE)
    else:
        scale = 0.0
    weighted = tl.zeros([BLOCK, D_PAD], WIDE)
    for rank in tl.static_range(k):
        place = row[:, None] * (G * k) + (g * k)[None, :] + rank
        expert, log_weight = _selected(indices, place, in_group, log_probability, rank, e, ROUTED)
        weight = tl.exp(log_weight - scale)
        at = row[:, None, None] * heads_row + ((g * k + rank) * d)[None, :, None] + c[None, None, :]
        output = tl.load(heads + at, in_head, 0.0)
        if WEIGHTED_SLOT:
            weighted += tl.sum(weight[:, :, None] * output.to(WIDE), 1)
        if SCALED:
            output = (weight[:, :, None] * output.to(WIDE)).to(slots.dtype.element_ty)
        if BY_EXPERT:
            slot = (g * M)[None, :] + expert
        else:
            slot = (g * k)[None, :] + rank + tl.zeros([BLOCK, G_PAD], tl.int64)
        tl.store(slots + row[:, None, None] * width + (slot * d)[:, :, None] + c[None, None, :], output, in_head)
    if BY_EXPERT and ROUTED:
        for m in range(M):
            off = in_group
            for rank in tl.static_range(k):
                off = off & (tl.load(indices + row[:, None] * (G * k) + (g * k)[None, :] + rank, in_group, 0) != m)
            at = row[:, None, None] * width + ((g * M + m) * d)[None, :, None] + c[None, None, :]
            tl.store(slots + at, tl.zeros([BLOCK, G_PAD, D_PAD], WIDE), in_head & off[:, :, None])
    if WEIGHTED_SLOT:
        at = row[:, None] * width + hard * d + c[None, :]
        tl.store(slots + at, weighted, in_row)
        tl.store(slots + at + d, tl.load(shared + row[:, None] * shared_row + c[None, :], in_row, 0.0), in_row)


@triton.jit(do_not_specialize=["num_rows"])
def combine_back(
    slots, heads, logits, indices, heads_gradient, shared_gradient, logits_gradient,
    slots_row, heads_row, logits_row, gradient_row, shared_row, num_rows,
    G: tl.constexpr, M: tl.constexpr, k: tl.constexpr, C: tl.constexpr, d: tl.constexpr,
    G_PAD: tl.constexpr, M_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    ROUTED: tl.constexpr, BY_EXPERT: tl.constexpr, WEIGHTED_SLOT: tl.constexpr, SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of `combine`, given those of the slots [R, ...]: of heads, of the shared head's rows and of the logits.

    With weights w_i, outputs o_i, and y the weighted slot's gradient: do_i = dy_i + w_i y, and the logarithm of p_i
    gets w_i (<y, o_i> - sum_j w_j <y, o_j>). Scaled: do_i = p_i dy_i, and it gets p_i <dy_i, o_i>. A logit gets that of
    its expert, less p times the sum over its group. Copies of the shared head but the first get zeros.
    """
    hard: tl.constexpr = G * M if BY_EXPERT else G * k
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    g, e, c = tl.arange(0, G_PAD), tl.arange(0, M_PAD), tl.arange(0, D_PAD)
    in_group = live[:, None] & (g < G)[None, :]
    in_row = live[:, None] & (c < d)[None, :]
    in_head = in_group[:, :, None] & (c < d)[None, None, :]
    weighed: tl.constexpr = ROUTED and (WEIGHTED_SLOT or SCALED)
    log_probability = _log_probabilities(logits, row, in_group, logits_row, g, e, M, weighed, WIDE)
    if WEIGHTED_SLOT:
        scale = _scale(indices, row, live, in_group, log_probability, g, e, G, k, ROUTED, WIDE)
    else:
        scale = 0.0
    given = slots + row[:, None] * slots_row  # [tokens, 1]
    if WEIGHTED_SLOT:
        of_weighted = tl.load(given + hard * d + c[None, :], in_row, 0.0).to(WIDE)  # [tokens, d]
    of_log, weights = tl.zeros([BLOCK, G_PAD, M_PAD], WIDE), tl.zeros([BLOCK, G_PAD, M_PAD], WIDE)
    for rank in tl.static_range(k):
        place = row[:, None] * (G * k) + (g * k)[None, :] + rank
        expert, log_weight = _selected(indices, place, in_group, log_probability, rank, e, ROUTED)
        weight = tl.exp(log_weight - scale)
        if BY_EXPERT:
            slot = (g * M)[None, :] + expert
        else:
            slot = (g * k)[None, :] + rank + tl.zeros([BLOCK, G_PAD], tl.int64)
        of_output = tl.load(given[:, :, None] + (slot * d)[:, :, None] + c[None, None, :], in_head, 0.0).to(WIDE)
        at = ((g * k + rank) * d)[None, :, None] + c[None, None, :]
        if weighed:
            output = tl.load(heads + row[:, None, None] * heads_row + at, in_head, 0.0).to(WIDE)
            if SCALED:
                product = tl.sum(output * of_output, 2)
            else:
                product = tl.sum(output * of_weighted[:, None, :], 2)
            own = e[None, None, :] == expert[:, :, None]
            of_log += tl.where(own, (weight * product)[:, :, None], 0.0)
            weights += tl.where(own, weight[:, :, None], 0.0)
        if WEIGHTED_SLOT:
            of_output += weight[:, :, None] * of_weighted[:, None, :]
        if SCALED:
            of_output = of_output * weight[:, :, None]
        tl.store(heads_gradient + row[:, None, None] * gradient_row + at, of_output, in_head)
    if weighed:
        if WEIGHTED_SLOT:
            of_log -= weights * tl.sum(tl.sum(of_log, 2), 1)[:, None, None]
        of_logits = of_log - tl.exp(log_probability) * tl.sum(of_log, 2)[:, :, None]
        at = row[:, None, None] * (G * M) + (g * M)[None, :, None] + e[None, None, :]
        tl.store(logits_gradient + at, of_logits, in_group[:, :, None] & (e < M)[None, None, :])
    if WEIGHTED_SLOT:
        of_shared = tl.load(given + (hard + 1) * d + c[None, :], in_row, 0.0)
        tl.store(shared_gradient + row[:, None] * shared_row + c[None, :], of_shared, in_row)
    for copy in tl.static_range(1, C):
        at = row[:, None] * gradient_row + (G * k + copy) * d + c[None, :]
        tl.store(heads_gradient + at, tl.zeros([BLOCK, D_PAD], WIDE), in_row)
