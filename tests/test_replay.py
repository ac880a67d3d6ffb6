"""Replayed routing: the model selects the experts that it is given, and trains with them."""

import pytest
import torch

from model_helpers import EXACT, SETTINGS, gradients, random_tokens, setting_id, tiny_model
from query_experts.replay import replayed_routing

ROUTED = [setting for setting in SETTINGS if setting.get("routing") != "none"]
each_setting = pytest.mark.parametrize("setting", ROUTED, ids=setting_id)


def selected_experts(model, ids: torch.Tensor) -> torch.Tensor:
    """The experts that a model selects, [B, T, L, G*k], numbered as by an engine."""
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
    with replayed_routing(model, selected_experts(model, ids)):
        replayed = model(ids, labels=ids)
        replayed.loss.backward()
    torch.testing.assert_close(replayed.logits, expected.logits, **EXACT)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], **EXACT)


@each_setting
@torch.no_grad()
def test_other_experts_than_the_models_own_are_selected_until_the_replay_ends(setting):
    """With another model's experts the output differs; after the replay it is as before."""
    model, other, ids = tiny_model(**setting), tiny_model(**setting, seed=1), random_tokens(2, 13)
    before = model(ids).logits
    experts = selected_experts(other, ids)
    with replayed_routing(model, experts):
        replayed = model(ids).logits
        forced = forced_experts(model)
    assert forced.tolist() == experts.tolist()
    assert (replayed - before).abs().amax() > 1e-3
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def forced_experts(model) -> torch.Tensor:
    """The experts that the layers are set to select, [B, T, L, G*k]."""
    M = model.config.num_attention_heads // model.config.num_key_value_heads
    first = torch.arange(0, model.config.num_attention_heads, M)[:, None]
    return torch.stack([(layer.self_attn.forced_indices + first).flatten(2) for layer in model.model.layers], 2)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (torch.zeros(1, 5, 3, 4).long(), r"experts are \[1, 5, 3, 4\]; they must be \[batch, tokens, 2, 4\]"),
        (torch.zeros(1, 5, 2, 4).long(), "experts name one outside its group"),
        (torch.full((1, 5, 2, 4), 8), "experts name one outside its group"),
        (torch.tensor([1, 1, 4, 5]).expand(1, 5, 2, 4), "experts name one twice; the 2 of a group must differ"),
        (torch.tensor([0, 1, 4, 5.5]).expand(1, 5, 2, 4), r"experts are torch.float32; they must be a tensor of integ"),
        ([[[[0, 1, 4, 5]] * 2] * 5], "experts are list; they must be a tensor of integers"),
    ],
)
def test_experts_that_dont_fit_the_model_are_refused(experts, message):
    model = tiny_model(active_query_experts=2)
    with pytest.raises(ValueError, match=message), replayed_routing(model, experts):
        pass
    assert model.model.layers[0].self_attn.forced_indices is None


FITTING = torch.tensor([1, 0, 4, 7])  # of a layer of tiny_model(active_query_experts=2)


@pytest.mark.parametrize("tokens", [(2, 12), (2, 14), (1, 13), (13, 2)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_tokens_that_the_experts_arent_for_are_refused(tokens, compiled):
    model = tiny_model(active_query_experts=2)
    run = torch.compile(model, backend="eager") if compiled else model
    expected = run(random_tokens(*tokens)).logits
    message = rf"experts are for \[2, 13\] tokens \(batch, tokens\), and these are \[{tokens[0]}, {tokens[1]}\]"
    with replayed_routing(model, FITTING.expand(2, 13, 2, 4)):
        run(random_tokens(2, 13))
        with pytest.raises(ValueError, match=message):
            run(random_tokens(*tokens))
    assert run(random_tokens(*tokens)).logits.equal(expected)


def test_inputs_given_as_embeddings_are_counted_too():
    model = tiny_model(active_query_experts=2)
    embeds = model.get_input_embeddings()(random_tokens(2, 12))
    with (
        replayed_routing(model, FITTING.expand(2, 13, 2, 4)),
        pytest.raises(ValueError, match=r"these are \[2, 12\]"),
    ):
        model(inputs_embeds=embeds)


def test_a_replay_leaves_no_hook():
    model = tiny_model(active_query_experts=2)
    with replayed_routing(model, FITTING.expand(2, 13, 2, 4)):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_routers_has_nothing_to_replay():
    model = tiny_model(routing="none", active_query_experts=4)
    with pytest.raises(ValueError, match="routing is 'none'"), replayed_routing(model, torch.zeros(2, 13, 2, 8).long()):
        pass


def test_a_replay_within_a_replay_is_refused_and_leaves_the_outer_one():
    model = tiny_model(active_query_experts=2)
    experts = FITTING.expand(2, 13, 2, 4)
    with replayed_routing(model, experts):
        with pytest.raises(ValueError, match="model replays experts already"), replayed_routing(model, experts):
            pass
        assert forced_experts(model).equal(experts)


def test_a_wrapped_model_replays_as_the_model_itself():
    model, ids = tiny_model(active_query_experts=2), random_tokens(2, 13)
    experts = FITTING.expand(2, 13, 2, 4)
    with replayed_routing(model, experts):
        expected = model(ids).logits
    with replayed_routing(torch.nn.ModuleDict({"wrapped": model}), experts):
        assert model(ids).logits.equal(expected)
    with (
        pytest.raises(ValueError, match="Linear that holds 0 GQE models"),
        replayed_routing(torch.nn.Linear(1, 1), experts),
    ):
        pass
