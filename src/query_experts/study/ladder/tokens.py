"""Opens a ladder's tokens; and `query-experts scaling tokens`, for a machine that can't read the text.

Tokens travel there and not text: the machine then needs no tokenizer to be trained, and has the hash of what was made
here. A part is a sample of the whole corpus with the same tokenizer and the same validation, so that its losses stand
beside those of other rungs. It has a hash of its own, and all runs of a rung must have the same hash.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from query_experts.common.errors import SettingError
from query_experts.common.formatting import plural
from query_experts.data import Corpus, missing_files, prepare, read_meta, write_portion
from query_experts.study.compare import check_corpus, print_corpus
from query_experts.study.ladder.queue import Queue
from query_experts.study.ladder.settings import ScalingSettings

SHARD_MEGABYTES = 14.0
MOST_EPOCHS = 4


def open_tokens(queue: Queue, settings: ScalingSettings, console: Console) -> Corpus:
    """The ladder's tokens: made from the text files once, found in `out` afterwards.

    Raises SettingError where they are missing, have another hash than the ladder says, or are too few for its runs.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ladder = queue.ladder
    shared = ladder.run_settings(ladder.runs()[0])
    data, validation = text_files(queue, settings)
    corpus = prepare(
        data, validation=validation, cache_dir=tokens_folder(settings), seq_len=shared.seq_len,
        vocab_size=shared.vocab_size, tokenizer=shared.tokenizer, text_field=shared.text_field,
    )  # fmt: skip
    if ladder.data_hash not in (None, corpus.facts.data_hash):
        raise SettingError(
            f"data has tokens with the hash {corpus.facts.data_hash}; ladder {queue.file} has data_hash "
            f"{ladder.data_hash}: they must be the same"
        )
    if not corpus.validation_parts:
        raise SettingError(f"data is {data[0]}, tokens without validation files; they must have those of {queue.file}")
    check_corpus(shared, corpus)
    print_corpus(shared, corpus, console)
    require_same_tokens(queue, corpus)
    epochs: dict[str, float] = {}
    for run in queue.runs:
        whole = ladder.run_settings(run)
        count = whole.steps * whole.sequences_per_step / len(corpus.train)
        epochs[run.rung] = max(count, epochs.get(run.rung, 0.0))
    for rung, count in epochs.items():
        if count > MOST_EPOCHS:
            raise SettingError(
                f"data has {corpus.facts.train_tokens:,} tokens, of which rung {rung} would train {count:.1f} "
                f"epochs; it must be {MOST_EPOCHS} at most: give more text, or fewer tokens_per_parameter"
            )
    console.print(Text("Epochs of the text: " + ", ".join(f"{rung} {count:.2f}" for rung, count in epochs.items())))
    return corpus


def require_same_tokens(queue: Queue, corpus: Corpus) -> None:
    """Raises SettingError where a rung of the queue has results with other tokens."""
    rungs = {run.rung for run in queue.runs}
    for result in queue.results():
        if result.rung in rungs and result.data_hash != corpus.facts.data_hash:
            raise SettingError(
                f"data has tokens with the hash {corpus.facts.data_hash}; rung {result.rung} has begun with "
                f"{result.data_hash}, and all of its runs must have the same"
            )


def tokens_folder(settings: ScalingSettings) -> Path:
    return Path(settings.out) / "tokens"


def text_files(queue: Queue, settings: ScalingSettings) -> tuple[list[str], list[str]]:
    """The files to train on and to validate on; or one folder of tokens, and nothing.

    Raises SettingError where `data` isn't given and `out` doesn't hold one folder of tokens.
    """
    if settings.data is not None and read_meta(Path(settings.data)) is None:
        folder, ladder = Path(settings.data), queue.ladder
        for name in (*ladder.data, *ladder.validation):
            if not (folder / name).exists():
                raise SettingError(
                    f"data is {folder}, which lacks {name}; it must have every text file of {queue.file}"
                )
        return [str(folder / name) for name in ladder.data], [str(folder / name) for name in ladder.validation]
    kept = [Path(settings.data)] if settings.data is not None else kept_tokens(queue, settings)
    if len(kept) != 1:
        raise SettingError(
            f"data isn't given, and out holds {plural(len(kept), 'folder')} of the ladder's tokens in "
            f"{tokens_folder(settings)}; data must be the folder of the text files, or one of tokens"
        )
    tokens = read_meta(kept[0])
    missing = missing_files(kept[0], tokens) if tokens is not None else []
    if missing:
        raise SettingError(
            f"data is {kept[0]}, which lacks {plural(len(missing), 'file')} of tokens or holds a part of it, such as "
            f"{missing[0]}; all must be there"
        )
    return [str(kept[0])], []


def kept_tokens(queue: Queue, settings: ScalingSettings) -> list[Path]:
    """Folders of different tokens in `out`, of those that have the hash that the ladder asks for."""
    found: dict[str, Path] = {}
    for folder in sorted(tokens_folder(settings).glob("corpus-*")):
        tokens = read_meta(folder)
        if tokens is not None and queue.ladder.data_hash in (None, tokens.info.data_hash):
            found.setdefault(tokens.info.data_hash, folder)
    return [*found.values()]


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
