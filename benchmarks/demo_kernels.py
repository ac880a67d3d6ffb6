"""How far the machine's arithmetic alone moves a run of the demo: one arm and seed, by other kernels and threads.

python benchmarks/demo_kernels.py [--variations NAME ...] [--dtypes float32 ...] [--out runs/kernels]

Finished runs aren't repeated. Writes benchmarks/results/demo-kernels.json, of all runs in `out`. Kernels that the
processor lacks come to the same as the best that it has. Speeds mean something on an idle machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from query_experts.common.files import write_json

RESULT = Path(__file__).resolve().parent / "results" / "demo-kernels.json"
VARIATIONS = {
    "as-it-is": {},
    "one-thread": {"OMP_NUM_THREADS": "1"},
    "onednn-avx512-bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},  # float32 goes through MKL, which it leaves alone
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
KEPT = ("arm", "seed", "validation_loss", "train_tokens", "tokens_per_s", "pieces")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variations", nargs="+", default=["as-it-is", "one-thread", "avx2"], choices=VARIATIONS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"), help="folder for the runs")
    options = parser.parse_args()
    for name in options.variations:
        for dtype in options.dtypes:
            held = {"preset": "demo", "arm": "static", "seed": 0, "dtype": dtype}
            held |= {"out": options.out / f"{name}-{dtype}", "cache_dir": options.out / "cache"}
            subprocess.run(
                [sys.executable, "-m", "query_experts.cli", "train"]
                + [word for setting, value in held.items() for word in (f"--{setting}", str(value))],
                check=True,
                env=os.environ | VARIATIONS[name],
            )
    runs = []
    for name in VARIATIONS:
        for dtype in ("float32", "bfloat16"):
            file = options.out / f"{name}-{dtype}" / "result.json"
            if file.exists():
                result = json.loads(file.read_text(encoding="utf-8"))
                runs.append({"kernels": name, "dtype": dtype, **{field: result[field] for field in KEPT}})
    write_json(RESULT, {"runs": runs})


if __name__ == "__main__":
    main()
