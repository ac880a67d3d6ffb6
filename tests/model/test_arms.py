"""Behaviour of the study's arms: what each holds, that each trains, and that controls control what they claim to."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from query_experts import GQEForCausalLM
from query_experts.common.errors import SettingError
from query_experts.model import costs
from query_experts.model.arms import ARMS, arm_config, build
from query_experts.model.initialization import initialise_by_name
from study_helpers import SIZE

pytestmark = pytest.mark.filterwarnings("ignore:the router gets no gradient")

PAPER = replace(
    SIZE, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8,
    head_dim=32, vocab_size=16384,
)  # fmt: skip
K2 = replace(SIZE, num_attention_heads=8, active_query_experts=2)


def after_steps(arm, steps=3):
    """The model before and after a few steps of AdamW."""
    model = build(arm_config(arm, SIZE))
    initialise_by_name(model, 0, model.config.initializer_range)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return before, model.state_dict(), losses


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_builds_and_learns(arm):
    before, after, losses = after_steps(arm)
    assert losses[-1] < losses[0]
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {name for name in before if "router" in name and arm == "frozen"}


def test_dense_arms_are_stock_llama_and_the_others_gqe():
    for arm in ARMS:
        assert type(build(arm_config(arm, SIZE))) is (LlamaForCausalLM if arm in ("dense", "half") else GQEForCausalLM)


def test_the_frozen_router_is_random_and_stays_as_it_is_while_gqes_moves():
    before, after, _ = after_steps("frozen")
    moved, moved_after, _ = after_steps("gqe")
    routers = [name for name in before if "router" in name]
    assert len(routers) == 2
    for name in routers:
        assert torch.equal(before[name], after[name])
        assert before[name].std() > 0.01
        assert torch.equal(before[name], moved[name])
        assert not torch.equal(moved[name], moved_after[name])


@pytest.mark.parametrize("size", [SIZE, PAPER, K2], ids=["tiny", "gpu preset", "k = 2"])
def test_half_holds_kg_heads_and_gqes_parameters_to_within_half_a_unit_of_mlp_width(size):
    half, gqe = arm_config("half", size), arm_config("gqe", size)
    assert half.num_attention_heads == size.num_key_value_heads * size.active_query_experts
    assert half.num_key_value_heads == size.num_key_value_heads
    with torch.device("meta"):
        difference = build(half).num_parameters() - build(gqe).num_parameters()
    assert abs(difference) <= 3 * size.hidden_size * size.num_hidden_layers / 2
    assert half.intermediate_size > size.intermediate_size


@pytest.mark.parametrize("size", [SIZE, PAPER, K2], ids=["tiny", "gpu preset", "k = 2"])
def test_static_has_as_many_active_heads_and_slots_as_gqe_and_no_router(size):
    static, gqe = arm_config("static", size), arm_config("gqe", size)
    assert costs.heads(static).active == costs.heads(static).held == costs.heads(gqe).active
    assert costs.heads(static).slots_active == costs.heads(gqe).slots_active
    assert static.num_attention_heads == size.num_key_value_heads * size.active_query_experts
    with torch.device("meta"):
        names = [name for name, _ in build(static).named_parameters()]
        o_proj = [build(c).model.layers[0].self_attn.o_proj.weight.shape for c in (static, gqe)]
    assert not any("router" in name for name in names)
    assert o_proj[0] == o_proj[1]


def test_gqe_m4_has_twice_the_experts_a_group_and_as_many_active():
    gqe, m4 = arm_config("gqe", PAPER), arm_config("gqe-m4", PAPER)
    assert (m4.num_attention_heads, m4.num_key_value_heads, m4.active_query_experts) == (32, 8, 1)
    assert costs.heads(m4).active == costs.heads(gqe).active == 9
    assert costs.heads(m4).slots_held == costs.heads(gqe).slots_held == 10
    assert m4.intermediate_size == gqe.intermediate_size
    assert costs.flops_per_token(m4, 64) - costs.flops_per_token(gqe, 64) == 12 * 2 * 512 * 16  # the router alone


def test_gqe_expert_has_output_rows_for_each_expert():
    model = build(arm_config("gqe-expert", SIZE))
    assert model.model.layers[0].self_attn.o_proj.weight.shape == (32, (4 + 2) * 8)
    assert build(arm_config("gqe", SIZE)).model.layers[0].self_attn.o_proj.weight.shape == (32, (2 + 2) * 8)


def test_the_papers_ablations_have_neither_weighted_slot_nor_shared_head():
    for arm, variant in (("hard", "hard_concat"), ("weighted", "weighted_concat")):
        attention = build(arm_config(arm, SIZE)).model.layers[0].self_attn
        assert attention.variant == variant
        assert attention.q_shared is None
        assert attention.o_proj.weight.shape == (32, 2 * 8)


def test_the_routers_coefficients_reach_every_arm_with_a_router():
    size = replace(SIZE, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    for arm in ("frozen", "gqe", "hard", "weighted", "gqe-m4", "gqe-expert"):
        config = arm_config(arm, size)
        assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (0.5, 0.25)


def test_an_unknown_arm_is_refused_with_what_is_allowed():
    with pytest.raises(SettingError, match=r"arm is 'sparse'; it must be one of dense, static, half") as caught:
        arm_config("sparse", SIZE)
    assert all(arm in str(caught.value) for arm in ARMS)
