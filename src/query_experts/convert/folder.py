"""`query-experts convert`: from a checkpoint's folder to another, one decoder layer in memory at a time."""

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
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from query_experts.common.errors import SettingError
from query_experts.common.files import disk_errors_as_os_errors, no_empty_folders, require_space, write_json
from query_experts.convert import make_plan
from query_experts.convert.calibration import HELD_OUT
from query_experts.convert.layers import Plan
from query_experts.convert.pipeline import Report, convert
from query_experts.convert.sidecar_files import check_sidecar_files, copied_bytes, copy_sidecar_files
from query_experts.convert.source import Folder, find_checkpoint, read_config
from query_experts.data.sources import find_sources
from query_experts.data.tokenizing import load_fast_tokenizer
from query_experts.model.configuration_gqe import GQEConfig

TOKENS = 16_384  # of text, where nothing else is asked for
LENGTH = 512  # of a sequence of it, where the model takes so many
PART, LOCK = ".{name}.{own}.part", ".{name}.lock"  # the folder that a conversion is made in, and what keeps it alone
PIECE = 2**16  # characters that are tokenised at once


@dataclass(frozen=True)
class ConvertSettings:
    """The command's settings; the options say what each is."""

    checkpoint: str
    out: str
    top_k: int | None
    output_projection: str
    router: str | None
    calibrate: list[str]
    calibration_tokens: int | None
    calibration_length: int | None
    text_field: str | None
    seed: int
    device: str


def convert_folder(settings: ConvertSettings) -> tuple[Plan, Report]:
    """Write the GQE checkpoint, its config.json last. Raises SettingError for what can't be converted."""
    settings = with_defaults(settings)
    out = new_folder(settings.out)
    if settings.output_projection == "slot" and not settings.calibrate:
        raise SettingError(
            "output_projection is 'slot', which doesn't start equal to the dense model; calibrate must be given, so "
            "that the difference is measured"
        )
    if settings.calibrate and settings.device == "mps":
        raise SettingError(
            "device is 'mps', which has no float64 for the router's fit; with calibrate it must be another"
        )
    logging.set_verbosity_error()
    report = Report()
    with building_folder(out, settings.out) as building, ExitStack() as stack:
        folder = find_checkpoint(settings.checkpoint)
        config = read_config(folder, settings.checkpoint)
        check_sidecar_files(folder)
        with disk_errors_as_os_errors(building):
            source = Folder(folder, config, settings.device, stack)
            plan = make_plan(
                source.config, settings.top_k, settings.output_projection, "gqe", settings.router, settings.seed,
                bool(settings.calibrate),
            )  # fmt: skip
            text = read_text(settings, folder, config.max_position_embeddings) if settings.calibrate else None
            needed = source.num_bytes + added_bytes(plan.full) + copied_bytes(folder)
            require_space(building, needed, settings.out)
            write_model(building, source, plan, text, report)
        copy_sidecar_files(folder, building)
        write_json(building / "conversion.json", describe(settings, report))
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


def new_folder(name: str) -> Path:
    """Raises SettingError for an `out` that can't be a folder."""
    if not name:
        raise SettingError("out is empty; it must be a new or empty folder")
    try:
        out = Path(name).resolve()
        blocked = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    except (OSError, RuntimeError) as error:  # links in a circle
        raise SettingError(f"out is {name}, which can't be read ({error}); it must be a new or empty folder") from error
    if blocked is not None:
        what = "which" if blocked == out else f"where {blocked}"
        raise SettingError(f"out is {name}, {what} is a file; it must be a new or empty folder")
    return out


@contextmanager
def building_folder(out: Path, name: str) -> Iterator[Path]:
    """A folder beside `out`, or within it where it is there (as a mounted disk, perhaps); removed in the end.

    Meanwhile a lock keeps other conversions to the same `out` away. So folders of this kind that are there before were
    left by conversions that were killed, and are removed. Raises SettingError where another is at work, for an `out`
    that holds something, and where none can be made.
    """
    place = out if out.exists() else out.parent
    lock = place / LOCK.format(name=out.name)
    building = place / PART.format(name=out.name, own=uuid.uuid4().hex[:8])
    with no_empty_folders(place), ExitStack() as stack:
        try:
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock, timeout=0))
            stack.callback(remove, lock)
            for left in place.glob(PART.format(name=glob.escape(out.name), own="[0-9a-f]" * 8)):
                shutil.rmtree(left, ignore_errors=True)
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


def remove(lock: Path) -> None:
    with suppress(OSError):  # gone, or on a system that doesn't let go of it yet
        lock.unlink()


def require_empty(out: Path, name: str) -> None:
    """Raises SettingError for an `out` that holds something besides the lock."""
    first = min(held_in(out), default=None) if out.exists() else None
    if first is not None:
        raise SettingError(f"out is {name}, which holds {first.name}; it must be a new or empty folder")


def held_in(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name != LOCK.format(name=out.name)]


def move_into_place(building: Path, out: Path, name: str) -> None:
    """The finished folder, under its name; config.json last, where it goes in file by file.

    Raises SettingError where the folder is no longer empty.
    """
    if not out.exists():
        building.rename(out)
        return
    if any(path != building for path in held_in(out)):  # a working directory, perhaps: it stays the same folder
        raise SettingError(f"out is {name}, which was filled meanwhile; it must be a new or empty folder")
    placed: list[Path] = []
    try:
        for path in sorted(building.iterdir(), key=lambda path: path.name == "config.json"):
            placed.append(path.rename(out / path.name))
    except BaseException:
        for path in placed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def added_bytes(config: GQEConfig) -> int:
    """What GQE has and a dense model doesn't: routers, shared heads and two slots' columns of W_O."""
    values = config.num_hidden_layers * config.hidden_size * (config.num_attention_heads + 3 * config.head_dim)
    return int(values * (config.dtype or torch.float32).itemsize)


def write_model(building: Path, source: Folder, plan: Plan, text: Tensor | None, report: Report) -> None:
    """Configuration and weights: a file for each layer, and the first for what is outside of them."""
    files = plan.final.num_hidden_layers + 1
    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(desc="converting", unit="part", total=files) as bar:
        number = 0  # counted by hand, as enumerate would hold the last part
        for tensors in convert(source, plan, text, report):
            number += 1  # noqa: SIM113
            name = f"model-{number:05}-of-{files:05}.safetensors"
            on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(on_cpu, building / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(on_cpu, name)
            total += sum(tensor.nbytes for tensor in on_cpu.values())
            del tensors, on_cpu  # before the next part is made
            bar.update()
    write_json(building / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = plan.final
    config.architectures = ["GQEForCausalLM"]
    config.save_pretrained(building)


def read_text(settings: ConvertSettings, folder: Path, longest: int) -> Tensor:
    """Token ids [sequences, calibration_length] of the text's beginning, documents joined by the end-of-text token.

    longest: max_position_embeddings of the model.
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
        for document in sources.texts(text_field, Path(scratch)):
            for start in range(0, len(document), PIECE):  # a book as one text would fill the memory
                piece = document[start : start + PIECE]
                ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
                if len(ids) >= tokens:
                    break
            ids.append(tokenizer.eos_token_id)
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
    """What is refused of the text or the tokenizer is refused by the names of training's settings."""
    try:
        yield
    except SettingError as error:
        said = str(error)
        if said.startswith("data "):
            said = f"calibrate {said.removeprefix('data ')}"
        if said.startswith("tokenizer is "):
            said = f"checkpoint is {folder}, whose tokenizer isn't there, damaged, slow or without an eos_token; with "
            said += "calibrate it must have a fast one that ends a text"
        raise SettingError(said) from error


def describe(settings: ConvertSettings, report: Report) -> dict[str, Any]:
    """What conversion.json holds. The router's weights are in the checkpoint."""
    fits = [{"kept": f.kept, "fixed": f.fixed, "best": f.best} if f is not None else None for f in report.fits]
    held = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name != "fits"}
    kept = dataclasses.asdict(settings) | {"calibrate": [Path(name).name for name in settings.calibrate]}
    kept |= {name: Path(kept[name]).name for name in ("checkpoint", "out")}
    return {"settings": kept, "fits": fits, **held}


def print_report(plan: Plan, report: Report, console: Any) -> None:
    """A row for each layer's router, and how far the models are apart."""
    from rich import box
    from rich.table import Table

    if any(fit is not None for fit in report.fits):
        k = plan.fitted_top_k
        title = f"Share of the heads' contributions that {k} awake in each group keep, on held-out tokens"
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
            f"KL(dense || GQE) {report.kl:.4f} nats a token."
        )
