"""The results of an evaluation, as they are printed and written as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from query_experts.common.environment import Environment


@dataclass(frozen=True)
class ModelFacts:
    """The scored model. parameters: how many it has. max_length: tokens that it is given at a time."""

    type: str
    parameters: int
    max_length: int


@dataclass(frozen=True)
class RequestCounts:
    """How many requests the model answered, and how many of them lost the start of their context."""

    all: int
    truncated: int


@dataclass(frozen=True)
class MetricScore:
    """One score; None for a number that isn't finite, and for what lm-eval doesn't give."""

    value: float | None
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskScore:
    """The scores of a task or group.

    Attributes:
        version: of the task's definition in lm-eval.
        items: questions that were scored.
        num_fewshot: few-shot examples before each question.
        metrics: name of a metric, with its filter in brackets if it has one -> score.
        note: why the scores aren't quite comparable with published ones, if so.
    """

    version: float | str | None
    items: int
    num_fewshot: int | None
    metrics: dict[str, MetricScore]
    note: str | None


@dataclass(frozen=True)
class RequestedSettings:
    """The settings that change the scores; None where the task's own or no limit applies."""

    data_dir: str | None
    batch_size: int
    limit: int | None
    num_fewshot: int | None


@dataclass(frozen=True, kw_only=True)
class EvaluationEnvironment(Environment):
    """The hardware and package versions of an evaluation, with those of lm-eval and datasets."""

    lm_eval: str
    datasets: str


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of a checkpoint, and what they were measured with. tasks: name of a task or group -> scores."""

    checkpoint: str
    model: ModelFacts
    requests: RequestCounts
    tasks: dict[str, TaskScore]
    settings: RequestedSettings
    environment: EvaluationEnvironment
