"""Routing that was recorded elsewhere: the model wakes the experts that it is given, and trains on."""

import pytest
import torch

from model_helpers import EXACT, SETTINGS, gradients, random_tokens, setting_id, tiny_model
from query_experts.replay import replayed_routing

ROUTED = [setting for setting in SETTINGS if setting.get("routing") != "none"]
each_setting = pytest.mark.parametrize("setting", ROUTED, ids=setting_id)


def woken(model, ids: torch.Tensor) -> torch.Tensor:
    """[B, T, L, G*k], as an engine numbers experts."""
    config = model.config
    M = config.num_attention_heads // config.num_key_value_heads
    first = torch.arange(0, config.num_attention_heads, M)[:, None]
    layers = [
        logits.view(*ids.shape, -1, M).topk(config.active_query_experts).indices
        for logits in model(ids, output_router_logits=True, use_cache=False).router_logits
    ]
    return torch.stack([(layer + first).flatten(2) for layer in layers], 2)


@each_setting
def test_replaying_what_the_model_does_itself_changes_nothing(setting):
    model, ids = tiny_model(**setting), random_tokens(2, 13)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    with replayed_routing(model, woken(model, ids)):
        replayed = model(ids, labels=ids)
        replayed.loss.backward()
    torch.testing.assert_close(replayed.logits, expected.logits, **EXACT)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], **EXACT)


@each_setting
@torch.no_grad()
def test_other_experts_than_the_models_own_are_woken_until_the_replay_ends(setting):
    """Another model's experts give what this model gives with that one's routers."""
    model, other, ids = tiny_model(**setting), tiny_model(**setting, seed=1), random_tokens(2, 13)
    before = model(ids).logits
    foreign = woken(other, ids)
    with replayed_routing(model, foreign):
        first = model(ids).logits
        again = woken_indices(model)
    assert again.tolist() == foreign.tolist()
    assert (first - before).abs().amax() > 1e-3
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def woken_indices(model) -> torch.Tensor:
    M = model.config.num_attention_heads // model.config.num_key_value_heads
    first = torch.arange(0, model.config.num_attention_heads, M)[:, None]
    return torch.stack([(layer.self_attn.forced_indices + first).flatten(2) for layer in model.model.layers], 2)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (torch.zeros(1, 5, 3, 4), r"experts are \[1, 5, 3, 4\]; they must be \[batch, tokens, 2, 4\]"),
        (torch.zeros(1, 5, 2, 4), "experts name one outside its group"),
        (torch.full((1, 5, 2, 4), 8), "experts name one outside its group"),
    ],
)
def test_experts_that_dont_fit_the_model_are_refused(experts, message):
    model = tiny_model(active_query_experts=2)
    with pytest.raises(ValueError, match=message), replayed_routing(model, experts):
        pass
    assert model.model.layers[0].self_attn.forced_indices is None
