"""`query-experts scaling tokens`: writes a ladder's tokens, or a part of them, for a machine that can't read the text.

What travels is tokens and not text: the machine then needs no tokenizer to be trained, and has the hash of what was
made here. A part is a sample of the whole corpus with the same tokenizer and the same validation, so that its losses
stand beside those of other rungs. It has a hash of its own, and all runs of a rung must have the same hash.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from query_experts.common.formatting import plural
from query_experts.data import write_portion
from query_experts.study.ladder.queue import Queue
from query_experts.study.ladder.settings import ScalingSettings
from query_experts.study.ladder.worker import MOST_EPOCHS, open_tokens

SHARD_MEGABYTES = 14.0


def write_tokens(settings: ScalingSettings, console: Console) -> None:
    """Writes the tokens into `to`, and prints what they are and how often each rung would train on them.

    Raises SettingError as `write_portion`, and where the ladder's tokens can't be opened.
    """
    settings.check()
    queue = Queue.read(Path(settings.ladder), settings.only)
    corpus = open_tokens(queue, settings, console)
    source, target = corpus.train.shards[0].parent, Path(str(settings.to))
    info = write_portion(source, target, settings.tokens, round(1e6 * (settings.shard_megabytes or SHARD_MEGABYTES)))
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    console.print(
        Text(
            f"{target}: {info.train_tokens:,} tokens to train on, {info.validation_tokens:,} held out, in "
            f"{plural(len(sizes), 'file')} of {max(sizes) / 1e6:.1f} MB at most, {sum(sizes) / 1e6:.1f} MB in all; "
            f"data_hash {info.data_hash}"
        )
    )
    for rung, run in {run.rung: run for run in queue.runs}.items():
        whole = queue.ladder.run_settings(run)
        epochs = whole.steps * whole.tokens_per_step / info.train_tokens
        note = f"; only {MOST_EPOCHS} are allowed" if epochs > MOST_EPOCHS else ""
        console.print(Text(f"{rung}: {epochs:.1f} epochs{note}"))
