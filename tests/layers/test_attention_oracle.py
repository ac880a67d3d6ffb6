"""`GQEAttention` against its brute-force oracle and against itself, over settings, masks, packing and caches.

Hypothesis draws the settings (derandomized, so that every run checks the same ones). Values are float64 and the
tolerance 1e-9; where both sides are the layer's own arithmetic in another order, 1e-12.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from oracle import OracleResult, oracle, parameter_shapes
from query_experts import GQEAttention

HIDDEN_SIZE = 24
VARIANTS = ["gqe", "hard_concat", "weighted_concat"]
PROJECTIONS = ["slot", "expert"]
CACHES = ["dynamic", "static"]
BACKENDS = ["sdpa", "eager", "flex_attention"]
# Transformers' eager attention takes its softmax in float32 for every dtype.
BACKEND_TOLERANCE = {"sdpa": 1e-9, "eager": 1e-6, "flex_attention": 1e-9}

# The layer warns where its router learns from the balance loss alone; such layers are drawn on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the router gets no gradient"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few hundred numbers: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """FlexAttention as plain tensor operations: the same masks and arithmetic without a minute of compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield


def drawn(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn: a layer, and a batch of tokens with their mask and positions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    num_query_experts: int = 8
    num_kv_heads: int = 2
    top_k: int = 2
    head_dim: int = 4
    variant: str = "gqe"
    output_projection: str = "slot"
    rope_theta: float | None = 10000.0
    routing: str = "learned"
    shared_head_kv: str = "mean"
    bias: bool = False
    seed: int = 0

    def settings(self, *left_out: str) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("seed", *left_out)}

    def params(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = parameter_shapes(hidden_size=HIDDEN_SIZE, **self.settings("rope_theta", "shared_head_kv"))
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            for name, shape in shapes.items()
        }

    def layer(self, **more) -> GQEAttention:
        """The layer in float64 holding `params`; loading is strict, so it checks every name and shape as well."""
        layer = GQEAttention(HIDDEN_SIZE, **self.settings(), **more).double()
        layer.load_state_dict(self.params())
        return layer


@dataclass(frozen=True)
class Tokens:
    x: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """[B, T], true where a token is not padding."""
        return torch.ones(self.x.shape[:2], dtype=bool) if self.attention_mask is None else self.attention_mask.bool()

    @property
    def defined(self) -> Tensor:
        """[B, T, 1], true where the output means something: padding that is told a position belongs nowhere."""
        return (self.real | (self.position_ids is None))[..., None]

    @property
    def sees_something(self) -> Tensor:
        """[B, T], true where a real token stands at or before the token."""
        return self.real.cumsum(-1) > 0

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids}

    def chunk(self, start: int, stop: int) -> dict[str, Tensor | None]:
        """Arguments of the layer for tokens start..stop-1 when those before are cached."""
        return {
            "x": self.x[:, start:stop],
            "attention_mask": None if self.attention_mask is None else self.attention_mask[:, :stop],
            "position_ids": None if self.position_ids is None else self.position_ids[:, start:stop],
        }


@st.composite
def setting_strategy(draw) -> Setting:
    groups, experts = draw(st.sampled_from([2, 3, 1])), draw(st.sampled_from([2, 3, 4, 1]))
    routing = draw(st.sampled_from(["learned", "learned", "frozen", "none"]))
    rope_theta = draw(st.sampled_from([None, 10000.0, 100.0]))
    return Setting(
        num_query_experts=groups * experts,
        num_kv_heads=groups,
        top_k=experts if routing == "none" else draw(st.integers(1, experts)),
        head_dim=draw(st.sampled_from([1, 3, 5, 7] if rope_theta is None else [2, 4, 6])),
        variant=draw(st.sampled_from(["gqe", *VARIANTS])),
        output_projection=draw(st.sampled_from(PROJECTIONS)),
        rope_theta=rope_theta,
        routing=routing,
        shared_head_kv=draw(st.sampled_from(["mean", "first"])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def mask_strategy(draw, length: int) -> list[int]:
    """One row's padding: none, left, right, or anywhere; at least one token is real."""
    kind = draw(st.sampled_from(["none", "left", "right", "anywhere", "anywhere"]))
    padding = draw(st.integers(min(1, length - 1), length - 1))
    match kind:
        case "none":
            return [1] * length
        case "left":
            return [0] * padding + [1] * (length - padding)
        case "right":
            return [1] * (length - padding) + [0] * padding
        case _:
            mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
            return mask if any(mask) else [1] * length


@st.composite
def position_strategy(draw, real: list[int], packed: bool, gaps: bool) -> list[int]:
    """One row's positions: count the real tokens of each document from 0. Padding is told anything.

    With gaps, positions only grow inside a document, and a document may begin anywhere.
    """
    positions, position = [], 0
    for is_real in real:
        if not is_real:
            positions.append(draw(st.integers(0, len(real))))
            continue
        if packed and draw(st.integers(0, 2)) == 0:
            position = draw(st.integers(0, 3)) if gaps else 0
        positions.append(position)
        position += draw(st.integers(1, 3)) if gaps else 1
    return positions


@st.composite
def token_strategy(draw, max_length: int = 9, gaps_allowed: bool = False) -> Tokens:
    batch, length = draw(st.integers(1, 2)), draw(st.sampled_from(range(1, max_length + 1, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(batch, length, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    masks = draw(st.none() | st.lists(mask_strategy(length), min_size=batch, max_size=batch))
    kind = draw(st.sampled_from(["default", "counted", "packed"] + ["packed with gaps"] * gaps_allowed))
    positions = None
    if kind != "default":
        positions = [
            draw(position_strategy(row, packed=kind != "counted", gaps=kind == "packed with gaps"))
            for row in masks or [[1] * length] * batch
        ]
    return Tokens(
        x,
        None if masks is None else torch.tensor(masks),
        None if positions is None else torch.tensor(positions),
    )


@st.composite
def chunk_strategy(draw, length: int) -> list[int]:
    """Where to cut: [0, ..., length]. One token at a time, all at once, and anything between."""
    kind = draw(st.sampled_from(["one at a time", "all at once", "prefill, then one at a time", "random", "random"]))
    match kind:
        case "one at a time":
            return list(range(length + 1))
        case "all at once":
            return [0, length]
        case "prefill, then one at a time":
            return [0, *range(draw(st.integers(1, length)), length + 1)]
        case _:
            return [0, *sorted(draw(st.sets(st.integers(1, length), max_size=4)) - {length}), length]


def fixed_tokens(batch: int = 2, length: int = 9, seed: int = 0, **inputs) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randn(batch, length, HIDDEN_SIZE, generator=generator, dtype=torch.float64), **inputs)


def make_cache(kind: str, length: int, spare: int = 3, layers: int = 1) -> Cache:
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(config=LlamaConfig(num_hidden_layers=layers), max_cache_len=length + spare)


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracle
# ---------------------------------------------------------------------------------------------------------------------


def ask_oracle(setting: Setting, params: dict[str, Tensor], tokens: Tokens) -> OracleResult:
    return oracle(params, tokens.x, **setting.settings("bias"), **tokens.inputs)


def assert_close(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def gradients(y: Tensor, balance_loss: Tensor, cotangent: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = (y * cotangent).sum() + 0.37 * balance_loss
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True), strict=True))


@drawn(max_examples=150)
@given(setting=setting_strategy(), tokens=token_strategy(gaps_allowed=True))
def test_outputs_routing_and_every_gradient_equal_the_oracles(setting: Setting, tokens: Tokens):
    layer = setting.layer()
    tokens.x.requires_grad_()
    y, routing = layer(tokens.x, **tokens.inputs, output_routing=True)
    params = {name: value.requires_grad_() for name, value in setting.params().items()}
    expected = ask_oracle(setting, params, tokens)

    defined = tokens.defined
    assert y.isfinite().all()
    assert_close(y * defined, expected.y * defined, "y")
    assert_close(routing.probs, expected.probs, "probs")
    assert torch.equal(routing.indices, expected.indices)
    assert_close(routing.balance_loss, expected.balance_loss, "balance loss")

    cotangent = defined * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert set(trained) == set(params) - ({"router.weight"} if setting.routing == "frozen" else set())
    actual_gradients = gradients(y, routing.balance_loss, cotangent, {"x": tokens.x} | trained)
    expected_gradients = gradients(
        expected.y, expected.balance_loss, cotangent, {"x": tokens.x} | {name: params[name] for name in trained}
    )
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("output_projection", PROJECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attn_implementation", BACKENDS)
@torch.no_grad()
def test_every_backend_equals_the_oracle_under_mask_and_packing(attn_implementation, variant, output_projection):
    setting = Setting(variant=variant, output_projection=output_projection, bias=True)
    tokens = fixed_tokens(
        length=7,
        attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0]]),
        position_ids=torch.tensor([[0, 0, 0, 1, 0, 1, 2], [0, 1, 0, 2, 0, 1, 0]]),
    )
    y = setting.layer(attn_implementation=attn_implementation)(tokens.x, **tokens.inputs)
    expected = ask_oracle(setting, setting.params(), tokens).y
    assert_close(y[tokens.real], expected[tokens.real], tolerance=BACKEND_TOLERANCE[attn_implementation])


@pytest.mark.parametrize("attn_implementation", BACKENDS)
@torch.no_grad()
def test_a_query_that_sees_no_key_attends_to_nothing(attn_implementation):
    """Padding on the left. What it gives becomes a key of the next layer, masked but multiplied: never a NaN.

    Transformers' eager attention spreads such a query over all keys instead: finite, and nobody reads it.
    """
    setting = Setting(bias=True)
    tokens = fixed_tokens(batch=1, length=5, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    y = setting.layer(attn_implementation=attn_implementation)(tokens.x, **tokens.inputs)
    assert y.isfinite().all()
    if attn_implementation == "eager":
        return
    assert_close(y[:, :2], setting.params()["o_proj.bias"].expand(1, 2, -1))


# ---------------------------------------------------------------------------------------------------------------------
# Cached equals uncached
# ---------------------------------------------------------------------------------------------------------------------


def run_in_chunks(layer: GQEAttention, tokens: Tokens, cuts: list[int], cache: Cache) -> Tensor:
    chunks = []
    for start, stop in pairwise(cuts):
        chunks.append(layer(**tokens.chunk(start, stop), past_key_values=cache))
        assert int(cache.get_seq_length()) == stop
    return torch.cat(chunks, dim=1)


@pytest.mark.parametrize("cache", CACHES)
@drawn(max_examples=120)
@given(setting=setting_strategy(), tokens=token_strategy(max_length=19), data=st.data())
@torch.no_grad()
def test_cached_equals_uncached_for_any_chunking_mask_and_packing(cache, setting, tokens, data):
    layer, length = setting.layer(), tokens.x.shape[1]
    cuts = data.draw(chunk_strategy(length), label="cuts")
    y = run_in_chunks(layer, tokens, cuts, make_cache(cache, length, spare=data.draw(st.integers(0, 3), label="spare")))
    assert y.isfinite().all()
    assert_close(y * tokens.defined, layer(tokens.x, **tokens.inputs) * tokens.defined)


@functools.cache
def padded_prompt(setting: Setting) -> tuple[Tokens, Tensor]:
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]])
    tokens = fixed_tokens(length=14, attention_mask=mask)
    return tokens, ask_oracle(setting, setting.params(), tokens).y


# With the mean, few new tokens are decoded apart from the backend; with the first group's K/V all go through it.
SHARED_HEADS = {"mean": Setting(), "first": Setting(shared_head_kv="first"), "none": Setting(variant="hard_concat")}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("setting", SHARED_HEADS.values(), ids=SHARED_HEADS)
@pytest.mark.parametrize("cuts", [[0, 4, 7, 14], [0, 2, 14], list(range(15))], ids=["even", "long tail", "one by one"])
@torch.no_grad()
def test_chunked_prefill_under_a_padding_mask_equals_the_oracle(cuts, setting, attn_implementation, cache):
    tokens, expected = padded_prompt(setting)
    layer = setting.layer(attn_implementation=attn_implementation)
    y = run_in_chunks(layer, tokens, cuts, make_cache(cache, 14))
    seeing = tokens.sees_something
    assert_close(y[seeing], expected[seeing], tolerance=BACKEND_TOLERANCE[attn_implementation])


def test_gradients_flow_back_through_a_dynamic_cache():
    layer, tokens = Setting().layer(), fixed_tokens()
    tokens.x.requires_grad_()
    inputs = {"x": tokens.x} | dict(layer.named_parameters())
    y = run_in_chunks(layer, tokens, [0, 3, 4, 9], DynamicCache())
    cached = gradients(y, torch.zeros(()), torch.ones_like(y), inputs)
    uncached = gradients(layer(tokens.x), torch.zeros(()), torch.ones_like(y), inputs)
    for name in inputs:
        assert_close(cached[name], uncached[name], f"gradient of {name}")


@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_the_cache_holds_the_oracles_keys_and_values_and_nothing_else(cache):
    setting, tokens = Setting(), fixed_tokens()
    kv = make_cache(cache, 9, spare=0)
    run_in_chunks(setting.layer(), tokens, [0, 4, 9], kv)
    expected = ask_oracle(setting, setting.params(), tokens)
    assert_close(kv.layers[0].keys, expected.keys.transpose(1, 2))
    assert_close(kv.layers[0].values, expected.values.transpose(1, 2))


@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_two_layers_share_one_cache_by_their_layer_index(cache):
    tokens, kv = fixed_tokens(), make_cache(cache, 9, layers=2)
    layers = [Setting(seed=i).layer(layer_idx=i) for i in range(2)]
    chunks = []
    for start, stop in pairwise([0, 3, 4, 9]):
        h = layers[0](tokens.x[:, start:stop], past_key_values=kv)
        chunks.append(layers[1](h, past_key_values=kv))
    assert_close(torch.cat(chunks, dim=1), layers[1](layers[0](tokens.x)))


@pytest.mark.parametrize("cache", [None, *CACHES])
@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("setting", SHARED_HEADS.values(), ids=SHARED_HEADS)
@torch.no_grad()
def test_documents_of_a_packed_row_are_each_as_if_alone(setting, attn_implementation, cache):
    """With cache or mask in hand too, where packing is easily forgotten."""
    layer, tokens = setting.layer(attn_implementation=attn_implementation), fixed_tokens(batch=1)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    alone = torch.cat([layer(document) for document in tokens.x.split([3, 2, 4], dim=1)], dim=1)
    for mask in (None, torch.ones(1, 9, dtype=torch.long)):
        packed = Tokens(tokens.x, mask, position_ids)
        if cache is None:
            y = layer(packed.x, **packed.inputs)
        else:
            y = run_in_chunks(layer, packed, [0, 4, 5, 9], make_cache(cache, 9))
        assert_close(y, alone, tolerance=BACKEND_TOLERANCE[attn_implementation])


@pytest.mark.parametrize("attn_implementation", BACKENDS)
@torch.no_grad()
def test_a_document_begins_wherever_positions_fail_to_grow_even_past_zero(attn_implementation):
    layer, tokens = Setting().layer(attn_implementation=attn_implementation), fixed_tokens(batch=1)
    position_ids = torch.tensor([[0, 1, 2, 2, 3, 1, 2, 3, 4]])
    documents = zip(tokens.x.split([3, 2, 4], dim=1), position_ids.split([3, 2, 4], dim=1), strict=True)
    alone = torch.cat([layer(x, position_ids=positions) for x, positions in documents], dim=1)
    y = layer(tokens.x, position_ids=position_ids)
    assert_close(y, alone, tolerance=BACKEND_TOLERANCE[attn_implementation])


# ---------------------------------------------------------------------------------------------------------------------
# Causality
# ---------------------------------------------------------------------------------------------------------------------

MASKS = {
    "no mask": None,
    "mask of ones": [[1] * 9] * 2,
    "padding left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "padding right": [[1, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 9],
    "padding between": [[1, 1, 0, 0, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 0, 1, 0, 1]],
}


@pytest.mark.parametrize("cache", [None, *CACHES])
@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("setting", SHARED_HEADS.values(), ids=SHARED_HEADS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_neither_mask_nor_cache_lets_a_token_see_the_future(mask, setting, attn_implementation, cache):
    layer = setting.layer(attn_implementation=attn_implementation)
    tokens = fixed_tokens(attention_mask=None if mask is None else torch.tensor(mask))

    def run(x: Tensor) -> Tensor:
        changed = Tokens(x, tokens.attention_mask)
        if cache is None:
            return layer(x, **changed.inputs)
        return run_in_chunks(layer, changed, [0, 3, 9], make_cache(cache, 9))

    before = run(tokens.x)
    for t in range(8):
        x = tokens.x.clone()
        x[:, t + 1 :] += 10
        unchanged, after = tokens.sees_something, run(x)
        unchanged[:, t + 1 :] = False
        assert_close(after[unchanged], before[unchanged], f"token {t + 1} reaches back", tolerance=1e-12)
        assert not torch.allclose(after[:, t + 1 :], before[:, t + 1 :]), "the change must show somewhere"


@torch.no_grad()
def test_padding_changes_nothing_for_the_real_tokens():
    layer = Setting().layer()
    tokens = fixed_tokens(attention_mask=torch.tensor(MASKS["padding between"]))
    before, routing_before = layer(tokens.x, **tokens.inputs, output_routing=True)
    after, routing_after = layer(
        torch.where(tokens.real[..., None], tokens.x, 5.0), **tokens.inputs, output_routing=True
    )
    assert_close(after[tokens.real], before[tokens.real], tolerance=1e-12)
    assert_close(routing_after.balance_loss, routing_before.balance_loss, tolerance=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Dense attention as the special case k = M
# ---------------------------------------------------------------------------------------------------------------------


def llama_attention(setting: Setting, params: dict[str, Tensor], attn_implementation: str, x: Tensor) -> Tensor:
    """Transformers' own layer with the same weights, causal, positions from 0."""
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=setting.num_query_experts,
        num_key_value_heads=setting.num_kv_heads,
        head_dim=setting.head_dim,
        attention_bias=setting.bias,
        rope_parameters={"rope_type": "default", "rope_theta": setting.rope_theta},
        attn_implementation=attn_implementation,
    )
    llama = LlamaAttention(config, layer_idx=0).double()
    llama.load_state_dict({name: params[name] for name in llama.state_dict()})
    length = x.shape[1]
    position_embeddings = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    causal = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    return llama(x, position_embeddings, None if attn_implementation == "sdpa" else causal)[0]


DENSE = [
    Setting(num_query_experts=8, num_kv_heads=2, top_k=4),
    Setting(num_query_experts=6, num_kv_heads=3, top_k=2, head_dim=6, bias=True, rope_theta=100.0),
    Setting(num_query_experts=3, num_kv_heads=3, top_k=1),
    Setting(num_query_experts=3, num_kv_heads=1, top_k=3, head_dim=2),
]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dense", DENSE, ids=lambda s: f"{s.num_query_experts} over {s.num_kv_heads}")
@pytest.mark.parametrize("variant", ["hard_concat", "gqe"])
@torch.no_grad()
def test_all_experts_through_the_expert_projection_are_transformers_llama_attention(
    variant, dense, attn_implementation
):
    setting = Setting(**(vars(dense) | {"variant": variant, "output_projection": "expert"}))
    params = setting.params()
    dense_columns = setting.num_query_experts * setting.head_dim
    dense_params = params | {"o_proj.weight": params["o_proj.weight"][:, :dense_columns].clone()}
    params["o_proj.weight"][:, dense_columns:] = 0  # the weighted and the shared slot, where there are any
    layer = setting.layer(attn_implementation=attn_implementation)
    layer.load_state_dict(params)

    x = fixed_tokens().x
    assert_close(layer(x), llama_attention(setting, dense_params, attn_implementation, x), tolerance=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@torch.no_grad()
def test_a_zero_router_ties_everywhere_and_selects_the_lowest_indices(top_k):
    setting, tokens = Setting(top_k=top_k), fixed_tokens()
    layer = setting.layer()
    layer.load_state_dict(setting.params() | {"router.weight": torch.zeros(8, HIDDEN_SIZE)})
    y, routing = layer(tokens.x, output_routing=True)
    assert torch.equal(routing.indices, torch.arange(top_k).expand(2, 9, 2, top_k))
    assert torch.equal(routing.probs, torch.full((2, 9, 2, 4), 0.25, dtype=torch.float64))
    params = setting.params() | {"router.weight": torch.zeros(8, HIDDEN_SIZE, dtype=torch.float64)}
    assert_close(y, ask_oracle(setting, params, tokens).y)


@torch.no_grad()
def test_a_tie_behind_the_first_rank_goes_to_the_lowest_index_too():
    setting, tokens = Setting(num_query_experts=4, num_kv_heads=1, top_k=2), fixed_tokens()
    direction = setting.params()["router.weight"][0]
    router = torch.stack([direction, torch.zeros_like(direction), torch.zeros_like(direction), -direction])
    layer = setting.layer()
    layer.load_state_dict(setting.params() | {"router.weight": router})
    _, routing = layer(tokens.x, output_routing=True)
    first_wins = (tokens.x @ direction > 0)[..., None]
    assert first_wins.any()
    assert not first_wins.all()
    expected = torch.where(first_wins, torch.tensor([0, 1]), torch.tensor([3, 1]))
    assert torch.equal(routing.indices, expected[:, :, None])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_float64_stays_float64_throughout(variant):
    kv = DynamicCache()
    y, routing = Setting(variant=variant).layer()(fixed_tokens().x, output_routing=True, past_key_values=kv)
    dtypes = {t.dtype for t in (y, routing.probs, routing.balance_loss, kv.layers[0].keys, kv.layers[0].values)}
    assert dtypes == {torch.float64}


def assert_routes_in_float32(routing, router_weight: Tensor, x: Tensor) -> None:
    """`routing` is what float32 arithmetic gives on these very inputs."""
    assert routing.probs.dtype == torch.float32
    logits = (x.double() @ router_weight.double().T).unflatten(-1, (2, 4))
    assert_close(routing.probs.double(), logits.softmax(-1), tolerance=1e-6)
    assert torch.equal(routing.indices, logits.sort(-1, descending=True).indices[..., :2])


@torch.no_grad()
def test_a_bf16_layer_routes_in_float32():
    layer = Setting().layer().bfloat16()
    x = fixed_tokens(length=63).x.bfloat16()
    y, routing = layer(x, output_routing=True)
    assert y.dtype == torch.bfloat16
    assert_routes_in_float32(routing, layer.router.weight, x)
    assert routing.balance_loss.dtype == torch.float32


@torch.no_grad()
def test_autocast_to_bf16_leaves_the_routing_in_float32():
    layer = Setting().layer().float()
    x = fixed_tokens(length=63).x.float()
    with torch.autocast("cpu", torch.bfloat16):
        _, routing = layer(x, output_routing=True)
    assert_routes_in_float32(routing, layer.router.weight, x)


@torch.no_grad()
def test_a_bf16_layer_errs_little_against_the_oracle():
    """Output error of bf16 stays within a few of its roundings (2**-8), against float64 on the same rounded values."""
    setting = Setting()
    layer = setting.layer().bfloat16()
    x = fixed_tokens().x.bfloat16()
    rounded = {name: value.double() for name, value in layer.state_dict().items()}
    expected = ask_oracle(setting, rounded, Tokens(x.double())).y
    assert (layer(x).double() - expected).abs().max() < 4 * 2**-8 * expected.abs().max()


@pytest.mark.parametrize("output_projection", PROJECTIONS)
@torch.no_grad()
def test_without_routing_the_experts_share_equally_and_there_is_no_router(output_projection):
    setting = Setting(num_query_experts=4, num_kv_heads=2, top_k=2, routing="none", output_projection=output_projection)
    layer, tokens = setting.layer(), fixed_tokens()
    assert not any("router" in name for name in layer.state_dict())
    y, routing = layer(tokens.x, output_routing=True)
    assert torch.equal(routing.indices, torch.arange(2).expand(2, 9, 2, 2))
    assert routing.balance_loss == 0
    # A learned router that is indifferent gives every selected expert 1/(kG) as well.
    learned = Setting(**(vars(setting) | {"routing": "learned"})).layer()
    learned.load_state_dict(layer.state_dict() | {"router.weight": torch.zeros(4, HIDDEN_SIZE)})
    assert_close(y, learned(tokens.x))


@torch.no_grad()
def test_the_balance_loss_with_a_cache_counts_only_the_real_new_tokens():
    setting = Setting()
    tokens = fixed_tokens(attention_mask=torch.tensor(MASKS["padding between"]))
    layer, kv = setting.layer(), DynamicCache()
    for start, stop in pairwise([0, 4, 9]):
        _, routing = layer(**tokens.chunk(start, stop), past_key_values=kv, output_routing=True)
        new = Tokens(tokens.x[:, start:stop], tokens.attention_mask[:, start:stop])
        assert_close(routing.balance_loss, ask_oracle(setting, setting.params(), new).balance_loss)


@torch.no_grad()
def test_the_balance_loss_of_padding_alone_is_finite():
    tokens = fixed_tokens(attention_mask=torch.zeros(2, 9, dtype=torch.long))
    y, routing = Setting().layer()(tokens.x, **tokens.inputs, output_routing=True)
    assert routing.balance_loss.isfinite()
    assert y.isfinite().all()
