"""The settings of `scaling`, and the YAML file that describes a ladder: its rungs, and the plan of its runs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from query_experts.common.errors import SettingError
from query_experts.common.faults import first_fault
from query_experts.common.fields import (
    Bounds,
    Count,
    Distinct,
    NonNegative,
    NotEmpty,
    Settings,
    argument,
    option,
)
from query_experts.common.formatting import join_words
from query_experts.common.settings import default_of, validate
from query_experts.common.yaml_reader import read_yaml
from query_experts.model import costs
from query_experts.model.arms import ARMS, ModelSize, arm_config, build, check_arms, in_order
from query_experts.study.settings import RunSettings

DECAY = 0.2  # of each budget
LOGS = 40  # in a whole run, whose steps are a multiple of it
LEAST_BUDGET = 0.125  # a budget's end and the start of its decay then fall on logs
MOST_STEPS = 10_000_000
MOST_OF_A_NUMBER = 1_000_000  # of whole ones, so that no product overflows
RUNG_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]{0,39}")  # hyphens stand between the parts of a result's file name
DEFAULTS = {"device": "cpu", "validation_sequences": None}  # where they differ from those of `train`
# the ladder or the queue sets these for each run; kernels are always chosen automatically; a run has one process
SET_FOR_A_RUN = {
    "data", "validation", "max_bytes", "out", "cache_dir", "stop_after_minutes", "steps", "warmup_fraction",
    "decay_fraction", "evaluations", "kernels", "fsdp_size", "tp_size", "rank_timeout_minutes", "keep", "report_to",
    "telemetry", "log_every", "peak_flops",
}  # fmt: skip
OF_ALL_RUNGS = {"seq_len", "vocab_size", "text_field", "tokenizer", "validation_sequences"}  # they make the tokens
ALLOWED = {f.name for f in dataclasses.fields(RunSettings)} - SET_FOR_A_RUN
BELONGS_TO = {
    "data": ["run", "tokens"], "only": ["run", "status", "tokens"], "hours": ["run"], "minutes": ["run"],
    "beside": ["run"], "device": ["run"], "collect": ["run"], "tokens": ["tokens"], "shard_megabytes": ["tokens"],
    "to": ["tokens"],
}  # fmt: skip


@dataclass
class ScalingSettings(Settings):
    """`query-experts scaling`."""

    action: Literal["run", "status", "fit", "report", "tokens"] = argument(
        "run: train what is missing; status: what is done, running and missing; fit: print gaps and laws; report: the "
        "same as a page; tokens: write the tokens for a machine that can't read the text"
    )
    ladder: Annotated[str, NotEmpty("be a ladder's file")] = argument("the ladder, a YAML file")
    data: str | None = option(
        None, "run, tokens: folder of the text files that the ladder names, or a folder of tokens; not needed once "
              "they are tokenised in out", "data", metavar="FOLDER",
    )  # fmt: skip
    tokens: Count | None = option(
        None, "tokens: training tokens to keep at most, spread evenly over the text; default: all", "data"
    )
    shard_megabytes: Annotated[float, Bounds(above=0)] | None = option(
        None, "tokens: largest size of a file; default: 14", "data"
    )
    only: list[str] = option([], "run, status, tokens: only these rungs and arms", "what to run", metavar="NAME")
    hours: NonNegative | None = option(
        None, "run: save and stop after X hours, at the end of a step; the same command goes on from there",
        "what to run",
    )  # fmt: skip
    minutes: NonNegative | None = option(
        None, "run: begin only runs that end within X minutes from now, at the rate measured on this device; one "
              "whose first steps show that it won't is given up", "what to run",
    )  # fmt: skip
    beside: Count | None = option(
        None, "run: processes that share the device; default: on a GPU more than one for small models, else 1",
        "machine",
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "run: the rungs of this device; auto: cuda where there is one, else cpu", "machine"
    )
    out: Annotated[str, NotEmpty("be a folder")] = option(
        "runs/ladder", "folder for tokens, checkpoints and the page; results go where the ladder says", "output",
        metavar="FOLDER",
    )  # fmt: skip
    collect: Annotated[str, NotEmpty("be a file")] | None = option(
        None, "run: add all results to this file, in place of one file each where the ladder says", "output",
        metavar="FILE",
    )  # fmt: skip
    to: Annotated[str, NotEmpty("be a new folder")] | None = option(
        None, "tokens: new folder for them", "output", metavar="FOLDER"
    )

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        validate(self)
        plain = ScalingSettings(self.action, self.ladder)
        for name, actions in BELONGS_TO.items():
            if getattr(self, name) != getattr(plain, name) and self.action not in actions:
                raise SettingError(
                    f"{name} is {getattr(self, name)!r}, which belongs to scaling {join_words(actions)}; it must be "
                    "left out"
                )
        if self.action == "tokens" and self.to is None:
            raise SettingError("to isn't given; it must be a new folder for the tokens")
        if Path(self.out).is_file():
            raise SettingError(f"out is {self.out}, which is a file; it must be a folder")


@dataclass(frozen=True)
class Entry:
    """A part of the plan, whose runs come rung by rung, seed by seed, arm by arm.

    Args:
        rungs: Names of rungs.
        arms: Arms of the study.
        seeds: How many seeds, from 0 on.
        vary: Setting -> numbers with each of which every run is made, as in a sweep of the learning rate.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rungs: Annotated[list[str], Distinct()]
    arms: Annotated[list[str], Distinct()]
    seeds: Annotated[int, Bounds(least=1, most=1000)]
    vary: dict[str, Any] = field(default_factory=dict)

    def variants(self) -> list[tuple[tuple[str, float], ...]]:
        return [((name, value),) for name, values in self.vary.items() for value in values] or [()]


@dataclass(frozen=True)
class Run:
    """One run of the queue; its budgets give a result each.

    Args:
        varied: Settings in which it differs from its rung's.
    """

    rung: str
    arm: str
    seed: int
    varied: tuple[tuple[str, float], ...] = ()

    @property
    def variant(self) -> str:
        """The varied setting as text, such as `learning_rate=0.004`; empty for none."""
        return ",".join(f"{name}={value!r}" for name, value in self.varied)

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.rung, self.variant, self.arm, self.seed

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.rung, self.variant.replace("=", "-"), self.arm, f"seed{self.seed}"]))


@dataclass(frozen=True)
class Ladder:
    """The content of a ladder's file.

    Args:
        results: Folder of the result files, relative to the ladder's file.
        data: Names of text files to train on, in `--data`; or, with `hub` names and paths, as `train` takes them.
        validation: Names of text files that are held out whole.
        data_hash: The hash of the tokens that every run must have; None before it is known.
        tag: The name of the code that the queue runs, as results keep it; None for any code.
        commit: The commit of that code.
        tokens_per_parameter: Training tokens for each parameter of the dense arm, embeddings not counted.
        learning_rate_factors: Arm -> what its learning rate is of its rung's; 1 for other arms. A rate that `vary` sets
            stays as it is.
        budgets: Shares of a rung's tokens for which there are results, rising, the last is 1.
        warmup: Share of the smallest budget's steps that warm up, in the runs of all budgets.
        threads: Threads of a worker on a CPU.
        settings: Settings of every run, as `query-experts train` has them. `device` is cpu by default, and the
            validation loss takes all held-out text. `dtype` must be given, here or by each rung.
        rungs: Name -> settings in which a rung differs, none of those that make the tokens.
        plan: What to run, in this order.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    results: Annotated[str, NotEmpty("be a folder, relative to the ladder's file")]
    data: Annotated[list[Annotated[str, NotEmpty("be the name of a text file")]], Distinct()]
    validation: Annotated[list[Annotated[str, NotEmpty("be the name of a text file")]], Distinct()]
    tokens_per_parameter: Annotated[float, Bounds(above=0)]
    budgets: list[Annotated[float, Bounds(above=0, most=1)]]
    settings: dict[str, Any]
    rungs: dict[str, dict[str, Any]]
    plan: list[Entry]
    learning_rate_factors: dict[str, Annotated[float, Bounds(above=0, most=1000)]] = field(default_factory=dict)
    warmup: Annotated[float, Bounds(least=0, most=1 - DECAY)] = 0.1
    threads: Count = 1
    data_hash: Annotated[str, NotEmpty("be the hash of the tokens, or left out")] | None = None
    tag: Annotated[str, NotEmpty("be the name of the code, or left out")] | None = None
    commit: Annotated[str, NotEmpty("be a commit, or left out")] | None = None

    def runs(self) -> list[Run]:
        """Every run, in the order of the plan, each once."""
        return [*dict.fromkeys(self._planned())]

    def _planned(self) -> Iterator[Run]:
        for entry in self.plan:
            for rung, seed in product(entry.rungs, range(entry.seeds)):
                for varied, arm in product(entry.variants(), entry.arms):
                    yield Run(rung, arm, seed, varied)

    def share_trained(self, budgets: list[float]) -> float:
        """Share of a run's tokens that are trained for some budgets, each from the stable part of the one before."""
        return sum(budget - self.stable_before(budget) for budget in budgets)

    def stable_before(self, budget: float) -> float:
        """Share of a run's tokens in the stable part of the budget before."""
        return (1 - DECAY) * max((b for b in self.budgets if b < budget), default=0.0)

    def arms(self) -> list[str]:
        return in_order(run.arm for run in self.runs())

    def device(self, rung: str) -> str:
        """cpu or cuda, for which a rung is made."""
        return self._given(rung)["device"]

    def _given(self, rung: str) -> dict[str, Any]:
        return DEFAULTS | self.settings | self.rungs[rung]

    def _given_to(self, run: Run) -> dict[str, Any]:
        """What the file sets for a run."""
        given = self._given(run.rung)
        rate = given.get("learning_rate", default_of(RunSettings, "learning_rate"))
        if run.arm in self.learning_rate_factors and type(rate) in (int, float):
            given["learning_rate"] = rate * self.learning_rate_factors[run.arm]
        return given | dict(run.varied)

    def flops_per_token(self, run: Run) -> float:
        """Active FLOPs of training, for a token."""
        settings = self.run_settings(run)
        return 3 * costs.flops_per_token(arm_config(run.arm, settings.model_size()), settings.seq_len)

    def run_settings(self, run: Run) -> RunSettings:
        """The settings of a whole run: the ladder's, the rung's, the varied ones, and steps by the rule."""
        settings = self._without_steps(run)
        return dataclasses.replace(settings, steps=self.steps(settings))

    def _without_steps(self, run: Run) -> RunSettings:
        given = self._given_to(run)
        return RunSettings(**given, data=[*self.data], validation=[*self.validation], max_bytes=None)

    def steps(self, settings: RunSettings) -> int:
        """`tokens_per_parameter` for each parameter of the dense arm without embeddings, in multiples of 40 steps."""
        return max(1, round(self._exact_steps(settings) / LOGS)) * LOGS

    def _exact_steps(self, settings: RunSettings) -> float:
        tokens = self.tokens_per_parameter * parameters_without_embeddings(settings.model_size())
        return tokens / settings.tokens_per_step

    def check_run(self, run: Run) -> None:
        """Raises SettingError for a setting of a run that can't be used."""
        given = self._given_to(run)
        for name, allowed in (("device", ("cpu", "cuda")), ("dtype", ("float32", "bfloat16"))):
            value = given.get(name, "auto")
            if value not in allowed:
                raise SettingError(f"{name} is {value!r}; it must be {' or '.join(allowed)}, whatever the machine has")
        for name, value in given.items():
            if isinstance(value, int) and value > MOST_OF_A_NUMBER:
                raise SettingError(f"{name} is {value}; it must be {MOST_OF_A_NUMBER:,} or less")
        settings = self._without_steps(run)
        validate(settings)
        _check_arm(run.arm, settings.model_size())
        steps = self._exact_steps(settings)
        if steps > MOST_STEPS:
            raise SettingError(
                f"tokens_per_parameter is {self.tokens_per_parameter:g}, which makes {steps:.3g} steps; they must be "
                f"{MOST_STEPS:,} or fewer"
            )

    def branch_settings(self, settings: RunSettings, budget: float) -> RunSettings:
        """The settings of a straight run of a share of the tokens.

        Warm-up takes `warmup` of the smallest budget's steps in all of them, decay a fifth of each budget's.
        """
        steps = round(budget * settings.steps)
        warmup = round(self.warmup * self.budgets[0] * settings.steps)
        return dataclasses.replace(
            settings, steps=steps, warmup_fraction=warmup / steps, decay_fraction=round(DECAY * steps) / steps
        )


@cache
def parameters_without_embeddings(size: ModelSize) -> int:
    """Parameters of the dense arm, embeddings not counted. Raises SettingError for a size that can't be built."""
    _check_arm("dense", size)
    with torch.device("meta"):
        counts = costs.parameters(build(arm_config("dense", size)))
    return counts["total"] - counts["embedding"]


@cache
def _check_arm(arm: str, size: ModelSize) -> None:
    check_arms([arm], size)


def read_ladder(file: Path) -> Ladder:
    """Reads and checks a ladder's file. Raises SettingError, naming the field, what it held and what is allowed."""
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise SettingError(f"ladder is {file}, which can't be read ({reason}); it must be a YAML file") from error
    if not isinstance(content, dict):
        raise SettingError(f"ladder is {file}; it must hold lines of `field: value`")
    try:
        text = json.dumps(content, default=str)
    except (TypeError, ValueError) as error:  # a key that is a date; an anchor that holds itself
        raise SettingError(
            f"ladder is {file}, which can't be read ({error}); its keys must be words, and no value may hold itself"
        ) from error
    try:
        ladder = TypeAdapter(Ladder).validate_json(text, strict=True)
    except ValidationError as error:
        raise SettingError(f"ladder is {file}, whose {first_fault(error)}") from error
    try:
        _check_budgets(ladder)
        _check_names(ladder)
        _check_settings(ladder)
        _check_plan(ladder)
        _check_results(file, ladder)
    except SettingError as error:
        raise SettingError(f"ladder is {file}, whose {error}") from error
    return ladder


def _check_budgets(ladder: Ladder) -> None:
    if not ladder.budgets or ladder.budgets != sorted({*ladder.budgets}) or ladder.budgets[-1] != 1:
        raise SettingError(f"budgets are {ladder.budgets}; they must rise, and the last must be 1")
    for share in ladder.budgets:
        if share % LEAST_BUDGET:
            raise SettingError(f"budgets hold {share}; each must be a multiple of {LEAST_BUDGET}")


def _check_names(ladder: Ladder) -> None:
    if (ladder.tag is None) != (ladder.commit is None):
        raise SettingError(f"tag is {ladder.tag!r} and commit {ladder.commit!r}; both must be given, or neither")
    if not ladder.rungs:
        raise SettingError("rungs are empty; they must hold one")
    for name in ladder.rungs:
        if not RUNG_NAME.fullmatch(name):
            raise SettingError(
                f"rungs hold {name!r}; a name must be 1 to 40 letters, digits, dots and underscores, and begin with a "
                "letter or digit"
            )
        if name in ARMS:
            raise SettingError(f"rungs hold {name!r}, which is the name of an arm; it must be another")


def _check_settings(ladder: Ladder) -> None:
    places = {"settings": ladder.settings} | {f"rungs.{name}": values for name, values in ladder.rungs.items()}
    places |= {f"plan.{number}.vary": entry.vary for number, entry in enumerate(ladder.plan)}
    for place, values in places.items():
        allowed = ALLOWED if place == "settings" else ALLOWED - OF_ALL_RUNGS
        for name in values:
            if name in OF_ALL_RUNGS - allowed:
                raise SettingError(f"{place} holds {name!r}; it must stand in settings, as all rungs share the tokens")
            if name not in allowed:
                raise SettingError(f"{place} holds {name!r}; it must hold some of {', '.join(sorted(allowed))}")


def _check_plan(ladder: Ladder) -> None:
    if not ladder.plan:
        raise SettingError("plan is empty; it must hold an entry")
    for name in ladder.learning_rate_factors:
        if name not in ARMS:
            raise SettingError(f"learning_rate_factors hold {name!r}; it must be one of {', '.join(ARMS)}")
    for number, entry in enumerate(ladder.plan):
        for names, allowed in ((entry.rungs, ladder.rungs), (entry.arms, ARMS)):
            for name in names:
                if name not in allowed:
                    raise SettingError(f"plan.{number} holds {name!r}; it must be one of {', '.join(allowed)}")
        for name, values in entry.vary.items():
            if not _are_distinct_numbers(values):
                raise SettingError(f"plan.{number}.vary.{name} is {values!r}; it must be a list of numbers, each once")
    for run in (run for run in ladder.runs() if run.seed == 0):  # other seeds have the same settings
        try:
            ladder.check_run(run)
        except SettingError as error:
            raise SettingError(f"run {run.name} can't be trained; {error}") from error


def _are_distinct_numbers(values: Any) -> bool:
    return isinstance(values, list) and {*map(type, values)} <= {int, float} and len(values) == len({*values}) > 0


def _check_results(file: Path, ladder: Ladder) -> None:
    folder = file.parent / ladder.results
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise SettingError(f"results is {ladder.results!r}, but {there} is a file; it must be a folder")
