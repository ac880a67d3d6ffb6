"""What a model costs: parameters, FLOPs a token, KV bytes a token. For GQE and for dense (Llama) configurations.

Symbols: D hidden size, N query heads, G KV heads, k selected experts in a group, d head dim, L layers, F MLP width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedModel

from query_experts.model.configuration_gqe import GQEConfig
from query_experts.ops.select import SPARSE_FROM


@dataclass(frozen=True)
class Heads:
    """Query heads that a layer holds, those active for a token, and its output slots (rows of W_O over d)."""

    held: int
    active: int
    router: int  # experts that the router scores
    slots_held: int
    slots_active: int


def heads(config: LlamaConfig) -> Heads:
    """Dense: N of everything. GQE: N + 1 held with the shared head, kG + 1 active."""
    n = config.num_attention_heads
    if not isinstance(config, GQEConfig):
        return Heads(n, n, 0, n, n)
    selected = config.num_key_value_heads * config.active_query_experts
    shared = 1 if config.variant == "gqe" else 0
    extra = 2 * shared  # the weighted slot and the shared head
    by_expert = config.output_projection == "expert"
    return Heads(
        held=n + shared,
        active=selected + shared,
        router=0 if config.routing == "none" else n,
        slots_held=(n if by_expert else selected) + extra,
        slots_active=selected + extra,
    )


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Counts parameters: `total` (tied ones once), `active` and `embedding` (input and output embeddings).

    `active` leaves out the query (and, with `expert`, output) weights of the experts that a token doesn't select.
    """
    config = model.config
    h, d = heads(config), config.head_dim
    bias = 1 if config.attention_bias else 0
    inactive = (h.held - h.active) * d * (config.hidden_size + bias)
    inactive += (h.slots_held - h.slots_active) * d * config.hidden_size
    total = sum(p.numel() for p in model.parameters())
    total += sum(b.numel() for name, b in model.named_buffers() if name.endswith("router.weight"))  # frozen routers
    tables = 1 if config.tie_word_embeddings else 2
    return {
        "total": total,
        "active": total - config.num_hidden_layers * inactive,
        "embedding": tables * config.vocab_size * config.hidden_size,
    }


def flops_per_token(config: LlamaConfig, seq_len: int) -> float:
    """Active FLOPs of one forward pass per token of a causal sequence of seq_len tokens.

    A weight costs 2 (multiply and add). A query head costs 2d for each key that it sees, and 2d for each value. Under
    a causal mask a token sees (seq_len + 1) / 2 keys on average. Norms, rotary embedding, softmax, and queries that
    are computed and discarded are left out.
    """
    D, d, G = config.hidden_size, config.head_dim, config.num_key_value_heads
    h = heads(config)
    projections = 2 * D * (h.active * d + 2 * G * d + h.router) + 2 * h.slots_active * d * D
    attention = 4 * d * h.active * (seq_len + 1) / 2
    mlp = 2 * 3 * D * config.intermediate_size
    return config.num_hidden_layers * (projections + attention + mlp) + 2 * D * config.vocab_size


def kv_bytes_per_token(config: LlamaConfig, bytes_per_value: int = 2) -> int:
    """Bytes that a token adds to the cache: a key and a value of d per KV head and layer; GQE adds the same."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value


def attention_limit(config: LlamaConfig, dense: LlamaConfig) -> float:
    """N / (kG + 1): the speedup of attention over `dense`, which whole layers approach at long context."""
    return heads(dense).active / heads(config).active


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one pass as it runs: queries of inactive experts count where they are computed."""

    projection_flops: float
    attention_flops: float
    bytes: float

    @property
    def flops(self) -> float:
        return self.projection_flops + self.attention_flops


def layer_work(
    config: LlamaConfig,
    batch: int,
    new: int,
    cached: int = 0,
    *,
    causal: bool = True,
    backward: bool = False,
    bytes_per_value: int = 2,
) -> Work:
    """The work of an attention layer for `new` tokens after `cached` ones, in each of `batch` sequences.

    A weight costs 2 FLOPs a token (multiply and add). Every query that the layer holds is computed; for one token in
    all, with few of many experts selected, only the selected ones are. A head's score and its share of the output cost
    2d each for every pair of a query and a key. Causally, new token i sees cached + i keys; otherwise (the full square,
    as a counter of executed products sees it) all cached + new. The weighted slot adds 2d for each selected head.

    With `backward`, FLOPs of the forward and the backward pass. Each product has two gradients, so projections cost 3
    times the forward pass. Exceptions: the weighted slot costs 2 times where nothing is routed (its weights are
    constant), a frozen router 2 times (its weight has no gradient), the router of hard_concat once (no output depends
    on it). A flash kernel recomputes the scores and forms four products (the gradients of V, weights, Q and K) where
    the forward pass has two, so attention costs 1 + 5/2 times.

    Bytes are those of the forward pass: every weight once; keys and values, cached and new, once; hidden states of new
    tokens in and out.
    """  # fmt: skip
    D, d, G = config.hidden_size, config.head_dim, config.num_key_value_heads
    h = heads(config)
    router = D * h.router
    experts = config.num_attention_heads // G
    one_token = isinstance(config, GQEConfig) and batch * new == 1
    selected_only = one_token and experts >= SPARSE_FROM * config.active_query_experts
    weights = D * d * ((h.active if selected_only else h.held) + 2 * G + h.slots_held) + router
    shared = isinstance(config, GQEConfig) and config.variant == "gqe"
    combine = 2 * d * (h.active - 1) if shared else 0
    pairs = new * cached + (new * (new + 1) / 2 if causal else new * new)
    projection = batch * new * (2 * weights + combine)
    attention = batch * 4 * d * h.active * pairs
    if backward:
        projection, attention = 3 * projection, 3.5 * attention
        if isinstance(config, GQEConfig):
            saved = combine if config.routing == "none" else 0
            saved += 4 * router if config.variant == "hard_concat" else 2 * router if config.routing == "frozen" else 0
            projection -= batch * new * saved
    moved = weights + batch * (2 * G * d * (cached + new) + 2 * new * D)
    return Work(projection, attention, moved * bytes_per_value)


def model_work(
    config: LlamaConfig, batch: int, new: int, cached: int = 0, *, backward: bool = False, bytes_per_value: int = 2
) -> Work:
    """The work of a model for `new` tokens after `cached` ones: logits of the last token, in training of all tokens.

    It adds to the attention layers three MLP matrices, D x F, per layer, and the output embedding, D x V.
    """
    layer = layer_work(config, batch, new, cached, backward=backward, bytes_per_value=bytes_per_value)
    L, D = config.num_hidden_layers, config.hidden_size
    mlp, table = 3 * D * config.intermediate_size, D * config.vocab_size
    times = 3 if backward else 1
    rest = 2 * batch * times * (new * L * mlp + (new if backward else 1) * table)
    return Work(
        L * layer.projection_flops + rest,
        L * layer.attention_flops,
        L * layer.bytes + (L * mlp + table) * bytes_per_value,
    )
