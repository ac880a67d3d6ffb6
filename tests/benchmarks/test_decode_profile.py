"""The profile of a decoding step: every stage is clocked, the stages fill the step, and nothing stays patched."""

import pytest
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import decode_profile
from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings
from query_experts.layers import attention


@pytest.mark.parametrize("arm", decode_profile.ARMS)
def test_the_stages_of_a_step_add_up_to_it(arm):
    settings = BenchSettings(
        device="cpu", kernels="torch", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    layer = Layer(settings, arm, "cpu", 9)
    before = attention.attend, StaticCache.update, ALL_ATTENTION_FUNCTIONS["sdpa"], {*vars(layer.module)}
    call = layer.cached("static", 2, 8, 1)
    expected = call()
    whole, stages = decode_profile.profile(layer, call, 30)
    assert (call() == expected).all()
    assert before == (
        attention.attend, StaticCache.update, ALL_ATTENTION_FUNCTIONS["sdpa"], {*vars(layer.module)}
    )  # fmt: skip
    own = set(decode_profile.STAGES) - ({"route", "combine"} if arm == "dense" else set())
    assert {stage for stage, spent in stages.items() if spent > 0} == own
    assert sum(stages.values()) == pytest.approx(whole, rel=0.2)  # medians of parts


def test_the_committed_profile_has_all_arms():
    profile = decode_profile.read_profile()
    for arms in profile.steps.values():
        assert [*arms] == [*decode_profile.ARMS]
        assert arms["dense"].route_alone is None
        for step in arms.values():
            assert [*step.stages] == [*decode_profile.STAGES]
