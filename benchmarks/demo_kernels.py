"""Measures how much kernels and threads change the loss of a run of the demo, with one arm and one seed.

python benchmarks/demo_kernels.py [--variations NAME ...] [--dtypes float32 ...] [--out runs/kernels]

Finished runs aren't repeated. Writes all runs in `out` to benchmarks/results/demo-kernels.json. A processor without
some kernels uses the best that it has. Speeds are meaningful only on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from query_experts.common.files import write_json
from query_experts.study.results import Piece, read_result

RESULT = Path(__file__).resolve().parent / "results" / "demo-kernels.json"
DTYPES = ("float32", "bfloat16")
VARIATIONS = {
    "as-it-is": {},
    "one-thread": {"OMP_NUM_THREADS": "1"},
    "onednn-avx512-bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},  # not of float32, which MKL computes
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}


@dataclass(frozen=True)
class KernelRun:
    """One run, with the names of its kernels and its dtype."""

    kernels: str
    dtype: str
    arm: str
    seed: int
    validation_loss: float | None
    train_tokens: int
    tokens_per_s: float
    pieces: list[Piece]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variations", nargs="+", default=["as-it-is", "one-thread", "avx2"], choices=VARIATIONS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"), help="folder for the runs")
    options = parser.parse_args()
    for name in options.variations:
        for dtype in options.dtypes:
            train(options.out, name, dtype)
    runs = [dataclasses.asdict(run) for run in finished_runs(options.out)]
    write_json(RESULT, {"runs": runs})


def train(out: Path, name: str, dtype: str) -> None:
    settings = {"preset": "demo", "arm": "static", "seed": 0, "dtype": dtype}
    settings |= {"out": out / f"{name}-{dtype}", "cache_dir": out / "cache"}
    words = [word for setting, value in settings.items() for word in (f"--{setting}", str(value))]
    subprocess.run(
        [sys.executable, "-m", "query_experts.cli", "train", *words], check=True, env=os.environ | VARIATIONS[name]
    )


def finished_runs(out: Path) -> list[KernelRun]:
    files = {(name, dtype): out / f"{name}-{dtype}" / "result.json" for name in VARIATIONS for dtype in DTYPES}
    results = {key: read_result(file) for key, file in files.items() if file.exists()}
    return [
        KernelRun(
            kernels=name,
            dtype=dtype,
            arm=result.arm,
            seed=result.seed,
            validation_loss=result.validation_loss,
            train_tokens=result.train_tokens,
            tokens_per_s=result.tokens_per_s,
            pieces=result.pieces,
        )
        for (name, dtype), result in results.items()
    ]


if __name__ == "__main__":
    main()
