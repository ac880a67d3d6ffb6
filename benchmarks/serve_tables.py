"""Puts the tables of serving into docs/benchmarks.md from benchmarks/results/serve-cpu.json.

python benchmarks/serve_tables.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from page_tables import markdown, with_tables
from query_experts.common import formatting as text

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "serve-cpu.json"
PAGE = ROOT / "docs" / "benchmarks.md"
SCRIPT = "benchmarks/serve_tables.py"  # in the markers of its tables


def loads(result: dict[str, Any]) -> list[str]:
    """Heads of columns."""
    return [
        f"{load['prompt_tokens']:,} + {load['new_tokens']} tokens, {load['at_a_time']} at a time"
        for load in result["workloads"].values()
    ]


def dense(result: dict[str, Any]) -> str:
    """What the others are held against: medians over the rounds."""
    rows = [["dense Llama", *loads(result)]]
    for title, figure, digits in (
        ("seconds to the first token", "seconds_to_first_token", 3),
        ("seconds a token after it", "seconds_a_token", 4),
        ("tokens a second, prompts and answers", "tokens_a_second", 0),
    ):
        runs = result["arms"]["dense"]["runs"].values()
        rows.append([title, *(f"{statistics.median(run[figure] for run in load):,.{digits}f}" for load in runs)])
    return markdown(rows)


def against_dense(result: dict[str, Any], figure: str, inverse: bool) -> str:
    """For each arm and load: how many times as fast as dense, median and range of the rounds."""
    rows = [["arm", *loads(result)]]
    for arm, held in result["against_dense"].items():
        if arm != "dense":
            cells = []
            for load in held.values():
                median, low, high = load[figure]
                if inverse:
                    median, low, high = 1 / median, 1 / high, 1 / low
                cells.append(f"{text.times(median)} ({low:.2f} to {high:.2f})")
            rows.append([f"`{arm}`", *cells])
    return markdown(rows)


def room(result: dict[str, Any]) -> str:
    """How many tokens the same memory holds."""
    there = {arm: held["tokens_that_the_cache_holds"] for arm, held in result["arms"].items()}
    size = f"tokens in {result['cache_bytes'] / 2**30:g} GiB of cache"
    rows = [["arm", size, "of dense's"]]
    rows += [[f"`{arm}`", f"{tokens:,}", f"{tokens / there['dense']:.3f}"] for arm, tokens in there.items()]
    return markdown(rows)


def setting(result: dict[str, Any]) -> str:
    there, size = result["environment"], result["size"]
    rounds = len(next(iter(result["arms"]["dense"]["runs"].values())))
    rows = [
        ["what", "held"],
        ["model", f"{result['arms']['dense']['parameters'] / 1e6:.0f}M parameters, random; "
                  f"{size['num_hidden_layers']} layers of hidden size {size['hidden_size']}, "
                  f"{size['num_attention_heads']} query heads over {size['num_key_value_heads']} KV heads of head dim "
                  f"{size['head_dim']}, bf16"],
        ["server", f"vLLM for CPUs {there['vllm']}, its own benchmark client; {rounds} rounds, a new server for each "
                   "arm and round, the arms taking turns"],
        ["machine", f"{there['hardware']}, torch {there['torch']}, Transformers "
                    f"{there['transformers']}, {there['date']}"],
    ]  # fmt: skip
    return markdown(rows)


def filled(page: str) -> str:
    """The page with every marked table made anew."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    tables = {
        "setting": setting(result),
        "dense": dense(result),
        "first-token": against_dense(result, "seconds_to_first_token", inverse=True),
        "next-token": against_dense(result, "seconds_a_token", inverse=True),
        "throughput": against_dense(result, "tokens_a_second", inverse=False),
        "room": room(result),
    }
    return with_tables(page, SCRIPT, tables.__getitem__)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
