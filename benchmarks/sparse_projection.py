"""From how many experts a group on it pays to project the woken ones alone, for one token: decides SPARSE_FROM.

python benchmarks/sparse_projection.py    # on an idle machine; writes benchmarks/results/woken-cpu.json
"""

from __future__ import annotations

import statistics
from pathlib import Path

from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings
from query_experts.common.environment import environment
from query_experts.common.files import write_json
from query_experts.common.timing import time_interleaved
from query_experts.ops import select

RESULT = Path(__file__).resolve().parent / "results" / "woken-cpu.json"
CACHED, REPEATS = 4096, 15


def main() -> None:
    points = []
    for heads in (16, 32, 64, 128):
        settings = BenchSettings(device="cpu", num_attention_heads=heads)
        calls = {}
        for name, layers_arm in (("dense", "dense"), ("all", "gqe"), ("woken", "gqe")):
            layer = Layer(settings, layers_arm, "cpu", CACHED + 1)
            if name != "dense":
                select.reads_selected_rows = lambda *_, alone=name == "woken": alone
            calls[name] = layer.cached("static", 1, CACHED, 1)
        seconds = time_interleaved(calls, REPEATS, "cpu")
        ratios = [whole / alone for whole, alone in zip(seconds["all"], seconds["woken"], strict=True)]
        points.append({"experts_per_group": heads // settings.num_key_value_heads, "seconds": seconds})
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"M = {heads // 8}: the woken alone {spread} times as fast")
    where = environment("cpu", "bfloat16")
    write_json(RESULT, {"cached": CACHED, "sparse_from": select.SPARSE_FROM, "environment": where, "points": points})


if __name__ == "__main__":
    main()
