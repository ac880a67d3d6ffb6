"""The result of serve.py as dataclasses, for serve.py and serve_tables.py; it needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from query_experts.bench.json_reader import read_result
from query_experts.bench.results import BASELINE, Spread, spread_of_ratios
from query_experts.common.environment import Environment
from query_experts.model.arms import ModelSize

RESULT = Path(__file__).resolve().parent / "results" / "serve-cpu.json"


@dataclass(frozen=True, kw_only=True)
class ServeEnvironment(Environment):
    """The hardware and package versions of a run, with vLLM's."""

    vllm: str


@dataclass(frozen=True)
class Workload:
    """Random requests of one length; `at_a_time` of them are in flight."""

    prompt_tokens: int
    new_tokens: int
    requests: int
    at_a_time: int


@dataclass(frozen=True)
class Figures:
    """What vLLM's benchmark client measured in one run; seconds are medians over requests."""

    output_tokens_a_second: float
    tokens_a_second: float
    seconds_to_first_token: float
    seconds_a_token: float


@dataclass(frozen=True)
class Ratios:
    """Figures of an arm over those of the baseline in the same round."""

    output_tokens_a_second: Spread
    tokens_a_second: Spread
    seconds_to_first_token: Spread
    seconds_a_token: Spread


@dataclass(frozen=True)
class ArmResult:
    """One arm.

    Args:
        runs: By workload, one value for each round.
        parameters: Number of parameters.
        tokens_that_the_cache_holds: Tokens that fit into the memory for keys and values.
    """

    runs: dict[str, list[Figures]]
    parameters: int
    tokens_that_the_cache_holds: int


@dataclass(frozen=True)
class ServeResult:
    """All of the result file. `against_dense`: by arm and workload."""

    environment: ServeEnvironment
    threads: str
    size: ModelSize
    cache_bytes: int
    workloads: dict[str, Workload]
    arms: dict[str, ArmResult]
    against_dense: dict[str, dict[str, Ratios]]


def read_serve() -> ServeResult:
    return read_result(RESULT, ServeResult, "a result of serve.py")


def ratios_to_dense(arms: dict[str, ArmResult]) -> dict[str, dict[str, Ratios]]:
    baseline = arms[BASELINE].runs
    return {
        arm: {name: _ratios(runs, baseline[name]) for name, runs in result.runs.items()} for arm, result in arms.items()
    }


def _ratios(runs: list[Figures], baseline: list[Figures]) -> Ratios:
    names = [field.name for field in fields(Figures)]
    values = {name: ([getattr(r, name) for r in runs], [getattr(r, name) for r in baseline]) for name in names}
    return Ratios(**{name: spread_of_ratios(*pair) for name, pair in values.items()})
