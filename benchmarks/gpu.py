"""One command for a GPU, under ten minutes: its tests, then the sweep of `query-experts bench` kernel by kernel.

    python benchmarks/gpu.py --out runs/gpu              # on a machine with a GPU; PYTHONPATH=src without installing
    python benchmarks/gpu.py --out runs/gpu-dry --dry    # the same calls on a CPU, tiny: shows that they run

Each part is a process of its own, so that one which fails leaves the others, and has what is left of the time, so that
all of it ends; a part that is cut off keeps the points that it had measured. Everything ends up in OUT/gpu.json, the
tests' last lines included, and each part's plot in a folder of its name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MINUTES = 9.5
LONG = [4096, 16384, 32768, 65536, 131072, 262144, 524288, 1048576]
PREFILL = ["--suites", "prefill", "--repeats", "3", "--lengths"]
DECODE = ["--suites", "decode", "--repeats", "9", "--caches", "static", "--batch_sizes", "1", "8", "32",
          "--cached_lengths", "1024", "4096", "16384", "65536"]  # fmt: skip
GRAPH = ["--cuda_graph", "True"]
PARTS = {  # name -> options of `query-experts bench`, most wanted first
    "prefill-flash": [*PREFILL, *map(str, LONG[:6]), "--sdpa_backend", "flash"],
    "prefill-graph": [*PREFILL, "1024", *map(str, LONG[:3]), "--sdpa_backend", "flash", *GRAPH],
    "decode": DECODE,
    "decode-graph": [*DECODE, *GRAPH],
    "decode-fused": [*DECODE, "--fused_decode", "True", *GRAPH],
    "train": ["--suites", "train", "--repeats", "5", "--train_lengths", "2048", "8192", "32768"],
    "model": ["--suites", "model", "model-train", "--repeats", "3", "--lengths", "4096", "16384", "65536", "131072",
              "--train_lengths", "2048"],
    "prefill-cudnn": [*PREFILL, *map(str, LONG[:5]), "--sdpa_backend", "cudnn"],
    "prefill-flex": [*PREFILL, *map(str, LONG[:4]), "--attn_implementation", "flex_attention"],
    "parts": ["--suites", "parts", "--repeats", "5", "--lengths", "8192", "65536"],
    "wide": [*PREFILL, "16384", "65536", "--num_attention_heads", "32"],
    "chunk": ["--suites", "chunk", "--repeats", "3", "--chunk_size", "8192", "--cached_lengths", *map(str, LONG[3:])],
    "prefill-long": [*PREFILL, *map(str, LONG[6:]), "--sdpa_backend", "flash"],
    "decode-compiled": [*DECODE[:-2], "--compile", "True"],
}  # fmt: skip
TINY = ["--preset", "tiny", "--device", "cpu", "--repeats", "1"]


def dry(options: list[str]) -> list[str]:
    """The part's suites, caches, kernels and compiling with the tiny preset's sizes; a CPU has flash and no cuDNN."""
    kept: list[str] = []
    name = ""
    for word in options:
        name = word if word.startswith("--") else name
        if name in ("--suites", "--caches", "--attn_implementation", "--sdpa_backend", "--fused_decode", "--compile"):
            kept.append("flash" if word == "cudnn" else word)
    return [*TINY, *kept]


def run(command: list[str], seconds: float, dry: bool) -> tuple[int | None, str]:
    """Exit status, None where it was cut off, and the last lines of what it printed."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds), env=environment)
    except subprocess.TimeoutExpired:
        return None, "cut off"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        parser.error(f"out is {options.out}, which holds files; it must be a new or empty folder")
    result: dict = {"dry": options.dry, "tests": None, "parts": {}}

    def keep() -> None:
        (options.out / "gpu.json").write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")

    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
        "tests/ops/test_fused_decode.py",
    ]
    status, said = run(tests, 180, options.dry)
    result["tests"] = {"status": status, "last": said.strip().splitlines()[-5:]}
    print(*result["tests"]["last"], sep="\n", flush=True)
    keep()
    for name in options.parts:
        folder = options.out / name
        wanted = dry(PARTS[name]) if options.dry else ["--device", "cuda", *PARTS[name]]
        started = time.monotonic()
        status, said = run(
            [sys.executable, "-m", "query_experts.cli", "bench", "--out", str(folder), *wanted],
            end - started,
            options.dry,
        )
        found = folder / "bench.json"
        measured = json.loads(found.read_text(encoding="utf-8")) if found.exists() else None
        result["parts"][name] = {"status": status, "bench": measured} | ({"last": said[-1000:]} if status else {})
        points = len(measured["points"]) if measured else 0
        print(f"{name}: status {status}, {points} points, {time.monotonic() - started:.0f} s", flush=True)
        keep()
    parts = result["parts"].values()
    failed = any(part["status"] not in (0, None) or not (part["bench"] or {}).get("points") for part in parts)
    return 1 if failed or result["tests"]["status"] != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
