"""Fills the tables of README.md and docs/results.md from the results of the ladder and its sweeps, and draws its plot.

python benchmarks/ladder_tables.py    # dev/ladder.sh harvest runs it too
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from page_tables import markdown, with_tables
from query_experts.common import formatting as text
from query_experts.common.plots import save
from query_experts.study.ladder.charts import gap_figure
from query_experts.study.ladder.fit import Fit, fit_ladder
from query_experts.study.ladder.gaps import BASELINES, RANDOM, Cell, Gap
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
OF_ROUTING = tuple((arm, base) for arm in ("gqe", "gqe-m4") for base in BASELINES)
SHORT_WARMUP = ("warmup", "warmup-d96")  # ladders
WITH_EITHER_WARMUP = (("static", "dense"), ("half", "dense"), ("gqe", "dense"), ("gqe", "static"), ("gqe", "half"))
VERDICTS = {
    "lower": "wins by {0:.4f} [{1:.4f}, {2:.4f}]",
    "higher": "loses by {0:.4f} [{1:.4f}, {2:.4f}]",
}
OUTCOMES = {"lower": "wins against", "higher": "loses to", "not known": "not known against"}


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


def fit_of(name: str) -> Fit:
    return fit_ladder(at_own_settings(ladder_of(name)[1]))


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
        cell for cell in fit_of("cpu").cells
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
        "Parameters: without embeddings. FLOPs: of training as run (of what a token uses). "
        f"**{says(cell, 'gqe')}; {says(cell, 'gqe-m4')}.** "
        "Wins or loses: the interval excludes zero, as one in twenty does by chance."
    )


def says(cell: Cell, arm: str) -> str:
    """What a rung says of a routed arm against the baselines, without numbers."""
    found: dict[str, list[str]] = {}
    for base in BASELINES:
        gap = cell.gap(arm, base)
        outcome = OUTCOMES[gap.known] if gap is not None and gap.has_interval else "has too few pairs with"
        found.setdefault(outcome, []).append(f"`{base}`")
    return f"`{arm}` {', '.join(f'{outcome} {text.join_words(bases)}' for outcome, bases in found.items())}"


def verdicts() -> str:
    """What is known of routing at every complete rung, trained on all of its tokens."""
    whole = [cell for cell in complete_cells() if cell.budget == 1]
    if not whole:
        return NOTHING
    rows = [["rung", "parameters", *(f"`{arm}` against `{base}`" for arm, base in OF_ROUTING)]]
    for cell in whole:
        found = [verdict(cell.gap(arm, base)) for arm, base in OF_ROUTING]
        rows.append([cell.rung, text.short(cell.size[0]), *found])
    return markdown(rows)


def verdict(gap: Gap | None) -> str:
    """What a difference says, in words."""
    difference = gap.difference if gap is not None else None
    if gap is None or difference is None or difference.low is None or difference.high is None:
        return "too few pairs"
    if gap.known == "not known":
        return f"not known, {text.signed(difference.mean)} {text.interval(difference.low, difference.high)}"
    ends = sorted((abs(difference.low), abs(difference.high)))
    return VERDICTS[gap.known].format(abs(difference.mean), *ends)


def warmups() -> Iterator[tuple[str, Ladder, Cell, Cell]]:
    """Rungs that were trained with a short warm-up too: the name, that ladder, and what was found with each warm-up."""
    own = {cell.rung: cell for cell in fit_of("cpu").cells if cell.budget == 1}
    for name in SHORT_WARMUP:
        for short in fit_of(name).cells:
            if short.budget == 1 and short.rung in own:
                yield short.rung, ladder_of(name)[0], short, own[short.rung]


def warmup() -> str:
    """The loss with a warm-up of a tenth of the smallest budget, and with the ladder's own."""
    rows = [["rung", "arm", "short warm-up", "the ladder's", "the ladder's minus short"]]
    for rung, ladder, short, now in warmups():
        steps = [warmup_steps(each, rung) for each in (ladder, ladder_of("cpu")[0])]
        for arm in ladder.arms():
            losses = [seeds_and_loss(cell, arm) for cell in (short, now)]
            rows.append([f"{rung}, {steps[0]} or {steps[1]} steps", f"`{arm}`", *losses, change(short, now, arm)])
    return markdown(rows)


def warmup_gaps() -> str:
    """The arms' differences with either warm-up."""
    rows = [["rung", "difference", "short warm-up", "the ladder's"]]
    for rung, _, short, now in warmups():
        for arm, base in WITH_EITHER_WARMUP:
            found = [line(difference_text(cell.gap(arm, base))) for cell in (short, now)]
            rows.append([rung, f"`{arm}` - `{base}`", *found])
    return markdown(rows)


def change(before: Cell, after: Cell, arm: str) -> str:
    """The difference of two cells for an arm, over the seeds that both have."""
    if arm not in after.arms or arm not in before.arms:
        return text.MISSING
    own, base = after.arms[arm].losses, before.arms[arm].losses
    paired = paired_difference({seed: own[seed] for seed in own if seed in base}, base)
    if paired is None:
        return text.MISSING
    pairs = text.plural(len(paired.differences), "pair")
    return f"{text.signed(paired.mean)} {text.interval(paired.low, paired.high)} {pairs}"


def warmup_steps(ladder: Ladder, rung: str) -> int:
    run = next(run for run in ladder.runs() if run.rung == rung)
    return ladder.branch_settings(ladder.run_settings(run), 1.0).warmup_steps


def seeds_and_loss(cell: Cell, arm: str) -> str:
    own = cell.arms.get(arm)
    if own is None:
        return text.MISSING
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
    complete = {(cell.rung, cell.budget) for cell in complete_cells()}
    ladder, results = ladder_of("cpu")
    shown = [result for result in at_own_settings(results)
             if (result.rung, result.budget) in complete and result.arm in ladder.plan[0].arms]  # fmt: skip
    figure = gap_figure(fit_ladder(shown), "compute")
    if figure is not None:
        save(figure, folder, "ladder")


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(PLOTS)


if __name__ == "__main__":
    main()
