"""Triton kernels between the projections and attention, forwards and backwards.

`prepare` selects each group's experts by their logits, takes their query rows, normalises and rotates queries and keys,
averages keys and values for the shared head, and writes all of it token by token, as attention kernels read it. One
program does so for a few tokens and all heads. Nothing is accumulated across programs but norm weights' gradients, as
partial sums, so two runs give the same bits.

Shapes: R = B*T rows (tokens), G groups, M experts in a group, k selected in a group, C copies of the shared query,
H = G*k + C query heads, GK = G + 1 key heads with the shared one, else G, d head dim, r rotated dims of it (0 for no
rotation). A head's row is held as two rotated halves [r/2] and the rest [d - r], each padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # above the -inf of an expert that is taken or isn't there


@triton.jit
def _load_heads(
    source, at, live, d: tl.constexpr, r: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Rows of d numbers at offsets [tokens, heads] -> two halves [tokens, heads, HALF] and the rest [.., REST]."""
    rows, there = source + at[:, :, None], live[:, :, None]
    c, t = tl.arange(0, HALF)[None, None, :], tl.arange(0, REST)[None, None, :]
    if r > 0:
        one = tl.load(rows + c, there & (c < r // 2), 0.0).to(WIDE)
        two = tl.load(rows + r // 2 + c, there & (c < r // 2), 0.0).to(WIDE)
    else:
        one = tl.zeros([at.shape[0], at.shape[1], HALF], WIDE)
        two = one
    if r < d:
        rest = tl.load(rows + r + t, there & (t < d - r), 0.0).to(WIDE)
    else:
        rest = tl.zeros([at.shape[0], at.shape[1], REST], WIDE)
    return one, two, rest


@triton.jit
def _store_heads(
    target, at, live, one, two, rest, d: tl.constexpr, r: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    rows, there = target + at[:, :, None], live[:, :, None]
    c, t = tl.arange(0, HALF)[None, None, :], tl.arange(0, REST)[None, None, :]
    if r > 0:
        tl.store(rows + c, one, there & (c < r // 2))
        tl.store(rows + r // 2 + c, two, there & (c < r // 2))
    if r < d:
        tl.store(rows + r + t, rest, there & (t < d - r))


@triton.jit
def _load_weight(weight, d: tl.constexpr, r: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr):
    """A norm's weight [d], as a head's row, [1, 1, ...]."""
    c, t = tl.arange(0, HALF)[None, None, :], tl.arange(0, REST)[None, None, :]
    one = tl.load(weight + c, c < r // 2, 0.0).to(WIDE)
    two = tl.load(weight + r // 2 + c, c < r // 2, 0.0).to(WIDE)
    return one, two, tl.load(weight + r + t, t < d - r, 0.0).to(WIDE)


@triton.jit
def _inverse_norm(one, two, rest, live, eps: tl.constexpr, d: tl.constexpr, WIDE: tl.constexpr):
    """1 / sqrt(mean square + eps) of each head's row, [tokens, heads, 1]; 0 where there is none."""
    square = tl.sum(one * one, 2) + tl.sum(two * two, 2) + tl.sum(rest * rest, 2)
    return tl.where(live, 1.0 / tl.sqrt(square / d + tl.full([1, 1], eps, WIDE)), 0.0)[:, :, None]


@triton.jit
def _rows(num_rows, num_tokens, BLOCK: tl.constexpr):
    """A program's rows, each one's place in the batch and in its sequence, and whether there is one: [BLOCK].

    There are fewer than 2^31 rows, and a division of 64 bits takes a call, with a stack; offsets are of 64 bits.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, token = row // num_tokens, row % num_tokens
    return row.to(tl.int64), batch.to(tl.int64), token.to(tl.int64), row < num_rows


@triton.jit
def _load_angles(
    cos, sin, batch, token, live, cos_batch, r: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """cos and sin [tokens, 1, HALF]; both halves of a head rotate by the same angles."""
    c = tl.arange(0, HALF)[None, None, :]
    at = (batch * cos_batch + token * r)[:, None, None] + c
    there = live[:, None, None] & (c < r // 2)
    return tl.load(cos + at, there, 0.0).to(WIDE), tl.load(sin + at, there, 0.0).to(WIDE)


@triton.jit
def _normalise_and_rotate(
    one, two, rest, live, weight_one, weight_two, weight_rest, cosine, sine, eps: tl.constexpr,
    d: tl.constexpr, r: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    if NORM:
        inverse = _inverse_norm(one, two, rest, live, eps, d, WIDE)
        one, two, rest = one * inverse * weight_one, two * inverse * weight_two, rest * inverse * weight_rest
    if r > 0:
        one, two = one * cosine - two * sine, two * cosine + one * sine
    return one, two, rest


@triton.jit
def _of_all_groups(heads, groups, G: tl.constexpr, MEAN: tl.constexpr):
    """[tokens, groups, c] -> the shared head's row [tokens, 1, c]: the mean over the groups, or the first group's."""
    if MEAN:
        shared = tl.sum(heads, 1) / G
    else:
        shared = tl.sum(tl.where((groups == 0)[None, :, None], heads, 0.0), 1)
    return shared[:, None, :]


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "room"])
def prepare(
    query, key, value, shared, logits, cos, sin, query_norm, key_norm, start, heads, keys, values, indices,
    query_row, key_row, value_row, shared_row, logits_row, cos_batch,
    keys_batch, keys_token, keys_head, values_batch, values_token, values_head, num_tokens, num_rows, room,
    eps: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, k: tl.constexpr, C: tl.constexpr, d: tl.constexpr, r: tl.constexpr,
    G_PAD: tl.constexpr, M_PAD: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, ROUTED: tl.constexpr, GIVEN: tl.constexpr, SHARED_KEY: tl.constexpr,
    MEAN: tl.constexpr, CACHED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """query [R, G*M*d], key, value [R, G*d], shared [R, d] -> heads [R, H, d], keys, values [B, T, GK, d].

    Experts come from logits [R, G*M], whose choice goes to indices [R, G, k]; from indices where GIVEN; are all of them
    without ROUTED. Where CACHED, keys and values begin at the token *start of tensors with room for so many; what would
    lie behind their end isn't written.
    """
    H: tl.constexpr = G * k + C
    row, batch, token, live = _rows(num_rows, num_tokens, BLOCK)
    g, e = tl.arange(0, G_PAD), tl.arange(0, M_PAD)
    one_head = row[:, None]  # [tokens, 1]
    alive = live[:, None]
    in_group = alive & (g < G)[None, :]  # [tokens, groups]
    if r > 0:
        cosine, sine = _load_angles(cos, sin, batch, token, live, cos_batch, r, HALF, WIDE)
    else:
        cosine, sine = 0.0, 0.0
    if NORM:
        query_one, query_two, query_rest = _load_weight(query_norm, d, r, HALF, REST, WIDE)
        key_one, key_two, key_rest = _load_weight(key_norm, d, r, HALF, REST, WIDE)
    else:
        query_one, query_two, query_rest = 1.0, 1.0, 1.0
        key_one, key_two, key_rest = 1.0, 1.0, 1.0

    # Select: the largest logits, largest first, ties to the lowest index. NaN counts as the largest
    if ROUTED and not GIVEN:
        at = row[:, None, None] * logits_row + (g * M)[None, :, None] + e[None, None, :]
        real = in_group[:, :, None] & (e < M)[None, None, :]
        score = tl.load(logits + at, real, 0.0)
        score = tl.where(score == score, tl.maximum(score, LOWEST), float("inf"))
        score = tl.where(real, score, float("-inf"))
    for rank in tl.static_range(k):
        place = row[:, None] * (G * k) + (g * k)[None, :] + rank
        if not ROUTED:
            expert = tl.zeros([BLOCK, G_PAD], tl.int64) + rank
        elif GIVEN:
            expert = tl.load(indices + place, in_group, 0)
        else:
            expert = tl.minimum(tl.argmax(score, 2), M - 1).to(tl.int64)
            score = tl.where(e[None, None, :] == expert[:, :, None], float("-inf"), score)
            tl.store(indices + place, expert, in_group)
        one, two, rest = _load_heads(
            query, one_head * query_row + ((g * M)[None, :] + expert) * d, in_group, d, r, HALF, REST, WIDE
        )
        one, two, rest = _normalise_and_rotate(
            one, two, rest, in_group, query_one, query_two, query_rest, cosine, sine, eps, d, r, NORM, WIDE
        )
        _store_heads(
            heads, one_head * (H * d) + (g * (k * d))[None, :] + rank * d, in_group, one, two, rest, d, r, HALF, REST
        )

    if C > 0:
        one, two, rest = _load_heads(shared, one_head * shared_row, alive, d, r, HALF, REST, WIDE)
        one, two, rest = _normalise_and_rotate(
            one, two, rest, alive, query_one, query_two, query_rest, cosine, sine, eps, d, r, NORM, WIDE
        )
        for copy in tl.static_range(C):
            _store_heads(heads, one_head * (H * d) + (G * k + copy) * d, alive, one, two, rest, d, r, HALF, REST)

    begin = 0
    if CACHED:
        begin = tl.load(start)
    token, batch = (token + begin)[:, None], batch[:, None]
    head = g.to(tl.int64)[None, :]  # times a step between heads, which may be as long as a cache
    behind = tl.zeros([1, 1], tl.int64) + G
    alive = alive & (token < room)
    in_group = in_group & (token < room)
    at = batch * keys_batch + token * keys_token
    one, two, rest = _load_heads(key, one_head * key_row + (g * d)[None, :], in_group, d, r, HALF, REST, WIDE)
    one, two, rest = _normalise_and_rotate(
        one, two, rest, in_group, key_one, key_two, key_rest, cosine, sine, eps, d, r, NORM, WIDE
    )
    one, two, rest = one.to(keys.dtype.element_ty), two.to(keys.dtype.element_ty), rest.to(keys.dtype.element_ty)
    _store_heads(keys, at + head * keys_head, in_group, one, two, rest, d, r, HALF, REST)
    if SHARED_KEY:  # of keys rounded as they are cached, so that training equals decoding
        one, two, rest = one.to(WIDE), two.to(WIDE), rest.to(WIDE)
        one, two = _of_all_groups(one, g, G, MEAN), _of_all_groups(two, g, G, MEAN)
        rest = _of_all_groups(rest, g, G, MEAN)
        _store_heads(keys, at + behind * keys_head, alive, one, two, rest, d, r, HALF, REST)

    at = batch * values_batch + token * values_token
    _, _, whole = _load_heads(value, one_head * value_row + (g * d)[None, :], in_group, d, 0, 1, D_PAD, WIDE)
    _store_heads(values, at + head * values_head, in_group, whole, whole, whole, d, 0, 1, D_PAD)
    if SHARED_KEY:
        whole = _of_all_groups(whole, g, G, MEAN)
        _store_heads(values, at + behind * values_head, alive, whole, whole, whole, d, 0, 1, D_PAD)


@triton.jit
def _to_each_group(shared, groups, G: tl.constexpr, MEAN: tl.constexpr):
    """The backward of `_of_all_groups`: [tokens, 1, c] -> [tokens, groups or 1, c]."""
    if MEAN:
        share = shared / G
    else:
        share = tl.where((groups == 0)[None, :, None], shared, 0.0)
    return share


@triton.jit
def _rotate_back(one, two, cosine, sine, r: tl.constexpr):
    if r > 0:
        one, two = one * cosine + two * sine, two * cosine - one * sine
    return one, two


@triton.jit
def _normalise_back(
    source, at, live, one, two, rest, weight_one, weight_two, weight_rest, eps: tl.constexpr,
    d: tl.constexpr, r: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of rows x after y = x * n * w with n = 1 / sqrt(mean x^2 + eps), and the summands of w's gradient.

    dx = n * (dy w - x n^2 mean(dy w x)); dw = sum of dy x n over all rows.
    """
    x_one, x_two, x_rest = _load_heads(source, at, live, d, r, HALF, REST, WIDE)
    inverse = _inverse_norm(x_one, x_two, x_rest, live, eps, d, WIDE)
    sum_one = tl.sum(tl.sum(one * x_one * inverse, 1), 0)
    sum_two = tl.sum(tl.sum(two * x_two * inverse, 1), 0)
    sum_rest = tl.sum(tl.sum(rest * x_rest * inverse, 1), 0)
    one, two, rest = one * weight_one, two * weight_two, rest * weight_rest
    product = tl.sum(one * x_one, 2) + tl.sum(two * x_two, 2) + tl.sum(rest * x_rest, 2)
    share = (product / d)[:, :, None] * inverse * inverse
    one, two, rest = inverse * (one - x_one * share), inverse * (two - x_two * share), inverse * (rest - x_rest * share)
    return one, two, rest, sum_one, sum_two, sum_rest


@triton.jit
def _store_weight(
    target, at, one, two, rest, d: tl.constexpr, r: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    c, t = tl.arange(0, HALF), tl.arange(0, REST)
    tl.store(target + at + c, one, c < r // 2)
    tl.store(target + at + r // 2 + c, two, c < r // 2)
    tl.store(target + at + r + t, rest, t < d - r)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def prepare_back(
    heads, keys, values, logits, cos, sin, indices, query, key, shared, query_norm, key_norm, packed, norms,
    heads_batch, heads_token, heads_head, keys_batch, keys_token, keys_head, values_batch, values_token, values_head,
    logits_row, query_row, key_row, shared_row, cos_batch, num_tokens, num_rows, eps: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, k: tl.constexpr, C: tl.constexpr, d: tl.constexpr, r: tl.constexpr,
    G_PAD: tl.constexpr, M_PAD: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, ROUTED: tl.constexpr, SHARED_KEY: tl.constexpr, MEAN: tl.constexpr,
    LOGIT_PARTS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of `prepare`: heads [B, T, H, d], keys, values [B, T, GK, d] -> packed [R, all projections' widths].

    Packed holds query, key, value, shared side by side, every number written once, zeros included. Behind them come
    LOGIT_PARTS parts of the logits' gradient [R, G*M]: one, or one rounded to packed's dtype and one of what that lost.
    Its rows are STEP numbers apart. norms [programs, 2, d] gets this program's part of the norm weights' gradients.
    """
    row, batch, token, live = _rows(num_rows, num_tokens, BLOCK)
    g, e = tl.arange(0, G_PAD), tl.arange(0, M_PAD)
    alive = live[:, None]
    in_group = alive & (g < G)[None, :]
    head = g.to(tl.int64)[None, :]  # times a step between heads, which may be as long as a sequence
    behind = tl.zeros([1, 1], tl.int64) + G
    out = row[:, None] * STEP  # [tokens, 1]
    if r > 0:
        cosine, sine = _load_angles(cos, sin, batch, token, live, cos_batch, r, HALF, WIDE)
    else:
        cosine, sine = 0.0, 0.0
    token, batch = token[:, None], batch[:, None]
    if NORM:
        query_one, query_two, query_rest = _load_weight(query_norm, d, r, HALF, REST, WIDE)
        key_one, key_two, key_rest = _load_weight(key_norm, d, r, HALF, REST, WIDE)
        sum_one, sum_two, sum_rest = tl.zeros([HALF], WIDE), tl.zeros([HALF], WIDE), tl.zeros([REST], WIDE)

    if ROUTED:  # zeros where no expert was selected
        zero, zeros = tl.zeros([BLOCK, G_PAD, HALF], WIDE), tl.zeros([BLOCK, G_PAD, REST], WIDE)
        for m in range(M):
            off = in_group
            for rank in tl.static_range(k):
                place = row[:, None] * (G * k) + (g * k)[None, :] + rank
                off = off & (tl.load(indices + place, in_group, 0) != m)
            _store_heads(packed, out + ((g * M + m) * d)[None, :], off, zero, zero, zeros, d, r, HALF, REST)
    for rank in tl.static_range(k):
        place = row[:, None] * (G * k) + (g * k)[None, :] + rank
        if ROUTED:
            expert = tl.load(indices + place, in_group, 0)
        else:
            expert = tl.zeros([BLOCK, G_PAD], tl.int64) + rank
        at = batch * heads_batch + token * heads_token + (head * k + rank) * heads_head
        one, two, rest = _load_heads(heads, at, in_group, d, r, HALF, REST, WIDE)
        one, two = _rotate_back(one, two, cosine, sine, r)
        column = ((g * M)[None, :] + expert) * d
        if NORM:
            one, two, rest, more_one, more_two, more_rest = _normalise_back(
                query, row[:, None] * query_row + column, in_group, one, two, rest,
                query_one, query_two, query_rest, eps, d, r, HALF, REST, WIDE,
            )  # fmt: skip
            sum_one, sum_two, sum_rest = sum_one + more_one, sum_two + more_two, sum_rest + more_rest
        _store_heads(packed, out + column, in_group, one, two, rest, d, r, HALF, REST)

    if C > 0:
        at = batch * heads_batch + token * heads_token + behind * k * heads_head
        one, two, rest = _load_heads(heads, at, alive, d, r, HALF, REST, WIDE)
        for copy in tl.static_range(1, C):
            more_one, more_two, more_rest = _load_heads(heads, at + copy * heads_head, alive, d, r, HALF, REST, WIDE)
            one, two, rest = one + more_one, two + more_two, rest + more_rest
        one, two = _rotate_back(one, two, cosine, sine, r)
        if NORM:
            one, two, rest, more_one, more_two, more_rest = _normalise_back(
                shared, row[:, None] * shared_row, alive, one, two, rest,
                query_one, query_two, query_rest, eps, d, r, HALF, REST, WIDE,
            )  # fmt: skip
            sum_one, sum_two, sum_rest = sum_one + more_one, sum_two + more_two, sum_rest + more_rest
        _store_heads(packed, out + (G * M + 2 * G) * d, alive, one, two, rest, d, r, HALF, REST)

    at = batch * keys_batch + token * keys_token
    one, two, rest = _load_heads(keys, at + head * keys_head, in_group, d, r, HALF, REST, WIDE)
    if SHARED_KEY:
        more_one, more_two, more_rest = _load_heads(keys, at + behind * keys_head, alive, d, r, HALF, REST, WIDE)
        one, two = one + _to_each_group(more_one, g, G, MEAN), two + _to_each_group(more_two, g, G, MEAN)
        rest = rest + _to_each_group(more_rest, g, G, MEAN)
    one, two = _rotate_back(one, two, cosine, sine, r)
    if NORM:
        norms_at = tl.program_id(0).to(tl.int64) * (2 * d)
        _store_weight(norms, norms_at, sum_one, sum_two, sum_rest, d, r, HALF, REST)
        one, two, rest, sum_one, sum_two, sum_rest = _normalise_back(
            key, row[:, None] * key_row + (g * d)[None, :], in_group, one, two, rest,
            key_one, key_two, key_rest, eps, d, r, HALF, REST, WIDE,
        )  # fmt: skip
        _store_weight(norms, norms_at + d, sum_one, sum_two, sum_rest, d, r, HALF, REST)
    _store_heads(packed, out + ((G * M + g) * d)[None, :], in_group, one, two, rest, d, r, HALF, REST)

    at = batch * values_batch + token * values_token
    _, _, whole = _load_heads(values, at + head * values_head, in_group, d, 0, 1, D_PAD, WIDE)
    if SHARED_KEY:
        _, _, more = _load_heads(values, at + behind * values_head, alive, d, 0, 1, D_PAD, WIDE)
        whole = whole + _to_each_group(more, g, G, MEAN)
    _store_heads(packed, out + ((G * M + G + g) * d)[None, :], in_group, whole, whole, whole, d, 0, 1, D_PAD)

    if LOGIT_PARTS > 0:
        experts = (g * M)[None, :, None] + e[None, None, :]
        real = in_group[:, :, None] & (e < M)[None, None, :]
        at = row[:, None, None] * STEP + (G * M + 2 * G + (1 if C > 0 else 0)) * d + experts
        gradient = tl.load(logits + row[:, None, None] * logits_row + experts, real, 0.0)
        rounded = gradient.to(packed.dtype.element_ty)
        tl.store(packed + at, rounded, real)
        if LOGIT_PARTS > 1:
            tl.store(packed + at + G * M, gradient - rounded.to(gradient.dtype), real)
