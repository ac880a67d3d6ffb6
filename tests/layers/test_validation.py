"""What `GQEAttention` refuses: arguments of the constructor and of a call, each with a sentence that names it."""

import pickle

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from query_experts import GQEAttention

B, T, D = 2, 5, 16


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return GQEAttention(D, 4, 2, rope_theta=1e4)


def static_cache():
    config = LlamaConfig(num_hidden_layers=1, hidden_size=D, num_attention_heads=4, num_key_value_heads=2)
    return StaticCache(config=config, max_cache_len=12)


x = torch.randn(B, T, D)
REFUSED_CALLS = [
    ({"x": x[0]}, "x has 2 dimensions; it must be [batch, tokens, hidden size]"),
    ({"x": x[None]}, "x has 4 dimensions; it must be [batch, tokens, hidden size]"),
    ({"x": x.long()}, "x has dtype torch.int64; it must be a float dtype"),
    ({"x": x[..., :8]}, "x has shape [2, 5, 8]; its last size must be hidden_size, 16"),
    ({"x": x.tolist()}, "x is of type list; it must be a tensor [batch, tokens, hidden size]"),
    (
        {"attention_mask": torch.ones(T, T).tril().bool()},
        "attention_mask has shape [5, 5]; it must have a row",
    ),
    ({"attention_mask": torch.ones(1, T).bool()}, "attention_mask has shape [1, 5]; it must have a row for each"),
    ({"attention_mask": torch.ones(B, T)}, "attention_mask has dtype torch.float32; it must be bool or an integer"),
    (
        {"attention_mask": torch.ones(B, T - 1).long()},
        "attention_mask has 4 columns; it must have one for each of",
    ),
    (
        {"attention_mask": torch.ones(B, T + 1).long()},
        "attention_mask has 6 columns; it must have one for each of",
    ),
    ({"attention_mask": torch.ones(B, 1, T, T)}, "attention_mask has 4 dimensions; it must be [batch, keys]"),
    ({"attention_mask": "causal"}, "attention_mask is of type str; it must be a tensor [batch, keys]"),
    ({"position_ids": torch.arange(T)}, "position_ids has 1 dimensions; it must be [batch, tokens] or [1, tokens]"),
    ({"position_ids": torch.zeros(3, T).long()}, "position_ids has shape [3, 5]; it must be [2, 5] or [1, 5]"),
    ({"position_ids": torch.zeros(B, T + 1).long()}, "position_ids has shape [2, 6]; it must be [2, 5] or [1, 5]"),
    ({"position_ids": torch.zeros(B, T)}, "position_ids has dtype torch.float32; it must be an integer dtype"),
    ({"position_ids": torch.zeros(B, T).bool()}, "position_ids has dtype torch.bool; it must be an integer dtype"),
    ({"past_key_values": ((x, x),)}, "past_key_values is of type tuple; it must be a Transformers Cache, or None"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED_CALLS, ids=[said.split(";")[0] for _, said in REFUSED_CALLS])
def test_a_bad_argument_of_a_call_is_refused_with_its_name_and_what_is_allowed(layer, given, said):
    with pytest.raises(ValueError, match="must") as refused:
        layer(**{"x": x} | given)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_must_have_a_column_for_each_cached_key_too(layer, kind):
    cache = DynamicCache() if kind == "dynamic" else static_cache()
    layer(x, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has 5 columns; it must have one for each of the 10 keys"):
        layer(x, torch.ones(B, T).long(), past_key_values=cache)


def test_a_mask_of_as_many_rows_as_tokens_is_read_as_padding_whatever_its_values(layer):
    """Shape and dtype decide: nothing else tells a causal mask from the padding of T rows."""
    square = torch.randn(T, T, D)
    mask = torch.ones(T, T).bool()
    for dtype in (torch.bool, torch.int64, torch.int32, torch.uint8):
        torch.testing.assert_close(layer(square, mask.to(dtype)), layer(square))


def test_a_mask_may_be_wider_than_the_tokens_so_far_where_there_is_a_cache(layer):
    wide = torch.ones(B, 12).long()
    for cache in (DynamicCache(), static_cache()):
        torch.testing.assert_close(layer(x, wide, past_key_values=cache), layer(x))


def test_the_checks_of_a_call_leave_one_compiled_graph(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    given = {"attention_mask": torch.ones(B, T).long(), "position_ids": torch.arange(T)[None]}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, **given), layer(x, **given))
        cached = compiled(x, given["attention_mask"], past_key_values=static_cache())
        torch.testing.assert_close(cached, layer(x))


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("rope_theta", [0, 1e-300, float("nan"), float("inf"), 10**400, "10000", True], "a number, 1 or more, or None"),
        ("dropout", [1.5, 10**400, -0.1, float("nan"), "0", None, False], "a number, 0 or more and below 1"),
        ("norm_eps", [-1e-6, float("nan"), float("inf"), "1e-6", None], "a number, 0 or more"),
        ("layer_idx", [-1, 0.0, "0", None, True], "a whole number, 0 or more"),
        ("bias", ["no", None, 2, 1, torch.tensor([True, False])], "True or False"),
        ("output_bias", ["false", 2], "True or False"),
        ("qk_norm", ["false", None], "True or False"),
        ("hidden_size", [True, "16", 16.0, None], "a whole number"),
        ("hidden_size", [0, -16], "1 or more"),
        ("num_query_experts", [True, "4", 4.0], "a whole number"),
        ("num_kv_heads", [False, "2", 2.0], "a whole number"),
        ("top_k", [True, "1", 1.0], "a whole number"),
        ("head_dim", [True, "4", 4.0], "a whole number"),
    ],
)
def test_a_bad_argument_of_the_constructor_is_refused_with_its_name_what_it_held_and_what_is_allowed(
    name, values, allowed
):
    for value in values:
        with pytest.raises(ValueError, match="must be") as refused:
            GQEAttention(**{"hidden_size": D, "num_query_experts": 4, "num_kv_heads": 2} | {name: value})
        assert str(refused.value) == f"{name} is {value!r}; it must be {allowed}"


def test_a_layer_that_an_older_version_pickled_runs(layer):
    """It has no hidden_size."""
    state = pickle.loads(pickle.dumps(layer))
    del state.__dict__["hidden_size"]
    torch.testing.assert_close(pickle.loads(pickle.dumps(state))(x), layer(x))


def test_numbers_of_numpy_are_numbers():
    layer = GQEAttention(D, 4, 2, rope_theta=np.float32(1e4), dropout=np.float64(0.5), layer_idx=np.int64(1))
    assert layer(torch.randn(1, 3, D)).isfinite().all()
