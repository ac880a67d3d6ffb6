"""The result of one run of the ladder as a dataclass, and the one reader and writer of its file.

Readers ignore unknown keys, which are those of newer versions. A file holds one result or a list of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from query_experts.common.errors import SettingError
from query_experts.common.faults import first_fault
from query_experts.common.fields import Bounds, Count, NonNegative, NotEmpty
from query_experts.common.files import parse_json, write_json
from query_experts.model.arms import ARMS
from query_experts.study.results import FINITE, Curve, PartLoss, Piece, RoutingLoad, RoutingPoint

MIXED = "mixed"  # instructions of a run whose pieces differ
MAX_CURVE_POINTS = 40

VARIANT = re.compile(r"|[a-z_]+=[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")  # nothing, or a setting and a number
WholeNumber = Annotated[int, Bounds(least=0)]

Key = tuple[str, str, str, int, float]  # rung, variant, arm, seed, budget


@dataclass(frozen=True, kw_only=True)
class LadderResult:
    """One finished run of the ladder at one of its budgets.

    Args:
        ladder: Name of the ladder.
        rung: Name of the model size.
        variant: What a sweep varies, such as `learning_rate=0.004`; empty outside of sweeps.
        arm: Name of the arm.
        seed: Seed of the initial values and of the order of the tokens.
        budget: Share of the rung's tokens that the run trained on.
        parameters: All parameters, tied ones counted once.
        embedding_parameters: Those of the input and output embeddings.
        active_parameters: Those that one token uses.
        active_heads: Query heads that attend for a token in a layer, the shared head included.
        train_tokens: Tokens trained on.
        flops: Of training as it runs, forward and backward: queries of inactive experts and recomputed scores count.
        active_flops: Of training, three times a forward pass of what a token uses.
        diverged_at_tokens: Tokens after which the loss was no longer finite; None for a run that did not diverge.
        validation_loss: Over all held-out text, nats a token; None for a run that diverged.
        bits_per_byte: Over all held-out text; None for a run that diverged.
        parts: The same for each validation file.
        routing: None without a router.
        routing_curve: Routing during training; empty without a router.
        curve: Training loss, at most 40 points.
        settings: The settings of the run that matter, without paths.
        pieces: Where the run was trained.
        instructions: Instruction set of the processor, such as AVX512_BF16; `mixed` where pieces differ.
        train_seconds: Time in training steps.
        tokens_per_s: Training speed.
        data_hash: Of the tokens.
        tag: Tag of the code; None for code without one.
        beside: Processes that shared the device, this one included; they slow one another.
    """

    __pydantic_config__ = FINITE

    ladder: str
    rung: Annotated[str, NotEmpty("be the name of a model size")]
    variant: str = ""
    arm: str
    seed: WholeNumber
    budget: Annotated[float, Bounds(above=0, most=1)]
    parameters: Count
    embedding_parameters: WholeNumber
    active_parameters: Count
    active_heads: Count
    train_tokens: Count
    flops: Annotated[float, Bounds(above=0)]
    active_flops: Annotated[float, Bounds(above=0)]
    diverged_at_tokens: WholeNumber | None
    validation_loss: NonNegative | None
    bits_per_byte: NonNegative | None
    parts: list[PartLoss]
    routing: RoutingLoad | None
    routing_curve: list[RoutingPoint]
    curve: Curve
    settings: dict[str, Any]
    pieces: list[Piece]
    instructions: str
    train_seconds: NonNegative
    tokens_per_s: NonNegative
    data_hash: str
    tag: str | None
    beside: int = 1  # older files lack it

    @property
    def key(self) -> Key:
        """What no two results of a ladder share."""
        return self.rung, self.variant, self.arm, self.seed, self.budget

    @property
    def swept(self) -> str:
        """Name of the setting that a sweep varies; empty outside of sweeps."""
        return self.variant.partition("=")[0]

    @property
    def swept_to(self) -> float:
        """The value that a sweep gives that setting. Raises ValueError outside of sweeps."""
        return float(self.variant.partition("=")[2])

    @property
    def device(self) -> str | None:
        """What it was trained on, cpu or cuda; None if its settings don't say."""
        return self.settings.get("device")

    @property
    def diverged(self) -> bool:
        """Whether the run has no loss to compare."""
        return self.diverged_at_tokens is not None or self.validation_loss is None


_RESULTS = TypeAdapter(list[LadderResult])


def file_name(result: LadderResult) -> str:
    """The name of a result's file, such as d64-gqe-seed0-025.json for a quarter of the tokens."""
    variant = [result.variant.replace("=", "-")] if result.variant else []
    return "-".join([result.rung, *variant, result.arm, f"seed{result.seed}", f"{100 * result.budget:03.0f}.json"])


def write_result(folder: Path, result: LadderResult) -> Path:
    """Writes a result into a folder, under its own name. Creates the folder.

    Raises:
        SettingError: The file is there already, or a string of the result is an absolute path.
    """
    file = folder / file_name(result)
    if file.exists():
        raise SettingError(f"results hold {file}; a finished run is not overwritten: move the file away to replace it")
    write_json(file, _checked(result))
    return file


def collect_result(file: Path, result: LadderResult) -> None:
    """Adds a result to a file that holds a list of them, which is whole at any moment. Creates the file.

    Several processes may add to one file.

    Raises:
        SettingError: The file is damaged or holds a result of the same key, or a string is an absolute path.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f"{file.name}.lock")):
        before = _read_file(file) if file.exists() else []
        _refuse_duplicates((file, one) for one in [*before, result])
        write_json(file, [*map(dataclasses.asdict, before), _checked(result)])


def _checked(result: LadderResult) -> dict[str, Any]:
    """A result as JSON holds it. Raises SettingError for an absolute path and for a curve of too many points."""
    values, name = dataclasses.asdict(result), file_name(result)
    paths = absolute_paths(values)
    if paths:
        raise SettingError(f"result {name} holds the path {paths[0]}; it must hold file names without folders")
    if len(result.curve) > MAX_CURVE_POINTS:
        raise SettingError(f"curve of {name} has {len(result.curve)} points; it must have at most 40")
    return values


def absolute_paths(values: Any) -> list[str]:
    """The strings of a nested value, keys included, that are an absolute path or hold one as a word."""
    return [text for text in _strings(values) if any(map(_is_absolute, re.split(r"[\s=,;'\"]+", text)))]


def _strings(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _strings(name)
            yield from _strings(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _strings(value)


def _is_absolute(word: str) -> bool:
    if word.startswith(("~/", "file:")):
        return True
    return len(word) > 1 and (PurePosixPath(word).is_absolute() or PureWindowsPath(word).is_absolute())


def read_results(folder: Path) -> list[LadderResult]:
    """Reads every *.json of a folder, in the order of the files' names.

    Raises:
        SettingError: There is no such folder, a file is damaged, or two results have one key.
    """
    if not folder.is_dir():
        raise SettingError(f"results is {folder}; it must be a folder")
    return read_files(sorted(folder.glob("*.json")))


def read_files(files: Iterable[Path]) -> list[LadderResult]:
    """Reads files of results. Raises SettingError where one is damaged, or two results have one key."""
    found = [(file, result) for file in files for result in _read_file(file)]
    _refuse_duplicates(found)
    return [result for _, result in found]


def _read_file(file: Path) -> list[LadderResult]:
    values: Any = None
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        several = values if isinstance(values, list) else [values]
        results = _RESULTS.validate_json(json.dumps(several), strict=True)
    except (ValidationError, ValueError) as error:
        fault = first_fault(error) if isinstance(values, list) else first_fault(error).removeprefix("0.")
        raise SettingError(f"results hold {file}, which is damaged ({fault}); move it away") from error
    for result in results:
        _check_words(result, file)
    return results


def _check_words(result: LadderResult, file: Path) -> None:
    """Raises SettingError for a word that a reader can't use."""
    if result.arm not in ARMS:
        raise SettingError(f"arm is {result.arm!r} in {file}; it must be one of {', '.join(ARMS)}")
    if not VARIANT.fullmatch(result.variant):
        raise SettingError(f"variant is {result.variant!r} in {file}; it must be empty or like 'learning_rate=0.004'")
    if result.validation_loss is None and result.diverged_at_tokens is None:
        raise SettingError(f"validation_loss is null in {file}; it must be a number, or diverged_at_tokens given")
    rate = result.settings.get("learning_rate", 1.0)
    if type(rate) not in (int, float):
        raise SettingError(f"settings.learning_rate is {rate!r} in {file}; it must be a number")


def _refuse_duplicates(found: Iterable[tuple[Path, LadderResult]]) -> None:
    seen: dict[Key, Path] = {}
    for file, result in found:
        if result.key in seen:
            raise SettingError(
                f"results hold {seen[result.key]} and {file}, both with {result.rung}, {result.arm}, seed "
                f"{result.seed}, budget {result.budget:g}; a run must have one result"
            )
        seen[result.key] = file
