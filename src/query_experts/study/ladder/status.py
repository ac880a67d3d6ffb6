"""`query-experts scaling status`: what is done, running and missing, and about how many core-hours it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from query_experts.common.files import parse_json
from query_experts.common.formatting import short
from query_experts.study.ladder.callbacks import PROGRESS, Progress
from query_experts.study.ladder.queue import Queue, Rates
from query_experts.study.ladder.results import LadderResult
from query_experts.study.ladder.settings import Run, ScalingSettings
from query_experts.study.ladder.worker import run_folder, run_lock


@dataclass(frozen=True)
class Row:
    """The state of the runs of one rung, variant and arm."""

    rung: str
    arm: str
    tokens: int
    done: int
    diverged: int
    running: list[str]
    missing: int
    tokens_per_s: float | None
    hours_done: float
    hours_left: float | None


def print_status(settings: ScalingSettings, console: Console) -> None:
    """Prints a row for each rung and arm. Raises SettingError for a ladder or results that can't be used."""
    settings.check()
    queue = Queue.read(Path(settings.ladder), settings.only)
    rows = status(queue, Path(settings.out))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="bold",
                  title=f"Ladder {queue.name}")  # fmt: skip
    for heading in ("rung", "arm", "tokens", "done", "running", "missing", "tok/s", "about hours", "about left"):
        justify = "left" if heading in ("rung", "arm", "running") else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading == "arm")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            row.rung, row.arm, short(row.tokens), f"{row.done}" + f" ({row.diverged} diverged)" * bool(row.diverged),
            "; ".join(row.running), str(row.missing), _number(row.tokens_per_s, ",.0f"),
            f"{row.hours_done:.2f}", _number(row.hours_left, ".2f"),
        )  # fmt: skip
    console.print(table)
    unknown = {row.rung for row in rows if row.hours_left is None}
    left = sum(row.hours_left or 0 for row in rows)
    more = f", and rungs {', '.join(sorted(unknown))}, whose rate isn't known" if unknown else ""
    console.print(
        Text(
            f"{sum(row.done for row in rows)} runs done in about {sum(row.hours_done for row in rows):.1f} core-hours; "
            f"{sum(row.missing for row in rows)} missing, about {left:.1f} core-hours at the measured rates{more}. "
            "A core is a worker: one thread, or one GPU."
        )
    )


def status(queue: Queue, out: Path) -> list[Row]:
    """A row for each rung, variant and arm, in the order of the plan."""
    results, missing = queue.results(), queue.missing()
    rates = Rates(queue, results)
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in queue.runs:
        groups.setdefault((run.rung, run.variant, run.arm), []).append(run)
    return [_row(queue, out, rates, {run: missing.get(run, []) for run in runs}, results) for runs in groups.values()]


def _row(queue: Queue, out: Path, rates: Rates, lacking: dict[Run, list[float]], results: list[LadderResult]) -> Row:
    """lacking: the runs of the row, with the budgets that they lack."""
    first, budgets = next(iter(lacking)), queue.ladder.budgets
    settings = queue.ladder.run_settings(first)
    own = [r for r in results if (r.rung, r.variant, r.arm) == (first.rung, first.variant, first.arm)]
    running = [run for run in lacking if lacking[run] and is_locked(run_lock(queue, run))]
    left = [rates.seconds(run, lacking[run]) for run in lacking]
    done = [rates.seconds(run, [b for b in budgets if b not in lacking[run]]) for run in lacking]
    return Row(
        rung=" ".join(filter(None, [first.rung, first.variant])),
        arm=first.arm,
        tokens=settings.steps * settings.tokens_per_step,
        done=sum(not lacking[run] for run in lacking),
        diverged=len({r.seed for r in own if r.diverged}),
        running=[running_text(queue, out, rates, run, lacking[run]) for run in running],
        missing=sum(bool(lacking[run]) for run in lacking) - len(running),
        tokens_per_s=rates.tokens_per_s(first) if own else None,
        hours_done=sum(seconds or 0 for seconds in done) / 3600,
        hours_left=None if None in left else sum(seconds or 0 for seconds in left) / 3600,
    )


def is_locked(lock: FileLock) -> bool:
    """Whether a living process holds a lock."""
    if not Path(lock.lock_file).exists():
        return False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def running_text(queue: Queue, out: Path, rates: Rates, run: Run, lacking: list[float]) -> str:
    """A running run: seed, how much of its training is done, and the time that is left."""
    settings, ladder = queue.ladder.run_settings(run), queue.ladder
    try:
        progress = Progress(**parse_json((run_folder(out, queue, run) / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        progress = Progress(lacking[0], 0)
    budget, step = progress.budget, progress.step
    trained = ladder.share_trained([b for b in ladder.budgets if b < budget])
    trained += max(0.0, step / settings.steps - ladder.stable_before(budget))
    text = f"seed {run.seed} {trained / ladder.share_trained(ladder.budgets):.0%}"
    seconds, rate = rates.seconds(run, [b for b in lacking if b > budget]), rates.tokens_per_s(run)
    if seconds is None or rate is None:
        return text
    seconds += (budget * settings.steps - step) * settings.tokens_per_step / rate
    return f"{text}, {seconds / 60:.0f} min left"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
