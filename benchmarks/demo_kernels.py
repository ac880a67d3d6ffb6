"""How far the processor's kernels alone move a run of the demo: one arm and seed by each instruction set of oneDNN.

python benchmarks/demo_kernels.py [--sets SET ...] [--out runs/kernels] [--result FILE]

Finished runs aren't repeated. Writes benchmarks/results/demo-kernels.json, if nothing else is said. Sets that the
processor lacks come to the same as the best that it has. Speeds mean something on an idle machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from query_experts.files import write_json

RESULT = Path(__file__).resolve().parent / "results" / "demo-kernels.json"
SETS = ("DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"), help="folder for the runs")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS, help="oneDNN's names")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    out = options.out
    runs = []
    for instructions in options.sets:
        for dtype in ("bfloat16", "float32"):
            folder = out / f"{instructions}-{dtype}"
            held = {"preset": "demo", "arm": "static", "seed": 0, "dtype": dtype, "out": folder}
            held["cache_dir"] = out / "cache"
            words = [word for name, value in held.items() for word in (f"--{name}", str(value))]
            subprocess.run(
                [sys.executable, "-m", "query_experts.cli", "train", *words],
                check=True,
                env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions},
            )
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            kept = ("arm", "seed", "validation_loss", "train_tokens", "tokens_per_s", "pieces")
            runs.append({"instructions": instructions, "dtype": dtype, **{name: result[name] for name in kept}})
    write_json(options.result, {"runs": runs})


if __name__ == "__main__":
    main()
