"""The GPU suite, in less than ten minutes: ceilings of the machine, tests, fused kernels, layers, models.

    python benchmarks/gpu.py --out runs/gpu              # on a machine with a GPU; with PYTHONPATH=src if not installed
    python benchmarks/gpu.py --out runs/gpu-dry --dry    # the same calls on a CPU, tiny: shows that they run

It needs torch, Transformers, Triton and pytest. Each step runs in a process of its own with a time limit, the most
wanted first, so a failure doesn't affect the other steps. A step that runs out of time keeps what it has measured, and
one for which too little time is left isn't begun: --no_tests --parts takes it in another run. OUT/gpu.json holds all
results and the last lines of the tests. OUT/STEP holds the result of one step, and its plot if matplotlib is there.

The exit status is 0 where the tests and all steps passed. The suite is green where moreover all steps of REQUIRED
came to their end and no fused kernel is far below the memory's bandwidth. Then `MEASURED` of ops/kernels.py may name
the GPU.
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
from typing import NamedTuple

import torch
import yaml

import gpu_kernels
from query_experts.bench.report import header, write_plot
from query_experts.bench.results import GpuResult, PartOutcome, PytestOutcome, read_bench, write_gpu
from query_experts.bench.run import run_benchmark, wrong_arm
from query_experts.bench.settings import Arm, BenchSettings
from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json, write_json

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 9.0
TEST_SECONDS = 200.0
LEAST_SECONDS = 15.0  # in which a step may measure something: it imports, starts and checks first
KERNEL_TESTS = "tests/layers/test_kernels.py"
TESTS = [  # the kernels first: of what time cuts off, those that passed count
    "tests/test_gpu.py",
    f"{KERNEL_TESTS}::test_in_a_narrow_dtype_it_errs_no_more_than_twice_as_much_as_the_plain_path",
    f"{KERNEL_TESTS}::test_a_compiled_model_decodes_over_a_static_cache_without_compiling_anew",
    f"{KERNEL_TESTS}::test_outputs_routing_and_gradients_are_those_of_the_plain_path",
    f"{KERNEL_TESTS}::test_chunks_and_single_tokens_over_a_cache_are_those_of_the_plain_path",
]
# torch's own choice on a Hopper GPU is cuDNN, which plans anew for every shape that the tests have (torch 2.11)
TEST_ENVIRONMENT = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
REQUIRED = ("ceilings", "kernels", "prefill-graph", "train", "decode")  # of a green suite
NUMBERS = "numbers.json"
LONG = [2048, 4096, 16384, 65536]
ARMS: list[Arm] = ["dense", "dense-fused", "gqe"]
PREFILL = BenchSettings(
    device="cuda", suites=["prefill"], repeats=3, arms=ARMS, kernels="triton", sdpa_backend="flash", lengths=LONG
)
TRAIN = replace(PREFILL, suites=["train"], repeats=5, train_lengths=[2048, 8192, 32768])
STEP_250M = replace(PREFILL, suites=["model-train"], train_lengths=[2048])
DECODE = BenchSettings(
    device="cuda", suites=["decode"], repeats=5, arms=ARMS, kernels="triton", caches=["static"], cuda_graph=True,
    batch_sizes=[1, 8, 32], cached_lengths=[1024, 4096, 16384, 65536],
)  # fmt: skip


class Part(NamedTuple):
    """A step of `gpu_kernels.STEPS`, where settings are None, or a benchmark; and its time limit."""

    seconds: float
    settings: BenchSettings | None = None


PARTS = {  # the most wanted first, since time may run out; a part's time that is left is that of the next ones
    "ceilings": Part(25),
    "kernels": Part(60),
    "prefill-graph": Part(60, replace(PREFILL, cuda_graph=True)),
    "train": Part(70, TRAIN),
    "decode": Part(70, DECODE),
    "model-train": Part(35, STEP_250M),
    "attention": Part(50),
    "prefill-eager": Part(30, PREFILL),
    "train-cudnn": Part(40, replace(TRAIN, sdpa_backend="cudnn")),
    "train-torch": Part(30, replace(TRAIN, kernels="torch")),
    "prefill-graph-torch": Part(30, replace(PREFILL, cuda_graph=True, kernels="torch")),
    "model-train-torch": Part(30, replace(STEP_250M, kernels="torch")),
    "decode-torch": Part(40, replace(DECODE, kernels="torch")),
    "train-batch-8": Part(30, replace(TRAIN, train_batch_size=8, train_lengths=[2048, 8192])),
    "prefill-compiled-torch": Part(45, replace(PREFILL, compile=True, kernels="torch", lengths=[2048, 4096, 16384])),
    "prefill-graph-cudnn": Part(30, replace(PREFILL, cuda_graph=True, sdpa_backend="cudnn")),
    "prefill-eager-torch": Part(30, replace(PREFILL, kernels="torch")),
    "parts": Part(30, replace(PREFILL, suites=["parts"], kernels="torch", lengths=[8192, 65536])),
    "chunk": Part(30, replace(PREFILL, suites=["chunk"], chunk_size=8192, cached_lengths=[16384, 65536])),
    "model": Part(60, replace(PREFILL, suites=["model"], lengths=[4096, 16384, 65536])),
}


def dry(settings: BenchSettings) -> BenchSettings:
    """The part's suites, arms, caches, kernels and compiling with the sizes of the preset `tiny`, on a CPU."""
    preset = files("query_experts") / "recipes" / "bench" / "tiny.yaml"
    tiny = BenchSettings(**yaml.safe_load(preset.read_text(encoding="utf-8")))
    return replace(
        tiny, device="cpu", repeats=1, suites=settings.suites, arms=settings.arms, caches=settings.caches,
        compile=settings.compile, attn_implementation=settings.attn_implementation, kernels=settings.kernels,
        train_batch_size=min(2, settings.train_batch_size), lengths=[64], cached_lengths=[64],
        sdpa_backend="flash" if settings.sdpa_backend else None,  # a CPU has no cuDNN
    )  # fmt: skip


def measure_part(name: str, out: Path, is_dry: bool) -> None:
    """Measures one part in this process. Raises SettingError where this machine can't run it."""
    settings = PARTS[name].settings
    if settings is None:
        numbers: dict[str, float] = {}
        (out / name).mkdir(parents=True, exist_ok=True)
        for key, value in gpu_kernels.STEPS[name](is_dry):
            numbers[key] = value
            write_json(out / name / NUMBERS, numbers)
        return
    settings = replace(dry(settings) if is_dry else settings, out=str(out / name))
    settings.check()
    result = run_benchmark(settings, refuses_wrong_arms=False)
    print(header(result), flush=True)
    if importlib.util.find_spec("matplotlib") is not None:
        write_plot(result.speed_points(), Path(settings.out))
    wrong = [sentence for check in result.checks if (sentence := wrong_arm(check))]
    if wrong:
        raise SettingError("; ".join(wrong))


def run(command: list[str], seconds: float, dry: bool, **environment: str) -> tuple[int | None, str]:
    """Runs a command with a time limit.

    Returns:
        Its exit status, None where time ran out, and what it printed until then.
    """
    environment |= {"TRITON_INTERPRET": "1"} if dry else {}
    try:
        done = subprocess.run(command, capture_output=True, timeout=max(1.0, seconds), env=os.environ | environment)
    except subprocess.TimeoutExpired as error:
        return None, f"{(error.stdout or b'').decode(errors='replace')}\nout of time"
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def run_tests(dry: bool) -> PytestOutcome:
    """Runs the tests, of which a CPU has only the first file. Keeps what failed and the last five lines."""
    tests = [str(ROOT / test) for test in TESTS[: 1 if dry else None]]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *tests]
    status, printed = run(command, TEST_SECONDS, dry, **TEST_ENVIRONMENT)
    lines = printed.strip().splitlines()
    failed = [line for line in lines[:-5] if line.startswith("E  ") or " FAILED" in line or " ERROR" in line]
    return PytestOutcome(status, [*failed[:20], *lines[-5:]])


def run_part(name: str, out: Path, seconds: float, dry: bool) -> PartOutcome:
    """Measures one part in a process of its own."""
    command = [sys.executable, __file__, "--out", str(out), "--part", name, *(["--dry"] if dry else [])]
    status, printed = run(command, seconds, dry)
    bench, numbers = out / name / "bench.json", out / name / NUMBERS
    return PartOutcome(
        status,
        read_bench(bench) if bench.exists() else None,
        printed[-1000:] if status else None,
        parse_json(numbers.read_text(encoding="utf-8")) if numbers.exists() else None,
    )


def run_all(names: list[str], out: Path, minutes: float, dry: bool, tests: bool = True) -> GpuResult:
    """Runs the parts for which there is time, and the tests after the first; gpu.json is written after each."""
    end = time.monotonic() + 60 * minutes
    result = GpuResult(dry, PytestOutcome(None, []), {})
    left = []
    for number, name in enumerate(names):
        started = time.monotonic()
        if end - started < LEAST_SECONDS:
            left.append(name)
            continue
        outcome = run_part(name, out, min(PARTS[name].seconds * (3 if dry else 1), end - started), dry)
        result = replace(result, parts=result.parts | {name: outcome})
        count = len(outcome.bench.points) if outcome.bench else len(outcome.numbers or {})
        took = time.monotonic() - started
        print(f"{name}: status {outcome.status}, {count} measured, {took:.0f} s", flush=True)
        if outcome.last:
            print(outcome.last.strip().splitlines()[-1], flush=True)
        if number == 0 and tests:
            result = replace(result, tests=run_tests(dry))
            print(*result.tests.last, sep="\n", flush=True)
        write_gpu(out / "gpu.json", result)
    if left:
        print(f"No time was left for {' '.join(left)}; --no_tests --parts takes them.", flush=True)
    return result


def measured(result: GpuResult) -> bool:
    """Whether every part that was begun measured something, of arms that are right; its time may have run out."""
    return all(passed(part) for part in result.parts.values())


def passed(part: PartOutcome) -> bool:
    some = bool(part.numbers or (part.bench and part.bench.points))
    right = part.bench is None or all(check.passed for check in part.bench.checks)
    return part.status in (0, None) and some and right


def is_green(result: GpuResult) -> bool:
    """Whether layers may run by the fused kernels on this GPU unasked."""
    complete = [name for name, part in result.parts.items() if part.status == 0]
    if result.dry or result.tests.status != 0 or not set(REQUIRED) <= set(complete) or not measured(result):
        return False
    return not gpu_kernels.too_slow(result.parts["ceilings"].numbers, result.parts["kernels"].numbers)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder for the results")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time limit of all, by default {MINUTES:g}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"parts to measure, of {' '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--no_tests", action="store_true", help="leave the tests out")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process, without the tests
    options = parser.parse_args()
    if options.part:
        try:
            measure_part(options.part, options.out, options.dry)
        except SettingError as error:
            print(f"{options.part}: {error}", file=sys.stderr)
            return 2
        return 0
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry runs on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        parser.error(f"out is {options.out}, which holds files; it must be a new or empty folder")
    result = run_all(options.parts, options.out, options.minutes, options.dry, not options.no_tests)
    if not options.dry:
        print(f"green: {'yes' if is_green(result) else 'no'}")
    return 0 if measured(result) and (options.no_tests or result.tests.status == 0) else 1


if __name__ == "__main__":
    sys.exit(main())
