"""The kernels that decode one token, in Triton's interpreter on a CPU, against the plain path in float64."""

import pytest
import torch

from query_experts.layers.attention import GQEAttention, Routing
from query_experts.ops.shared_decode import shared_decode

pytest.importorskip("triton")
module = pytest.importorskip("query_experts.ops.triton_decode")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = 0.3
RELATIVE = {torch.float64: 1e-12, torch.float32: 5e-6}  # softmax and sums of some hundred products, in another order


def draw(B=2, G=3, M=3, k=2, S=37, d=20, dtype=torch.float64, variant="gqe", seed=0):
    """query [B, H, d], key and value [B, G, S, d], logits [B, G, M], indices [B, G, k]."""
    generator = torch.Generator().manual_seed(seed)
    normal = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((B, G * k + (variant == "gqe"), d), (B, G, S, d), (B, G, S, d), (B, G, M))
    ]
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (t.to(DEVICE, dtype) for t in normal[:3])
    logits = normal[3].to(DEVICE, wide)
    return query, key, value, logits, logits.topk(k, -1).indices


def draw_mask(rows, S, seed=1):
    mask = torch.rand(rows, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    return mask.to(DEVICE)


def plain(query, key, value, mask, logits, indices, variant="gqe", output_projection="slot", shared_head_kv="mean"):
    """The slots as the plain path makes them, in the dtype of the inputs."""
    B, H, d = query.shape
    G = key.shape[1]
    k = (H - (variant == "gqe")) // G
    visible = mask[:, None, None] if mask is not None else None
    routed = query[:, : G * k].view(B, G, k, 1, d)
    shared = query[:, -1:] if variant == "gqe" else torch.zeros_like(query[:, :1])
    out, shared_out, _ = shared_decode(routed, shared, key, value, visible, SCALING)
    if shared_head_kv == "first":
        shared_out = shared_decode(routed[:, :1], shared, key[:, :1], value[:, :1], visible, SCALING)[1]
    if logits is None:
        logits = torch.zeros(B, G, k, dtype=torch.promote_types(query.dtype, torch.float32), device=DEVICE)
        indices = torch.arange(k, device=DEVICE).expand(B, G, k)
    layer = GQEAttention(
        G * logits.shape[2] * d, G * logits.shape[2], G, k, d, variant=variant, output_projection=output_projection,
        routing="learned", device="meta",
    )  # fmt: skip
    routing = Routing(logits[:, None], indices[:, None], logits.shape[-1], logits.dtype)
    return layer.combine(out.permute(0, 3, 1, 2, 4), shared_out if variant == "gqe" else None, routing)[:, 0]


def assert_as_plain(query, key, value, mask, logits, indices, *options):
    actual = module.triton_decode(query, key, value, mask, logits, indices, SCALING, *options)
    wide = [t.double() if t is not None else None for t in (query, key, value, logits)]
    expected = plain(*wide[:3], mask, wide[3], indices, *options)
    assert actual.shape == expected.shape
    assert actual.dtype == value.dtype
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= RELATIVE[value.dtype], error


OPTIONS = [
    ("gqe", "slot", "mean"),
    ("gqe", "slot", "first"),
    ("gqe", "expert", "mean"),
    ("weighted_concat", "slot", "mean"),
    ("weighted_concat", "expert", "mean"),
    ("hard_concat", "slot", "mean"),
    ("hard_concat", "expert", "mean"),
]
pytestmark = pytest.mark.filterwarnings("ignore:the router gets no gradient")


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_it_equals_the_plain_path_in_every_variant(options):
    query, key, value, logits, indices = draw(variant=options[0])
    assert_as_plain(query, key, value, draw_mask(2, 37), logits, indices, *options)
    query, key, value, *_ = draw(variant=options[0], M=2)
    assert_as_plain(query, key, value, None, None, None, *options)


def test_it_equals_the_plain_path_over_random_shapes():
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the shapes")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=15, deadline=None)
    @hypothesis.given(
        B=st.integers(1, 3), G=st.integers(1, 5), M=st.integers(1, 4), S=st.integers(1, 70), d=st.integers(1, 40),
        rank=st.integers(1, 4), rows=st.sampled_from([None, 1, "B"]), options=st.sampled_from(OPTIONS),
        dtype=st.sampled_from(list(RELATIVE)),
    )  # fmt: skip
    def check(B, G, M, S, d, rank, rows, options, dtype):
        query, key, value, logits, indices = draw(B, G, M, min(rank, M), S, d, dtype, options[0])
        mask = None if rows is None else draw_mask(B if rows == "B" else 1, S)
        assert_as_plain(query, key, value, mask, logits, indices, *options)

    check()


def test_experts_whose_probabilities_all_underflow_have_the_weights_of_their_logarithms():
    """As replayed ones may: exp(-200) is 0 in float32."""
    query, key, value, logits, indices = draw(dtype=torch.float32)
    low = logits.scatter(-1, indices, logits.gather(-1, indices) - 200)
    assert_as_plain(query, key, value, None, low, indices)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_any_number_of_pieces_gives_the_same(monkeypatch, programs):
    monkeypatch.setattr(module, "PROGRAMS_OF_ALL_GROUPS", programs)
    query, key, value, logits, indices = draw(1, 8, 2, 1, 91, 64, torch.float32)
    assert_as_plain(query, key, value, draw_mask(1, 91), logits, indices)


@pytest.mark.parametrize(("most", "ranks"), [(1, 1), (60, 2), (100, 4)])
def test_few_registers_change_nothing_but_the_programs(monkeypatch, most, ranks):
    monkeypatch.setattr(module, "MOST_REGISTERS", most)
    query, key, value, logits, indices = draw(1, 2, 4, 4, 20, 40)
    assert_as_plain(query, key, value, draw_mask(1, 20), logits, indices)
    assert module.ranks_and_tile(2, 4, True, 40)[0] == ranks


def test_many_heads_get_fewer_numbers_of_each_and_then_more_programs():
    assert module.ranks_and_tile(1, 1, False, 64) == (1, 16)
    assert module.ranks_and_tile(8, 1, True, 64) == (1, 8)  # 4 numbers
    assert module.ranks_and_tile(4, 4, True, 128) == (2, 4)
    assert module.ranks_and_tile(8, 3, True, 128) == (1, 4)
    assert module.ranks_and_tile(16, 1, True, 128) == (1, 2)  # 2 numbers: a key spread over two warps


def test_bf16_errs_at_most_twice_as_much_as_the_plain_path():
    query, key, value, logits, indices = draw(1, 4, 3, 2, 150, 32, torch.bfloat16)
    mask = draw_mask(1, 150)
    exact = plain(query.double(), key.double(), value.double(), mask, logits.double(), indices)
    actual = module.triton_decode(query, key, value, mask, logits, indices, SCALING)
    reference = plain(query, key, value, mask, logits, indices)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).norm() <= 2 * (reference - exact).norm()
    assert (actual - exact).abs().max() <= 2 * (reference - exact).abs().max()


def test_a_sequence_whose_mask_hides_every_key_gives_zeros_and_hidden_keys_are_not_read():
    query, key, value, logits, indices = draw()
    mask = draw_mask(2, 37)
    expected = module.triton_decode(query, key, value, mask, logits, indices, SCALING)
    hidden = ~mask[:, None, :, None]
    poisoned = [t.masked_fill(hidden, float("nan")) for t in (key, value)]
    assert torch.equal(module.triton_decode(query, *poisoned, mask, logits, indices, SCALING), expected)
    mask[1] = False
    actual = module.triton_decode(query, key, value, mask, logits, indices, SCALING)
    assert not actual[1].any()
    assert torch.equal(actual[0], expected[0])


def test_every_number_is_written_and_two_runs_are_equal_to_the_bit(monkeypatch):
    original = torch.Tensor.new_empty

    def poisoned(*args, **options):
        new = original(*args, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for options in OPTIONS:
        query, key, value, logits, indices = draw(M=5, dtype=torch.float32, variant=options[0])
        runs = [module.triton_decode(query, key, value, None, logits, indices, SCALING, *options) for _ in range(2)]
        assert runs[0].isfinite().all()
        assert torch.equal(*runs)


def test_everything_is_read_in_any_memory_layout():
    query, key, value, logits, indices = draw()
    by_token = value.transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.cat([key, key], 2)
    row = torch.cat([query, query], 1)[:, : query.shape[1]]
    mask = draw_mask(2, 60)
    assert_as_plain(row, longer[:, :, 3:40], by_token, mask[:, :37], logits, indices)
    assert_as_plain(query, key.mT.contiguous().mT, value, None, logits.mT.contiguous().mT, indices)
    assert_as_plain(query, key[:1].expand(2, -1, -1, -1), value, mask[:1, :37].expand(2, -1), logits, indices)


def test_rows_beyond_two_to_the_31_numbers_are_read():
    query, key, value, logits, indices = draw(1, 2, 2, 1, 3, 16, torch.float32)
    far = torch.empty(2**31 + 4096, device=DEVICE)  # a CPU gives memory when it is written to
    for strides in ((0, 2**31, 64, 1), (0, 64, 2**30, 1)):  # far groups, far tokens
        apart = far.as_strided(key.shape, strides)
        apart.copy_(key)
        assert_as_plain(query, apart, value, None, logits, indices)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, of the interpreter
def test_nan_logits_and_indices_out_of_bounds_stay_within_the_output():
    query, key, value, logits, indices = draw(dtype=torch.float32)
    logits[0], indices[0] = float("nan"), torch.tensor([7, -9], device=DEVICE)
    alone = [t[1:] for t in (query, key, value)]
    for projection in ("slot", "expert"):
        actual = module.triton_decode(query, key, value, None, logits, indices, SCALING, "gqe", projection)
        clean = module.triton_decode(*alone, None, logits[1:], indices[1:], SCALING, "gqe", projection)
        torch.testing.assert_close(actual[1:], clean, rtol=1e-5, atol=1e-6)
        assert actual[0].isnan().any()


def test_a_mask_of_another_length_is_refused():
    query, key, value, logits, indices = draw()
    with pytest.raises(ValueError, match="mask has 50 columns; it must have one for each of the 37 keys"):
        module.triton_decode(query, key, value, draw_mask(2, 50), logits, indices, SCALING)


def test_no_sequence_gives_no_row():
    query, key, value, logits, indices = (t[:0] for t in draw())
    assert module.triton_decode(query, key, value, None, logits, indices, SCALING).shape == (0, 8 * 20)


def test_the_operator_follows_torch_s_rules_for_operators():
    query, key, value, logits, indices = draw(S=9, d=8, dtype=torch.float32)
    for mask, options in ((None, OPTIONS[0]), (draw_mask(2, 9), OPTIONS[2])):
        torch.library.opcheck(
            torch.ops.query_experts.decode.default,
            (query, key, value, mask, logits, indices, SCALING, *options),
        )


def test_compiled_code_calls_it_without_a_break():
    query, key, value, logits, indices = draw(S=9, d=8, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, key, value, logits, indices):
        return module.triton_decode(query * 2, key, value, None, logits, indices, SCALING) + 1

    expected = module.triton_decode(query * 2, key, value, None, logits, indices, SCALING) + 1
    assert torch.equal(step(query, key, value, logits, indices), expected)
