"""One call of attention and two: each against the oracle and against the other, and when which is made."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oracle import oracle
from query_experts import GQEAttention
from query_experts.ops import attend
from query_experts.ops.attend import CausalKernel, one_call

D = 24
LAYOUT = {"num_query_experts": 6, "num_kv_heads": 3, "top_k": 1, "head_dim": 4, "rope_theta": 1e4}
BACKENDS = ["sdpa", "eager", "flex_attention"]
TOLERANCE = {"sdpa": 1e-11, "eager": 1e-6, "flex_attention": 1e-11}  # eager takes its softmax in float32
INPUTS = {
    "no mask": {},
    "padding": {"attention_mask": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0]]},
    "packed": {"position_ids": [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]]},
    "padding and packed": {
        "attention_mask": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0]],
        "position_ids": [[0, 0, 0, 1, 0, 1, 2], [0, 1, 0, 2, 0, 1, 0]],
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """FlexAttention as plain tensor operations."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=["one call", "two calls"])
def calls(request, monkeypatch) -> int:
    """How many calls attention makes, whatever the number of tokens."""
    monkeypatch.setattr(attend, "ONE_CALL_TOKENS_CPU", 10**9 if request.param == "one call" else 0)
    return 1 if request.param == "one call" else 2


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Query heads of each call of an attention kernel."""
    heads = []
    forward = CausalKernel.forward

    def counted(self, query, *args, **kwargs):
        heads.append(query.shape[1])
        return forward(self, query, *args, **kwargs)

    monkeypatch.setattr(CausalKernel, "forward", counted)
    return heads


def layer(attn_implementation: str = "sdpa", **changes) -> GQEAttention:
    torch.manual_seed(0)
    return GQEAttention(D, **(LAYOUT | changes), attn_implementation=attn_implementation).double()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def static_cache(length: int) -> Cache:
    return StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=length)


def outputs_and_gradients(module: GQEAttention, x: Tensor, **inputs) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    parameters = dict(module.named_parameters())
    y = module(x, **inputs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    grads = torch.autograd.grad(y, [x, *parameters.values()], cotangent)
    return {"y": y.detach()} | dict(zip(["x", *parameters], grads, strict=True))


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("shared_head_kv", ["mean", "first"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_either_number_of_calls_gives_the_oracles_outputs(backend, shared_head_kv, given, calls, made):
    inputs = {name: torch.tensor(rows) for name, rows in INPUTS[given].items()}
    module, x = layer(backend, shared_head_kv=shared_head_kv), tokens(7)
    expected = oracle(module.state_dict(), x, **LAYOUT, shared_head_kv=shared_head_kv, **inputs)
    y = module(x, **inputs)
    real = inputs.get("attention_mask", torch.ones(2, 7)).bool()
    torch.testing.assert_close(y[real], expected.y[real], rtol=0, atol=TOLERANCE[backend])
    assert len(made) == (1 if backend == "eager" else calls)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("shared_head_kv", ["mean", "first"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_either_number_of_calls_gives_the_oracles_gradients(backend, shared_head_kv, given, calls):
    inputs = {name: torch.tensor(rows) for name, rows in INPUTS[given].items()}
    mask = inputs.get("attention_mask", torch.ones(2, 7, dtype=torch.long))
    module, x = layer(backend, shared_head_kv=shared_head_kv), tokens(7)
    parameters = dict(module.named_parameters())
    cotangent = mask[..., None] * tokens(7).flip(1)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = oracle(parameters, plain, **LAYOUT, shared_head_kv=shared_head_kv, **inputs).y
    expected = torch.autograd.grad(expected, [plain, *parameters.values()], cotangent)
    actual = torch.autograd.grad(module(ours, **inputs), [ours, *parameters.values()], cotangent)
    for name, gradient, exact in zip(["x", *parameters], actual, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=TOLERANCE[backend], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"output_projection": "expert"}], ids=str)
@pytest.mark.parametrize("shared_head_kv", ["mean", "first"])
@pytest.mark.parametrize("length", [1, 63, 111])
def test_one_call_equals_two_forwards_and_backwards(length, shared_head_kv, options, monkeypatch):
    module, x = layer(shared_head_kv=shared_head_kv, **options), tokens(length)
    one = outputs_and_gradients(module, x)
    monkeypatch.setattr(attend, "ONE_CALL_TOKENS_CPU", 0)
    two = outputs_and_gradients(module, x)
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("shared_head_kv", ["mean", "first"])
@torch.no_grad()
def test_a_prompt_and_its_chunks_into_a_cache_give_what_no_cache_gives(shared_head_kv, kind, backend, calls):
    module, x = layer(backend, shared_head_kv=shared_head_kv), tokens(35)
    cache = DynamicCache() if kind == "dynamic" else static_cache(37)
    chunks = [module(piece, past_key_values=cache) for piece in x.split([17, 11, 7], 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), module(x), rtol=0, atol=TOLERANCE[backend])


@torch.no_grad()
def test_few_tokens_make_one_call_and_many_or_a_filled_cache_or_more_experts_two(made, monkeypatch):
    def heads(module, *args, **kwargs):
        made.clear()
        module(*args, **kwargs)
        return made

    module, x = layer(), tokens(21)
    assert heads(module, x) == [4]
    assert heads(layer(top_k=2), x) == [6, 1]
    assert heads(layer("eager", top_k=2), x) == [7]
    assert heads(layer(variant="hard_concat"), x) == [3]
    cache = DynamicCache()
    assert heads(module, x, past_key_values=cache) == [4]
    assert heads(module, x, past_key_values=cache) == [3, 1]
    assert heads(module, x, past_key_values=static_cache(50)) == [3, 1]
    monkeypatch.setattr(attend, "ONE_CALL_TOKENS_CPU", 43)
    assert heads(module, x) == [4]
    monkeypatch.setattr(attend, "ONE_CALL_TOKENS_CPU", 42)
    assert heads(module, x) == [3, 1]


@pytest.mark.parametrize(("device", "tokens_in_all"), [("meta", 16384), ("cpu", 1024)])
def test_from_so_many_tokens_in_all_there_are_two_calls(device, tokens_in_all):
    module = layer()

    def asked(batch, length):
        query, key = (torch.empty(batch, heads, length, 4, device=device) for heads in (4, 3))
        return one_call(module, query, key)

    assert asked(1, tokens_in_all - 1)
    assert not asked(1, tokens_in_all)
    assert asked(8, tokens_in_all // 8 - 1)
    assert not asked(8, tokens_in_all // 8)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation allocates."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("shared_head_kv", ["mean", "first"])
@torch.no_grad()
def test_a_chunk_over_a_filled_cache_copies_no_part_of_the_size_of_the_cache(shared_head_kv):
    module, x = layer(head_dim=64, shared_head_kv=shared_head_kv).float(), tokens(1024, batch=1).float()
    cache = static_cache(1024)
    module(x[:, :1000], past_key_values=cache)
    with Largest() as recorded:
        module(x[:, 1000:1016], past_key_values=cache)
    keys = cache.layers[0].keys
    assert 0 < recorded.bytes <= keys.nbytes // keys.shape[1]  # that is one head: the mean


@torch.no_grad()
def test_weights_are_returned_by_eager_attention_and_never_what_another_backend_returns_in_their_place(monkeypatch):
    def with_sums(module, query, key, value, mask, **kwargs):
        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
        return out, torch.zeros(query.shape[:3])

    module, x = layer(), tokens(9)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "with_sums", with_sums)
    for backend, shape in (("with_sums", None), ("eager", (2, 4, 9, 9))):
        module.config._attn_implementation = backend
        weights = module.route_and_attend(x, None, None, None)[1]
        assert (None if weights is None else weights.shape) == shape


@pytest.mark.parametrize("cached", [3, attend.SHORT_CACHE // 2 - 1, attend.SHORT_CACHE // 2])
def test_a_short_cache_is_served_by_one_call_and_a_longer_one_by_a_single_read(cached, made, monkeypatch):
    """Two rows, one of which sees no key at one step: zeros either way, but for W_O's bias, which there isn't."""
    module = layer()
    x = torch.randn(2, cached + 1, D, generator=torch.Generator().manual_seed(cached)).double()
    mask = torch.ones(2, cached + 1, dtype=torch.int64)
    mask[1] = 0

    def last_step() -> Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            module(x[:, :-1], past_key_values=cache)
            made.clear()
            return module(x[:, -1:], attention_mask=mask, past_key_values=cache)

    y = last_step()
    short = 2 * (cached + 1) <= attend.SHORT_CACHE
    assert made == ([LAYOUT["num_kv_heads"] + 1] if short else [])
    assert not y[1].any()
    monkeypatch.setattr(attend, "SHORT_CACHE", 0)
    torch.testing.assert_close(y, last_step(), rtol=0, atol=1e-12)
    assert made == []
