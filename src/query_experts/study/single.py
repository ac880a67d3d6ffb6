"""`query-experts train`: one run of one arm, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from query_experts.common.errors import SettingError
from query_experts.distributed.ranks import first_rank
from query_experts.study.compare import divergence, open_corpus, report_stop
from query_experts.study.settings import DistillSettings, TrainSettings
from query_experts.study.train import StartingPoint, stop_after, train_arm
from query_experts.study.workspace import own_folder


def train(settings: TrainSettings, console: Console) -> bool:
    """Trains one arm with one seed.

    Returns:
        Whether the run is finished: False if `stop_after_minutes` ended it.

    Raises:
        SettingError: A setting that can't be used; also where the loss diverged, which is kept as the run's result.
    """
    settings.check()
    return train_one(settings, settings.arm, console)


def train_one(
    settings: TrainSettings | DistillSettings, arm: str, console: Console, start: StartingPoint | None = None
) -> bool:
    """One run in the folder `out`, from an arm's initial values or from `start`; otherwise as `train`."""
    with own_folder(Path(settings.out)) as out:
        stop = stop_after(settings.stop_after_minutes)
        corpus = first_rank(lambda: open_corpus(settings, out, console))
        before = ", finished before" if (out / "result.json").exists() else ""
        run = train_arm(settings, arm, settings.seed, corpus, out, stop, start)
    if run is None:
        return report_stop(settings, stop, console)
    if run.diverged:
        raise SettingError(divergence(settings, run))
    others = [f"{run.validation_curve[0][1]:.4f} at the start"] if start is not None else []
    others += [f"the teacher's is {run.teacher_loss:.4f}"] if run.teacher_loss is not None else []
    beside = f" ({'; '.join(others)})" if others else ""
    console.print(
        Text(
            f"{arm} seed {settings.seed}{before}: validation loss {run.validation_loss:.4f}{beside} after "
            f"{run.train_tokens:,} tokens, trained at {run.tokens_per_s:,.0f} tokens/s without validation. "
            f"Model: {out / 'model'}"
        )
    )
    return True
