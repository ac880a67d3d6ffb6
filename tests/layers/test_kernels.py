"""The layer by Triton kernels against the plain path in float64, over its settings, in every way that it is called.

In the interpreter on a CPU, compiled on a GPU. In float32 both paths err from float64 by some hundred roundings of
6e-8; a number counts as right within 5e-6, or within three times the plain path's own error.
"""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import gpu
from query_experts import GQEAttention
from query_experts.bench.results import read_gpu
from query_experts.layers.router import Router
from query_experts.ops import kernels as choice
from query_experts.ops.rotate import rotary_cos_sin

pytest.importorskip("triton")
fused = pytest.importorskip("query_experts.layers.fused")
fused_operators = pytest.importorskip("query_experts.ops.fused")
pytestmark = pytest.mark.filterwarnings("ignore:the router gets no gradient")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts off bf16 in place of rounding
EPS = torch.finfo(NARROW).eps
D, B, T = 24, 2, 9
SIZES = {"paper": (4, 2, 1, 6), "two of three": (3, 3, 2, 8), "two of four": (3, 4, 2, 10), "all": (3, 3, 3, 10)}
LAYERS = {
    "gqe": ("paper", {}),
    "gqe, no rotation": ("paper", {"rope_theta": None}),
    "gqe, norms and biases": ("two of three", {"qk_norm": True, "bias": True}),
    "gqe, first": ("two of four", {"shared_head_kv": "first", "output_projection": "expert", "bias": True}),
    "gqe, frozen, eager": ("two of four", {"routing": "frozen", "attn_implementation": "eager"}),
    "static": ("all", {"routing": "none"}),
    "static, expert": ("all", {"routing": "none", "output_projection": "expert"}),
    "hard": ("paper", {"variant": "hard_concat", "qk_norm": True}),
    "hard, expert": ("two of three", {"variant": "hard_concat", "output_projection": "expert"}),
    "weighted": ("two of four", {"variant": "weighted_concat"}),
    "weighted, expert, frozen": (
        "two of four", {"variant": "weighted_concat", "output_projection": "expert", "routing": "frozen"}
    ),
    "dense": ("all", {"variant": "hard_concat", "routing": "none"}),
}  # fmt: skip


def build(name: str, **options) -> GQEAttention:
    size, settings = LAYERS[name]
    G, M, k, d = SIZES[size]
    settings = {"rope_theta": 1e4, **settings, **options}
    layer = GQEAttention(D, G * M, G, k, d, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.normal_(std=0.3, generator=generator)
    return layer.to(DEVICE)


def by_triton(layer: GQEAttention) -> GQEAttention:
    layer = copy.deepcopy(layer)
    layer.set_kernels("triton")
    return layer


def inputs(dtype=torch.float32):
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    mask = torch.ones(B, T, dtype=torch.long, device=DEVICE)
    mask[0, :3] = 0
    return x, mask


def run(layer, x, mask=None, forward=None, **options):
    """Output, routing, and gradients of x and of every parameter by name; None where there is none."""
    x = x.detach().clone().requires_grad_()
    y, routing = (layer if forward is None else forward)(x, attention_mask=mask, output_routing=True, **options)
    loss = (y * y.detach().sin()).sum() + 0.3 * routing.balance_loss
    named = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return y.detach(), routing, dict(zip(named, gradients, strict=True))


def error(actual, expected) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1)).item()


def rounding(actual, expected) -> float:
    """The error relative to all numbers together, which in a narrow dtype says more than the worst of a few hundred."""
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()


@pytest.fixture
def launches(monkeypatch):
    """Counts the calls of the fused path."""
    counted = []
    original = fused.fused_attention

    def counting(*args, **options):
        counted.append(1)
        return original(*args, **options)

    monkeypatch.setattr(fused, "fused_attention", counting)
    return counted


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_routing_and_gradients_are_those_of_the_plain_path(name, masked, launches):
    plain = build(name)
    exact = copy.deepcopy(plain).double()
    x, mask = inputs()
    mask = mask if masked else None
    y, routing, gradients = run(by_triton(plain), x, mask)
    assert launches, "the plain path ran"
    exact_y, exact_routing, exact_gradients = run(exact, x.double(), mask)
    plain_y, plain_routing, plain_gradients = run(plain, x, mask)
    assert torch.equal(routing.indices, exact_routing.indices)
    assert error(routing.probs, exact_routing.probs) < 5e-6
    assert routing.balance_loss.dtype == plain_routing.balance_loss.dtype
    assert error(y, exact_y) <= max(5e-6, 3 * error(plain_y, exact_y))
    for part, expected in exact_gradients.items():
        assert (gradients[part] is None) == (plain_gradients[part] is None), part
        if plain_gradients[part] is not None:
            bound = max(5e-6, 3 * error(plain_gradients[part], expected))
            assert error(gradients[part], expected) <= bound, part


@pytest.mark.parametrize("name", ["gqe", "gqe, norms and biases", "gqe, first"])
def test_in_a_narrow_dtype_it_errs_no_more_than_twice_as_much_as_the_plain_path(name):
    plain = build(name).to(NARROW)
    exact = copy.deepcopy(plain).double()
    x, _ = inputs(NARROW)
    exact_y, exact_routing, exact_gradients = run(exact, x.double())
    plain.forced_indices = exact_routing.indices  # where two logits are nearly equal, either choice is right
    plain_y, _, plain_gradients = run(plain, x)
    y, _, gradients = run(by_triton(plain), x)
    assert rounding(y, exact_y) <= 2 * rounding(plain_y, exact_y)
    for part, expected in exact_gradients.items():
        assert rounding(gradients[part], expected) <= 2 * max(rounding(plain_gradients[part], expected), EPS), part


@pytest.mark.parametrize("name", ["gqe", "gqe, norms and biases", "weighted, expert, frozen"])
def test_two_runs_give_the_same_bits_and_so_does_activation_checkpointing(name):
    layer = by_triton(build(name))
    x, mask = inputs()
    runs = [run(layer, x, mask), run(layer, x, mask)]
    for reentrant in (False, True):

        def forward(x, reentrant=reentrant, **options):
            return checkpoint(lambda x: layer(x, **options), x, use_reentrant=reentrant)

        if reentrant:  # which allows backward() alone, and tensors alone as outputs
            leaf = x.clone().requires_grad_()
            y = checkpoint(lambda t: layer(t, attention_mask=mask), leaf, use_reentrant=True)
            once = x.clone().requires_grad_()
            expected = layer(once, attention_mask=mask)
            for out in (y, expected):
                layer.zero_grad()
                out.backward(out.detach().sin())
            assert torch.equal(y, expected)
            assert torch.equal(leaf.grad, once.grad)
        else:
            runs.append(run(layer, x, mask, forward))
    for y, _, gradients in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert all(g is e or torch.equal(g, e) for g, e in zip(gradients.values(), runs[0][2].values(), strict=True))


@pytest.mark.parametrize("name", ["gqe", "gqe, first", "static", "hard"])
def test_a_compiled_layer_is_one_graph_and_gives_the_same(name):
    layer = by_triton(build(name))
    x, _ = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, _, gradients = run(layer, x, forward=compiled)
    expected_y, _, expected = run(layer, x)
    assert error(y, expected_y) < 1e-6
    for part, gradient in expected.items():
        assert gradient is None or error(gradients[part], gradient) < 5e-6, part


def cache_of(kind: str, name: str):
    if kind == "dynamic":
        return DynamicCache()
    G, _, _, d = SIZES[LAYERS[name][0]]
    config = LlamaConfig(hidden_size=G * d, num_attention_heads=G, num_key_value_heads=G, num_hidden_layers=1)
    return StaticCache(config, max_cache_len=T + 4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_chunks_and_single_tokens_over_a_cache_are_those_of_the_plain_path(name, kind):
    plain = build(name)
    x, mask = inputs()
    outputs, caches = [], []
    for layer in (plain, by_triton(plain)):
        cache, at, parts = cache_of(kind, name), 0, []
        for part in x.split([4, 1, 1, 2, 1], 1):
            at += part.shape[1]
            parts.append(layer(part, attention_mask=mask[:, :at], past_key_values=cache))
        outputs.append(torch.cat(parts, 1))
        caches.append(cache)
    real = mask.bool()
    assert error(outputs[1][real], outputs[0][real]) < 5e-6
    for part in ("keys", "values"):
        ours, theirs = (getattr(cache.layers[0], part)[:, :, :T] for cache in reversed(caches))
        assert error(ours, theirs) < 5e-6
    assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length()) == T


@torch.no_grad()
def test_single_tokens_over_a_static_cache_run_by_the_decoding_kernel_without_a_copy(monkeypatch):
    layer, (x, _) = by_triton(build("gqe")), inputs()
    cache = cache_of("static", "gqe")
    layer(x[:, :4], past_key_values=cache)
    keys = cache.layers[0].keys
    steps = []
    original = fused._decode
    monkeypatch.setattr(fused, "_decode", lambda *a: steps.append(1) or original(*a))
    monkeypatch.setattr(cache.layers[0], "update", lambda *a, **kw: pytest.fail("the cache copied"))
    for at in range(4, T):
        layer(x[:, at : at + 1], past_key_values=cache)
    assert len(steps) == T - 4
    assert cache.layers[0].keys is keys


@pytest.mark.parametrize("name", ["gqe", "gqe, norms and biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_training_layer_makes_its_logits_in_the_same_way_with_gradients_and_without(name, dtype, monkeypatch):
    """Checkpointing runs it without first. Two ways differ in the last bits, which may select another expert."""
    layer, (x, _) = by_triton(build(name).to(dtype)).train(), inputs(dtype)
    if layer.k_norm is not None:  # one that the kernels don't compute
        layer.k_norm = nn.RMSNorm(layer.head_dim, eps=1e-6).to(DEVICE, dtype)
    ways = []
    for owner, way in ((fused, "wide_product"), (fused_operators, "wide_product"), (Router, "forward")):
        original = getattr(owner, way)
        monkeypatch.setattr(owner, way, lambda *args, way=way, call=original: ways.append(way) or call(*args))
    with torch.no_grad():
        layer(x)
    layer(x)
    assert len(ways) == 2
    assert ways[0] == ways[1]


def test_modules_that_do_more_than_a_product_are_called_as_modules():
    plain = build("gqe")
    plain.q_proj.register_forward_hook(lambda module, args, out: 2 * out)
    seen = []
    plain.router.register_forward_hook(lambda module, args, out: seen.append(out))
    x, mask = inputs()
    expected_y, _, expected = run(plain, x, mask)
    y, _, gradients = run(by_triton(plain), x, mask)
    assert len(seen) == 2
    assert error(y, expected_y) < 5e-6
    for part, gradient in expected.items():
        assert error(gradients[part], gradient) < 2e-5, part


@pytest.mark.parametrize("trained", ["none", "q_proj", "router", "o_proj", "v_proj and x"])
def test_only_what_trains_gets_gradients(trained):
    plain = build("gqe").requires_grad_(False)
    for name in trained.split(" and "):
        if name not in ("none", "x"):
            getattr(plain, name).requires_grad_(True)
    x, _ = inputs()
    results = []
    for layer in (plain, by_triton(plain)):
        leaf = x.clone().requires_grad_("x" in trained.split(" and "))
        y = layer(leaf)
        assert y.requires_grad == (trained != "none")
        if y.requires_grad:
            y.backward(y.detach().sin())
        results.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert (expected is None) == (actual is None)
        assert expected is None or error(actual, expected) < 5e-6


@pytest.mark.parametrize("name", ["gqe", "gqe, norms and biases", "static"])
def test_under_autocast_weights_stay_float32_and_errors_are_the_plain_path_s(name):
    plain, (x, _) = build(name), inputs()
    exact_y, exact_routing, exact = run(copy.deepcopy(plain).double(), x.double())
    if plain.router is not None:
        plain.forced_indices = exact_routing.indices
    results = []
    for layer in (plain, by_triton(plain)):
        with torch.autocast(DEVICE, NARROW):
            results.append(run(layer, x))
    (plain_y, _, plain_gradients), (y, routing, gradients) = results
    assert routing.logits is None or routing.logits.dtype == torch.float32
    assert rounding(y, exact_y) <= 2 * rounding(plain_y, exact_y)
    for part, expected in exact.items():
        assert gradients[part].dtype == torch.float32
        assert rounding(gradients[part], expected) <= 2 * max(rounding(plain_gradients[part], expected), EPS), part


def test_a_router_of_another_dtype_than_the_input_keeps_its_own():
    plain, (x, _) = build("gqe").to(NARROW), inputs(NARROW)
    plain.router.float()
    expected = run(plain, x)[1].logits
    _, routing, gradients = run(by_triton(plain), x)
    assert routing.logits.dtype == torch.float32
    assert error(routing.logits, expected) < 1e-6
    assert gradients["router.weight"].dtype == torch.float32


def test_a_replay_selects_the_given_experts_of_any_integer_dtype():
    plain, (x, _) = build("gqe, first"), inputs()
    G, M, k, _ = SIZES["two of four"]
    plain.forced_indices = torch.randn(B, T, G, M).argsort(-1)[..., :k].int().to(DEVICE)
    expected_y, _, expected = run(plain, x)
    y, routing, gradients = run(by_triton(plain), x)
    assert torch.equal(routing.indices, plain.forced_indices.long())
    assert error(y, expected_y) < 5e-6
    assert error(gradients["router.weight"], expected["router.weight"]) < 5e-6


def test_many_tokens_in_all_take_two_calls_where_k_is_more_than_one(monkeypatch):
    plain, (x, mask) = build("gqe, norms and biases"), inputs()
    expected_y, _, expected = run(plain, x, mask)
    monkeypatch.setattr(fused, "ONE_CALL_TOKENS", 1)
    layer, calls = by_triton(plain), []
    layer.shared_head.register_forward_hook(lambda *_: calls.append(1))
    y, _, gradients = run(layer, x, mask)
    assert calls
    assert error(y, expected_y) < 5e-6
    for part, gradient in expected.items():
        assert error(gradients[part], gradient) < 5e-6, part


def test_no_rows_and_no_tokens_give_nothing():
    layer = by_triton(build("gqe"))
    for shape in ((0, T, D), (B, 0, D)):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape


# ---- the choice


def test_the_choice_is_no_part_of_weights_copies_keep_it_and_the_text_shows_it():
    layer = by_triton(build("gqe"))
    assert layer.state_dict().keys() == build("gqe").state_dict().keys()
    assert copy.deepcopy(layer).kernels == pickle.loads(pickle.dumps(layer)).kernels == "triton"
    assert "kernels=triton" in repr(layer)
    assert GQEAttention(32, 4, 2).kernels == "auto"
    assert "kernels=auto (torch)" in repr(GQEAttention(32, 4, 2))
    assert GQEAttention(32, 4, 2, kernels="torch").kernels == "torch"


def test_auto_is_the_plain_path_where_the_kernels_were_not_measured(launches):
    layer, (x, _) = build("gqe"), inputs()
    assert layer.kernels == "auto"
    layer(x)
    assert not launches


def test_auto_takes_the_kernels_on_no_gpu_without_a_committed_green_suite():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    for major, minor in choice.MEASURED:
        assert gpu.is_green(read_gpu(results / f"gpu-sm{major}{minor}.json"))


def test_an_unknown_name_and_the_old_switch_end_in_a_sentence():
    with pytest.raises(ValueError, match="kernels is 'cuda'; it must be one of auto, torch, triton"):
        GQEAttention(32, 4, 2, kernels="cuda")
    with pytest.raises(AttributeError, match="fused_decode is True; it has become kernels='triton'"):
        GQEAttention(32, 4, 2).fused_decode = True


def test_what_triton_cannot_run_is_refused_with_the_way_out(monkeypatch):
    layer, (x, _) = by_triton(build("gqe")), inputs()
    way_out = "kernels='torch' runs here"
    with pytest.raises(ValueError, match=f"kernels is 'triton', which takes head_dim up to 256, .*; {way_out}"):
        GQEAttention(32, 2, 1, head_dim=258, kernels="triton")
    with pytest.raises(ValueError, match=f"doesn't support the transforms of torch.func .*; {way_out}"):
        torch.func.vmap(layer)(x[:, None])
    with pytest.raises(ValueError, match=f"doesn't support the transforms of torch.func .*; {way_out}"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    with pytest.raises(ValueError, match=f"needs an NVIDIA GPU, where the device is meta; {way_out}"):
        layer.to("meta")(x.to("meta"))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs the package triton, which isn't installed; {way_out}"):
        GQEAttention(32, 4, 2, kernels="triton")


def test_an_old_triton_rocm_and_a_cpu_without_the_interpreter_are_refused(monkeypatch):
    import triton

    monkeypatch.setattr(choice, "interpreted", lambda: False)
    assert choice.no_triton_on(torch.device("cpu")) == "needs an NVIDIA GPU, where the device is cpu"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choice.no_triton_on(torch.device("cuda")) == "doesn't support ROCm"
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(ValueError, match=r"needs triton 3\.6 or newer, where 3\.5\.1 is installed; kernels='torch'"):
        GQEAttention(32, 4, 2, kernels="triton")


def test_a_kernel_that_does_not_compile_ends_in_a_sentence(monkeypatch):
    import triton

    from query_experts.ops import triton_operators

    class Broken:
        __name__ = "prepare"

        def __getitem__(self, programs):
            def fail(*args, **constants):
                raise triton.runtime.errors.PTXASError("first line\nptxas fatal: no such target")

            return fail

    monkeypatch.setattr(triton_operators, "interpreted", lambda: False)
    monkeypatch.setattr(triton_operators.triton_prepare, "prepare", Broken())
    sentence = r"whose kernel prepare doesn't compile here \(.*no such target\); kernels='torch' runs here"
    with pytest.raises(RuntimeError, match=sentence):
        by_triton(build("gqe"))(inputs()[0])


def test_an_exported_layer_takes_the_plain_path_and_triton_is_refused():
    layer, (x, _) = build("gqe").eval(), inputs()
    exported = torch.export.export(layer, (x,))
    assert not [node for node in exported.graph.nodes if "query_experts" in str(node.target)]
    with pytest.raises(Exception, match="kernels is 'triton', which can't be exported; kernels='torch' runs here"):
        torch.export.export(by_triton(layer), (x,))


def test_a_second_derivative_is_refused():
    layer, (x, _) = by_triton(build("gqe")), inputs()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="gives no second derivative; kernels='torch' does where attention does"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    plain = build("gqe", attn_implementation="eager")  # the way out
    (first,) = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()


def test_forward_mode_differentiation_is_refused():
    layer, (x, _) = by_triton(build("gqe", attn_implementation="eager")), inputs()
    way_out = "kernels is 'triton', which doesn't support forward-mode differentiation; kernels='torch' runs here"
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(ValueError, match=way_out):
            layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        layer.set_kernels("torch")
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_a_subclass_of_the_router_or_of_a_linear_map_with_its_own_forward_is_called():
    class Louder(Router):
        def forward(self, x):
            return 2 * super().forward(x)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, (x, _) = build("gqe"), inputs()
    plain.router.__class__, plain.k_proj.__class__ = Louder, Doubled
    assert error(by_triton(plain)(x), plain(x)) < 5e-6


@torch.no_grad()
def test_a_compiled_model_decodes_over_a_static_cache_without_compiling_anew():
    from model_helpers import random_tokens, tiny_model

    model = tiny_model(num_hidden_layers=1).float().to(DEVICE).eval()
    tokens = random_tokens(2, 12).to(DEVICE)
    results = []
    for kernels in ("torch", "triton"):
        model.set_kernels(kernels)
        torch._dynamo.reset()
        cache = StaticCache(model.config, max_cache_len=16)
        model(tokens[:, :6], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if kernels == "triton" else model
        logits = []
        for at in range(6, 12):
            with torch.compiler.set_stance("fail_on_recompile" if at > 7 else "default"):
                positions = torch.full((1, 1), at, device=DEVICE)
                out = step(tokens[:, at : at + 1], past_key_values=cache, position_ids=positions)
            logits.append(out.logits)
        results.append(torch.cat(logits, 1))
    assert error(results[1], results[0]) < 2e-5


def test_generate_gives_the_plain_path_s_tokens():
    from model_helpers import random_tokens, tiny_model

    model = tiny_model(active_query_experts=2, output_projection="expert").to(DEVICE).eval()
    tokens = random_tokens(2, 7).to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for cache in (None, "static"):
        texts = []
        for kernels in ("torch", "triton"):
            model.set_kernels(kernels)
            options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            texts.append(model.generate(tokens, cache_implementation=cache, disable_compile=True, **options))
        assert torch.equal(*texts)
    assert "kernels" not in model.config.to_dict()


@torch.no_grad()
def test_small_projections_are_joined_anew_in_every_call_and_large_ones_are_not(monkeypatch):
    for name in ("gqe", "gqe, norms and biases", "static", "dense"):
        plain, (x, mask) = build(name).eval(), inputs()
        layer = by_triton(plain)
        joined = layer(x, attention_mask=mask)
        assert error(joined, plain(x, attention_mask=mask)) < 5e-6
        monkeypatch.setattr(fused, "JOINED_BYTES", 0)
        assert error(layer(x, attention_mask=mask), joined) < 5e-6
        monkeypatch.undo()
        for module in (layer, plain):
            module.k_proj.weight.data.mul_(2)  # a write that no version counter notices
        assert error(layer(x, attention_mask=mask), plain(x, attention_mask=mask)) < 5e-6


@torch.no_grad()
def test_an_empty_growing_cache_takes_the_keys_over_without_a_copy_and_works_on():
    plain, (x, _) = build("gqe").eval(), inputs()
    layer = by_triton(plain)
    for cache, other in (
        (DynamicCache(), DynamicCache()),
        (DynamicCache(config=LlamaConfig(num_hidden_layers=1)),) * 2,
    ):
        other = copy.deepcopy(other)
        layer(x, past_key_values=cache)
        plain(x, past_key_values=other)
        assert cache.layers[0].keys._base is not None  # a part of what attention read
        for c in (cache, other):
            c.reorder_cache(torch.tensor([1, 0], device=DEVICE))
            c.crop(-5)
        assert cache.get_seq_length() == other.get_seq_length()
        steps = [module(x[:, 4:6], past_key_values=c) for c, module in ((cache, layer), (other, plain))]
        assert error(*steps) < 5e-6


# ---- what a plain call of every module would do


def test_norms_that_do_more_than_rmsnorm_are_called_as_modules():
    class Shifted(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    def shift(layer):
        layer.k_norm.__class__ = Shifted

    def hook(layer):
        layer.q_norm.register_forward_hook(lambda module, args, out: 2 * out)

    def own_eps(layer):
        layer.k_norm.variance_epsilon = 0.5

    def other_class(layer):
        layer.q_norm = nn.RMSNorm(layer.head_dim, eps=1e-6).to(DEVICE)

    x, _ = inputs()
    for change in (shift, hook, own_eps, other_class):
        plain = build("gqe, norms and biases")
        change(plain)
        expected_y, _, expected = run(plain, x)
        y, _, gradients = run(by_triton(plain), x)
        assert error(y, expected_y) < 5e-6, change
        for part, gradient in expected.items():
            assert error(gradients[part], gradient) < 2e-5, (change, part)


def test_a_norm_without_eps_gives_finite_gradients_for_groups_that_fill_no_tile():
    x, _ = inputs()
    _, _, gradients = run(by_triton(build("gqe, norms and biases", norm_eps=0.0)), x)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_given_experts_of_another_shape_are_refused_and_others_are_never_read():
    layer, (x, _) = by_triton(build("gqe, first")), inputs()
    layer.forced_indices = torch.zeros(B, T, 3, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"forced_indices has shape \[2, 9, 3, 1\]; it must have \[2, 9, 3, 2\]"):
        layer(x)
    layer.forced_indices = torch.tensor([99, -1], device=DEVICE).expand(B, T, 3, 2)
    assert layer(x).isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would have to be waited for")
@torch.no_grad()
def test_a_full_static_cache_is_an_error():
    layer, (x, _) = by_triton(build("gqe")), inputs()
    cache = cache_of("static", "gqe")
    layer(x, past_key_values=cache)
    with pytest.raises(IndexError):
        layer(x[:, :5], past_key_values=cache)


def test_cached_keys_that_need_gradients_get_them():
    plain, (x, _) = build("gqe").requires_grad_(False), inputs()
    results = []
    for layer in (plain, by_triton(plain)):
        cache = DynamicCache()
        layer(x[:, :8], past_key_values=cache)
        part = cache.layers[0]
        prefix = part.keys.detach().clone().requires_grad_()
        part.keys = prefix
        layer(x[:, 8:], past_key_values=cache).sum().backward()
        results.append(prefix.grad)
    assert error(results[1], results[0]) < 5e-6


def test_angles_that_need_gradients_and_own_steps_of_a_subclass_are_refused():
    class Mine(GQEAttention):
        def combine(self, routed, shared, routing):
            return 0 * super().combine(routed, shared, routing)

    layer, (x, _) = by_triton(build("gqe")), inputs()
    angles = tuple(torch.ones(1, T, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="gives no gradients of cos and sin; kernels='torch' runs here"):
        layer.route_and_attend(x, None, angles, None)
    with pytest.raises(ValueError, match="runs no subclass's own combine; kernels='torch' runs here"):
        Mine(32, 4, 2, kernels="triton")


@torch.no_grad()
def test_another_attention_backend_is_called_for_single_tokens_too(monkeypatch):
    def sevens(module, query, key, value, mask, **_):
        return torch.full_like(query, 7.0).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sevens", sevens)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sevens", sdpa_mask)
    x, _ = inputs()
    for name in ("hard", "gqe, first"):
        plain = build(name, attn_implementation="sevens")
        results = []
        for layer in (plain, by_triton(plain)):
            cache = DynamicCache()
            layer(x[:, :8], past_key_values=cache)
            results.append(layer(x[:, 8:], past_key_values=cache))
        assert error(*results) < 5e-6


@torch.no_grad()
def test_caches_of_other_classes_store_what_they_are_given():
    class Halving(DynamicCache):
        def update(self, key, value, *args, **kwargs):
            return super().update(key / 2, value, *args, **kwargs)

    plain, (x, _) = build("gqe"), inputs()
    caches = [Halving(), Halving()]
    outputs = [layer(x, past_key_values=c) for layer, c in zip((plain, by_triton(plain)), caches, strict=True)]
    assert error(*outputs) < 5e-6
    assert error(*(cache.layers[0].keys for cache in caches)) < 5e-6


def test_small_gradients_of_logits_survive_float16():
    plain, (x, _) = build("gqe").half(), inputs(torch.float16)
    results = []
    for layer in (plain, by_triton(plain)):
        layer.zero_grad()
        _, routing = layer(x, output_routing=True)
        (1e-7 * routing.logits.sum()).backward()
        results.append(layer.router.weight.grad)
    assert results[0].abs().max() > 0
    assert error(*results) < 1e-3


def test_bf16_trains_by_one_function_for_projections_and_router():
    plain, (x, _) = build("gqe").bfloat16(), inputs(torch.bfloat16)
    _, exact_routing, exact = run(copy.deepcopy(plain).double(), x.double())
    plain.forced_indices = exact_routing.indices
    _, _, plain_gradients = run(plain, x)
    _, _, gradients = run(by_triton(plain), x)
    for part, expected in exact.items():  # the interpreter cuts bf16 off, which is twice as coarse and biased
        assert rounding(gradients[part], expected) <= 6 * max(rounding(plain_gradients[part], expected), 2**-8), part


def test_a_mask_of_each_head_fits_the_heads_of_eager_attention():
    plain, (x, _) = build("gqe, frozen, eager"), inputs()
    angles = rotary_cos_sin(torch.arange(T, device=DEVICE)[None], 10, 1e4, torch.float32)
    mask = torch.zeros(B, 7, T, T, device=DEVICE).masked_fill(torch.ones(T, T, device=DEVICE).triu(1).bool(), -1e9)
    mask[:, 2] *= 0.5
    outputs = [layer.route_and_attend(x, mask, angles, None)[0] for layer in (plain, by_triton(plain))]
    assert error(*outputs) < 5e-6


def test_a_bf16_router_s_gradient_is_that_of_float32_logits_rounded_once():
    layer, (x, _) = by_triton(build("gqe").bfloat16()), inputs(torch.bfloat16)
    cotangent = torch.randn(B, T, 4, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    _, routing = layer(x, output_routing=True)
    (routing.logits * cotangent).sum().backward()
    exact = cotangent.double().view(B * T, 8).mT @ x.double().view(B * T, D)
    assert rounding(layer.router.weight.grad, exact) <= 1.01 * rounding(exact.bfloat16(), exact)


def test_keys_with_gradients_are_copied_into_the_cache_which_may_then_change():
    layer, (x, _) = by_triton(build("gqe")), inputs()
    leaf, cache = x.clone().requires_grad_(), DynamicCache()
    y = layer(leaf, past_key_values=cache)
    with torch.no_grad():
        cache.layers[0].keys.zero_()
    (y * y.detach().sin()).sum().backward()
    plain = build("gqe")
    (gradient,) = torch.autograd.grad((plain(x.requires_grad_()) * y.detach().sin()).sum(), x)
    assert error(leaf.grad, gradient) < 5e-6


def test_global_hooks_see_the_projections_of_both_paths():
    plain, (x, _) = build("gqe"), inputs()
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(type(module)))
    try:
        counts = []
        for layer in (plain, by_triton(plain)):
            called.clear()
            layer(x)
            counts.append([called.count(nn.Linear), called.count(Router)])
    finally:
        handle.remove()
    assert counts == [[5, 1], [5, 1]]
