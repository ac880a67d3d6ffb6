"""The GPU suite: the tests that need a GPU, then the benchmark of every kernel, in less than ten minutes.

    python benchmarks/gpu.py --out runs/gpu              # on a machine with a GPU; with PYTHONPATH=src if not installed
    python benchmarks/gpu.py --out runs/gpu-dry --dry    # the same calls on a CPU, tiny: shows that they run

It needs torch, Transformers, Triton and pytest. Each part of the benchmark runs in a process of its own, so a failure
doesn't affect the other parts. A part that runs out of time keeps the points that it has measured. OUT/gpu.json holds
all results and the last lines of the tests. OUT/PART holds the result of one part, and its plot if matplotlib is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import yaml

from query_experts.bench.report import write_plot
from query_experts.bench.results import GpuResult, PartOutcome, PytestOutcome, read_bench, write_gpu
from query_experts.bench.run import run_benchmark
from query_experts.bench.settings import BenchSettings
from query_experts.common.errors import SettingError

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 9.5
TEST_SECONDS = 180.0
TESTS = ["tests/test_gpu.py", "tests/ops/test_fused_decode.py"]
LONG = [4096, 16384, 32768, 65536, 131072, 262144, 524288, 1048576]
PREFILL = BenchSettings(device="cuda", suites=["prefill"], repeats=3)
FLASH = replace(PREFILL, sdpa_backend="flash")
DECODE = BenchSettings(
    device="cuda", suites=["decode"], repeats=9, caches=["static"], batch_sizes=[1, 8, 32],
    cached_lengths=[1024, 4096, 16384, 65536],
)  # fmt: skip
PARTS = {  # the most important first, since time may run out
    "prefill-flash": replace(FLASH, lengths=LONG[:6]),
    "prefill-graph": replace(FLASH, lengths=[1024, *LONG[:3]], cuda_graph=True),
    "decode": DECODE,
    "decode-graph": replace(DECODE, cuda_graph=True),
    "decode-fused": replace(DECODE, cuda_graph=True, fused_decode=True),
    "train": BenchSettings(device="cuda", suites=["train"], repeats=5, train_lengths=[2048, 8192, 32768]),
    "model": BenchSettings(
        device="cuda", suites=["model", "model-train"], repeats=3, lengths=[4096, 16384, 65536, 131072],
        train_lengths=[2048],
    ),
    "prefill-cudnn": replace(PREFILL, lengths=LONG[:5], sdpa_backend="cudnn"),
    "prefill-flex": replace(PREFILL, lengths=LONG[:4], attn_implementation="flex_attention"),
    "parts": BenchSettings(device="cuda", suites=["parts"], repeats=5, lengths=[8192, 65536]),
    "wide": replace(PREFILL, lengths=[16384, 65536], num_attention_heads=32),
    "chunk": BenchSettings(device="cuda", suites=["chunk"], repeats=3, chunk_size=8192, cached_lengths=LONG[3:]),
    "prefill-long": replace(FLASH, lengths=LONG[6:]),
    "decode-compiled": replace(DECODE, cached_lengths=[1024, 4096], compile=True),
}  # fmt: skip


def dry(settings: BenchSettings) -> BenchSettings:
    """The part's suites, caches, kernels and compiling with the sizes of the preset `tiny`, on a CPU."""
    preset = files("query_experts") / "recipes" / "bench" / "tiny.yaml"
    tiny = BenchSettings(**yaml.safe_load(preset.read_text(encoding="utf-8")))
    return replace(
        tiny, device="cpu", repeats=1, suites=settings.suites, caches=settings.caches, compile=settings.compile,
        attn_implementation=settings.attn_implementation, fused_decode=settings.fused_decode,
        sdpa_backend="flash" if settings.sdpa_backend else None,  # a CPU has no cuDNN
    )  # fmt: skip


def measure_part(settings: BenchSettings) -> None:
    """Measures one part in this process. Raises SettingError where this machine can't run it."""
    settings.check()
    result = run_benchmark(settings)
    if importlib.util.find_spec("matplotlib") is not None:
        write_plot(result.speed_points(), Path(settings.out))


def run(command: list[str], seconds: float, dry: bool) -> tuple[int | None, str]:
    """Runs a command with a time limit.

    Returns:
        Its exit status, None where time ran out, and the end of what it printed.
    """
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds), env=environment)
    except subprocess.TimeoutExpired:
        return None, "out of time"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def run_tests(dry: bool) -> PytestOutcome:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(ROOT / test) for test in TESTS)]
    status, printed = run(command, TEST_SECONDS, dry)
    return PytestOutcome(status, printed.strip().splitlines()[-5:])


def run_part(name: str, out: Path, seconds: float, dry: bool) -> PartOutcome:
    """Measures one part in a process of its own."""
    command = [sys.executable, __file__, "--out", str(out), "--part", name, *(["--dry"] if dry else [])]
    status, printed = run(command, seconds, dry)
    file = out / name / "bench.json"
    return PartOutcome(status, read_bench(file) if file.exists() else None, printed[-1000:] if status else None)


def run_all(names: list[str], out: Path, minutes: float, dry: bool) -> GpuResult:
    """Runs the tests and the parts; gpu.json is written after each."""
    end = time.monotonic() + 60 * minutes
    result = GpuResult(dry, run_tests(dry), {})
    print(*result.tests.last, sep="\n", flush=True)
    write_gpu(out / "gpu.json", result)
    for name in names:
        started = time.monotonic()
        outcome = run_part(name, out, end - started, dry)
        result = replace(result, parts=result.parts | {name: outcome})
        points = len(outcome.bench.points) if outcome.bench else 0
        print(f"{name}: status {outcome.status}, {points} points, {time.monotonic() - started:.0f} s", flush=True)
        write_gpu(out / "gpu.json", result)
    return result


def succeeded(result: GpuResult) -> bool:
    """Whether all tests passed and every part measured something without an error; time may have run out."""
    measured = all(part.status in (0, None) and part.bench and part.bench.points for part in result.parts.values())
    return measured and result.tests.status == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder for the results")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit of the whole suite")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--part", choices=PARTS, help="measure one part in this process, without the tests")
    options = parser.parse_args()
    if options.part:
        settings = dry(PARTS[options.part]) if options.dry else PARTS[options.part]
        try:
            measure_part(replace(settings, out=str(options.out / options.part)))
        except SettingError as error:
            print(f"{options.part}: {error}", file=sys.stderr)
            return 2
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        parser.error(f"out is {options.out}, which holds files; it must be a new or empty folder")
    return 0 if succeeded(run_all(options.parts, options.out, options.minutes, options.dry)) else 1


if __name__ == "__main__":
    sys.exit(main())
