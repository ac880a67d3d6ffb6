"""Costs against what models hold and execute: parameters, active parameters, FLOPs by torch's counter, KV bytes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from query_experts.model import costs
from query_experts.model.arms import ARMS, arm_config, build
from study_helpers import SIZE

pytestmark = pytest.mark.filterwarnings("ignore:the router gets no gradient")

D, F, L, V, G, d = 32, 48, 2, 300, 2, 8
# query heads held, active, experts that the router scores, output slots held, active; for N = 4, G = 2, k = 1
BY_HAND = {
    "dense": (4, 4, 0, 4, 4),
    "static": (3, 3, 0, 4, 4),
    "half": (2, 2, 0, 2, 2),
    "frozen": (5, 3, 4, 4, 4),
    "gqe": (5, 3, 4, 4, 4),
    "hard": (4, 2, 4, 2, 2),
    "weighted": (4, 2, 4, 2, 2),
    "gqe-m4": (9, 3, 8, 4, 4),
    "gqe-m8": (17, 3, 16, 4, 4),
    "gqe-expert": (5, 3, 4, 6, 4),
}
SEQ = 24


def parameters_by_hand(query_heads, slots, router, width, tables=1, bias=0):
    attention = query_heads * d * (D + bias) + 2 * G * d * (D + bias) + slots * d * D + bias * D + router * D
    return L * (attention + 3 * D * width + 2 * D) + D + tables * V * D


def executed_flops(config, tokens=SEQ):
    """What torch counts of one forward pass: every matrix product, with eager attention over the full square.

    Eager attention makes all S x S scores and masks half of them away; the causal average is (S + 1) / 2 keys a token.
    So 4d for each head and each of the S * (S - 1) / 2 masked pairs is taken off; and so are the rotary angles where
    Transformers makes them by a matrix product.
    """
    model = build(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    rotary = counter.get_flop_counts().get(f"{type(model).__name__}.model.rotary_emb", {})
    masked = L * 4 * d * costs.heads(config).active * tokens * (tokens - 1) / 2
    return counter.get_total_flops() - masked - sum(rotary.values())


def test_the_table_below_names_every_arm():
    assert set(BY_HAND) == set(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_heads_and_slots_are_those_counted_by_hand(arm):
    heads = costs.heads(arm_config(arm, SIZE))
    assert (heads.held, heads.active, heads.router, heads.slots_held, heads.slots_active) == BY_HAND[arm]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (False, True)])
def test_total_and_active_parameters_are_those_counted_by_hand(arm, tied, bias):
    config = arm_config(arm, replace(SIZE, tie_word_embeddings=tied))
    config.attention_bias = bias
    model = build(config)
    held, active, router, slots_held, slots_active = BY_HAND[arm]
    sizes = {"width": config.intermediate_size, "tables": 1 if tied else 2, "bias": int(bias)}
    assert costs.parameters(model) == {
        "total": parameters_by_hand(held, slots_held, router, **sizes),
        "active": parameters_by_hand(active, slots_active, router, **sizes),
        "embedding": V * D * (1 if tied else 2),
    }
    frozen = sum(b.numel() for name, b in model.named_buffers() if name.endswith("router.weight"))
    assert costs.parameters(model)["total"] == model.num_parameters() + frozen


@pytest.mark.parametrize("arm", ["dense", "half"])
def test_flops_of_dense_arms_are_those_that_torch_counts(arm):
    config = arm_config(arm, SIZE)
    assert costs.flops_per_token(config, SEQ) * SEQ == executed_flops(config)


@pytest.mark.parametrize("arm", ["static", "frozen", "gqe", "hard", "weighted", "gqe-m4"])
def test_flops_of_gqe_are_those_that_torch_counts_but_for_queries_thrown_away(arm):
    """Queries of inactive experts are computed (2D for each of d numbers) and not counted as active. static has neither
    a router nor a query to throw away."""
    config = arm_config(arm, SIZE)
    heads = costs.heads(config)
    thrown_away = 2 * D * d * (heads.held - heads.active)
    assert thrown_away == 0 or arm != "static"
    assert costs.flops_per_token(config, SEQ) + L * thrown_away == executed_flops(config) / SEQ


def test_flops_by_expert_are_those_by_slot_since_as_many_slots_are_used():
    slot, expert = (costs.flops_per_token(arm_config(arm, SIZE), SEQ) for arm in ("gqe", "gqe-expert"))
    assert slot == expert


def test_flops_of_the_papers_layer_by_hand():
    """16 heads over 8 groups: 9 active heads and 10 slots against 16 and 16."""
    size = replace(
        SIZE, hidden_size=1024, head_dim=64, num_attention_heads=16, num_key_value_heads=8, num_hidden_layers=1,
        intermediate_size=1, vocab_size=1,
    )  # fmt: skip
    gqe, dense = arm_config("gqe", size), arm_config("dense", size)
    rest = 2 * 1024 * 2 * 8 * 64 + 6 * 1024 + 2 * 1024  # keys and values, MLP, output embedding
    seen = (2048 + 1) / 2
    assert costs.flops_per_token(dense, 2048) == rest + 2 * 2 * 1024 * 16 * 64 + 4 * 64 * 16 * seen
    assert costs.flops_per_token(gqe, 2048) == (
        rest + 2 * 1024 * (9 * 64 + 16) + 2 * 10 * 64 * 1024 + 4 * 64 * 9 * seen
    )
    assert costs.attention_limit(gqe, dense) == 16 / 9
    assert costs.attention_limit(arm_config("half", size), dense) == 2
    assert costs.attention_limit(dense, dense) == 1


@pytest.mark.parametrize("arm", ["dense", "gqe", "static", "gqe-m4", "hard"])
def test_kv_bytes_are_those_of_the_dynamic_cache_and_the_same_for_dense_and_gqe(arm):
    config = arm_config(arm, SIZE)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        build(config)(torch.zeros(1, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 7 * costs.kv_bytes_per_token(config, bytes_per_value=4)
    assert costs.kv_bytes_per_token(config) == costs.kv_bytes_per_token(arm_config("dense", SIZE)) == 2 * L * G * d * 2


def test_a_decoding_step_reads_every_weight_and_the_cache_once():
    config = arm_config("dense", SIZE)
    weights = parameters_by_hand(4, 4, 0, F) - L * 2 * D - D  # but for the norms
    step = costs.model_work(config, 1, 1, 100)
    assert step.bytes == 2 * weights + 101 * costs.kv_bytes_per_token(config) + L * 2 * 2 * D
