"""Two layers may not write to one place of a cache; whatever is right with a cache goes on."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, StaticCache

from query_experts import GQEAttention
from query_experts.layers.caches import _writers

D = 16


def layer(**arguments):
    return GQEAttention(D, 4, 2, rope_theta=1e4, **arguments)


def new_cache(kind):
    if kind == "dynamic":
        return DynamicCache()
    config = LlamaConfig(num_hidden_layers=2, hidden_size=D, num_attention_heads=4, num_key_value_heads=2)
    return StaticCache(config=config, max_cache_len=24)


@pytest.fixture
def x():
    torch.manual_seed(0)
    with torch.no_grad():
        yield torch.randn(2, 3, D)


def trained_clones():
    """Layers that began as copies of one, as stacks are often built, and no longer are equal."""
    first = layer()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.v_proj.weight.mul_(1.5)
    return first, second


each_cache = pytest.mark.parametrize("kind", ["dynamic", "static"])


@each_cache
@pytest.mark.parametrize("make", [lambda: (layer(), layer()), trained_clones], ids=["apart", "clones"])
def test_a_second_layer_at_the_same_place_of_a_cache_is_refused_at_its_first_call(kind, make, x):
    first, second = make()
    cache = new_cache(kind)
    h = first(x, past_key_values=cache)
    with pytest.raises(ValueError, match=r"^layer_idx is 0, where another layer has written to this cache; each layer"):
        second(h, past_key_values=cache)
    assert cache.get_seq_length() == 3
    first(x, past_key_values=cache)


@each_cache
def test_the_refusal_outlasts_reordering_and_cropping_and_more_steps_of_the_first_layer(kind, x):
    first, second = layer(), layer()
    cache = new_cache(kind)
    first(x, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    if kind == "dynamic":
        cache.crop(-1)
    first(x, past_key_values=cache)
    with pytest.raises(ValueError, match="another layer has written"):
        second(x, past_key_values=cache)


@each_cache
def test_layers_of_their_own_place_and_one_layer_with_two_caches_go_on(kind, x):
    first, second = layer(), layer(layer_idx=1)
    for cache in (new_cache(kind), new_cache(kind)):
        for _ in range(2):
            second(first(x, past_key_values=cache), past_key_values=cache)


@each_cache
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_layer_goes_on_where_the_layer_stopped_and_back(kind, copied, x):
    first = layer()
    second = copied(first)
    cache, expected = new_cache(kind), new_cache(kind)
    for one in (first, second, first, second):
        torch.testing.assert_close(one(x, past_key_values=cache), first(x, past_key_values=expected))


@each_cache
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_a_copy_of_a_cache_knows_no_writer_and_finds_its_own(kind, copied, x):
    first, second = layer(), layer()
    cache = new_cache(kind)
    first(x, past_key_values=cache)
    other = copied(cache)
    second(x, past_key_values=other)
    with pytest.raises(ValueError, match="another layer has written"):
        first(x, past_key_values=other)
    first(x, past_key_values=cache)


@each_cache
def test_an_emptied_cache_may_go_to_another_layer(kind, x):
    first, second = layer(), layer()
    cache = new_cache(kind)
    first(x, past_key_values=cache)
    if kind == "dynamic":
        cache.crop(-3)
    else:
        cache.reset()
    second(x, past_key_values=cache)
    with pytest.raises(ValueError, match="another layer has written"):
        first(x, past_key_values=cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double(),
        lambda m: setattr(m, "k_proj", nn.Sequential(m.k_proj)),
        lambda m: m.v_proj.weight.data.untyped_storage().resize_(0),
    ],
    ids=["another dtype", "an adapter", "a freed storage"],
)
def test_weights_that_cannot_be_compared_are_no_reason_to_refuse(change, x):
    first = layer()
    second = copy.deepcopy(first)
    cache = DynamicCache()
    first(x, past_key_values=cache)
    change(first)
    assert second(x, past_key_values=cache).isfinite().all()


def biased():
    return layer(bias=True)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (biased, lambda m: m.k_proj.bias.data.add_(1)),
        (biased, lambda m: setattr(m.v_proj, "bias", None)),
        (lambda: layer(qk_norm=True), lambda m: m.k_norm.weight.data.mul_(2)),
        (layer, lambda m: setattr(m, "rope_theta", 1e5)),
    ],
    ids=["a bias", "no bias", "a norm", "a rotary base"],
)
def test_a_clone_that_computes_other_keys_or_values_with_equal_weights_is_refused(make, change, x):
    first = make()
    second = copy.deepcopy(first)
    change(second)
    cache = DynamicCache()
    first(x, past_key_values=cache)
    with pytest.raises(ValueError, match="another layer has written"):
        second(x, past_key_values=cache)


def test_a_layer_of_another_width_is_refused_whatever_its_dtype(x):
    first, cache = layer(), DynamicCache()
    first(x, past_key_values=cache)
    wide = GQEAttention(2 * D, 4, 2, head_dim=4, dtype=torch.float64)
    with pytest.raises(ValueError, match="another layer has written"):
        wide(torch.cat([x, x], -1).double(), past_key_values=cache)


def test_recomputation_of_a_checkpointed_layer_is_no_second_layer(x):
    one, cache = layer(), new_cache("dynamic")
    one(x, past_key_values=cache)
    with torch.enable_grad():
        x.requires_grad_()
        checkpoint(lambda h: one(h, past_key_values=copy.deepcopy(cache)), x, use_reentrant=False).sum().backward()
    assert x.grad.abs().max() > 0


def test_nothing_keeps_a_layer_or_a_cache_alive(x):
    before = len(_writers)
    one, cache = layer(), DynamicCache()
    one(x, past_key_values=cache)
    assert len(_writers) == before + 1
    dead = weakref.ref(one), weakref.ref(cache)
    del one
    assert dead[0]() is None
    layer()(x, past_key_values=cache)  # the writer is gone, so nothing is known against this one
    del cache
    assert dead[1]() is None
    assert len(_writers) == before


def test_compiled_code_checks_nothing(x):
    first, second = layer(), layer()
    cache = new_cache("static")
    for one in (first, second):
        torch.compile(one, fullgraph=True, backend="eager")(x, past_key_values=cache)
    assert cache not in _writers
