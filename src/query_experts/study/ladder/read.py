"""`query-experts scaling fit` and `scaling report`: what the results so far say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from query_experts.common.errors import SettingError
from query_experts.common.formatting import plural
from query_experts.study.ladder.fit import Fit, fit_ladder
from query_experts.study.ladder.page import write_page
from query_experts.study.ladder.queue import Queue
from query_experts.study.ladder.rates import best_rate, rates_table
from query_experts.study.ladder.results import LadderResult
from query_experts.study.ladder.settings import Ladder, ScalingSettings
from query_experts.study.ladder.sweeps import sweep_tables, swept_values
from query_experts.study.ladder.terminal import print_fit
from query_experts.study.report.table import Table, print_table


def print_laws(settings: ScalingSettings, console: Console) -> None:
    """Prints gaps and laws, and what the sweeps say.

    Raises SettingError for a ladder without results, or with results of something else.
    """
    queue, results = _read(settings)
    own, sweeps = at_own_settings(results), tables_of_sweeps(results, queue.ladder)
    _print(fit_ladder(own, queue.unplanned(own)), sweeps, console)


def at_own_settings(results: Sequence[LadderResult]) -> list[LadderResult]:
    """The results of runs with their rung's own settings, without those of sweeps."""
    return [result for result in results if not result.variant]


def tables_of_sweeps(results: Sequence[LadderResult], ladder: Ladder) -> list[Table]:
    """The best learning rates, and a table for each other setting that was swept."""
    rates = best_rate(results)
    return [*([rates_table(rates)] if rates else []), *sweep_tables(swept_values(results, ladder))]


def report(settings: ScalingSettings, console: Console) -> None:
    """Writes a page with the ladder's name into `out`, and prints the same; raises as `print_laws`."""
    queue, results = _read(settings)
    own, sweeps = at_own_settings(results), tables_of_sweeps(results, queue.ladder)
    fit = fit_ladder(own, queue.unplanned(own))
    page = Path(settings.out) / f"{queue.name}.html"
    write_page(own, fit, page, missing_words(queue), sweeps, queue.name, text_words(queue, results))
    _print(fit, sweeps, console)
    console.print(Text(f"Page: {page}"))


def _print(fit: Fit, sweeps: Sequence[Table], console: Console) -> None:
    if fit.cells:
        print_fit(fit, console)
    for table in sweeps:
        print_table(table, console)


def text_words(queue: Queue, results: Sequence[LadderResult]) -> list[str]:
    """The text that the results were trained and validated on, and the hashes of its tokens, a line each."""
    hashes = [*dict.fromkeys(result.data_hash for result in results)]
    return [
        f"Text: {', '.join(queue.ladder.data)}",
        f"Held out: {', '.join(queue.ladder.validation)}",
        f"data_hash of the tokens: {', '.join(hashes)}",
    ]


def missing_words(queue: Queue) -> list[str]:
    """What a ladder still has to run, a line for each rung and arm."""
    counts = Counter((run.rung, run.variant, run.arm) for run in queue.missing())
    return [f"{' '.join(filter(None, key))}: {plural(count, 'run')}" for key, count in counts.items()]


def _read(settings: ScalingSettings) -> tuple[Queue, list[LadderResult]]:
    settings.check()
    queue = Queue.read(Path(settings.ladder))
    results = queue.results()
    if not results:
        raise SettingError(f"ladder is {queue.file}, in whose results no run has finished yet; it must hold one")
    return queue, results
