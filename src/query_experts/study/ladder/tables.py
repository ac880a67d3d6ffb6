"""Makes the tables of a fit as text, so that terminal and page show the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from query_experts.common import formatting as text
from query_experts.study.ladder.estimates import Estimate
from query_experts.study.ladder.fit import TOKENS_PER_PARAMETER, Extrapolation, Fit, Prediction
from query_experts.study.ladder.gaps import BASELINES, CONTROLS, RANDOM, ArmCell, Cell, Gap
from query_experts.study.ladder.law import Law, NoLaw
from query_experts.study.ladder.line import GapLine
from query_experts.study.report.table import Table
from query_experts.study.statistics import MIN_SEEDS_FOR_INTERVAL

PAIRED = (
    "Differences: validation loss in nats a token, arm minus baseline, higher is worse, paired by seed; the mean, its "
    "95% interval (Student's t over seeds) and the number of pairs."
)

_SEEDS_ALONE = (
    " The law's predicted intervals hold seeds alone, as three rungs don't show how far a rung lies from it: a no of "
    "the law may be such a distance."
)


def tables(fit: Fit) -> list[Table]:
    """The tables of law, lines, prediction and extrapolations, where they have a row."""
    found = [_law_table(fit.law), _line_table(fit.lines), _prediction_table(fit.predictions),
             _extrapolation_table(fit.extrapolations)]  # fmt: skip
    return [table for table in found if table.body]


def further_tables(fit: Fit) -> list[Table]:
    """Learned against random routing, and the loss by held-out file, where they have a row."""
    return [table for table in (_random_router_table(fit), _parts_table(fit)) if table.body]


def findings_table(fit: Fit) -> Table:
    """Of each studied arm, its gaps from the baselines at the largest rung and budget, and their trends."""
    bases = [base for base in BASELINES if base in fit.arms]
    found = [(arm, _largest(fit, arm)) for arm in fit.arms if arm not in CONTROLS]
    return Table(
        title="Findings",
        note=f"At the largest rung and budget where three pairs of the arm have finished, else where any has. {PAIRED} "
        "Trend: whether the difference falls or rises with compute. Not known: the interval holds both signs, or there "
        "is none.",
        head=["arm", "at", *(f"from {base}" for base in bases)],
        body=[
            [arm, f"{cell.rung}\n{cell.budget:.0%}", *(_finding(fit, cell.gap(arm, base)) for base in bases)]
            for arm, cell in found
            if cell is not None
        ],
        left=(0, 1),
    )


def _largest(fit: Fit, arm: str) -> Cell | None:
    """Where an arm is judged."""
    most = {id(cell): max((gap.pairs for gap in cell.arms[arm].gaps.values()), default=0)
            for cell in fit.cells if arm in cell.arms}  # fmt: skip
    for enough in (MIN_SEEDS_FOR_INTERVAL, 1):
        for cell in reversed(fit.cells):
            if most.get(id(cell), 0) >= enough:
                return cell
    return None


def _finding(fit: Fit, gap: Gap | None) -> str:
    """What is known of a gap, its numbers, and what is known of its trend, a line each."""
    if gap is None or gap.difference is None:
        return difference_text(gap)
    line = fit.line(gap.arm, gap.base)
    trend = [] if line is None else [f"trend {_direction(line.trend)}"]
    return "\n".join([gap.known, difference_text(gap), *trend])


def _direction(slope: Estimate) -> str:
    return {"lower": "falling", "higher": "rising"}.get(slope.known, slope.known)


def _estimate(estimate: Estimate) -> str:
    bracket = text.interval(estimate.low, estimate.high)
    return "\n".join([text.signed(estimate.value), *([bracket] if bracket else [])])


def difference_text(gap: Gap | None) -> str:
    """The mean, its interval, and the pairs with what is to be known about them, a line each."""
    if gap is None or gap.difference is None:
        return text.MISSING if gap is None else "\n".join(_unpaired(gap)) or text.MISSING
    bracket = text.interval(gap.difference.low, gap.difference.high)
    return "\n".join([text.signed(gap.difference.mean), *([bracket] if bracket else []), *_pairs(gap)])


def _pairs(gap: Gap) -> list[str]:
    lines = [text.plural(gap.pairs, "pair")]
    if gap.marked:
        lines.append(f"{len(gap.marked)} marked")
    return [*lines, *_unpaired(gap)]


def _unpaired(gap: Gap) -> list[str]:
    counts = {"other tag": len(gap.other_tag), "other tokens": len(gap.other_tokens)}
    return [f"{count} {name}" for name, count in counts.items() if count]


def runs_table(fit: Fit) -> Table:
    """Of each rung, its size and the number of finished runs of each arm, by budget."""
    budgets = sorted({cell.budget for cell in fit.cells})
    return Table(
        title="Runs",
        note=f"Seeds that finished at {text.join_words([f'{budget:.0%}' for budget in budgets])} of the rung's tokens, "
        "in one number if they are as many; x: diverged. N: parameters of the first arm, which is dense where that "
        "ran, without embeddings. Tokens: of that arm.",
        head=["rung", "N", "tokens", *fit.arms],
        body=[_runs(fit, rung, budgets) for rung in fit.rungs],
    )


def _runs(fit: Fit, rung: str, budgets: Sequence[float]) -> list[str]:
    own = {cell.budget: cell for cell in fit.cells if cell.rung == rung}
    parameters, tokens = own[max(own)].size
    return [rung, text.short(parameters), text.short(tokens), *(_counts(own, budgets, arm) for arm in fit.arms)]


def _counts(own: Mapping[float, Cell], budgets: Sequence[float], arm: str) -> str:
    """The seeds of an arm at each budget; one line if they are the same at all."""
    found = [_seeds(own[at].arms[arm]) if at in own and arm in own[at].arms else text.MISSING for at in budgets]
    return "\n".join(dict.fromkeys(found) if len(set(found)) == 1 else found)


def gap_table(cell: Cell) -> Table:
    """Losses and gaps at one rung and budget."""
    parameters, tokens = cell.size
    bases = [base for base in BASELINES if base in cell.arms]
    return Table(
        title=f"{cell.rung}, {cell.budget:.0%} of its tokens",
        note=f"{text.short(parameters)} parameters without embeddings, {text.short(tokens)} tokens. Loss: mean over "
        f"seeds in nats a token, bits per byte, and the number of seeds; x: diverged. {_warnings(cell)}".rstrip(),
        head=["arm", "loss", *(f"from {base}" for base in bases)],
        body=[
            [arm, _loss(own), *(difference_text(own.gaps.get(base)) for base in bases)]
            for arm, own in cell.arms.items()
        ],
    )


def _loss(own: ArmCell) -> str:
    means = [text.fixed(value) for value in (own.mean, own.bits_per_byte) if value is not None]
    return "\n".join([*means, _seeds(own)])


def _seeds(own: ArmCell) -> str:
    return str(len(own.losses)) + (f" ({len(own.diverged)}x)" if own.diverged else "")


def _warnings(cell: Cell) -> str:
    other_seeds = len({frozenset(own.losses) for own in cell.arms.values()}) > 1
    return " ".join(
        [
            *(["Means of different seeds don't compare; the differences do."] if other_seeds else []),
            *gap_warnings([gap for own in cell.arms.values() for gap in own.gaps.values()]),
        ]
    )


def gap_warnings(gaps: Sequence[Gap]) -> list[str]:
    """What marks of gaps in a table mean, a sentence each."""
    lines = []
    if any(gap.marked for gap in gaps):
        lines.append(
            "Marked: the two runs of a pair used different processor instructions or versions of torch, which alone "
            "move a loss, or code of different commits without a tag."
        )
    if any(gap.other_tag for gap in gaps):
        lines.append("Other tag: the two runs used code of different tags, so they make no pair.")
    if any(gap.other_tokens for gap in gaps):
        lines.append("Other tokens: the two runs used tokens of different hashes, so they make no pair.")
    return lines


def _random_router_table(fit: Fit) -> Table:
    found = [(cell, gap) for cell in fit.cells if (gap := cell.gap("gqe", RANDOM)) is not None]
    return Table(
        title="Learned against random routing",
        note=" ".join(
            [f"gqe from {RANDOM}, whose router never trains. {PAIRED}", *gap_warnings([g for _, g in found])]
        ),
        head=["rung", "budget", f"gqe from {RANDOM}"],
        body=[[cell.rung, f"{cell.budget:.0%}", difference_text(gap)] for cell, gap in found],
    )


def _parts_table(fit: Fit) -> Table:
    last = {cell.rung: cell for cell in fit.cells}
    rows = [(cell.rung, own) for cell in last.values() for own in cell.arms.values() if own.parts]
    names = list(dict.fromkeys(name for _, own in rows for name in own.parts))
    return Table(
        title="By held-out file",
        note="Bits per byte at each rung's largest budget, mean over an arm's seeds.",
        head=["arm", "rung", *names],
        body=[[own.arm, rung, *(text.fixed(own.parts.get(name)) for name in names)] for rung, own in rows],
        left=(0, 1),
    )


def cost_table(fit: Fit) -> Table:
    """What each arm costs and how it routes, at each rung's largest budget."""
    last = {cell.rung: cell for cell in fit.cells}
    return Table(
        title="Cost and routing",
        note="At each rung's largest budget. Params: all of them. PFLOP: of training, as run, and counting only what a "
        "token uses. Minutes: median over seeds, the process's own on one thread of a CPU; other work on a machine and "
        "different machines change them. Entropy: of the router, mean over seeds, layers and groups; 1 is undecided, 0 "
        "is certain. Load: the largest share of tokens that select one expert, and dead: the most dead experts, over "
        f"seeds.{_rates_of_arms(fit)}",
        head=["arm", "rung", "params", "active heads", "PFLOP", "active PFLOP", "min", "entropy", "load", "dead"],
        body=[_costs(cell.rung, own) for cell in last.values() for own in cell.arms.values()],
        left=(0, 1),
    )


def _rates_of_arms(fit: Fit) -> str:
    """The learning rates of each rung whose arms have several, a sentence."""
    found = []
    for cell in {cell.rung: cell for cell in fit.cells}.values():
        arms: dict[float, list[str]] = {}
        for arm, own in cell.arms.items():
            if own.learning_rate is not None:
                arms.setdefault(own.learning_rate, []).append(arm)
        if len(arms) > 1:
            rates = [f"{text.join_words(names)} {rate:.3g}" for rate, names in arms.items()]
            found.append(f"{cell.rung}: {', '.join(rates)}")
    return f" Arms have learning rates of their own. {'; '.join(found)}." if found else ""


def _costs(rung: str, own: ArmCell) -> list[str]:
    routing = own.routing
    minutes = own.train_seconds / 60 if own.train_seconds is not None else None
    return [
        own.arm, rung, text.short(own.parameters), str(own.active_heads), f"{own.flops / 1e15:.3g}",
        f"{own.active_flops / 1e15:.3g}", text.fixed(minutes, 1),
        *([text.MISSING] * 3 if routing is None else
          [f"{routing.entropy:.2f}", f"{routing.highest_load:.2f}", str(routing.dead)]),
    ]  # fmt: skip


def _law_table(law: Law | NoLaw) -> Table:
    title, head = "Scaling law", ["", "alpha", "beta", "A", "B"]
    if isinstance(law, NoLaw):
        return Table(title, law.why, head, [])
    E = law.estimate(lambda c: c.E)
    return Table(
        title=title,
        note=f"L = E + A N^{text.MINUS}alpha + B D^{text.MINUS}beta in nats a token, N: parameters of the rung's "
        f"dense arm without embeddings, for every arm, D: training tokens; E = {_plain(E)}. "
        f"Exponents: {_exponents(law)}. Fitted to {law.cells} means on {law.rungs} rungs, which it misses by "
        f"{law.error:.2%}. Brackets: {_intervals(law)}",
        head=head,
        body=[_law_row(law, arm) for arm in law.arms],
    )


def _exponents(law: Law) -> str:
    if law.seeds_alone:
        return "shared by all arms, as three rungs can't tell them apart"
    return "shared by all arms" if law.shared else "each arm's own, as the data tell them apart"


def _intervals(law: Law) -> str:
    if law.seeds_alone:
        return (
            "95% intervals from a bootstrap over seeds alone. Three rungs don't show how far rungs scatter around a "
            "law, so the intervals leave that out and are too narrow."
        )
    return f"95% intervals from leaving out one rung at a time (jackknife, Student's t on {law.rungs - 1})."


def _law_row(law: Law, arm: str) -> list[str]:
    alpha, beta, of_size, of_tokens = (
        law.estimate(lambda c: c.alpha[arm]), law.estimate(lambda c: c.beta[arm]),
        law.estimate(lambda c: c.A[arm]), law.estimate(lambda c: c.B[arm]),
    )  # fmt: skip
    return [arm, *("\n".join(_plain(each).split(" ", 1)) for each in (alpha, beta, of_size, of_tokens))]


def _plain(estimate: Estimate) -> str:
    """A value that can't be negative, and its interval."""
    low, high = max(0.0, estimate.low or 0.0), estimate.high
    return f"{text.short(estimate.value)} [{text.short(low)}, {text.short(high)}]"


def _line_table(lines: Sequence[GapLine]) -> Table:
    return Table(
        title="Difference against compute",
        note="A straight line through the differences of all rungs at all of their tokens over log10 of 6 N D, which "
        "counts neither embeddings nor attention and so grows faster than the FLOPs of small models. Change: with ten "
        "times 6 N D. Rungs: their number, and the standard deviation of a "
        "rung's own distance from the line, beyond what seeds explain. Brackets: 95% intervals that hold both "
        f"(Student's t on rungs {text.MINUS} 2). Middle: the line at the geometric mean of 6 N D.",
        head=["arm", "baseline", "rungs", "in the middle", "change", "trend"],
        body=[
            [
                line.arm, line.base, f"{len(line.points)}\n{text.fixed(math.sqrt(line.scatter))}",
                _estimate(line.at(line.centre)), _estimate(line.trend), _direction(line.trend),
            ]
            for line in lines
        ],
        left=(0, 1),
    )  # fmt: skip


def _prediction_table(predictions: Sequence[Prediction]) -> Table:
    rung = predictions[0].rung if predictions else ""
    return Table(
        title=f"{rung}, left out and predicted",
        note="The law's loss and the line's differences from the smaller rungs alone, with the distance that a rung "
        "has from them, beside what was measured. Held: they differ by no more than both 95% intervals together "
        "allow, which is the number below; where that is large, a yes says little."
        + (_SEEDS_ALONE if any(each.seeds_alone for each in predictions) else ""),
        head=["arm", "what", "by", "predicted", "measured", "held"],
        body=[
            [
                each.arm, "loss" if each.base is None else f"from {each.base}", each.by,
                _predicted(each, each.predicted), _predicted(each, each.measured),
                f"{'yes' if each.held else 'no'}\n{text.fixed(each.allowed)}",
            ]
            for each in predictions
        ],
        left=(0, 1, 2),
    )  # fmt: skip


def _predicted(prediction: Prediction, estimate: Estimate) -> str:
    if prediction.base is not None:
        return _estimate(estimate)
    return f"{text.fixed(estimate.value)}\n[{text.fixed(estimate.low)}, {text.fixed(estimate.high)}]"


def _extrapolation_table(found: Sequence[Extrapolation]) -> Table:
    sizes = sorted({each.parameters for each in found})
    rows = dict.fromkeys((each.arm, each.base, each.by) for each in found)
    at = {(each.arm, each.base, each.by, each.parameters): each.gap for each in found}
    return Table(
        title="Far beyond the ladder",
        note=f"The difference at {TOKENS_PER_PARAMETER} tokens a parameter, if the line or the law goes on as it is. "
        "No run has checked that, and the intervals leave out that doubt. With one E for all arms the law's "
        "differences can only fade with size; its intervals leave out a rung's own distance, which the line's hold. "
        "Parameters: of the dense arm, without embeddings.",
        head=["arm", "from", *map(_size, sizes)],
        body=[[arm, f"{base}\n{by}", *(_far(at[arm, base, by, size]) for size in sizes)] for arm, base, by in rows],
        left=(0, 1),
    )


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:g}B" if parameters >= 1e9 else f"{parameters / 1e6:g}M"


def _far(gap: Estimate) -> str:
    return "\n".join([gap.known, text.interval(gap.low, gap.high)])
