"""Counts the kernels of one attention layer on a CPU: aten operators and Triton launches, for each arm.

    python benchmarks/operator_counts.py    # writes benchmarks/results/operator-counts.json

Counted is every operator that reaches a backend, those inside registered operators (query_experts::...) too, and every
launch of a Triton kernel. Views and allocations are counted apart, since a launch they are not;
in eager mode they cost as much of the host's time. Nothing is timed, so the machine needn't be idle.

The router's product counts as the one that it is on a GPU, of bf16 numbers with a float32 result; a CPU lacks it and
casts both factors first. On the plain path the casts are counted, as a GPU does them too.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings
from query_experts.common.environment import Environment, environment
from query_experts.common.files import write_json

RESULT = Path(__file__).resolve().parent / "results" / "operator-counts.json"
ARMS = {
    "dense": ("dense", "torch"),
    "static": ("static", "torch"),
    "gqe": ("gqe", "torch"),
    "dense-fused, triton": ("dense-fused", "triton"),
    "static, triton": ("static", "triton"),
    "gqe, triton": ("gqe", "triton"),
}  # the arm and its kernels
TOKENS, CACHED, BATCH = 256, 256, 2  # of prefill and training; of decoding
WARM_UP = 3  # calls; a packed weight is made in the second
OUTSIDE = "query_experts"  # the namespace of registered operators, which are counted by what they run
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
NO_KERNELS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip


@dataclass(frozen=True)
class Count:
    """What one call runs.

    Attributes:
        kernels: aten operators that compute or copy, by name.
        launches: launches of Triton kernels, by the kernel's name.
        views: views and allocations.
    """

    kernels: dict[str, int]
    launches: dict[str, int]
    views: int

    @property
    def total(self) -> int:
        return sum(self.kernels.values()) + sum(self.launches.values())


@dataclass(frozen=True)
class OperatorCounts:
    """All of the result file. counts: by what is run, then by arm."""

    tokens: int
    cached: int
    batch: int
    environment: Environment
    triton: str | None
    counts: dict[str, dict[str, Count]]


class _Counting(TorchDispatchMode):
    """Counts operators. A registered one runs under the mode again, so that those inside it are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == OUTSIDE:
            with self:  # straight to the kernel, as the mode would meet the operator itself again
                return func.redispatch(ON_CPU, *args, **(kwargs or {}))
        with self:  # inside a registered operator, those that are made of others come as they are
            made_of_others = func.decompose(*args, **(kwargs or {}))
        if made_of_others is not NotImplemented:
            return made_of_others
        if name in NO_KERNELS:
            self.views += 1
        else:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Counts launches of Triton kernels, in whose place nothing runs, as no one reads what they would write."""
    launches: Counter[str] = Counter()
    if importlib.util.find_spec("triton") is None:
        yield launches
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        launches[self.fn.__name__] += 1

    with (
        mock.patch.object(JITFunction, "run", launched),
        mock.patch.object(InterpretedFunction, "run", launched),
    ):
        yield launches


def count(call: Callable[[], object]) -> Count:
    """Counts what one call runs, after a few to warm up."""
    with counted_launches() as launches:
        for _ in range(WARM_UP):
            call()
        launches.clear()
        with _Counting() as operators:
            call()
    return Count(dict(operators.kernels), dict(launches), operators.views)


def calls(arm: str) -> dict[str, Callable[[], object]]:
    """The calls of the paper's layer that are counted, in bf16 and eager mode."""
    name, kernels = ARMS[arm]
    layer = Layer(BenchSettings(device="cpu", kernels=kernels), name, "cpu", max(TOKENS, CACHED + WARM_UP + 1))
    made = {
        "prefill with a cache": layer.prefill(1, TOKENS),
        "training, forward and backward": layer.train(1, TOKENS),
        "decoding, static cache": decoding(layer),
    }
    return {what: as_on_a_gpu(call) for what, call in made.items()} if kernels == "triton" else made


def decoding(layer: Layer) -> Callable[[], object]:
    """One new token over a static cache, which is one token longer after each call."""
    cache = layer._filled_cache("static", BATCH, CACHED, WARM_UP + 1)
    x = layer.hidden(BATCH, 1)
    inputs = layer.inputs(x, CACHED, cache)
    return torch.no_grad()(lambda: layer.forward(x, inputs, cache))


def as_on_a_gpu(call: Callable[[], object]) -> Callable[[], object]:
    """The call with one product of bf16 numbers in place of the router's, whose numbers no one reads."""

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        torch.mm(rows, weight.mT)
        return torch.empty(rows.shape[0], weight.shape[0], dtype=torch.float32)

    def replaced() -> object:
        from query_experts.layers import fused as layer  # here, as both need Triton
        from query_experts.ops import fused as operators

        with mock.patch.object(layer, "wide_product", product), mock.patch.object(operators, "wide_product", product):
            return call()

    return replaced


def measure() -> dict[str, dict[str, Count]]:
    counts: dict[str, dict[str, Count]] = {}
    for arm in ARMS:
        for what, call in calls(arm).items():
            counts.setdefault(what, {})[arm] = count(call)
    return counts


def triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def table(counts: dict[str, dict[str, Count]]) -> str:
    """A row for each call; in each cell the kernels, and those with views and allocations."""
    lines = ["| kernels / with views | " + " | ".join(ARMS) + " |", "| --- |" + " --- |" * len(ARMS)]
    for what, by_arm in counts.items():
        cells = [f"{by_arm[arm].total} / {by_arm[arm].total + by_arm[arm].views}" for arm in ARMS]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # nothing has imported Triton yet
    counts = measure()
    print(table(counts))
    ran_in = environment("cpu", "bfloat16")
    write_json(RESULT, asdict(OperatorCounts(TOKENS, CACHED, BATCH, ran_in, triton_version(), counts)))


if __name__ == "__main__":
    main()
