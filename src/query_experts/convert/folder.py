"""`query-experts convert`: makes a GQE checkpoint of a dense one, with one decoder layer in memory at a time."""

from __future__ import annotations

import dataclasses
import errno
import glob
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from query_experts.common.errors import SettingError
from query_experts.common.files import disk_errors_as_os_errors, no_empty_folders, require_space, write_json
from query_experts.convert import make_plan
from query_experts.convert.calibration import HELD_OUT
from query_experts.convert.layers import Plan
from query_experts.convert.pipeline import Report, convert_in_parts
from query_experts.convert.settings import ConvertSettings
from query_experts.convert.sidecar_files import check_sidecar_files, copy_sidecar_files, sidecar_bytes
from query_experts.convert.source import CheckpointFolder, find_checkpoint, load_dense_config
from query_experts.data.sources import find_sources
from query_experts.data.tokenizing import load_fast_tokenizer, tokenize_documents
from query_experts.model.configuration_gqe import GQEConfig

TOKENS = 16_384  # of text to calibrate on, by default
LENGTH = 512  # tokens of a sequence, by default, if the model takes that many
BUILDING_NAME = ".{name}.{id}.part"  # of the folder that a conversion writes to
LOCK_NAME = ".{name}.lock"  # of the file that keeps other conversions away


def convert_folder(settings: ConvertSettings) -> tuple[Plan, Report]:
    """Convert a checkpoint and write the GQE checkpoint, config.json last.

    Returns the plan of the conversion, and what it measured. Raises SettingError for a checkpoint or a setting that
    can't be used.
    """
    settings.check()
    settings = with_defaults(settings)
    out = resolve_out(settings.out)
    if settings.output_projection == "slot" and not settings.calibrate:
        raise SettingError(
            "output_projection is 'slot', which doesn't start equal to the dense model; calibrate must be given, so "
            "that the difference is measured"
        )
    if settings.calibrate and settings.torch_device == "mps":
        raise SettingError(
            "device is 'mps', which has no float64 for the router's fit; with calibrate it must be another"
        )
    logging.set_verbosity_error()
    report = Report()
    with building_folder(out, settings.out) as building, ExitStack() as stack:
        folder = find_checkpoint(settings.checkpoint)
        config = load_dense_config(folder, settings.checkpoint)
        check_sidecar_files(folder)
        with disk_errors_as_os_errors(building):
            source = CheckpointFolder(folder, config, settings.torch_device, stack)
            plan = make_plan(
                source.config, settings.top_k, settings.output_projection, "gqe", settings.router, settings.seed,
                bool(settings.calibrate),
            )  # fmt: skip
            longest = config.max_position_embeddings
            text = read_calibration_text(settings, folder, longest) if settings.calibrate else None
            needed = source.num_bytes + added_bytes(plan.full) + sidecar_bytes(folder)
            require_space(building, needed, settings.out)
            write_model(building, source, plan, text, report)
        copy_sidecar_files(folder, building)
        write_json(building / "conversion.json", dataclasses.asdict(conversion_record(settings, report)))
        move_into_place(building, out, settings.out)
    return plan, report


def with_defaults(settings: ConvertSettings) -> ConvertSettings:
    """Raises SettingError for a setting of the text without a text."""
    defaults: dict[str, Any] = {"calibration_tokens": TOKENS, "calibration_length": None, "text_field": "text"}
    given = {name: value for name in defaults if (value := getattr(settings, name)) is not None}
    if given and not settings.calibrate:
        name, value = next(iter(given.items()))
        raise SettingError(f"{name} is {value!r}, and there is no text to calibrate on; calibrate must be given too")
    return dataclasses.replace(settings, **defaults | given) if settings.calibrate else settings


def resolve_out(name: str) -> Path:
    """The absolute path of `out`. Raises SettingError if it can't be a folder."""
    if not name:
        raise SettingError("out is empty; it must be a new or empty folder")
    try:
        out = Path(name).resolve()
        blocked = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    except (OSError, RuntimeError) as error:  # such as a loop of links
        raise SettingError(f"out is {name}, which can't be read ({error}); it must be a new or empty folder") from error
    if blocked is not None:
        subject = "which" if blocked == out else f"where {blocked}"
        raise SettingError(f"out is {name}, {subject} is a file; it must be a new or empty folder")
    return out


@contextmanager
def building_folder(out: Path, name: str) -> Iterator[Path]:
    """A folder to build the checkpoint in, removed on exit. It is next to `out`, or inside an `out` that exists.

    (An `out` that exists may be a mounted disk; a folder next to it would be on another disk.) A lock keeps other
    conversions to the same `out` away. So building folders of the same `out` are left over from killed conversions, and
    are removed.

    out: the resolved path. name: the setting as given. Raises SettingError if another conversion is running, if `out`
    isn't empty, and if no folder can be made.
    """
    parent = out if out.exists() else out.parent
    lock = parent / LOCK_NAME.format(name=out.name)
    building = parent / BUILDING_NAME.format(name=out.name, id=uuid.uuid4().hex[:8])
    with no_empty_folders(parent), ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock, timeout=0))
            stack.callback(remove_lock, lock)
            for abandoned in parent.glob(BUILDING_NAME.format(name=glob.escape(out.name), id="[0-9a-f]" * 8)):
                shutil.rmtree(abandoned, ignore_errors=True)
            require_empty(out, name)
            stack.callback(shutil.rmtree, building, ignore_errors=True)
            building.mkdir()
        except Timeout as error:
            raise SettingError(
                f"out is {name}, to which another conversion is at work ({lock} is held); wait for it, or use another "
                "folder"
            ) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise SettingError(
                f"out is {name}, which can't be made ({error.strerror}); it must be a new or empty folder"
            ) from error
        yield building


def remove_lock(lock: Path) -> None:
    with suppress(OSError):  # it is gone, or the system still holds it
        lock.unlink()


def require_empty(out: Path, name: str) -> None:
    """Raises SettingError for an `out` that holds anything but the lock."""
    first = min(contents(out), default=None) if out.exists() else None
    if first is not None:
        raise SettingError(f"out is {name}, which holds {first.name}; it must be a new or empty folder")


def contents(out: Path) -> list[Path]:
    """The files and folders in `out`, without the lock."""
    return [path for path in out.iterdir() if path.name != LOCK_NAME.format(name=out.name)]


def move_into_place(building: Path, out: Path, name: str) -> None:
    """Rename the finished folder to `out`, or move its files into an `out` that exists, config.json last.

    Raises SettingError if `out` is no longer empty.
    """
    if not out.exists():
        building.rename(out)
        return
    # `out` isn't replaced, because it may be a process's working directory
    if any(path != building for path in contents(out)):
        raise SettingError(f"out is {name}, which was filled meanwhile; it must be a new or empty folder")
    moved: list[Path] = []
    try:
        for path in sorted(building.iterdir(), key=lambda path: path.name == "config.json"):
            moved.append(path.rename(out / path.name))
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def added_bytes(config: GQEConfig) -> int:
    """Size of what only GQE has, in bytes: routers, shared heads and the columns of W_O of two slots."""
    values = config.num_hidden_layers * config.hidden_size * (config.num_attention_heads + 3 * config.head_dim)
    return int(values * (config.dtype or torch.float32).itemsize)


def write_model(building: Path, source: CheckpointFolder, plan: Plan, text: Tensor | None, report: Report) -> None:
    """Write configuration and weights: a file for the tensors outside of the layers, then one for each layer."""
    num_files = plan.final.num_hidden_layers + 1
    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(desc="converting", unit="part", total=num_files) as bar:
        number = 0  # enumerate would keep the last part in memory
        for tensors in convert_in_parts(source, plan, text, report):
            number += 1  # noqa: SIM113
            name = f"model-{number:05}-of-{num_files:05}.safetensors"
            on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(on_cpu, building / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(on_cpu, name)
            total += sum(tensor.nbytes for tensor in on_cpu.values())
            del tensors, on_cpu  # frees them before the next part is made
            bar.update()
    write_json(building / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = plan.final
    config.architectures = ["GQEForCausalLM"]
    config.save_pretrained(building)


def read_calibration_text(settings: ConvertSettings, folder: Path, longest: int) -> Tensor:
    """Token ids [sequences, calibration_length] of the beginning of the text; each document ends with the eos token.

    folder: of the checkpoint, for its tokenizer. longest: the model's max_position_embeddings. Raises SettingError for
    a length that the model can't take, and for too few tokens.
    """
    tokens, text_field = settings.calibration_tokens, settings.text_field
    assert tokens is not None
    assert text_field is not None
    length = min(LENGTH, longest) if settings.calibration_length is None else settings.calibration_length
    if not 2 <= length <= longest:
        raise SettingError(
            f"calibration_length is {length}; it must be 2 to {longest}, the checkpoint's max_position_embeddings"
        )
    if tokens < HELD_OUT * length:
        raise SettingError(
            f"calibration_tokens is {tokens}; it must be {HELD_OUT * length} or more, {HELD_OUT} sequences of "
            f"calibration_length"
        )
    ids: list[int] = []
    with errors_in_convert_terms(folder), TemporaryDirectory() as scratch:
        tokenizer = load_fast_tokenizer(str(folder))
        sources = find_sources(settings.calibrate)
        texts = sources.texts(text_field, Path(scratch))
        for piece in tokenize_documents((("train", text, 0) for text in texts), tokenizer):
            ids += piece.ids
            if len(ids) >= tokens:
                break
    sequences = min(len(ids), tokens) // length
    if sequences < HELD_OUT:
        raise SettingError(
            f"calibrate holds {len(ids)} tokens; it must hold {HELD_OUT * length} or more, {HELD_OUT} sequences of "
            "calibration_length"
        )
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


@contextmanager
def errors_in_convert_terms(folder: Path) -> Iterator[None]:
    """Errors about the text or the tokenizer name settings of training; this names those of the conversion."""
    try:
        yield
    except SettingError as error:
        sentence = str(error)
        if sentence.startswith("data "):
            sentence = f"calibrate {sentence.removeprefix('data ')}"
        if sentence.startswith("tokenizer is "):
            sentence = (
                f"checkpoint is {folder}, whose tokenizer isn't there, damaged, slow or without an eos_token; with "
                "calibrate it must have a fast one with an eos_token"
            )
        raise SettingError(sentence) from error


@dataclass(frozen=True)
class FitShares:
    """How good a layer's router is: the shares of `calibration.Fit`, without the weight."""

    kept: float
    fixed: float
    best: float


@dataclass(frozen=True)
class ConversionRecord:
    """The content of conversion.json: the settings, and what `pipeline.Report` holds, without the routers' weights."""

    settings: ConvertSettings
    fits: list[FitShares | None]
    tokens: int
    dense_loss: float | None
    gqe_loss: float | None
    kl: float | None


def conversion_record(settings: ConvertSettings, report: Report) -> ConversionRecord:
    """The record of a conversion; of paths it keeps only the last part, as others will read it."""
    names_only = dataclasses.replace(
        settings,
        checkpoint=Path(settings.checkpoint).name,
        out=Path(settings.out).name,
        calibrate=[Path(name).name for name in settings.calibrate],
        device=settings.torch_device,
    )
    fits = [FitShares(fit.kept, fit.fixed, fit.best) if fit is not None else None for fit in report.fits]
    return ConversionRecord(names_only, fits, report.tokens, report.dense_loss, report.gqe_loss, report.kl)


def print_report(plan: Plan, report: Report, console: Console) -> None:
    """Print a table of the layers' routers, and how far the two models are apart."""
    if any(fit is not None for fit in report.fits):
        k = plan.fitted_top_k
        title = f"Share of the heads' contributions that {k} active per group keep, on held-out tokens"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("layer", "by the router", "always the same", "the strongest"):
            table.add_column(heading, justify="right")
        for number, fit in enumerate(report.fits):
            if fit is not None:
                table.add_row(str(number), *(f"{share:.1%}" for share in (fit.kept, fit.fixed, fit.best)))
        console.print(table)
    if report.kl is not None:
        console.print(
            f"On {report.tokens:,} held-out tokens: loss {report.gqe_loss:.4f}, dense {report.dense_loss:.4f}; "
            f"KL(dense || GQE) {report.kl:.4f} nats per token."
        )
