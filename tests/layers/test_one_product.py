"""Decoding on a CPU by a packed copy of the weights: when there is one, what it gives, and what drops it."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from query_experts.layers import one_product
from query_experts.layers.attention import GQEAttention
from query_experts.model.configuration_gqe import GQEConfig

D = 32
PARTS = ["q_proj", "q_shared", "k_proj", "v_proj"]


def layer_with_cache(kind="dynamic", dtype=torch.bfloat16, **options):
    """A layer, and a cache that holds a prompt of five tokens."""
    torch.manual_seed(0)
    layer = GQEAttention(D, 8, 4, head_dim=8, **{"rope_theta": 100.0} | options).to(dtype).eval()
    config = GQEConfig(hidden_size=D, num_attention_heads=8, num_key_value_heads=4, head_dim=8, num_hidden_layers=1)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=32)
    prefill(layer, cache)
    return layer, cache


@torch.no_grad()
def prefill(layer, cache):
    return layer(token(layer, 0, 5), past_key_values=cache)


def token(layer, seed, length=1):
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed)).to(layer.q_proj.weight.dtype)


@torch.no_grad()
def step(layer, cache, seed=1):
    return layer(token(layer, seed), past_key_values=cache)


def is_packed(layer):
    last = one_product._last_steps.get(layer)
    return last is not None and last.weight is not None


def packed(**options):
    layer, cache = layer_with_cache(**options)
    step(layer, cache)
    step(layer, cache)
    assert is_packed(layer)
    return layer, cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"qk_norm": True}, {"variant": "hard_concat"}, {"routing": "none", "top_k": 2}, {"top_k": 2}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the router gets no gradient")
def test_steps_with_the_copy_give_what_they_give_without(kind, options, monkeypatch):
    layer, cache = layer_with_cache(kind, **options)
    outputs = [step(layer, cache, seed) for seed in range(4)]
    assert is_packed(layer)
    monkeypatch.setattr(one_product, "MOST_BYTES", 0)
    layer, cache = layer_with_cache(kind, **options)
    expected = [step(layer, cache, seed) for seed in range(4)]
    assert not is_packed(layer)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-9)


def test_the_first_step_of_a_generation_makes_no_copy_and_turns_between_two_caches_make_none():
    layer, cache = layer_with_cache()
    other = copy.deepcopy(cache)
    for _ in range(3):
        step(layer, cache)
        assert not is_packed(layer)
        step(layer, other)
        assert not is_packed(layer)


def in_place(layer, name):
    with torch.no_grad():
        getattr(layer, name).weight.mul_(2)


def by_state_dict(layer, name):
    state = layer.state_dict()
    layer.load_state_dict(state | {f"{name}.weight": state[f"{name}.weight"] * 2})


def by_data(layer, name):
    getattr(layer, name).weight.data = getattr(layer, name).weight.data * 2


def by_parameter(layer, name):
    getattr(layer, name).weight = nn.Parameter(getattr(layer, name).weight.detach() * 2)


def by_module(layer, name):
    linear = nn.Linear(D, getattr(layer, name).out_features, bias=False, dtype=torch.bfloat16)
    setattr(layer, name, linear)


def by_swap(layer, name):
    torch.utils.swap_tensors(getattr(layer, name).weight, nn.Parameter(getattr(layer, name).weight.detach() * 2))


def by_hook(layer, name):
    getattr(layer, name).register_forward_hook(lambda module, args, output: output * 2)


def by_transpose(layer, name):
    weight = getattr(layer, name).weight
    if weight.shape[0] == weight.shape[1]:
        weight.data = weight.data.t()
    else:
        by_data(layer, name)


CHANGES = [in_place, by_state_dict, by_data, by_parameter, by_module, by_swap, by_hook, by_transpose]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_a_weight_within_a_generation_counts_at_once(change, name):
    layer, cache = packed()
    change(layer, name)
    twin = copy.deepcopy(cache)
    y = step(layer, cache)
    assert not is_packed(layer)
    assert torch.equal(y, step(layer, twin))


def unnoticed_write(layer):
    for name in PARTS:
        getattr(layer, name).weight.data.mul_(2)


def new_cache(layer, cache):
    return DynamicCache()


def reset_cache(layer, cache):
    cache.reset()
    return cache


def gradients_between(layer, cache):
    layer(token(layer, 0, 5)).sum().backward()
    return cache


@pytest.mark.parametrize("between", [new_cache, reset_cache, gradients_between], ids=lambda f: f.__name__)
def test_writes_that_no_counter_sees_count_from_the_next_generation_or_other_use_on(between):
    layer, cache = packed(kind="static")
    unnoticed_write(layer)
    cache = between(layer, cache)
    fresh, same = copy.deepcopy(layer), copy.deepcopy(cache)
    assert torch.equal(step(layer, cache), step(fresh, same))  # a prompt of one token, or the next token
    assert torch.equal(step(layer, cache), step(fresh, same))


def test_a_fused_optimizer_bumps_no_version_so_versions_alone_would_not_do():
    weight = nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    before = weight._version
    torch.optim.AdamW([weight], fused=True).step()
    assert weight._version == before, "torch counts these writes now; one_product.py may say so"
    weight.data.add_(1)
    assert weight._version == before


def test_the_copy_goes_with_its_cache():
    layer, cache = packed()
    del cache
    gc.collect()
    assert layer not in one_product._last_steps


def test_neither_state_dicts_nor_copies_nor_pickles_hold_the_copy():
    layer, _ = packed()
    plain, _ = layer_with_cache()
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert len([*layer.parameters()]) == len([*plain.parameters()])
    assert not is_packed(copy.deepcopy(layer))
    assert len(pickle.dumps(layer)) == len(pickle.dumps(plain))


def wide_dtype(layer, cache):
    layer.float()
    prefill(layer, cache := DynamicCache())
    return step, cache


def autocast(layer, cache):
    def under_autocast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(*args)

    return under_autocast, cache


def gradients(layer, cache):
    return lambda *args: layer(token(layer, 1), past_key_values=cache), cache


def some_biases(layer, cache):
    layer.q_proj.bias = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    return step, cache


@pytest.mark.parametrize("case", [wide_dtype, autocast, gradients, some_biases], ids=lambda case: case.__name__)
def test_there_is_no_copy_in_cases_that_one_product_does_not_serve(case):
    layer, cache = packed()
    call, cache = case(layer, cache)
    for _ in range(3):
        call(layer, cache)
        assert not is_packed(layer)


def test_there_is_no_copy_of_large_weights(monkeypatch):
    layer, cache = layer_with_cache()
    size = sum(getattr(layer, name).weight.nbytes for name in PARTS)
    for limit, expected in ((size - 1, False), (size, True)):
        monkeypatch.setattr(one_product, "MOST_BYTES", limit)
        for _ in range(2):
            step(layer, cache)
        assert is_packed(layer) == expected
