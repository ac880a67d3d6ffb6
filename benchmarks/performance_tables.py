"""Puts the tables of speed into docs/ from benchmarks/results/, and their plots into docs/plots/.

python benchmarks/performance_tables.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from page_tables import markdown, with_tables
from query_experts import GQEConfig
from query_experts.bench.report import speedup, write_plot
from query_experts.common import formatting as text
from query_experts.model import costs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "performance.md")
SCRIPT = "benchmarks/performance_tables.py"  # in the markers of its tables
SUITES = {  # table -> its suite, and the result files that hold it
    "prefill": ("prefill", "bench-cpu"),
    "chunk": ("chunk", "bench-cpu"),
    "train": ("train", "bench-cpu"),
    "decode": ("decode", "bench-cpu-decode"),
    "decode-short": ("decode", "bench-cpu-decode-short"),
    "wide": ("prefill", "bench-cpu-wide"),
    "model": ("model", "bench-cpu-model", "bench-cpu-model-long"),
    "gpu-prefill": ("prefill", "bench-h100-prefill-flash"),
    "gpu-prefill-graph": ("prefill", "bench-h100-prefill-graph"),
    "gpu-prefill-cudnn": ("prefill", "bench-h100-prefill-cudnn"),
    "gpu-prefill-flex": ("prefill", "bench-h100-prefill-flex"),
    "gpu-wide": ("prefill", "bench-h100-wide"),
    "gpu-chunk": ("chunk", "bench-h100-chunk"),
    "gpu-train": ("train", "bench-h100-train"),
    "gpu-model": ("model", "bench-h100-model"),
    "gpu-model-train": ("model-train", "bench-h100-model"),
    "gpu-decode": ("decode", "bench-h100-decode-fused"),
}
GPU_PLOT = ("bench-h100-prefill-flash", "bench-h100-train", "bench-h100-model", "bench-h100-decode-fused")
GPU_DECODE = {
    "eager": "bench-h100-decode",
    "graph": "bench-h100-decode-graph",
    "graph, fused": "bench-h100-decode-fused",
}
LENGTHS = [2048, 8192, 32768, 131072]
PAYS = 1.1
SHAPES = {  # as their published configurations give them: D, N, G, d, F, layers, vocabulary, tied
    "the paper's 250M": (1024, 16, 8, 64, 2816, 16, 32_000, False),
    "SmolLM2-360M": (960, 15, 5, 64, 2560, 32, 49_152, True),
    "Qwen3-0.6B": (1024, 16, 8, 128, 3072, 28, 151_936, True),
    "Llama-3.2-1B": (2048, 32, 8, 64, 8192, 16, 128_256, True),
    "Llama-3.1-8B": (4096, 32, 8, 128, 14_336, 32, 128_256, False),
}


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def speeds(suite: str, *names: str) -> str:
    """A row for each point and arm: dense's time, speed against it with its range, predicted, share, peak memory."""
    rows = [["tokens", "arm", "time", "speed (range of repeats)", "predicted", "share of it", "peak memory"]]
    for point in [point for name in names for point in result(name)["points"]]:
        if point["suite"] != suite:
            continue
        place = text.length_name(point["length"])
        if suite == "decode":
            place += f", batch {point['batch']}, {point['cache']} cache"
        for arm, seconds in point["seconds"].items():
            row = [place if arm == "dense" else "", f"`{arm}`", text.duration(statistics.median(seconds))]
            if arm == "dense":
                row += [text.DASH] * 3
            else:
                median, low, high = speedup(point, arm)
                expected = point["predicted"][arm]
                row += [
                    f"{text.times(median)} ({low:.2f} to {high:.2f})",
                    text.times(expected),
                    f"{median / expected:.0%}",
                ]
            rows.append([*row, f"{text.short(point['peak_bytes'][arm])}B"])
    return markdown(rows)


def parts(name: str = "bench-cpu") -> str:
    """Median time of each stage of the gqe layer and its share of the whole layer."""
    points = [point for point in result(name)["points"] if point["suite"] == "parts"]
    rows = [["stage", *(f"{text.length_name(point['length'])} tokens" for point in points)]]
    for stage in points[0]["seconds"]:
        cells = []
        for point in points:
            median, whole = (statistics.median(point["seconds"][name]) for name in (stage, "layer"))
            cells.append(f"{text.duration(median)} ({median / whole:.1%})")
        rows.append([stage, *cells])
    return markdown(rows)


def gpu_decode_ways() -> str:
    """Speed of `gqe` over dense in decoding: eager, as a CUDA graph, and as one with the fused kernel."""
    held = {way: result(name)["points"] for way, name in GPU_DECODE.items()}
    rows = [["cached tokens", "batch", *held]]
    for points in zip(*held.values(), strict=True):
        cells = [
            f"{text.times(median)} ({low:.2f} to {high:.2f})"
            for median, low, high in (speedup(point, "gqe") for point in points)
        ]
        rows.append([text.length_name(points[0]["length"]), str(points[0]["batch"]), *cells])
    return markdown(rows)


def shapes() -> str:
    """What FLOPs alone allow for whole models of known shapes, and from which length prefill gains a tenth."""
    rows = [["shape", "N/(kG+1)", *(f"{text.length_name(n)} tokens" for n in LENGTHS), f"{PAYS:.1f}{text.TIMES} from"]]
    for name, (D, N, G, d, F, layers, vocabulary, tied) in SHAPES.items():
        shape = {"hidden_size": D, "num_attention_heads": N, "num_key_value_heads": G, "head_dim": d,
                 "intermediate_size": F, "num_hidden_layers": layers, "vocab_size": vocabulary,
                 "tie_word_embeddings": tied}  # fmt: skip
        dense, gqe = LlamaConfig(**shape), GQEConfig(**shape)

        def gain(length: int, dense: Any = dense, gqe: Any = gqe) -> float:
            return costs.model_work(dense, 1, length).flops / costs.model_work(gqe, 1, length).flops

        first = next(n for n in (2**power for power in range(8, 24)) if gain(n) >= PAYS)
        limit = costs.attention_limit(gqe, dense)
        rows.append([name, *map(text.times, [limit, *map(gain, LENGTHS)]), f"{text.length_name(first)} tokens"])
    return markdown(rows)


def where() -> str:
    """Hardware, versions and repeats of each result file."""
    rows = [["file", "hardware", "torch", "Transformers", "repeats", "date"]]
    files = {file for _, *files in SUITES.values() for file in files}
    for name in sorted({*files, *GPU_DECODE.values(), "bench-h100-parts"}):
        held, ran = result(name), result(name)["environment"]
        link = f"[{name}.json](../benchmarks/results/{name}.json)"
        rows.append(
            [link, ran["hardware"], ran["torch"], ran["transformers"], str(held["settings"]["repeats"]), ran["date"]]
        )
    return markdown(rows)


def woken() -> str:
    """How many times faster a one-token step gets by projecting the woken alone."""
    rows = [["experts in a group", "times as fast (range of repeats)", "the same over dense"]]
    for point in result("woken-cpu")["points"]:
        seconds = point["seconds"]
        cells = [str(point["experts_per_group"])]
        for base in ("all", "dense"):
            ratios = [other / own for other, own in zip(seconds[base], seconds["woken"], strict=True)]
            cells.append(f"{text.times(statistics.median(ratios))} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows.append(cells)
    return markdown(rows)


def filled(page: str) -> str:
    """The page with every table anew."""
    tables = {
        "parts": parts,
        "shapes": shapes,
        "where": where,
        "selected-only": woken,
        "gpu-decode-ways": gpu_decode_ways,
    }
    tables["gpu-parts"] = lambda: parts("bench-h100-parts")
    return with_tables(page, SCRIPT, lambda name: tables[name]() if name in tables else speeds(*SUITES[name]))


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    write_plot(result("bench-cpu"), ROOT / "docs" / "plots")
    points = [point for name in GPU_PLOT for point in result(name)["points"] if point["suite"] != "model-train"]
    write_plot({"points": points}, ROOT / "docs" / "plots", "bench-h100")


if __name__ == "__main__":
    main()
