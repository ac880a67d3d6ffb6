"""Fills the tables of serving in docs/benchmarks.md from benchmarks/results/serve-cpu.json.

python benchmarks/serve_tables.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from page_tables import markdown, with_tables
from query_experts.bench.results import BASELINE, Spread
from query_experts.common import formatting as text
from serve_results import Figures, Ratios, ServeResult, read_serve

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
SCRIPT = "benchmarks/serve_tables.py"  # in the markers of its tables
DENSE_ROWS: list[tuple[str, Callable[[Figures], float], int]] = [  # title, figure, digits
    ("seconds to the first token", lambda run: run.seconds_to_first_token, 3),
    ("seconds a token after it", lambda run: run.seconds_a_token, 4),
    ("tokens a second, prompts and answers", lambda run: run.tokens_a_second, 0),
]


def workloads(result: ServeResult) -> list[str]:
    """The headings of the columns."""
    return [
        f"{load.prompt_tokens:,} + {load.new_tokens} tokens, {load.at_a_time} at a time"
        for load in result.workloads.values()
    ]


def dense(result: ServeResult) -> str:
    """The figures of the baseline: medians over the rounds."""
    rows = [["dense Llama", *workloads(result)]]
    for title, figure, digits in DENSE_ROWS:
        medians = [statistics.median(map(figure, runs)) for runs in result.arms[BASELINE].runs.values()]
        rows.append([title, *(f"{median:,.{digits}f}" for median in medians)])
    return markdown(rows)


def against_dense(result: ServeResult, speed: Callable[[Ratios], Spread]) -> str:
    """The speed of each arm relative to dense for each workload: the median of the rounds, and their range."""
    rows = [["arm", *workloads(result)]]
    for arm, by_workload in result.against_dense.items():
        if arm != BASELINE:
            speeds = map(speed, by_workload.values())
            rows.append([f"`{arm}`", *(f"{text.times(s.median)} ({s.low:.2f} to {s.high:.2f})" for s in speeds)])
    return markdown(rows)


def inverse(seconds: Spread) -> Spread:
    """Speeds, given ratios of seconds."""
    return Spread(1 / seconds.median, 1 / seconds.high, 1 / seconds.low)


def room(result: ServeResult) -> str:
    """The number of tokens that the same memory holds."""
    rows = [["arm", f"tokens in {result.cache_bytes / 2**30:g} GiB of cache", "of dense's"]]
    baseline = result.arms[BASELINE].tokens_that_the_cache_holds
    for arm, held in result.arms.items():
        tokens = held.tokens_that_the_cache_holds
        rows.append([f"`{arm}`", f"{tokens:,}", f"{tokens / baseline:.3f}"])
    return markdown(rows)


def setting(result: ServeResult) -> str:
    ran_in, size, baseline = result.environment, result.size, result.arms[BASELINE]
    rounds = len(next(iter(baseline.runs.values())))
    rows = [
        ["what", "held"],
        ["model", f"{baseline.parameters / 1e6:.0f}M parameters, random; {size.num_hidden_layers} layers of hidden "
                  f"size {size.hidden_size}, {size.num_attention_heads} query heads over {size.num_key_value_heads} KV "
                  f"heads of head dim {size.head_dim}, bf16"],
        ["server", f"vLLM for CPUs {ran_in.vllm}, its own benchmark client; {rounds} rounds, a new server for each "
                   "arm and round, the arms taking turns"],
        ["machine", f"{ran_in.hardware}, torch {ran_in.torch}, Transformers {ran_in.transformers}, {ran_in.date}"],
    ]  # fmt: skip
    return markdown(rows)


TABLES: dict[str, Callable[[ServeResult], str]] = {
    "setting": setting,
    "dense": dense,
    "first-token": lambda result: against_dense(result, lambda ratios: inverse(ratios.seconds_to_first_token)),
    "next-token": lambda result: against_dense(result, lambda ratios: inverse(ratios.seconds_a_token)),
    "throughput": lambda result: against_dense(result, lambda ratios: ratios.tokens_a_second),
    "room": room,
}


def filled(page: str) -> str:
    """The page with every table made anew."""
    result = read_serve()
    return with_tables(page, SCRIPT, lambda name: TABLES[name](result))


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
