"""Times one token of decoding on a CPU, eager and compiled, for the layer of each arm over a static cache.

    python benchmarks/decode_compiled.py    # on an idle machine, some minutes; writes results/decode-compiled.json

A step over a short cache is made of calls, which a compiler fuses. But compiled stock Llama copies a long cache in
every step, and is then several times slower than eager. So every arm has both modes, in one process and in turn, and
is compared with dense in dense's faster mode.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from query_experts.bench.json_reader import read_result
from query_experts.bench.models import Layer
from query_experts.bench.results import BASELINE, Spread, spread_of_ratios
from query_experts.bench.settings import BenchSettings
from query_experts.common.environment import Environment, environment
from query_experts.common.files import write_json
from query_experts.common.timing import Call, time_interleaved

RESULT = Path(__file__).resolve().parent / "results" / "decode-compiled.json"
ARMS = (BASELINE, "static", "gqe")
EAGER, COMPILED = MODES = ("eager", "compiled")
CLOSE = 2**-5  # of outputs of order 1: several roundings to bf16


@dataclass(frozen=True)
class Point:
    """Seconds of a step: by arm and mode, one value for each repeat."""

    batch: int
    cached: int
    seconds: dict[str, dict[str, list[float]]]

    def dense_mode(self) -> str:
        """The mode in which dense is faster, by the median."""
        return min(MODES, key=lambda mode: median(self.seconds[BASELINE][mode]))

    def speed(self, arm: str, mode: str) -> Spread:
        """Of an arm over dense in dense's faster mode."""
        return spread_of_ratios(self.seconds[BASELINE][self.dense_mode()], self.seconds[arm][mode])


@dataclass(frozen=True)
class DecodeCompiled:
    """All of the result file."""

    environment: Environment
    points: list[Point]


def read_decode_compiled() -> DecodeCompiled:
    return read_result(RESULT, DecodeCompiled, "a result of decode_compiled.py")


def settings(mode: str) -> BenchSettings:
    return BenchSettings(device="cpu", kernels="torch", compile=mode == COMPILED)


def steps(batch: int, cached: int) -> dict[tuple[str, str], Call]:
    """A step of each arm in each mode. Raises RuntimeError where the modes differ by more than rounding."""
    calls: dict[tuple[str, str], Call] = {}
    for mode in MODES:
        for arm in ARMS:
            calls[arm, mode] = Layer(settings(mode), arm, "cpu", cached + 1).cached("static", batch, cached, 1)
    for arm in ARMS:
        eager, compiled = (calls[arm, mode]() for mode in MODES)
        assert isinstance(eager, torch.Tensor)
        assert isinstance(compiled, torch.Tensor)
        if not torch.allclose(eager, compiled, rtol=CLOSE, atol=CLOSE):
            raise RuntimeError(f"{arm}, compiled, differs from eager by {(eager - compiled).abs().max():.3g}")
    return calls


def measure(batch: int, cached: int, repeats: int) -> Point:
    names = {f"{arm} {mode}": call for (arm, mode), call in steps(batch, cached).items()}
    seconds = time_interleaved(names, repeats, "cpu")
    return Point(batch, cached, {arm: {mode: seconds[f"{arm} {mode}"] for mode in MODES} for arm in ARMS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached_lengths", type=int, nargs="+", default=[16, 1024, 4096], help="tokens in the cache")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    points = []
    for batch in chosen.batch_sizes:
        for cached in chosen.cached_lengths:
            points.append(point := measure(batch, cached, chosen.repeats))
            times = {f"{arm} {mode}": 1e6 * median(point.seconds[arm][mode]) for arm in ARMS for mode in MODES}
            shown = ", ".join(f"{name} {time:,.0f}" for name, time in times.items())
            Console().print(f"batch {batch}, {cached:,} cached, µs: {shown}")
    write_json(chosen.out, asdict(DecodeCompiled(environment("cpu", settings(EAGER).dtype), points)))


if __name__ == "__main__":
    main()
