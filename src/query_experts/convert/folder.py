"""`query-experts convert`: from a checkpoint's folder to another, one decoder layer in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from query_experts.convert import make_plan
from query_experts.convert.calibration import HELD_OUT
from query_experts.convert.configs import check_convertible, untied
from query_experts.convert.layers import Plan
from query_experts.convert.names import LAYERS
from query_experts.convert.walk import Report, convert
from query_experts.data.sources import find_sources
from query_experts.data.tokenizing import load_tokenizer
from query_experts.errors import SettingError
from query_experts.files import full_disk_as_os_error, require_space, write_json
from query_experts.generation import UNLOADABLE, reason, require_folder

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LENGTH = 512  # of a sequence of text, where nothing else is asked for and the model takes so many
PIECE = 2**16  # characters that are tokenised at once
# what comes along: tokenizer, chat template, generation settings, licence
COPIED = (
    "tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# what a hub repository may hold besides: the same weights in other forms
NOT_FETCHED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    "onnx/*",
    "original/*",
    "consolidated*",
]
MOST_GROWTH = 1.1  # of the weights: routers, shared heads and the extra columns of W_O


@dataclass(frozen=True)
class ConvertSettings:
    """The command's settings; the options say what each is."""

    checkpoint: str
    out: str
    top_k: int | None
    output_projection: str
    router: str | None
    calibrate: list[str]
    calibration_tokens: int
    calibration_length: int | None
    text_field: str
    seed: int
    device: str


def convert_folder(settings: ConvertSettings) -> tuple[Plan, Report]:
    """Write the GQE checkpoint, its config.json last. Raises SettingError for what can't be converted."""
    if not settings.out:
        raise SettingError("out is empty; it must be a new or empty folder")
    out = Path(settings.out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"out is {settings.out}, which exists; it must be a new or empty folder")
    logging.set_verbosity_error()
    folder = find_checkpoint(settings.checkpoint)
    config = read_config(folder)
    check_convertible(config)
    if settings.output_projection == "slot" and not settings.calibrate:
        raise SettingError(
            "output_projection is 'slot', which doesn't start equal to the dense model; calibrate must be given, so "
            "that the difference is measured"
        )
    if settings.calibrate and settings.device == "mps":
        raise SettingError(
            "device is 'mps', which has no float64 for the router's fit; with calibrate it must be another"
        )
    report = Report()
    part = f".{out.name}.{os.getpid()}.part"
    building = out / part if out.exists() else out.with_name(part)  # inside, where out may be a mounted disk
    try:
        with ExitStack() as stack, full_disk_as_os_error(building):
            source = Folder(folder, config, settings.device, stack)
            plan = make_plan(
                source.config, settings.top_k, settings.output_projection, "gqe", settings.router, settings.seed,
                bool(settings.calibrate),
            )  # fmt: skip
            text = read_text(settings, folder, config.max_position_embeddings) if settings.calibrate else None
            require_space(building, int(MOST_GROWTH * source.num_bytes))
            write_model(building, source, plan, text, report)
        copy_beside(folder, building)
        write_json(building / "conversion.json", describe(settings, report))
        if out.exists():  # a working directory, perhaps: it stays the same folder
            if any(path != building for path in out.iterdir()):
                raise SettingError(
                    f"out is {settings.out}, which was filled meanwhile; it must be a new or empty folder"
                )
            for path in sorted(building.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(out / path.name)
        else:
            building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return plan, report


def find_checkpoint(name: str) -> Path:
    """The folder of that name, or the copy of a checkpoint on the hub."""
    require_folder(name, "checkpoint")
    if Path(name).exists():
        return Path(name)
    try:
        return Path(snapshot_download(name, ignore_patterns=NOT_FETCHED))
    except (HFValidationError, OSError) as error:
        raise SettingError(
            f"checkpoint is {name}, which is no folder and can't be had from the hub ({type(error).__name__}); it must "
            "be a folder with config.json and safetensors, or the name of a model on the hub"
        ) from error


def read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise SettingError(f"checkpoint is {folder}, which holds no config.json; it must be a model's folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except UNLOADABLE as error:
        raise SettingError(f"checkpoint is {folder}, whose config.json can't be read: {reason(error)}") from error


class Folder:
    """A dense checkpoint on disk, in one file of safetensors or several; tensors are read when they are asked for."""

    def __init__(self, folder: Path, config: PreTrainedConfig, device: str, stack: ExitStack):
        self.folder, self.config = folder, config
        self.where: dict[str, tuple[Any, str]] = {}  # tensor -> the open file that holds it, and its name there
        files = self._files()
        self.num_bytes = sum(path.stat().st_size for path in files)
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=device))
            except SafetensorError as error:
                raise SettingError(f"checkpoint holds {path}, which is damaged ({error})") from error
            self.where |= {name: (file, name) for name in file.keys()}  # noqa: SIM118
        if config.tie_word_embeddings and HEAD in self.where:  # as Transformers loads it
            if EMBEDDINGS not in self.where:
                self.where[EMBEDDINGS] = self.where.pop(HEAD)
            elif torch.equal(self._read(HEAD), self._read(EMBEDDINGS)):
                del self.where[HEAD]
            else:
                self.config = untied(config)

    def _files(self) -> list[Path]:
        """Transformers' choice: one file, and else those that the index lists."""
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        files = [self.folder / SAFE_WEIGHTS_NAME]
        if not files[0].is_file() and index.exists():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = [self.folder / name for name in sorted(set(listed.values()))]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise SettingError(
                    f"checkpoint is {self.folder}, whose {index.name} is damaged; it must be the index that "
                    "save_pretrained wrote"
                ) from error
        for path in files:
            if not path.is_file():
                raise SettingError(
                    f"checkpoint is {self.folder}, which holds no {path.name}; it must hold weights as safetensors"
                )
        return files

    def outside(self) -> dict[str, Tensor]:
        layers = tuple(f"{LAYERS}{number}." for number in range(self.config.num_hidden_layers))
        return {name: self._read(name) for name in self.where if not name.startswith(layers)}

    def layer(self, number: int) -> dict[str, Tensor]:
        prefix = f"{LAYERS}{number}."
        return {name.removeprefix(prefix): self._read(name) for name in self.where if name.startswith(prefix)}

    def _read(self, name: str) -> Tensor:
        file, there = self.where[name]
        return file.get_tensor(there)


def write_model(building: Path, source: Folder, plan: Plan, text: Tensor | None, report: Report) -> None:
    """Configuration and weights: a file for each layer, and the first for what is outside of them."""
    building.mkdir(parents=True, exist_ok=True)
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


def copy_beside(folder: Path, building: Path) -> None:
    """Tokenizer, chat template, generation settings and licence."""
    for path in folder.iterdir():
        if path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, building / path.name)
        elif path.is_file() and any(fnmatch(path.name, pattern) for pattern in COPIED):
            shutil.copyfile(path, building / path.name)


def read_text(settings: ConvertSettings, folder: Path, longest: int) -> Tensor:
    """Token ids [sequences, calibration_length] of the text's beginning, documents joined by the end-of-text token.

    longest: max_position_embeddings of the model.
    """
    tokens = settings.calibration_tokens
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
    with calls_them_by_our_names(folder), TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(str(folder))
        sources = find_sources(settings.calibrate)
        for document in sources.texts(settings.text_field, Path(scratch)):
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
def calls_them_by_our_names(folder: Path) -> Iterator[None]:
    """What is refused of the text or the tokenizer is refused by the names of training's settings."""
    try:
        yield
    except SettingError as error:
        said = str(error).replace("`data`", "calibrate").replace("`text_field`", "text_field")
        if said.startswith("`tokenizer` is "):
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
