"""The profile of a decoding step: every stage is clocked once, and nothing stays patched."""

import pytest
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import decode_profile
from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings
from query_experts.layers import attention


@pytest.mark.parametrize("arm", decode_profile.ARMS)
def test_each_stage_of_a_step_is_clocked(arm):
    settings = BenchSettings(
        device="cpu", kernels="torch", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    layer = Layer(settings, arm, "cpu", 9)
    before = attention.attend, StaticCache.update, ALL_ATTENTION_FUNCTIONS["sdpa"], {*vars(layer.module)}
    call = layer.cached("static", 2, 8, 1)
    expected = call()
    route = layer.module.route if arm == "gqe" else None
    timed = decode_profile.Arm(layer, call, route and (lambda: route(layer.hidden(2, 1))))
    timed.time_block()
    step = timed.step()
    stages = step.stages
    assert (call() == expected).all()
    assert before == (
        attention.attend, StaticCache.update, ALL_ATTENTION_FUNCTIONS["sdpa"], {*vars(layer.module)}
    )  # fmt: skip
    own = set(decode_profile.STAGES) - ({"route", "combine"} if arm == "dense" else set())
    assert {stage for stage, spent in stages.items() if spent > 0} == own
    assert sum(spent for stage, spent in stages.items() if stage != "rest") < step.clocked
    assert step.plain > 0
    assert (step.route_alone is None) == (arm != "gqe")


def test_a_stage_within_another_is_refused():
    clocks = decode_profile.Clocks()
    inner = clocks.around(lambda: None, "rotate")
    clocks.around(lambda: None, "attend")()
    with pytest.raises(RuntimeError, match="rotate runs within attend, and would be counted twice"):
        clocks.around(inner, "attend")()
    inner()  # after an error too


def test_the_committed_profile_has_all_arms():
    profile = decode_profile.read_profile()
    for arms in profile.steps.values():
        assert [*arms] == [*decode_profile.ARMS]
        assert arms["dense"].route_alone is None
        for step in arms.values():
            assert [*step.stages] == [*decode_profile.STAGES]
