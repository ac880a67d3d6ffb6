"""The Triton kernels compile for NVIDIA GPUs on a machine without one, and none spills registers."""

from functools import lru_cache

import pytest

import cross_compile

pytest.importorskip("triton")
PAPER = {"G": 8, "M": 2, "k": 1, "d": 64}
TYPICAL = [
    ("decode", PAPER, 80),
    ("decode", PAPER, 90),
    ("decode", PAPER, 100),
    ("decode", {"G": 8, "M": 4, "k": 1, "d": 128, "by_expert": True}, 90),
    ("decode", {"G": 8, "M": 4, "k": 2, "d": 64}, 90),
    ("decode", {"G": 8, "k": 4, "d": 128, "variant": "hard_concat"}, 90),
    ("layer", PAPER, 80),
    ("layer", PAPER, 90),
    ("layer", PAPER, 100),
    ("layer", {"G": 8, "M": 4, "k": 1, "d": 128, "norm": True, "by_expert": True}, 90),
    ("layer", {"G": 8, "M": 4, "k": 2, "d": 64, "copies": 1}, 90),
    ("layer", {"G": 8, "M": 4, "k": 4, "d": 128, "variant": "hard_concat", "learned": False}, 90),
]
RARE = [
    ("decode", {"G": 8, "M": 4, "k": k, "d": d} | more, capability)
    for capability, dims in ((80, (64, 128)), (90, (16, 32, 64, 80, 96, 128)), (100, (64, 128)))
    for d in dims
    for k, more in [
        (1, {}),
        (2, {"by_expert": True}),
        (3, {"first": True}),
        (4, {"masked": False}),
        (1, {"G": 5, "M": 3}),
        (3, {"G": 5, "M": 3}),
        (1, {"dtype": "fp32"}),
        (2, {"variant": "weighted_concat", "by_expert": True}),
        (4, {"M": None, "variant": "hard_concat"}),
        (1, {"G": 16}),
    ]
] + [
    ("layer", {"G": 8, "M": 4, "k": k, "d": d} | more, capability)
    for capability, dims in ((80, (64, 128)), (90, (16, 32, 64, 80, 96, 128)), (100, (64, 128)))
    for d in dims
    for k, more in [
        (1, {"by_expert": True}),
        (2, {"norm": True}),
        (3, {"norm": True, "by_expert": True, "copies": 1}),
        (2, {"G": 5, "M": 3, "norm": True}),
        (1, {"r": d // 2}),
        (1, {"r": 0, "dtype": "fp32"}),
        (1, {"dtype": "fp16", "given": True}),
        (2, {"first": True, "given": True}),
        (2, {"variant": "weighted_concat", "by_expert": True}),
        (4, {"variant": "hard_concat", "learned": False, "norm": True}),
        (1, {"G": 32, "M": 8}),
        (2, {"G": 3, "M": 3, "r": d // 2, "norm": True, "by_expert": True, "given": True, "first": True}),
    ]
]


LENGTHS = [1, 16, 17, 4096]
LAYOUTS = [(20, False), (20, True), (64, False), (64, True)]  # head dim, whether a token's heads lie together


@lru_cache
def compiled():
    """The resources of the typical kernels, and the number of kernels that decoding needs in each layout."""
    calls = [("decode_variants", [LENGTHS, *layout]) for layout in LAYOUTS]
    cases, *variants = cross_compile.in_a_compiling_process(("compile_cases", [TYPICAL]), *calls)
    return cases, variants


def assert_no_spills(cases, found):
    kernels = [(case, kernel) for case, kernels in zip(cases, found, strict=True) for kernel in kernels]
    spilled = [f"{case}: {kernel}" for case, kernel in kernels if kernel["spills"]]
    assert not spilled, "\n".join(spilled)


def test_no_kernel_of_a_typical_layer_spills():
    assert_no_spills(TYPICAL, compiled()[0])


@pytest.mark.full
def test_no_kernel_of_any_layer_spills():
    assert_no_spills(RARE, *cross_compile.in_a_compiling_process(("compile_cases", [RARE])))


def test_decoding_reads_keys_and_values_as_vectors_and_counts_rows_in_64_bits():
    for (family, arguments, _), kernels in zip(TYPICAL, compiled()[0], strict=True):
        if family != "decode":
            continue
        piece, join = kernels
        groups = 1 if arguments.get("variant") else arguments["G"]
        assert piece["vector_loads"] >= 2 * groups
        assert not piece["narrow_rows"]
        assert join["wide_loads"]


def test_the_layer_s_kernels_read_whole_vectors():
    for (family, _, _), kernels in zip(TYPICAL, compiled()[0], strict=True):
        for kernel in kernels if family == "layer" else []:
            assert kernel["wide_loads"] >= 2, kernel


def test_decoding_compiles_two_kernels_for_all_lengths():
    assert compiled()[1] == [2] * len(LAYOUTS)
