"""The results of the study as dataclasses, and the one reader and writer of each file that holds them.

Readers ignore unknown keys, which are those of newer versions. Fields that older files lack have defaults.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from query_experts.common.environment import Environment
from query_experts.common.errors import SettingError
from query_experts.common.faults import first_fault
from query_experts.common.files import read_json, write_json
from query_experts.model.arms import ARMS
from query_experts.model.kernel_choice import KernelChoice
from query_experts.study.settings import CompareSettings

FINITE = ConfigDict(allow_inf_nan=False)
Curve = list[tuple[int, float]]  # training tokens, loss


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Args:
        total: All of them, tied ones counted once.
        active: Those that one token uses.
        embedding: Those of the input and output embeddings.
    """

    total: int
    active: int
    embedding: int


@dataclass(frozen=True)
class RoutingLoad:
    """How the routers of a model distribute held-out tokens.

    Args:
        load: Share of tokens that select each expert, [layers][groups][experts].
        entropy: Mean entropy of the router as a share of its maximum, [layers][groups].
        dead: Number of dead experts.
        dead_below: The load below which an expert is dead.
    """

    __pydantic_config__ = FINITE

    load: list[list[list[float]]]
    entropy: list[list[float]]
    dead: int
    dead_below: float

    @property
    def experts_per_group(self) -> int:
        return len(self.load[0][0])

    @property
    def num_experts(self) -> int:
        return sum(len(group) for layer in self.load for group in layer)

    @property
    def mean_entropy(self) -> float:
        values = [value for layer in self.entropy for value in layer]
        return sum(values) / len(values)

    @property
    def highest_load(self) -> float:
        return max(value for layer in self.load for group in layer for value in group)


@dataclass(frozen=True, kw_only=True)
class RoutingPoint:
    """How the routers distribute tokens at one moment of training.

    Args:
        tokens: Training tokens so far.
        entropy: Of the router as a share of its maximum, log M; mean over layers and groups.
        entropy_lowest: The lowest over layers and groups.
        highest_load: The largest share of tokens that select one expert.
        dead: Number of dead experts.
    """

    __pydantic_config__ = FINITE

    tokens: int
    entropy: float
    entropy_lowest: float
    highest_load: float
    dead: int


@dataclass(frozen=True)
class Passage:
    """A held-out text token by token, and the most probable expert of each token, [layers][tokens][groups]."""

    tokens: list[str]
    experts: list[list[list[int]]]


@dataclass(frozen=True)
class PartLoss:
    """The language-model loss on one validation file.

    Args:
        name: The file's name without endings.
        loss: Mean nats for each predicted token.
        bits_per_byte: loss * tokens of the file's text / its UTF-8 bytes / ln 2.
        predicted_tokens: Tokens that the mean is taken over.
    """

    __pydantic_config__ = FINITE

    name: str
    loss: float
    bits_per_byte: float
    predicted_tokens: int


@dataclass(frozen=True, kw_only=True)
class _FirstStep:
    first_step: int


@dataclass(frozen=True, kw_only=True)
class Piece(Environment, _FirstStep):  # in this order of bases, first_step is the first key of its JSON
    """The part of a resumed run that one machine trained, from `first_step` on.

    Args:
        instructions: As `common.environment.instructions` gives them; older files lack them.
        kernels: The setting, and what it chose; None for stock Llama. Older files lack it.
    """

    instructions: str | None = None
    kernels: KernelChoice | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run: result.json, and an entry of comparison.json's runs.

    Args:
        parameters: Parameter counts of the model.
        active_attention_heads: Query heads that attend for a token.
        dense_attention_heads: Query heads of the dense arm.
        flops_per_token: Of a forward pass at the training length.
        kv_bytes_per_token: Bytes that a token adds to the KV cache.
        tokens_per_s: Training speed, without the first steps of each piece.
        train_seconds: Time in training steps.
        train_tokens: Tokens trained on.
        diverged_at_tokens: Tokens after which the loss was no longer finite; None for a run that did not diverge.
        pieces: Where the run was trained; empty in files from before pieces were recorded.
        clipped_steps: Steps whose gradient ZClip scaled down.
        skipped_steps: Steps that were skipped, as their gradient wasn't finite. None, and absent in the file, for none.
        validation_loss: Language-model loss in nats a token at the end; None for a run that diverged.
        train_curve: Training loss.
        validation_curve: Validation loss.
        routing: None without a router.
        passage: None without a router.
        teacher_loss: The teacher's validation loss; None, and absent in the file, without a teacher.
        bits_per_byte: validation_loss * tokens of the held-out text / its UTF-8 bytes / ln 2. None, and absent in the
            file, for a run that diverged and in older files.
        validation_parts: The loss on each validation file. None, and absent in the file, without such files, for a
            run that diverged and in older files.
        routing_curve: Routing during training: loads of the logged steps' batches, entropy on fixed held-out tokens.
            None, and absent in the file, without a router, without telemetry and in older files.
    """

    __pydantic_config__ = FINITE

    arm: str
    seed: int
    parameters: ParameterCounts
    active_attention_heads: int
    dense_attention_heads: int
    intermediate_size: int | None = None
    flops_per_token: float
    kv_bytes_per_token: int
    tokens_per_s: float
    train_seconds: float
    train_tokens: int
    diverged_at_tokens: int | None = None
    pieces: list[Piece] = field(default_factory=list)
    clipped_steps: int | None = None
    skipped_steps: int | None = None
    validation_loss: float | None
    train_curve: Curve
    validation_curve: Curve
    routing: RoutingLoad | None = None
    passage: Passage | None = None
    teacher_loss: float | None = None
    bits_per_byte: float | None = None
    validation_parts: list[PartLoss] | None = None
    routing_curve: list[RoutingPoint] | None = None

    @property
    def diverged(self) -> bool:
        """Whether the run ended because its loss was no longer a finite number."""
        return self.diverged_at_tokens is not None


@dataclass(frozen=True)
class PrefillTimes:
    """Prefill times of all arms.

    Args:
        lengths: Prompt lengths in tokens.
        repeats: Timings of each arm at each length.
        dtype: The dtype of the models.
        limit: Speedup over dense that attention alone could reach, by arm; empty without a dense arm.
        seconds: Seconds of each repeat by arm, [lengths][repeats]; no repeats where a length isn't timed yet.
    """

    __pydantic_config__ = FINITE

    lengths: list[int]
    repeats: int
    dtype: str
    limit: dict[str, float]
    seconds: dict[str, list[list[float]]]

    def seconds_of(self, arm: str, length: int) -> list[float]:
        """Seconds of each repeat; empty where the arm isn't timed at this length."""
        by_length = self.seconds.get(arm, [])
        position = self.lengths.index(length)
        return by_length[position] if position < len(by_length) else []


@dataclass(frozen=True)
class FileFacts:
    """What a validation file contributes: the name without endings, documents, tokens, and text in UTF-8 bytes."""

    name: str
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """`Corpus.facts`, and how much of the tokens a comparison uses. Older files lack what has a default."""

    source: list[str]
    data_hash: str
    tokenizer: str | None = None
    validation: str | None = None
    validation_fraction: float | None = None
    max_bytes: int | None = None
    text_field: str | None = None
    duplicate_documents: int | None = None
    vocab_size: int
    train_documents: int
    train_tokens: int
    train_bytes: int | None = None
    validation_documents: int
    validation_tokens: int
    validation_bytes: int | None = None
    validation_files: list[FileFacts] = field(default_factory=list)
    seq_len: int
    skipped_files: dict[str, int] = field(default_factory=dict)
    epochs: float | None = None
    validation_sequences_used: int | None = None
    validation_tokens_used: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of comparison.json."""

    settings: CompareSettings | None = None
    data: DataFacts | None = None
    environment: Environment | None = None
    runs: list[RunResult]
    prefill: PrefillTimes | None = None


_RUN = TypeAdapter(RunResult)
_COMPARISON = TypeAdapter(Comparison)


def read_result(file: Path) -> RunResult:
    """Reads a result.json. Raises SettingError for any other file."""
    remedy = "delete it, and that run is trained again"
    values = read_json(file, remedy)
    try:
        return _RUN.validate_python(values)
    except ValidationError as error:
        raise SettingError(f"{file} is no run's result ({first_fault(error)}); {remedy}") from error


def write_result(file: Path, run: RunResult) -> None:
    write_json(file, _run_as_json(run))


def parse_comparison(content: str) -> Comparison:
    """Reads the content of a comparison.json. Raises ValueError for anything else."""
    comparison = _COMPARISON.validate_json(content)  # as JSON: strict settings refuse to be made of a dictionary
    asked = comparison.settings.arms if comparison.settings is not None else []
    unknown = {*asked, *(run.arm for run in comparison.runs)} - ARMS.keys()
    if unknown:
        raise ValueError(f"arms hold {', '.join(sorted(unknown))}; they must be of {', '.join(ARMS)}")
    return comparison


def read_comparison(folder: Path) -> Comparison:
    """Reads a folder's comparison.json.

    Raises:
        SettingError: The file isn't there, is damaged, or holds something else.
        OSError: The file is there and can't be read.
    """
    file = folder / "comparison.json"
    try:
        return parse_comparison(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and file.exists():
            raise
        fault = f" ({first_fault(error)})" if isinstance(error, ValueError) else ""
        raise SettingError(
            f"folder is {folder}; it must hold comparison.json as compare wrote it{fault}, and the same compare "
            "command writes it again"
        ) from error


def write_comparison(file: Path, comparison: Comparison) -> None:
    runs = [_run_as_json(run) for run in comparison.runs]
    write_json(file, dataclasses.asdict(comparison) | {"runs": runs})


def _run_as_json(run: RunResult) -> dict[str, Any]:
    values = dataclasses.asdict(run)
    for name in ("skipped_steps", "teacher_loss", "bits_per_byte", "validation_parts", "routing_curve"):
        if values[name] is None:
            del values[name]
    return values
