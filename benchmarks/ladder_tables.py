"""Fills the tables of docs/results.md from the results of the ladder and of its sweeps.

python benchmarks/ladder_tables.py    # dev/ladder.sh harvest runs it too
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from page_tables import markdown, with_tables
from query_experts.common import formatting as text
from query_experts.study.ladder.fit import Fit, fit_ladder
from query_experts.study.ladder.gaps import BASELINES, Cell
from query_experts.study.ladder.rates import best_rate, excess
from query_experts.study.ladder.read import at_own_settings
from query_experts.study.ladder.results import LadderResult, read_results
from query_experts.study.ladder.settings import Ladder, parameters_without_embeddings, read_ladder
from query_experts.study.ladder.sweeps import swept_values
from query_experts.study.ladder.tables import difference_text

ROOT = Path(__file__).resolve().parent.parent
LADDERS = ROOT / "benchmarks" / "ladder"
PAGE = ROOT / "docs" / "results.md"
SCRIPT = "benchmarks/ladder_tables.py"  # in the markers of its tables
PAIRS = (
    ("gqe", "static"),
    ("gqe", "dense"),
    ("gqe", "half"),
    ("gqe-m4", "static"),
    ("static", "dense"),
    ("half", "dense"),
)
NOTHING = "No rung is complete yet, so nothing is known."
VERDICTS = {
    "lower": "**At this size routing wins:** `gqe` is below `static`, and the interval excludes zero.",
    "higher": "**At this size routing loses:** `gqe` is above `static`, and the interval excludes zero.",
    "not known": "**At this size no effect of routing is known:** the interval of `gqe` against `static` holds zero.",
}


def ladder_of(name: str) -> tuple[Ladder, list[LadderResult]]:
    """A committed ladder and its results; none where its folder isn't there yet."""
    file = LADDERS / f"{name}.yaml"
    ladder = read_ladder(file)
    folder = file.parent / ladder.results
    return ladder, read_results(folder) if folder.is_dir() else []


def fit_of(name: str) -> Fit:
    return fit_ladder(at_own_settings(ladder_of(name)[1]))


def line(cell: str) -> str:
    """A cell of several lines in one."""
    return " ".join(cell.splitlines())


def loss(losses: Sequence[float], mean: float | None) -> str:
    """The mean, and the range over seeds."""
    if mean is None:
        return text.MISSING
    return f"{mean:.3f} ({min(losses):.3f} to {max(losses):.3f})"


def shapes() -> str:
    """Dense against half at each shape."""
    rows = [["shape", "heads times head dim over width", "`dense`", "`half`", "`half` - `dense`"]]
    ladder, _ = ladder_of("shapes")
    for cell in fit_of("shapes").cells:
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
    for each in swept_values(ladder_of("rates")[1]):
        rows.append([f"{each.value:g}", loss([*each.losses.values()], each.mean)])
    return markdown(rows)


def done() -> str:
    """How many seeds of each rung and arm have finished, of those that are planned."""
    ladder, results = ladder_of("cpu")
    finished = {(result.rung, result.arm, result.seed) for result in results if result.budget == 1}
    arms = ladder.arms()
    rows = [["rung", "parameters", "tokens", *(f"`{arm}`" for arm in arms)]]
    for rung in ladder.rungs:
        settings = ladder.run_settings(next(run for run in ladder.runs() if run.rung == rung))
        tokens = settings.steps * settings.tokens_per_step
        counts = []
        for arm in arms:
            planned = {(run.rung, run.arm, run.seed) for run in ladder.runs() if (run.rung, run.arm) == (rung, arm)}
            counts.append(f"{len(planned & finished)} of {len(planned)}" if planned else text.DASH)
        parameters = parameters_without_embeddings(settings.model_size())
        rows.append([rung, text.short(parameters), text.short(tokens), *counts])
    return markdown(rows)


def complete_cells() -> list[Cell]:
    """Rungs and budgets at which every planned seed of the five main arms has finished, the smallest first."""
    ladder, results = ladder_of("cpu")
    main = ladder.plan[0].arms
    finished = {(result.rung, result.arm, result.seed, result.budget) for result in results}
    return [
        cell for cell in fit_of("cpu").cells
        if all((run.rung, run.arm, run.seed, cell.budget) in finished for run in ladder.runs()
               if run.rung == cell.rung and run.arm in main and not run.varied)
    ]  # fmt: skip


def gaps() -> str:
    """Paired differences at every complete rung and budget."""
    cells = complete_cells()
    if not cells:
        return NOTHING
    rows = [["rung", "tokens", *(f"`{arm}` - `{base}`" for arm, base in PAIRS)]]
    for cell in cells:
        found = [line(difference_text(cell.gap(arm, base))) for arm, base in PAIRS]
        rows.append([cell.rung, text.short(cell.size[1]), *found])
    return markdown(rows)


def largest() -> str:
    """The arms of the largest complete rung, trained on all of its tokens, and what their differences say."""
    whole = [cell for cell in complete_cells() if cell.budget == 1]
    if not whole:
        return NOTHING
    cell, results = whole[-1], ladder_of("cpu")[1]
    head = ["arm", "active heads", "active parameters", "training FLOPs", "validation loss (range)"]
    rows = [[*head, *(f"against `{base}`" for base in BASELINES)]]
    for arm in ladder_of("cpu")[0].plan[0].arms:
        own = cell.arms[arm]
        first = next(result for result in results if (result.rung, result.arm) == (cell.rung, arm))
        counts = [str(own.active_heads), text.short(first.active_parameters), text.short(own.active_flops)]
        gaps = [line(difference_text(cell.gap(arm, base))) for base in BASELINES]
        rows.append([f"`{arm}`", *counts, loss([*own.losses.values()], own.mean), *gaps])
    parameters, tokens = cell.size
    size = f"Rung {cell.rung}: {text.short(parameters)} parameters without embeddings, {text.short(tokens)} tokens."
    gap, weak = cell.gap("gqe", "static"), cell.gap("half", "dense")
    assert gap is not None
    assert weak is not None
    says = VERDICTS[gap.known]
    if weak.known == "lower":
        says += " `dense` is a weak baseline here, as `half` is below it."
    return f"{markdown(rows)}\n\n{size} {says}"


TABLES = {"largest": largest, "shapes": shapes, "rates": rates, "balance": balance, "done": done, "gaps": gaps}


def filled(page: str) -> str:
    """The page with every table made anew."""
    return with_tables(page, SCRIPT, lambda name: TABLES[name]())


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
