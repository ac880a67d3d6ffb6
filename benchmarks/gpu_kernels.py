"""The steps of the GPU suite that time no layer: the machine's ceilings, each fused kernel, and forms of attention.

`gpu.py` runs them, each in a process of its own. A step gives numbers by name one after another; their unit ends the
name. Times are of a CUDA graph's replay, the median of several; with --dry, of plain calls with tiny shapes on a CPU.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from query_experts.common.timing import Call, as_cuda_graph, time_interleaved
from query_experts.ops.fused import Combine, Layout, Prepare, wide_product

REPEATS = 5
LAUNCHES = 100
LENGTHS = [4096, 32768]
G, M, K, D, HIDDEN = 8, 2, 1, 64, 1024  # the paper's layer
LEAST_BANDWIDTH = 0.45  # of a copy's, that prepare and combine must reach at the longest length
Numbers = Iterator[tuple[str, float]]


def seconds(call: Call, dry: bool) -> float:
    """Of one call."""
    if dry:
        return statistics.median(time_interleaved({"": call}, 1, "cpu")[""])
    return statistics.median(time_interleaved({"": as_cuda_graph(call)}, REPEATS, "cuda")[""])


def random(*shape: int, dry: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cpu" if dry else "cuda").to(dtype)


def ceilings(dry: bool) -> Numbers:
    """Bandwidth of a copy, time of a launch, and time and error of the router's product with a float32 output."""
    source = random(2**16 if dry else 2**28, dry=dry)
    target = torch.empty_like(source)
    yield "copy_bytes_per_s", 2 * source.nbytes / seconds(lambda: target.copy_(source), dry)
    one = torch.zeros(1, device=source.device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    yield "launch_in_a_graph_s", seconds(launches, dry) / LAUNCHES
    device = "cpu" if dry else "cuda"
    yield "launch_s", statistics.median(time_interleaved({"": launches}, REPEATS, device)[""]) / LAUNCHES
    rows, weight = (random(count, HIDDEN, dry=dry) for count in (64 if dry else 32768, G * M))
    products: dict[str, Callable[[], Tensor]] = {
        "out_dtype": lambda: wide_product(rows, weight),
        "float32_copy": lambda: rows.float() @ weight.float().mT,
        "bf16": lambda: rows @ weight.mT,
    }
    exact = rows.double() @ weight.double().mT
    for name, product in products.items():
        yield f"router_{name}_s", seconds(product, dry)
        yield f"router_{name}_error", float((product().double() - exact).abs().max() / exact.abs().max())


def kernels(dry: bool) -> Numbers:
    """Bandwidth of prepare and combine, forwards and backwards, by the bytes that they must move."""
    for length in [24] if dry else LENGTHS:
        for name, (call, moved) in calls_of_kernels(length, dry).items():
            yield f"{name}_{length}_bytes_per_s", moved / seconds(call, dry)


def calls_of_kernels(length: int, dry: bool) -> dict[str, tuple[Call, int]]:
    """The calls for a prompt, and the bytes that each moves."""
    layout = Layout(1, G, M, K, K, D, True, True, 0.0)
    query, key, value, shared = (random(length, width, dry=dry) for width in layout.widths)
    logits, angles = random(length, G * M, dry=dry, dtype=torch.float32), random(1, length, D, dry=dry)
    outputs = Prepare.apply(query, key, value, shared, logits, None, angles, angles, None, None, layout)
    indices, heads = outputs[3], outputs[0].flatten(0, 1)
    forms = (G, M, K, D, False, True, False)
    slots = Combine.apply(heads, None, logits, indices, *forms)
    operators = torch.ops.query_experts

    def prepare_back() -> tuple[Tensor, Tensor]:
        return operators.prepare_back(
            *outputs[:3], None, angles, angles, indices, None, None, None, None, None, 0.0, *layout.heads, True, True, 0
        )

    back, of_combine = prepare_back(), operators.combine_back(slots, heads, logits, indices, False, *forms)
    given = size(query) * K // M + size(key, value, shared, logits, angles, angles)
    routed = size(logits, indices)
    return {
        "prepare": (
            lambda: Prepare.apply(query, key, value, shared, logits, None, angles, angles, None, None, layout),
            given + size(*outputs),
        ),
        "combine": (lambda: Combine.apply(heads, None, logits, indices, *forms), size(heads, slots) + routed),
        "prepare_back": (prepare_back, size(*outputs[:3], angles, angles, indices, *back)),
        "combine_back": (
            lambda: operators.combine_back(slots, heads, logits, indices, False, *forms),
            size(slots, heads, *of_combine) + routed,
        ),
    }


def size(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def attention(dry: bool) -> Numbers:
    """Nine heads in one call against eight and one, with rows by token or by head, forwards and with the backward."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION} | ({} if dry else {"cudnn": SDPBackend.CUDNN_ATTENTION})
    for length in [64] if dry else [2048, 8192, 32768]:
        for backend, kernel in backends.items():
            for order in ("by_token", "by_head"):
                for form, sizes in {"one_call": [G + 1], "two_calls": [G, 1]}.items():
                    name = f"{backend}_{order}_{form}_{length}"
                    try:
                        with sdpa_kernel(kernel):
                            forward, both = calls_of_attention(length, sizes, order, dry)
                            yield f"{name}_s", seconds(forward, dry)
                            yield f"{name}_with_backward_s", seconds(both, dry)
                    except RuntimeError as error:  # a backend may lack a form; the others are timed
                        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)


def calls_of_attention(length: int, sizes: list[int], order: str, dry: bool) -> tuple[Call, Call]:
    """Causal attention with as many heads in each call, and the same with its backward pass."""
    shapes = [(1, length, heads, D) if order == "by_token" else (1, heads, length, D) for heads in sizes]
    inputs = [[random(*shape, dry=dry).requires_grad_() for _ in range(3)] for shape in shapes]
    ordered = [[t.transpose(1, 2) if order == "by_token" else t for t in three] for three in inputs]
    cotangents = [torch.randn_like(three[0]) for three in ordered]

    def attend() -> list[Tensor]:
        return [scaled_dot_product_attention(*three, is_causal=True) for three in ordered]

    def forward() -> None:
        with torch.no_grad():
            attend()

    def both() -> None:
        torch.autograd.grad(attend(), [t for three in inputs for t in three], cotangents)

    return forward, both


STEPS: dict[str, Callable[[bool], Numbers]] = {"ceilings": ceilings, "kernels": kernels, "attention": attention}


def too_slow(of_ceilings: dict[str, float] | None, of_kernels: dict[str, float] | None) -> bool:
    """Whether prepare or combine stays below `LEAST_BANDWIDTH` at the longest length, or wasn't timed there."""
    of_ceilings, of_kernels = of_ceilings or {}, of_kernels or {}
    least = LEAST_BANDWIDTH * of_ceilings.get("copy_bytes_per_s", float("inf"))
    timed = (of_kernels.get(f"{name}_{LENGTHS[-1]}_bytes_per_s", 0.0) for name in ("prepare", "combine"))
    return any(found < least for found in timed)
