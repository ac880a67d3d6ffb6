"""The layer again, by brute force: what every faster implementation of it must equal.

Plain Python loops over tokens, groups, experts, heads and keys, on small vectors, in the dtype of `x` (float64 in the
tests), with autograd. It is slow, it shares no line with `query_experts`, and it follows the steps of the paper
(https://arxiv.org/abs/2606.20945) in their order.

Indices: b row of the batch, t token (query), s token (key), g group, m expert within its group, r router rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

EXTRA_SLOTS = {"gqe": 2, "hard_concat": 0, "weighted_concat": 0}


@dataclass(frozen=True)
class OracleResult:
    y: Tensor  # [B, T, hidden_size]
    probs: Tensor  # [B, T, G, M]
    indices: Tensor  # [B, T, G, k], in rank order
    balance_loss: Tensor  # scalar
    keys: Tensor  # [B, T, G, head_dim], after RoPE
    values: Tensor  # [B, T, G, head_dim]


def parameter_shapes(
    *,
    hidden_size: int,
    num_query_experts: int,
    num_kv_heads: int,
    top_k: int,
    head_dim: int,
    variant: str = "gqe",
    output_projection: str = "slot",
    routing: str = "learned",
    bias: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the layer's state_dict."""
    routed_blocks = num_query_experts if output_projection == "expert" else num_kv_heads * top_k
    rows = {
        "q_proj": num_query_experts * head_dim,
        "k_proj": num_kv_heads * head_dim,
        "v_proj": num_kv_heads * head_dim,
    }
    if variant == "gqe":
        rows["q_shared"] = head_dim
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (n, hidden_size) for name, n in rows.items()}
    shapes["o_proj.weight"] = (hidden_size, (routed_blocks + EXTRA_SLOTS[variant]) * head_dim)
    if bias:
        shapes |= {f"{name}.bias": (n,) for name, n in rows.items()} | {"o_proj.bias": (hidden_size,)}
    if routing != "none":
        shapes["router.weight"] = (num_query_experts, hidden_size)
    return shapes


@dataclass(frozen=True)
class _Row:
    """One row of the batch: what a query of it may read."""

    keys: list[list[Tensor]]  # [token][group]
    values: list[list[Tensor]]
    real: list[bool]
    positions: list[int]

    def read(self, t: int, query: Tensor, head: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Attend from token t; `head` picks, out of one token's keys (or values) over the groups, those to read."""
        visible = [s for s in range(t + 1) if _sees(t, s, self.real, self.positions)]
        return _attend(query, [head(self.keys[s]) for s in visible], [head(self.values[s]) for s in visible])


def oracle(
    params: dict[str, Tensor],
    x: Tensor,
    *,
    num_query_experts: int,
    num_kv_heads: int,
    top_k: int,
    head_dim: int,
    variant: str = "gqe",
    output_projection: str = "slot",
    rope_theta: float | None = None,
    routing: str = "learned",
    shared_head_kv: str = "mean",
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> OracleResult:
    batch, length, _ = x.shape
    groups, experts = num_kv_heads, num_query_experts // num_kv_heads
    assert num_query_experts == groups * experts
    assert 1 <= top_k <= experts
    assert routing != "none" or experts == top_k
    first_extra_block = num_query_experts if output_projection == "expert" else groups * top_k

    def project(name: str, head: int, vector: Tensor, position: int | None = None) -> Tensor:
        """One head of a projection, applied to one token, rotated if it has a position."""
        rows = slice(head * head_dim, (head + 1) * head_dim)
        projected = params[f"{name}.weight"][rows].mv(vector)
        if f"{name}.bias" in params:
            projected = projected + params[f"{name}.bias"][rows]
        return projected if position is None or rope_theta is None else _rotate(projected, position, rope_theta)

    def route(vector: Tensor) -> tuple[list[Tensor], list[list[int]]]:
        """For each group, the probabilities of its experts and the selected experts in rank order."""
        if routing == "none":
            return [vector.new_full((experts,), 1 / experts)] * groups, [list(range(top_k))] * groups
        logits = [
            [row.dot(vector) for row in params["router.weight"][g * experts : (g + 1) * experts]] for g in range(groups)
        ]
        # Python's sort is stable: equal logits stay in index order.
        selected = [sorted(range(experts), key=lambda m, g=g: -logits[g][m].item())[:top_k] for g in range(groups)]
        return [_softmax(group) for group in logits], selected

    def output(vector: Tensor, t: int, row: _Row, p: list[Tensor], selected: list[list[int]]) -> Tensor:
        """y of one token."""
        attended = {}  # (g, m) -> head_dim
        for g in range(groups):
            for m in selected[g]:
                query = project("q_proj", g * experts + m, vector, row.positions[t])
                attended[g, m] = row.read(t, query, lambda heads, g=g: heads[g])

        blocks = {}  # block of W_O's input -> head_dim
        for g in range(groups):
            for r, m in enumerate(selected[g]):
                block = g * experts + m if output_projection == "expert" else g * top_k + r
                blocks[block] = attended[g, m] * (p[g][m] if variant == "weighted_concat" else 1)
        if variant == "gqe":
            total = sum(p[g][m] for g, m in attended)
            blocks[first_extra_block] = sum(p[g][m] / total * o for (g, m), o in attended.items())
            query = project("q_shared", 0, vector, row.positions[t])
            heads_read = groups if shared_head_kv == "mean" else 1
            blocks[first_extra_block + 1] = row.read(t, query, lambda heads: sum(heads[:heads_read]) / heads_read)

        y = params.get("o_proj.bias", torch.zeros_like(vector))
        for block, o in blocks.items():
            y = y + params["o_proj.weight"][:, block * head_dim : (block + 1) * head_dim].mv(o)
        return y

    rows, routed, y = [], [], []
    for b in range(batch):
        real = [attention_mask is None or bool(attention_mask[b, t]) for t in range(length)]
        positions = [t if position_ids is None else int(position_ids[b, t]) for t in range(length)]
        keys = [[project("k_proj", g, x[b, t], positions[t]) for g in range(groups)] for t in range(length)]
        values = [[project("v_proj", g, x[b, t]) for g in range(groups)] for t in range(length)]
        rows.append(_Row(keys, values, real, positions))
        routed.append([route(x[b, t]) for t in range(length)])
        y.append([output(x[b, t], t, rows[b], *routed[b][t]) for t in range(length)])

    probs = _stack([[p for p, _ in row] for row in routed])
    indices = [[selected for _, selected in row] for row in routed]
    return OracleResult(
        y=_stack(y),
        probs=probs,
        indices=torch.tensor(indices),
        balance_loss=x.new_zeros(()) if routing == "none" else _balance_loss(probs, indices, [r.real for r in rows]),
        keys=_stack([row.keys for row in rows]),
        values=_stack([row.values for row in rows]),
    )


def _stack(nested: list | Tensor) -> Tensor:
    return nested if isinstance(nested, Tensor) else torch.stack([_stack(inner) for inner in nested])


def _rotate(vector: Tensor, position: int, theta: float) -> Tensor:
    """Llama's half rotation: dimension i turns with dimension i + d/2. Angles are float32 whatever the vector is."""
    dim = vector.shape[0]
    inverse_frequency = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angle = position * inverse_frequency
    cos, sin = angle.cos().to(vector.dtype), angle.sin().to(vector.dtype)
    low, high = vector[: dim // 2], vector[dim // 2 :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin])


def _sees(query: int, key: int, real: list[bool], positions: list[int]) -> bool:
    """Causal, never padding, and never another document of the row.

    The position p of a token says that its document began p real tokens back. Where the position does not grow from
    one real token to the next, a new document begins as well.
    """
    if key > query or not real[key]:
        return False
    reals_between = sum(real[key + 1 : query + 1])  # rank of the query less rank of the key
    if reals_between > positions[query]:
        return False
    return not any(positions[t] <= positions[s] for s, t in pairwise(r for r in range(key, query + 1) if real[r]))


def _softmax(scores: list[Tensor]) -> Tensor:
    largest = max(float(score.detach()) for score in scores)
    powers = [(score - largest).exp() for score in scores]
    total = sum(powers)
    return torch.stack([power / total for power in powers])


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    if not keys:
        return torch.zeros_like(query)
    weights = _softmax([query.dot(key) / query.shape[0] ** 0.5 for key in keys])
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def _balance_loss(probs_BTGM: Tensor, indices: list, real: list[list[bool]]) -> Tensor:
    """Switch Transformer's loss inside each group, M * sum_m f_m P_m over the real tokens; mean over groups."""
    batch, length, groups, experts = probs_BTGM.shape
    tokens = [(b, t) for b in range(batch) for t in range(length) if real[b][t]]
    loss = probs_BTGM.new_zeros(())
    for g in range(groups):
        for m in range(experts):
            chosen = sum(m in indices[b][t][g] for b, t in tokens) / len(tokens)
            mean_probability = sum(probs_BTGM[b, t, g, m] for b, t in tokens) / len(tokens)
            loss = loss + experts * chosen * mean_probability
    return loss / groups
