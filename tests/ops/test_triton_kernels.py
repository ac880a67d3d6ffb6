"""The Triton kernels `prepare` and `combine` against float64 autograd: in Triton's interpreter, or compiled on a GPU.

Tolerances: a float64 accumulator gives 1e-12, some thousand roundings of 1e-16. In float32 a number is a sum of at most
a few hundred products of order 1, each rounded by 6e-8: 5e-6. In a narrow dtype the kernels compute in float32 and
round once, where the plain path rounds at every step, so their error is at most twice the plain path's.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from query_experts.layers.router import select_top_k
from query_experts.ops.combine import weighted_slot
from query_experts.ops.rotate import rotary_cos_sin, rotate
from query_experts.ops.select import scatter_experts, select_experts

triton = pytest.importorskip("triton")
triton_operators = pytest.importorskip("query_experts.ops.triton_operators")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the shapes")
st = hypothesis.strategies

OPERATORS = torch.ops.query_experts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts off bf16 in place of rounding
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    B: int = 2
    T: int = 5
    G: int = 3
    M: int = 3
    k: int = 2
    d: int = 8
    r: int = 8
    shared: bool = True
    copies: int = 1
    mean: bool = True
    norm: bool = False
    by_expert: bool = False
    variant: str = "gqe"
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.B * self.T


@st.composite
def cases(draw):
    M = draw(st.integers(1, 5))
    d = draw(st.sampled_from([1, 2, 6, 7, 16, 20]))
    k = draw(st.integers(1, M))
    return Case(
        B=draw(st.integers(1, 3)), T=draw(st.integers(1, 19)), G=draw(st.integers(1, 5)), M=M, k=k, d=d,
        r=draw(st.sampled_from([0, *range(2, d + 1, 4), d - d % 2])), shared=draw(st.booleans()),
        copies=draw(st.sampled_from([1, k])), mean=draw(st.booleans()), norm=draw(st.booleans()),
        by_expert=draw(st.booleans()), variant=draw(st.sampled_from(["gqe", "weighted_concat", "hard_concat"])),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


SWEEP = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)


def normalised(rows: Tensor, weight: Tensor) -> Tensor:
    return rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


class Prepared:
    """A case's inputs in float64, and what plain operations make of them."""

    def __init__(self, case: Case):
        self.case = case
        B, T, G, M, k, d = case.B, case.T, case.G, case.M, case.k, case.d
        generator = torch.Generator().manual_seed(case.seed)
        widths = [G * M * d, G * d, G * d, d if case.shared else 0]
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)  # noqa: E731
        self.inputs = [draw(case.rows, width).requires_grad_() for width in widths]
        self.logits = draw(case.rows, G * M).float().double()
        self.norms = [draw(d).requires_grad_() if case.norm else None for _ in range(2)]
        self.angles = (None, None)
        if case.r:
            self.angles = rotary_cos_sin(torch.arange(T, device=DEVICE)[None] + 3, case.r, 1e4, torch.float64)
        self.indices = select_top_k(self.logits.view(B, T, G, M), k)
        query, key, value, shared = self.inputs
        heads = select_experts(query.view(B, T, G, M, d), self.indices).flatten(2, 3)
        if case.shared:
            heads = torch.cat([heads, shared.view(B, T, 1, d)], 2)
        keys, values = key.view(B, T, G, d), value.view(B, T, G, d)
        if case.norm:
            heads, keys = normalised(heads, self.norms[0]), normalised(keys, self.norms[1])
        heads, keys = (rotate(t, self.angles if case.r else None) for t in (heads, keys))
        if case.shared:
            heads = torch.cat([heads, heads[:, :, -1:].expand(-1, -1, case.copies - 1, -1)], 2)
            keys, values = (torch.cat([t, self.of_all_groups(t)], 2) for t in (keys, values))
        self.outputs = [heads, keys, values]
        self.cotangents = [draw(*t.shape) for t in self.outputs]
        self.logits_cotangent = draw(case.rows, G * M)

    def of_all_groups(self, heads: Tensor) -> Tensor:
        return heads.mean(2, keepdim=True) if self.case.mean else heads[:, :, :1]

    @property
    def layout(self) -> tuple[int, ...]:
        case = self.case
        return case.G, case.M, case.k, case.copies if case.shared else 0, case.d

    def given(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The operator's tensors: query, key, value, shared, logits, given, cos, sin, norms."""
        logits = self.logits.to(torch.promote_types(dtype, torch.float32))
        tensors = [
            *self.inputs[:3],
            self.inputs[3] if self.case.shared else None,
            None,
            None,
            *self.angles,
            *self.norms,
        ]
        tensors = [None if t is None else t.detach().to(dtype) for t in tensors]
        tensors[4] = logits
        return tensors

    def forward(self, dtype: torch.dtype) -> list[Tensor]:
        return OPERATORS.prepare(
            *self.given(dtype), EPS, self.case.B, *self.layout, self.case.shared, self.case.mean
        )  # fmt: skip

    def backward(self, dtype: torch.dtype, logit_parts: int = 1) -> tuple[list[Tensor], Tensor]:
        """Gradients of query, key, value, shared and logits; partial sums of those of the norms' weights."""
        query, key, _, shared, _, _, cos, sin, *norms = self.given(dtype)
        normed = (query, key, shared) if self.case.norm else (None, None, None)
        logits = self.logits_cotangent.to(torch.promote_types(dtype, torch.float32))
        packed, partial = OPERATORS.prepare_back(
            *(c.to(dtype) for c in self.cotangents), logits, cos, sin, self.indices.flatten(0, 1), *normed, *norms, EPS,
            *self.layout, self.case.shared, self.case.mean, logit_parts,
        )  # fmt: skip
        widths = [t.shape[1] for t in self.inputs] + [self.logits.shape[1]] * logit_parts
        assert packed.stride(0) % 8 == 0, "rows of bf16 must begin at 16 bytes"
        return list(packed.split(widths, 1)), partial


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error relative to 1 + the expected number."""
    pairs = zip(actual, expected, strict=True)
    errors = [((a.double() - e).abs() / (1 + e.abs())).max().item() for a, e in pairs if e.numel()]
    assert all(a.isfinite().all() for a in actual)
    return max(errors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_prepare_equals_plain_operations_over_random_shapes(dtype):
    @SWEEP
    @hypothesis.given(case=cases())
    def check(case):
        prepared = Prepared(case)
        *outputs, chosen = prepared.forward(dtype)
        assert torch.equal(chosen.view_as(prepared.indices), prepared.indices)
        assert worst(outputs, prepared.outputs) <= TOLERANCE[dtype]

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradients_of_prepare_are_autograd_s(dtype):
    @SWEEP
    @hypothesis.given(case=cases())
    def check(case):
        prepared = Prepared(case)
        leaves = [*prepared.inputs, *(w for w in prepared.norms if w is not None)]
        expected = torch.autograd.grad(prepared.outputs, leaves, prepared.cotangents, allow_unused=True)
        gradients, partial = prepared.backward(dtype)
        assert torch.equal(gradients.pop().double(), prepared.logits_cotangent.to(dtype).double())
        norms = list(partial.sum(0)) if case.norm else []
        expected = [torch.zeros_like(leaf) if e is None else e for e, leaf in zip(expected, leaves, strict=True)]
        assert worst([*gradients, *norms], expected) <= TOLERANCE[dtype] * (10 if case.norm else 1)

    check()


def slots(heads: Tensor, shared: Tensor | None, logits: Tensor, indices: Tensor, case: Case) -> Tensor:
    """The slots by plain operations; heads [R, H, d]."""
    routed = heads[:, : case.G * case.k].view(case.B, case.T, case.G, case.k, case.d)
    log_scores = logits.view(case.B, case.T, case.G, case.M).log_softmax(-1).gather(-1, indices)
    extra = []
    if case.variant == "gqe":
        extra = [weighted_slot(routed, log_scores), shared.view(case.B, case.T, case.d)]
    elif case.variant == "weighted_concat":
        routed = routed * log_scores.exp()[..., None]
    if case.by_expert:
        routed = scatter_experts(routed, indices, case.M)
    return torch.cat([routed.flatten(2), *extra], -1).flatten(0, 1)


@pytest.mark.parametrize("apart", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_combine_and_its_gradients_are_those_of_plain_operations(dtype, apart):
    @SWEEP
    @hypothesis.given(case=cases())
    def check(case):
        generator = torch.Generator().manual_seed(case.seed)
        weighed, gqe = case.variant != "hard_concat", case.variant == "gqe"
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)  # noqa: E731
        routed, copies = case.G * case.k, case.copies if gqe and not apart else 0
        heads = draw(case.rows, routed + copies, case.d).requires_grad_()
        shared = draw(case.rows, case.d).requires_grad_() if gqe and apart else None
        logits = draw(case.rows, case.G * case.M).requires_grad_()
        indices = select_top_k(logits.detach().view(case.B, case.T, case.G, case.M), case.k)
        behind = shared if apart or not gqe else heads[:, routed]
        expected = slots(heads, behind, logits, indices, case)
        cotangent = draw(*expected.shape)
        leaves = [heads, *([shared] if shared is not None else []), *([logits] if weighed else [])]
        gradients = torch.autograd.grad(expected, leaves, cotangent)

        layout = (case.G, case.M, case.k, case.d, case.by_expert, gqe, case.variant == "weighted_concat")
        narrow = lambda t: None if t is None else t.detach().to(dtype)  # noqa: E731
        given = (narrow(heads), narrow(shared), narrow(logits) if weighed else None, indices.flatten(0, 1))
        assert worst([OPERATORS.combine(*given, *layout)], [expected]) <= TOLERANCE[dtype]
        of_heads, of_shared, of_logits = OPERATORS.combine_back(
            cotangent.to(dtype), given[0], given[2], given[3], shared is not None, *layout
        )
        actual = [of_heads, *([of_shared] if shared is not None else []), *([of_logits] if weighed else [])]
        assert worst(actual, list(gradients)) <= TOLERANCE[dtype]

    check()


def test_narrow_outputs_and_gradients_err_no_more_than_twice_as_much_as_the_plain_path():
    case = Case(B=1, T=33, G=4, M=2, k=1, d=16, r=16)
    prepared, plain = Prepared(case), Prepared(case)
    narrow = [t.detach().to(NARROW).requires_grad_() for t in prepared.inputs]
    plain.inputs, prepared.inputs = narrow, [t.detach().double().requires_grad_() for t in narrow]

    def outputs(inputs, angles):
        query, key, value, shared = inputs
        heads = select_experts(query.view(1, 33, 4, 2, 16), prepared.indices).flatten(2, 3)
        heads = rotate(torch.cat([heads, shared.view(1, 33, 1, 16)], 2), angles)
        keys, values = rotate(key.view(1, 33, 4, 16), angles), value.view(1, 33, 4, 16)
        keys, values = (torch.cat([t, t.mean(2, keepdim=True)], 2) for t in (keys, values))
        return [heads, keys, values]

    angles = tuple(t.to(NARROW) for t in prepared.angles)
    cotangents = [c.to(NARROW) for c in prepared.cotangents]
    prepared.angles, prepared.cotangents = tuple(t.double() for t in angles), [c.double() for c in cotangents]
    exact = outputs(prepared.inputs, prepared.angles)
    exact_gradients = torch.autograd.grad(exact, prepared.inputs, prepared.cotangents)
    rounded = outputs(narrow, angles)
    rounded_gradients = torch.autograd.grad(rounded, narrow, cotangents)
    error = lambda actual, expected: max(  # noqa: E731
        (a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True)
    )
    assert error(prepared.forward(NARROW)[:3], exact) <= 2 * error(rounded, exact)
    gradients, _ = prepared.backward(NARROW, logit_parts=2)
    assert error(gradients[:4], exact_gradients) <= 2 * error(rounded_gradients, exact_gradients)
    parts = gradients[4].double() + gradients[5].double()
    assert (parts - prepared.logits_cotangent).abs().max() < 2**-15 * prepared.logits_cotangent.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf"), 0.0])
def test_the_choice_stays_in_bounds_and_without_repetition_whatever_the_logits_hold(value):
    prepared = Prepared(Case(M=4, k=3))
    prepared.logits[::2] = value
    chosen = prepared.forward(torch.float32)[3]
    assert ((chosen >= 0) & (chosen < 4)).all()
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(chosen[::2], torch.arange(3, device=DEVICE).expand_as(chosen[::2]))  # ties go to the lowest


def test_logits_decide_where_probabilities_underflow_and_nan_counts_as_the_largest():
    prepared = Prepared(Case(B=1, T=2, G=1, M=3, k=2))
    prepared.logits[0] = torch.tensor([0.0, -400.0, -300.0])
    prepared.logits[1] = torch.tensor([1.0, float("nan"), 2.0])
    assert prepared.forward(torch.float32)[3].flatten(1).tolist() == [[0, 2], [1, 2]]


def test_given_experts_replace_the_choice_and_no_router_takes_all():
    prepared = Prepared(Case(k=2))
    given = prepared.given(torch.float32)
    heads = prepared.forward(torch.float32)[0]
    layout = (EPS, prepared.case.B, *prepared.layout, True, True)
    replayed = OPERATORS.prepare(*given[:4], None, prepared.indices.flatten(0, 1), *given[6:], *layout)
    assert torch.equal(replayed[0], heads)
    every = Prepared(Case(k=3))
    tensors = every.given(torch.float32)
    order = torch.arange(3, device=DEVICE).expand(every.case.rows, 3, 3)
    by_index = OPERATORS.prepare(*tensors[:4], None, order, *tensors[6:], EPS, 2, *every.layout, True, True)
    without = OPERATORS.prepare(*tensors[:4], None, None, *tensors[6:], EPS, 2, *every.layout, True, True)
    assert all(torch.equal(a, b) for a, b in zip(by_index[:3], without[:3], strict=True))


def poison(monkeypatch):
    """Makes every new tensor hold NaN, or a far index, so that a number that isn't written shows."""
    original = Tensor.new_empty

    def filled(self, *size, **options):
        new = original(self, *size, **options)
        return new.fill_(float("nan") if new.is_floating_point() else 1 << 40)

    monkeypatch.setattr(Tensor, "new_empty", filled)
    like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: like(t, **options).fill_(float("nan")))


@pytest.mark.parametrize("case", [Case(T=7, by_expert=True), Case(T=1, G=5, d=7, r=2, norm=True, copies=2)], ids=str)
def test_every_number_is_written_and_two_runs_give_the_same_bits(monkeypatch, case):
    prepared = Prepared(case)
    poison(monkeypatch)
    runs = []
    for _ in range(2):
        outputs = prepared.forward(torch.float32)
        gradients, partial = prepared.backward(torch.float32)
        layout = (case.G, case.M, case.k, case.d, case.by_expert, True, False)
        heads = outputs[0].flatten(0, 1)
        made = OPERATORS.combine(heads, None, prepared.logits.float(), outputs[3], *layout)
        back = OPERATORS.combine_back(made, heads, prepared.logits.float(), outputs[3], False, *layout)
        runs.append([*outputs, *gradients, partial, made, *back])
    assert all(t.isfinite().all() for t in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_and_heads_are_read_in_any_memory_layout():
    prepared = Prepared(Case())
    given = prepared.given(torch.float32)
    expected = prepared.forward(torch.float32)

    def wide(t):  # rows within wider rows whose other numbers are NaN
        return torch.full((t.shape[0], t.shape[1] + 5), float("nan"), device=DEVICE)[:, 3 : 3 + t.shape[1]].copy_(t)

    layout = (EPS, prepared.case.B, *prepared.layout, True, True)
    strided = OPERATORS.prepare(*map(wide, given[:5]), *given[5:], *layout)
    by_column = OPERATORS.prepare(*(t.mT.contiguous().mT for t in given[:5]), *given[5:], *layout)
    for actual in (strided, by_column):
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    gradients, _ = prepared.backward(torch.float32)
    prepared.cotangents = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in prepared.cotangents]
    assert all(torch.equal(a, b) for a, b in zip(gradients, prepared.backward(torch.float32)[0], strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="the rows would take real memory")
def test_rows_are_found_beyond_2_to_the_31_numbers():
    rows, width = 3, 2 * 2 * 4
    far = torch.empty(2**31 + 4 * width, dtype=torch.float16)  # untouched pages take no memory
    query = far.as_strided((rows, width), (2**30 + width, 1))
    query.copy_(torch.arange(rows * width).view(rows, width))
    key = torch.zeros(rows, 8, dtype=torch.float16)
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).expand(rows, 4).contiguous()
    heads = OPERATORS.prepare(
        query, key, key, None, logits, None, None, None, None, None, EPS, 1, 2, 2, 1, 0, 4, False, True
    )[0]
    assert torch.equal(heads[0], query.view(rows, 2, 2, 4)[:, [0, 1], [1, 0]])


def test_a_static_cache_is_written_in_place_and_never_behind_its_end():
    prepared = Prepared(Case(T=2, shared=False))
    given = prepared.given(torch.float32)
    layout = prepared.layout
    heads, keys, values, _ = prepared.forward(torch.float32)
    cache = [torch.full((2, 3, 6, 8), float("nan"), device=DEVICE) for _ in range(2)]
    start = torch.tensor(3, device=DEVICE)
    cached, _ = OPERATORS.prepare_cached(*given, EPS, *(c[:, :, :5] for c in cache), start, *layout)
    assert torch.equal(cached, heads)
    for tensor, expected in zip(cache, (keys, values), strict=True):
        assert torch.equal(tensor[:, :, 3:5], expected.transpose(1, 2))
        assert tensor[:, :, [0, 1, 2, 5]].isnan().all()
    OPERATORS.prepare_cached(*given, EPS, *(c[:, :, :5] for c in cache), start + 1, *layout)
    assert all(
        torch.equal(c[:, :, 4], e[:, 0]) and c[:, :, 5].isnan().all()
        for c, e in zip(cache, (keys, values), strict=True)
    )


def test_the_operators_follow_torch_s_rules_for_custom_operators():
    prepared = Prepared(Case(norm=True))
    given = prepared.given(torch.float32)
    case = prepared.case
    layout = (EPS, case.B, *prepared.layout, True, True)
    torch.library.opcheck(OPERATORS.prepare.default, (*given, *layout))
    heads, _, _, chosen = OPERATORS.prepare(*given, *layout)
    back = (*(c.float() for c in prepared.cotangents), prepared.logits.float(), *given[6:8], chosen, given[0], given[1],
            given[3], *given[8:], EPS, *prepared.layout, True, True, 1)  # fmt: skip
    torch.library.opcheck(OPERATORS.prepare_back.default, back)
    cache = [torch.zeros(2, 3, 9, 8, device=DEVICE) for _ in range(2)]
    start = torch.tensor(1, device=DEVICE)
    torch.library.opcheck(OPERATORS.prepare_cached.default, (*given, EPS, *cache, start, *prepared.layout))
    slots_layout = (case.G, case.M, case.k, case.d, True, True, False)
    rows = heads.flatten(0, 1)
    torch.library.opcheck(OPERATORS.combine.default, (rows, None, prepared.logits.float(), chosen, *slots_layout))
    made = OPERATORS.combine(rows, None, prepared.logits.float(), chosen, *slots_layout)
    torch.library.opcheck(
        OPERATORS.combine_back.default, (made, rows, prepared.logits.float(), chosen, False, *slots_layout)
    )


def test_the_weighted_slot_is_right_where_every_selected_probability_underflows():
    logits = torch.tensor([[0.0, -300.0, 0.0, -299.0]], device=DEVICE, requires_grad=True)
    heads = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    indices = torch.ones(1, 2, 1, dtype=torch.int64, device=DEVICE)
    weights = logits.double().view(2, 2).log_softmax(-1)[:, 1].softmax(0)
    expected = (weights[:, None] * heads[0, :2].double()).sum(0)
    layout = (2, 2, 1, 4, False, True, False)
    made = OPERATORS.combine(heads.detach(), None, logits.detach(), indices, *layout)
    torch.testing.assert_close(made[0, 8:12].double(), expected, rtol=0, atol=5e-6)
    cotangent = torch.zeros_like(made)
    cotangent[0, 8:12] = 1.0
    gradients = torch.autograd.grad(expected.sum(), [heads, logits])
    of_heads, _, of_logits = OPERATORS.combine_back(cotangent, heads.detach(), logits.detach(), indices, False, *layout)
    torch.testing.assert_close(of_heads, gradients[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(of_logits, gradients[1].view(1, 4), rtol=0, atol=5e-6)
