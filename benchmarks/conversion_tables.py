"""Puts the tables of conversions into docs/benchmarks.md from benchmarks/results/conversion.json, and draws their plot.

python benchmarks/conversion_tables.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from conversion import CASES as CONVERSIONS
from conversion import ConversionRun, Conversions, read_conversions
from page_tables import markdown, with_tables
from query_experts.common import formatting as text
from query_experts.common.plots import new_figure, save

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "conversion.json"
RATES = [*RESULT.parent.glob("conversion-rate-*.json")]
PAGE = ROOT / "docs" / "benchmarks.md"
SCRIPT = "benchmarks/conversion_tables.py"  # in the markers of its tables
PLOTS = ROOT / "docs" / "plots"
WITHIN = (0.01, 0.003)  # of the teacher's loss

CASES = {
    "all-awake": "all four experts active",
    "static": "static, the strongest head of each group",
    "static-k2": "static, the two strongest of each group",
    "expert-random": "expert, random router",
    "expert-query_norm": "expert, router fitted to query norms",
    "expert-calibrated": "expert, calibrated router",
    "slot-random": "slot, random router",
    "slot-query_norm": "slot, router fitted to query norms",
    "slot-calibrated": "slot, calibrated router",
    "expert-calibrated-k2": "expert, calibrated, k = 2",
    "expert-calibrated-k3": "expert, calibrated, k = 3",
    "expert-calibrated-gradual": "expert, calibrated, k from 4 to 1 over half the steps",
    "expert-calibrated-undistilled": "expert, calibrated, without a teacher",
    "expert-calibrated-unbalanced": "expert, calibrated, without the balance loss",
    "slot-calibrated-unbalanced": "slot, calibrated, without the balance loss",
}
COLOURS = {  # in the plot; by slot, the same and dashed
    "static": "k", "all-awake": "C0", "random": "C1", "query_norm": "C2", "calibrated": "C3",
    "calibrated-gradual": "C4", "calibrated-undistilled": "C8", "calibrated-unbalanced": "C5",
}  # fmt: skip
LONG = "-long"  # of a case's name: the same for longer


def by_case(result: Conversions, suffix: str = "") -> dict[str, list[ConversionRun]]:
    """The runs of each case, by seed; with a suffix, those of its longer form."""
    runs = {case: [run for run in result.runs if run.case == case + suffix] for case in CASES}
    return {case: sorted(found, key=lambda run: run.seed) for case, found in runs.items() if found}


def mean_and_range(values: list[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def reached(run: ConversionRun, share: float) -> float | None:
    """Tokens until a validation with the final top-k is within a share of the teacher's loss; None if none is."""
    goal = run.teacher_loss * (1 + share)
    _, training = CONVERSIONS[run.case]
    sparse_from = training.get("sparsify_fraction", 0) * run.train_tokens
    judged = [(tokens, loss) for tokens, loss in run.validation_curve if not sparse_from or tokens > sparse_from]
    return next((tokens for tokens, loss in judged if loss <= goal), None)


def tokens_in_words(counts: list[float | None]) -> str:
    """Token counts by seed."""
    if all(count is None for count in counts):
        return "not reached"
    return " / ".join(text.DASH if count is None else text.short(count) if count else "0" for count in counts)


def losses(result: Conversions, suffix: str = "") -> str:
    """For each case: active heads, loss at the start and the end with its range over seeds, tokens to approach it."""
    head = ["conversion", "active heads", "KL at the start", "loss at the start", "loss at the end", "over the teacher",
            *(f"tokens to {share:.1%}" for share in WITHIN), "dead experts"]  # fmt: skip
    rows = [head]
    for case, runs in by_case(result, suffix).items():
        final = [run.validation_loss for run in runs]
        over = [run.validation_loss / run.teacher_loss - 1 for run in runs]
        rows.append(
            [
                CASES[case],
                str(runs[0].active_heads),
                f"{max(0, statistics.mean(run.kl_at_start for run in runs)):.3f}",  # equal models differ by rounding
                mean_and_range([run.validation_curve[0][1] for run in runs]),
                mean_and_range(final),
                f"{text.signed(100 * statistics.mean(over), 2)}%",
                *(tokens_in_words([reached(run, share) for run in runs]) for share in WITHIN),
                " / ".join(str(run.routing.dead) for run in runs if run.routing) or text.DASH,
            ]
        )
    return markdown(rows)


def paired(result: Conversions, suffix: str = "") -> str:
    """Differences of final losses, seed by seed."""
    runs = by_case(result, suffix)
    rows = [["", "difference of the final loss, by seed", "mean"]]
    for case, control in (
        ("expert-calibrated", "expert-random"),
        ("expert-calibrated", "expert-query_norm"),
        ("slot-calibrated", "slot-random"),
        ("slot-calibrated", "slot-query_norm"),
        ("expert-calibrated", "slot-calibrated"),
        ("expert-calibrated", "static"),
        ("slot-calibrated", "static"),
        ("expert-calibrated-k2", "static-k2"),
        ("expert-calibrated", "expert-calibrated-unbalanced"),
        ("slot-calibrated", "slot-calibrated-unbalanced"),
        ("slot-calibrated-unbalanced", "static"),
        ("expert-calibrated-gradual", "expert-calibrated"),
        ("expert-calibrated", "expert-calibrated-undistilled"),
    ):
        if case in runs and control in runs:
            baseline = {run.seed: run.validation_loss for run in runs[control]}
            differences = [run.validation_loss - baseline[run.seed] for run in runs[case] if run.seed in baseline]
            if differences:
                rows.append(
                    [
                        f"{CASES[case]} {text.MINUS} {CASES[control]}",
                        " / ".join(map(text.signed, differences)),
                        text.signed(statistics.mean(differences)),
                    ]
                )
    return markdown(rows)


def fits(result: Conversions) -> str:
    """The share of the heads' contributions that fitted routers keep, by layer, mean over seeds."""
    rows = [["layer", "by the fitted router", "always the same head", "the strongest of each token"]]
    runs = by_case(result).get("expert-calibrated", [])
    for layer in range(len(runs[0].fits) if runs else 0):
        found = [run.fits[layer] for run in runs]
        shares = [[fit.kept for fit in found], [fit.fixed for fit in found], [fit.best for fit in found]]
        rows.append([str(layer), *(f"{statistics.mean(share):.1%}" for share in shares)])
    return markdown(rows)


def setting(result: Conversions) -> str:
    settings, teacher, environment = result.settings, result.teacher, result.environment
    seeds = sorted({run.seed for run in result.runs})
    loss = result.runs[0].teacher_loss
    tokens = sorted({run.train_tokens for run in result.runs})
    rows = [
        ["what", "held"],
        ["dense model", f"{text.short(teacher.parameters.total)} parameters, {teacher.heads} query heads over "
                        f"{settings.num_key_value_heads} KV heads, loss {loss:.4f}"],
        ["trained on", f"{' or '.join(f'{n:,.0f}' for n in tokens)} tokens a run, {settings.batch_size} by "
                       f"{settings.seq_len} a step, learning rate {settings.learning_rate:g}, weight of the "
                       f"divergence {settings.distillation:g}"],
        ["judged on", f"{settings.validation_sequences * settings.seq_len:,} held-out tokens"],
        ["seeds", f"{', '.join(map(str, seeds))} of conversion and data order; one dense model"],
        ["text", ", ".join(result.data.source)],
        ["machine", f"{environment.hardware}, torch {environment.torch}, Transformers {environment.transformers}, "
                    f"{environment.dtype}, {environment.date}"],
    ]  # fmt: skip
    return markdown(rows)


def rates(results: list[Conversions]) -> str:
    """Final losses of single-seed studies by their learning rate."""
    results = sorted(results, key=lambda result: result.settings.learning_rate)
    cases = list(by_case(results[0]))
    rows = [["learning rate", *(CASES[case] for case in cases)]]
    for result in results:
        found = by_case(result)
        losses = [f"{run.validation_loss:.3f}" for case in cases for run in found[case]]
        rows.append([f"{result.settings.learning_rate:g}", *losses])
    return markdown(rows)


def filled(page: str) -> str:
    """The page with new tables between its markers."""
    result = read_conversions(RESULT)
    at_rates = [read_conversions(path) for path in RATES]
    tables = {
        "setting": setting(result), "losses": losses(result), "paired": paired(result), "longer": losses(result, LONG),
        "paired-longer": paired(result, LONG), "fits": fits(result), "rates": rates(at_rates),
    }  # fmt: skip
    return with_tables(page, SCRIPT, tables.__getitem__)


def draw(result: Conversions) -> None:
    """Draws loss by training tokens, loss by active heads before and after training, and longer runs."""
    runs = by_case(result)
    figure = new_figure(4.4, 13)
    left, middle, right = figure.subplots(1, 3, width_ratios=[3, 2, 3])
    goal = result.runs[0].teacher_loss
    for axes in (left, middle, right):
        axes.axhline(goal, color="0.5", linewidth=1, linestyle=":", label="the dense model")
    curves(left, {case: found for case, found in runs.items() if "-k" not in case})
    curves(right, by_case(result, LONG))
    for share in WITHIN:
        right.axhline(goal * (1 + share), color="0.8", linewidth=1, linestyle=":")
        right.annotate(f"{share:+.1%}", (0, goal * (1 + share)), fontsize=7, color="0.4", va="bottom")
    for name, colour, ladder in (
        ("calibrated", "C3", ["expert-calibrated", "expert-calibrated-k2", "expert-calibrated-k3", "all-awake"]),
        ("static", "k", ["static", "static-k2"]),
    ):
        there = [case for case in ladder if case in runs]
        heads = [runs[case][0].active_heads for case in there]
        before = [statistics.mean(run.validation_curve[0][1] for run in runs[case]) for case in there]
        after = [statistics.mean(run.validation_loss for run in runs[case]) for case in there]
        middle.plot(heads, before, "o--", color=colour, label=f"{name}, before training")
        middle.plot(heads, after, "o-", color=colour, label=f"{name}, after it")
    counts = sorted({run.active_heads for run in result.runs})
    left.set(ylabel="validation loss (nats a token)", title="all conversions")
    middle.set(xlabel="active query heads, the shared one included", title="k = 1 to 4", xticks=counts)
    right.set(title="for longer")
    for axes in (left, right):
        axes.set(xlabel="tokens of further training")
        axes.xaxis.set_major_formatter(lambda tokens, _: text.short(tokens) if tokens else "0")
    left.legend(fontsize=7, frameon=False)
    for axes in (middle, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    save(figure, PLOTS, "conversion")


def curves(axes: Any, runs: dict[str, list[ConversionRun]]) -> None:
    """Draws mean and range over seeds of the validation loss of each case, in the case's colour."""
    for case, found in runs.items():
        tokens = [point[0] for point in found[0].validation_curve]
        values = list(zip(*([loss for _, loss in run.validation_curve] for run in found), strict=True))
        colour = COLOURS[case.removeprefix("expert-").removeprefix("slot-")]
        dashes = "--" if case.startswith("slot") else "-"
        axes.plot(tokens, [statistics.mean(v) for v in values], dashes, color=colour, label=CASES[case])
        axes.fill_between(tokens, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(read_conversions(RESULT))


if __name__ == "__main__":
    main()
