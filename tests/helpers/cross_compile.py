"""Compiles Triton kernels for GPUs that this machine lacks, and reads what they need: Triton ships NVIDIA's assembler.

A process whose tests run in Triton's interpreter can't compile, so `in_a_compiling_process` does it in another one,
for all kernels at once. A new family of kernels adds a function of its shape to `FAMILIES`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        kernel: its name.
        registers: of a thread.
        spills: bytes of a thread that had no register: its stack and its local memory.
        shared: bytes of shared memory of a program.
        loads: instructions that load from the GPU's memory.
        vector_loads: those of 8 or 16 bytes of a thread.
        wide_loads: those of 16.
        barriers: instructions at which a program's threads wait for one another.
        narrow_rows: products of tensors in 32 bits; row numbers times strides belong in 64.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    loads: int
    vector_loads: int
    wide_loads: int
    barriers: int
    narrow_rows: int


def compile_for(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], launch: dict[str, int], capability: int
) -> Resources:
    """Compiles a `triton.jit` function for NVIDIA's compute capability (90: sm_90).

    signature: the arguments' types, as `*bf16` or `i64`, in any order. Pointers are taken to be aligned to 16 bytes,
    as torch allocates them; `i32:16` is a number that 16 divides. constants: the
    compile-time arguments. launch: the options of a launch, as num_warps.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if re.search(r"^\*|:16$", types[name])}
    types = {name: kind.removesuffix(":16") for name, kind in types.items()}
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=values, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options=launch,
    )
    ptx, tensors = compiled.asm["ptx"], compiled.asm["ttir"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        kernel.__name__,
        number["REG"],
        number["STACK"] + number["LOCAL"],
        compiled.metadata.shared,
        len(re.findall(r"ld\.global", ptx)),
        len(re.findall(r"ld\.global[.\w:]*\.v[248]\.[bfu](32|64)", ptx)),
        len(re.findall(r"ld\.global[.\w:]*\.(v[48]\.[bfu]32|v2\.[bfu]64)", ptx)),
        len(re.findall(r"bar\.sync|barrier\.sync", ptx)),
        len(re.findall(r"arith\.muli .*tensor<[\dx]*xi32>", tensors)),
    )


def decode_kernels(
    G: int, k: int, d: int, M: int | None = None, variant: str = "gqe", by_expert: bool = False, first: bool = False,
    dtype: str = "bf16", masked: bool = True,
) -> list[tuple]:  # fmt: skip
    """The two kernels of `ops/triton_decode.py`; without M, those of a layer without a router."""
    import triton.language as tl

    from query_experts.ops import triton_decode

    accumulator, kind = (tl.float64, "*fp64") if dtype == "fp64" else (tl.float32, "*fp32")
    shared_groups = 0 if variant != "gqe" else 1 if first else G
    piece = dict.fromkeys(("query", "key", "value"), f"*{dtype}") | {"mask": "*i1", "partial": kind}
    piece |= {f"{t}_{axis}": "i64" for t in ("key", "value") for axis in "bgs"}
    piece |= {"query_b": "i64", "query_h": "i64", "mask_b": "i64", "num_keys": "i32"}
    join = {"partial": kind, "logits": kind, "indices": "*i64", "output": f"*{dtype}", "num_pieces": "i32"}
    unit = triton_decode.unit_of(d)
    constants = triton_decode.piece_constants(G, k, d, shared_groups, d**-0.5, masked, unit, accumulator)
    joined = triton_decode.join_constants(G, M or k, k, d, variant, M is not None, by_expert, accumulator)
    warps = {"num_warps": triton_decode.NUM_WARPS}
    return [(triton_decode._piece, piece, constants, warps), (triton_decode._join, join, joined, warps)]


def layer_kernels(
    G: int, M: int, k: int, d: int, r: int | None = None, norm: bool = False, by_expert: bool = False,
    variant: str = "gqe", copies: int | None = None, dtype: str = "bf16", learned: bool = True,
    given: bool = False, first: bool = False,
) -> list[tuple]:  # fmt: skip
    """`prepare` and `combine`, forwards and backwards; also `prepare` for a static cache. r: the rotated dims of d."""
    import triton.language as tl

    from query_experts.ops import triton_combine, triton_operators, triton_prepare

    r = d if r is None else r
    narrow, gqe = f"*{dtype}", variant == "gqe"
    sizes = {"G": G, "M": M, "k": k, "d": d, "WIDE": tl.float32, "ROUTED": learned}
    copies = (k if copies is None else copies) if gqe else 0
    heads = {
        **sizes,
        **triton_operators._sizes(G, M, d, r, norm),
        "C": copies,
        "r": r,
        "NORM": norm,
        "MEAN": not first,
        "eps": 1e-6,
    }
    tensors = ("query", "key", "value", "shared", "cos", "sin", "query_norm", "key_norm", "heads", "keys", "values")
    types = dict.fromkeys((*tensors, "packed", "slots", "heads_gradient", "shared_gradient"), narrow)
    types |= dict.fromkeys(("logits", "norms", "logits_gradient"), "*fp32") | {"indices": "*i64", "start": "*i64"}
    types |= dict.fromkeys(("num_tokens", "num_rows", "room"), "i32")
    step = "i32:16" if d % 16 == 0 else "i32"
    types |= {f"{t}_row": step for t in ("query", "key", "value", "shared", "logits", "slots", "heads", "gradient")}
    types |= {f"{t}_{axis}": step for t in ("heads", "keys", "values") for axis in ("batch", "token", "head")}
    types |= {"cos_batch": "i32:16"}
    slots = {**sizes, **triton_operators._combine_sizes(G, M, d), "BY_EXPERT": by_expert}
    slots |= {"WEIGHTED_SLOT": gqe, "SCALED": variant == "weighted_concat"}
    parts = 0 if not learned else 2 if dtype == "bf16" else 1
    packed_step = triton_operators.aligned(triton_operators.packed_width(G, M, d, copies, parts))
    kernels = [
        (triton_prepare.prepare, {**heads, "GIVEN": given, "SHARED_KEY": gqe, "CACHED": False}),
        (triton_prepare.prepare, {**heads, "GIVEN": False, "SHARED_KEY": False, "CACHED": True, "C": min(copies, 1)}),
        (triton_prepare.prepare_back, {**heads, "SHARED_KEY": gqe, "LOGIT_PARTS": parts, "STEP": packed_step}),
        (triton_combine.combine, slots),
        (triton_combine.combine_back, {**slots, "C": copies}),
    ]
    return [(kernel, types, constants, triton_operators.OPTIONS) for kernel, constants in kernels]


FAMILIES = {"decode": decode_kernels, "layer": layer_kernels}


def compiled_variants(call: Callable[[], Any], capability: int = 90) -> set[tuple[str, str]]:
    """The kernels that a call would start on a GPU, each with the key by which Triton finds a compiled one again."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    found = set()

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", capability, 32))
        )
        found.add((kernel.__name__, str(bind(*args, **options)[1:])))

    with mock.patch.object(JITFunction, "run", note):
        call()
    return found


def decode_variants(lengths: list[int], d: int, by_token: bool) -> int:
    """How many kernels decoding compiles in all, for caches of those lengths in either memory layout."""
    import torch

    from query_experts.ops.triton_decode import triton_decode

    found = set()
    for S in lengths:
        key = torch.zeros(2, S, 4, d).transpose(1, 2) if by_token else torch.zeros(2, 4, S, d)
        query, logits, mask = torch.zeros(2, 5, d), torch.zeros(2, 4, 3), torch.ones(1, S, dtype=torch.bool)
        indices = logits.argmax(-1, keepdim=True)
        found |= compiled_variants(partial(triton_decode, query, key, key, mask, logits, indices, 0.5))
    return len(found)


def compile_cases(cases: list[tuple[str, dict[str, Any], int]]) -> list[list[dict[str, Any]]]:
    """The resources of every kernel of each case (family, arguments of its function, compute capability)."""
    return [
        [asdict(compile_for(*kernel, capability)) for kernel in FAMILIES[family](**arguments)]
        for family, arguments, capability in cases
    ]


def in_a_compiling_process(*calls: tuple[str, list]) -> list:
    """Calls functions of this file, by name, where Triton compiles; JSON holds their arguments and results."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(calls), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps([globals()[function](*arguments) for function, arguments in json.load(sys.stdin)]))
