"""Fills the tables of README.md and docs/results.md from the results of the ladder and its sweeps, and draws its plot.

python benchmarks/ladder_tables.py    # dev/ladder.sh harvest runs it too
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from page_tables import markdown, with_tables
from query_experts.common import formatting as text
from query_experts.common.plots import save
from query_experts.study.ladder.charts import gap_figure
from query_experts.study.ladder.fit import fit_ladder
from query_experts.study.ladder.gaps import BASELINES, RANDOM, ArmCell, Cell, Gap, cells_of
from query_experts.study.ladder.rates import best_rate, excess
from query_experts.study.ladder.read import at_own_settings
from query_experts.study.ladder.results import LadderResult, read_files
from query_experts.study.ladder.settings import Ladder, parameters_without_embeddings, read_ladder
from query_experts.study.ladder.sweeps import swept_values
from query_experts.study.ladder.tables import difference_text
from query_experts.study.statistics import paired_difference

ROOT = Path(__file__).resolve().parent.parent
LADDERS = ROOT / "benchmarks" / "ladder"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
PLOTS = ROOT / "docs" / "plots"
SCRIPT = "benchmarks/ladder_tables.py"  # in the markers of its tables
PAIRS = (  # without and with routing
    ("static", "dense"), ("half", "dense"), ("half", "static"),
    ("gqe", "dense"), ("gqe", "static"), ("gqe", "half"), ("gqe-m4", "dense"), ("gqe-m4", "static"), ("gqe-m4", "half"),
)  # fmt: skip
FURTHER = ("gqe-m8", "gqe-expert", "hard")  # against static, where their fewer seeds have finished
NOTHING = "No rung is complete yet, so nothing is known."
SHORT_WARMUP = ("warmup", "warmup-d96")  # ladders
AGAINST = ("static", "half", "dense")  # the first two have fewer heads, as routed arms have active
JUDGED = {"gqe": AGAINST, "gqe-m4": AGAINST, "static": ("dense",), "half": ("dense",)}
OUTCOMES = {"lower": "wins", "higher": "loses", "not known": "not known"}


def ladder_of(name: str) -> tuple[Ladder, list[LadderResult]]:
    """A committed ladder and its results; none where its folder isn't there yet."""
    file = LADDERS / f"{name}.yaml"
    ladder = read_ladder(file)
    folder = file.parent / ladder.results
    return ladder, read_files(known_to_git(folder)) if folder.is_dir() else []


def known_to_git(folder: Path) -> list[Path]:
    """The results of a folder that are committed or are about to be; all of them outside of a repository.

    So a result that has just been written changes no page before it is committed.
    """
    files = sorted(folder.glob("*.json"))
    git = subprocess.run(["git", "ls-files", "-z", "--", "*.json"], cwd=folder, capture_output=True, text=True)
    known = {*git.stdout.split("\0")}
    return files if git.returncode else [file for file in files if file.name in known]


def all_cells(name: str) -> list[Cell]:
    return cells_of(at_own_settings(ladder_of(name)[1]))


def line(cell: str) -> str:
    """A cell of several lines in one."""
    return " ".join(cell.splitlines())


def loss(losses: Sequence[float], mean: float | None, diverged: int = 0) -> str:
    """The mean, and the range over seeds; how many diverged and are left out."""
    left_out = f", {diverged} diverged" if diverged else ""
    if mean is None:
        return text.MISSING + left_out
    return f"{mean:.3f} ({min(losses):.3f} to {max(losses):.3f}){left_out}"


def shapes() -> str:
    """Dense against half at each shape."""
    rows = [["shape", "heads times head dim over width", "`dense`", "`half`", "`half` - `dense`"]]
    ladder, _ = ladder_of("shapes")
    for cell in all_cells("shapes"):
        sizes = ladder.rungs[cell.rung]
        share = sizes["num_attention_heads"] * sizes["head_dim"] / sizes["hidden_size"]
        losses = [loss([*own.losses.values()], own.mean) for own in (cell.arms["dense"], cell.arms["half"])]
        rows.append([f"`{cell.rung}`", f"{share:.2g}", *losses, line(difference_text(cell.gap("half", "dense")))])
    return markdown(rows)


def rates() -> str:
    """The best learning rate of each arm, the loss at every rate, and what the ladder's own rate costs."""
    found = best_rate(ladder_of("rates")[1])
    rungs = ladder_of("cpu")[0].rungs
    grid = sorted({rate for each in found for rate in each.rates})
    rows = [["rung", "arm", *(f"{rate:g}" for rate in grid), "optimum", "by seed", "the ladder's rate"]]
    for each in found:
        losses = [f"{each.losses[rate]:.3f}" if rate in each.losses else text.MISSING for rate in grid]
        seeds = ", ".join(optimum(rate) for rate in each.by_seed.values())
        own = rungs[each.rung]["learning_rate"]
        above = excess(each, own)
        cost = text.MISSING if above is None else f"{own:g}: +{above:.3f}"
        rows.append([each.rung, f"`{each.arm}`", *losses, optimum(each.optimum), seeds, cost])
    return markdown(rows)


def optimum(rate: float | None) -> str:
    return f"{rate:.2g}" if rate is not None else "outside"


def balance() -> str:
    """The loss of gqe at each weight of the balance loss."""
    rows = [["weight of the balance loss", "`gqe`, smallest rung"]]
    ladder, results = ladder_of("rates")
    for each in swept_values(results, ladder):
        rows.append([f"{each.value:g}", loss([*each.losses.values()], each.mean)])
    return markdown(rows)


def planned(ladder: Ladder, rung: str, arm: str) -> set[int]:
    """The seeds of an arm at a rung."""
    return {run.seed for run in ladder.runs() if (run.rung, run.arm) == (rung, arm) and not run.varied}


def done() -> str:
    """How many seeds of each rung and arm have finished, of those that are planned."""
    ladder, results = ladder_of("cpu")
    arms = ladder.arms()
    rows = [["rung", "parameters", "tokens", *(f"`{arm}`" for arm in arms)]]
    for rung in ladder.rungs:
        settings = ladder.run_settings(next(run for run in ladder.runs() if run.rung == rung))
        tokens = settings.steps * settings.tokens_per_step
        counts = []
        for arm in arms:
            own = {r.seed: r for r in results if (r.rung, r.arm, r.variant, r.budget) == (rung, arm, "", 1)}
            seeds = planned(ladder, rung, arm)
            diverged = sum(own[seed].diverged for seed in seeds & {*own})
            count = f"{len(seeds & {*own})} of {len(seeds)}" + (f", {diverged} diverged" if diverged else "")
            counts.append(count if seeds else text.DASH)
        parameters = parameters_without_embeddings(settings.model_size())
        rows.append([rung, text.short(parameters), text.short(tokens), *counts])
    return markdown(rows)


def complete_cells() -> list[Cell]:
    """Rungs and budgets at which every planned seed of the main arms has finished, the smallest first."""
    ladder, _ = ladder_of("cpu")
    main = ladder.plan[0].arms
    return [
        cell for cell in all_cells("cpu")
        if cell.rung in ladder.rungs and all(is_complete(ladder, cell, arm) for arm in main)
    ]  # fmt: skip


def is_complete(ladder: Ladder, cell: Cell, arm: str) -> bool:
    """Whether every planned seed of an arm has finished there, diverged ones among them."""
    own = cell.arms.get(arm)
    return own is not None and planned(ladder, cell.rung, arm) <= {*own.losses, *own.diverged}


def gaps() -> str:
    """Paired differences at every complete rung, a column for each budget."""
    cells = complete_cells()
    if not cells:
        return NOTHING
    budgets = ladder_of("cpu")[0].budgets
    rows = [["rung", "difference", *(f"{budget:.0%} of the tokens" for budget in budgets)]]
    for rung in dict.fromkeys(cell.rung for cell in cells):
        own = {cell.budget: cell for cell in cells if cell.rung == rung}
        for arm, base in [*PAIRS, *further_pairs(own)]:
            found = [line(difference_text(own[at].gap(arm, base) if at in own else None)) for at in budgets]
            rows.append([rung, f"`{arm}` - `{base}`", *found])
    return markdown(rows)


def further_pairs(cells: Mapping[float, Cell]) -> list[tuple[str, str]]:
    """The pairs of arms that have fewer seeds, once these have finished."""
    ladder, _ = ladder_of("cpu")
    pairs = [("gqe", RANDOM), *((arm, "static") for arm in FURTHER)]
    return [(arm, base) for arm, base in pairs
            if all(is_complete(ladder, cell, name) for cell in cells.values() for name in (arm, base))]  # fmt: skip


def largest() -> str:
    """The arms of the largest complete rung, trained on all of its tokens."""
    whole = [cell for cell in complete_cells() if cell.budget == 1]
    if not whole:
        return NOTHING
    cell, results = whole[-1], ladder_of("cpu")[1]
    head = ["arm", "active heads", "active parameters", "FLOPs", "validation loss (range)"]
    rows = [[*head, *(f"against `{base}`" for base in BASELINES)]]
    for arm in ladder_of("cpu")[0].plan[0].arms:
        own = cell.arms[arm]
        first = next(result for result in results if (result.rung, result.arm) == (cell.rung, arm))
        active = text.short(first.active_parameters - first.embedding_parameters)
        counts = [str(own.active_heads), active, f"{text.short(own.flops)} ({text.short(own.active_flops)})"]
        gaps = [line(difference_text(cell.gap(arm, base))) for base in BASELINES]
        rows.append([f"`{arm}`", *counts, loss([*own.losses.values()], own.mean, len(own.diverged)), *gaps])
    parameters, tokens = cell.size
    return (
        f"{markdown(rows)}\n\nRung {cell.rung}: {text.short(parameters)} parameters, {text.short(tokens)} tokens. "
        "Parameters: without embeddings. FLOPs: of training as run (without discarded queries and recomputed scores). "
        f"**{' '.join(says(cell, base) for base in AGAINST)}** *Not known*: the interval holds zero."
    )


def says(cell: Cell, base: str) -> str:
    """What a rung says of the arms against a baseline, without numbers."""
    judged = [arm for arm, bases in JUDGED.items() if base in bases]
    return f"Against `{base}`: {', '.join(f'`{arm}` {outcome(cell.gap(arm, base))}' for arm in judged)}."


def outcome(gap: Gap | None) -> str:
    return OUTCOMES[gap.known] if has_interval(gap) else "too few pairs"


def has_interval(gap: Gap | None) -> TypeGuard[Gap]:
    return gap is not None and gap.has_interval


def verdicts() -> str:
    """What is known at every complete rung, trained on all of its tokens."""
    whole = [cell for cell in complete_cells() if cell.budget == 1]
    if not whole:
        return NOTHING
    rows = [["rung", "arm", *(f"against `{base}`" for base in AGAINST)]]
    for cell in whole:
        for arm, bases in JUDGED.items():
            found = [verdict(cell.gap(arm, base)) if base in bases else text.MISSING for base in AGAINST]
            rows.append([cell.rung, f"`{arm}`", *found])
    return markdown(rows)


def verdict(gap: Gap | None) -> str:
    """What a difference says, in words, with its mean and interval."""
    if not has_interval(gap) or gap.difference is None:
        return outcome(None)
    paired = gap.difference
    return f"{outcome(gap)}, {text.signed(paired.mean)} {text.interval(paired.low, paired.high)}"


def warmups() -> Iterator[tuple[str, Ladder, Cell, Cell]]:
    """Rungs that were trained with a short warm-up too: the name, that ladder, and what was found with each warm-up.

    Those with three seeds of an arm or more.
    """
    own = {cell.rung: cell for cell in complete_cells() if cell.budget == 1}
    for name in SHORT_WARMUP:
        for short in all_cells(name):
            if short.budget == 1 and short.rung in own and any(arm.counts for arm in short.arms.values()):
                yield short.rung, ladder_of(name)[0], short, own[short.rung]


def warmup() -> str:
    """The loss with a warm-up of a tenth of the smallest budget, and with the ladder's own."""
    rows = [["rung", "arm", "short warm-up", "the ladder's", "the ladder's minus short"]]
    for rung, ladder, short, now in warmups():
        steps = [warmup_steps(each, rung) for each in (ladder, ladder_of("cpu")[0])]
        for arm in counting(short):
            losses = [seeds_and_loss(cell.arms[arm]) for cell in (short, now)]
            change = difference(now.arms[arm].losses, short.arms[arm].losses)
            rows.append([f"{rung}, {steps[0]} or {steps[1]} steps", f"`{arm}`", *losses, change])
    return markdown(rows)


def warmup_gaps() -> str:
    """The arms' differences with either warm-up, and how they change over the seeds of both."""
    rows = [["rung", "difference", "short warm-up", "the ladder's", "the ladder's minus short"]]
    for rung, _, short, now in warmups():
        for arm, base in PAIRS:
            if {arm, base} <= {*counting(short)}:
                found = [line(difference_text(cell.gap(arm, base))) for cell in (short, now)]
                change = difference(*(gaps_by_seed(cell, arm, base) for cell in (now, short)))
                rows.append([rung, f"`{arm}` - `{base}`", *found, change])
    return markdown(rows)


def counting(cell: Cell) -> list[str]:
    """The arms with enough seeds for an interval."""
    return [arm for arm, own in cell.arms.items() if own.counts]


def gaps_by_seed(cell: Cell, arm: str, base: str) -> dict[int, float]:
    own, other = cell.arms[arm].losses, cell.arms[base].losses
    return {seed: own[seed] - other[seed] for seed in own.keys() & other.keys()}


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    """The mean difference over the seeds of both, with its interval."""
    paired = paired_difference(values, others)
    if paired is None:
        return text.MISSING
    pairs = text.plural(len(paired.differences), "pair")
    return f"{text.signed(paired.mean)} {text.interval(paired.low, paired.high)} {pairs}"


def warmup_steps(ladder: Ladder, rung: str) -> int:
    run = next(run for run in ladder.runs() if run.rung == rung)
    return ladder.branch_settings(ladder.run_settings(run), 1.0).warmup_steps


def seeds_and_loss(own: ArmCell) -> str:
    return f"{loss([*own.losses.values()], own.mean, len(own.diverged))}, {text.plural(len(own.losses), 'seed')}"


TABLES = {
    "largest": largest, "verdicts": verdicts, "shapes": shapes, "rates": rates, "balance": balance, "warmup": warmup,
    "warmup_gaps": warmup_gaps, "done": done, "gaps": gaps,
}  # fmt: skip


def filled(page: str) -> str:
    """The page with every table made anew."""
    return with_tables(page, SCRIPT, lambda name: TABLES[name]())


def draw(folder: Path) -> None:
    """Draws the differences of the main arms at complete rungs: ladder.svg and ladder.png."""
    complete = {(cell.rung, cell.budget) for cell in complete_cells() if cell.budget == 1}
    ladder, results = ladder_of("cpu")
    shown = [result for result in at_own_settings(results)
             if (result.rung, result.budget) in complete and result.arm in ladder.plan[0].arms]  # fmt: skip
    figure = gap_figure(fit_ladder(shown), "compute")
    if figure is not None:
        save(figure, folder, "ladder")


def main() -> None:
    pages = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES}
    draw(PLOTS)
    for page, words in pages.items():
        page.write_text(words, encoding="utf-8")


if __name__ == "__main__":
    main()
