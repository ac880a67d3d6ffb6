"""The ladder's runs and their results: what is done, what is missing, and how long it will take."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from query_experts.common.errors import SettingError
from query_experts.model.arms import ARMS
from query_experts.study.ladder.branches import recorded_settings
from query_experts.study.ladder.results import LadderResult, collect_result, read_files, write_result
from query_experts.study.ladder.settings import Ladder, Run, read_ladder

FOLLOWS = {  # settings that no ladder's file holds
    "steps": " by tokens_per_parameter and the batch",
    "warmup_fraction": " by budgets and warmup",
    "decay_fraction": " by tokens_per_parameter and the batch",
}


@dataclass(frozen=True)
class Queue:
    """Runs of a ladder.

    Args:
        ladder: The ladder.
        file: Its file.
        runs: The runs that a worker may take, in the order of the plan.
        collect: A file for all new results, in place of one each in the ladder's folder; None for those.
    """

    ladder: Ladder
    file: Path
    runs: list[Run]
    collect: Path | None = None

    @classmethod
    def read(cls, file: Path, only: Sequence[str] = (), device: str | None = None) -> Queue:
        """The queue of a ladder's file.

        Args:
            only: Names of rungs and arms. Where it names a rung, other rungs are left out; the same for arms.
            device: cpu or cuda, whose rungs are taken; None for all.

        Raises:
            SettingError: The file can't be used, or `only` names something else.
        """
        ladder = read_ladder(file)
        chosen = {*only}
        for name in sorted(chosen - ladder.rungs.keys() - ARMS.keys()):
            raise SettingError(
                f"only holds {name!r}; it must hold some of {', '.join([*ladder.rungs, *ladder.arms()])}"
            )
        rungs = chosen & ladder.rungs.keys() or {*ladder.rungs}
        arms = chosen & ARMS.keys() or {*ARMS}
        runs = [run for run in ladder.runs() if run.rung in rungs and run.arm in arms]
        if not runs:
            raise SettingError(f"only is {[*only]}; the plan of {file} must have a run of these rungs and arms")
        return cls(ladder, file, [run for run in runs if device in (None, ladder.device(run.rung))])

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def results_folder(self) -> Path:
        return self.file.parent / self.ladder.results

    def results(self) -> list[LadderResult]:
        """The results so far. Raises SettingError for one that doesn't belong to the ladder as it is now."""
        files = {file.resolve() for file in self.results_folder.glob("*.json")}
        if self.collect is not None and self.collect.exists():
            files.add(self.collect.resolve())
        results = read_files(sorted(files))
        planned = {(run.rung, run.variant, run.arm): run for run in self.ladder.runs()}
        for result in results:  # of more seeds or budgets than the plan has now, too
            run = planned.get((result.rung, result.variant, result.arm))
            if run is not None:
                self._check(result, dataclasses.replace(run, seed=result.seed))
        self._require_one_corpus(results)
        return results

    def _require_one_corpus(self, results: list[LadderResult]) -> None:
        """Raises SettingError where results of a rung were made with different tokens, so that no pair is."""
        hashes: dict[str, str] = {}
        for result in results:
            if hashes.setdefault(result.rung, result.data_hash) != result.data_hash:
                raise SettingError(
                    f"results of rung {result.rung} in {self.results_folder} have the data_hash "
                    f"{hashes[result.rung]} and {result.data_hash}; all must be made with the same tokens"
                )

    def _check(self, result: LadderResult, run: Run) -> None:
        branch = self.ladder.branch_settings(self.ladder.run_settings(run), result.budget)
        now = recorded_settings(branch, self.ladder) | {"data_hash": self.ladder.data_hash or result.data_hash}
        made = result.settings | {"data_hash": result.data_hash}
        for name, value in now.items():
            if made.get(name, value) != value:
                raise SettingError(
                    f"ladder is {self.file}, where run {run.name} has {name} {value!r}{FOLLOWS.get(name, '')}; its "
                    f"result was made with {made[name]!r}: the ladder must keep it, or have other results"
                )

    def unplanned(self, results: Sequence[LadderResult]) -> dict[str, int]:
        """Of some results, the number that the plan doesn't have, by rung: other ladders' and those of plans before."""
        planned = {(*run.key, budget) for run in self.ladder.runs() for budget in self.ladder.budgets}
        return dict(Counter(result.rung for result in results if result.key not in planned))

    def write(self, result: LadderResult) -> None:
        """Keeps a new result. Raises SettingError where one of its key is there."""
        if self.collect is None:
            write_result(self.results_folder, result)
        else:
            collect_result(self.collect, result)

    def missing(self) -> dict[Run, list[float]]:
        """The runs that lack results, in the order of the plan, with the budgets that they lack."""
        done = {result.key for result in self.results()}
        lacking = {run: [b for b in self.ladder.budgets if (*run.key, b) not in done] for run in self.runs}
        return {run: budgets for run, budgets in lacking.items() if budgets}


@dataclass(frozen=True)
class Rates:
    """How fast runs of a ladder train, as measured by its results.

    Args:
        queue: The ladder's queue.
        results: Its results.
    """

    queue: Queue
    results: list[LadderResult]

    def tokens_per_s(self, run: Run) -> float | None:
        """Of this rung and arm; else from the FLOP/s of other runs on its device; None where nothing is measured.

        A small model doesn't fill a GPU, on which a larger one has more FLOP/s. So there only the rung's own count.
        """
        timed = [r for r in self.results if r.tokens_per_s]
        own = [r.tokens_per_s for r in timed if (r.rung, r.arm) == (run.rung, run.arm)]
        if own:
            return statistics.median(own)
        device = self.queue.ladder.device(run.rung)
        others = [r for r in timed if r.device == device]
        if device == "cuda":
            others = [r for r in others if r.rung == run.rung]
        if not others:
            return None
        per_s = statistics.median(r.tokens_per_s * r.active_flops / r.train_tokens for r in others)
        return per_s / self.queue.ladder.flops_per_token(run)

    def seconds(self, run: Run, budgets: list[float]) -> float | None:
        """Time for some budgets of a run, validation included; a validated token takes a third of a trained one."""
        rate = self.tokens_per_s(run)
        if rate is None:
            return None
        settings = self.queue.ladder.run_settings(run)
        validated = statistics.median(sum(part.predicted_tokens for part in r.parts) for r in self.results)
        trained = self.queue.ladder.share_trained(budgets) * settings.steps * settings.tokens_per_step
        return (trained + len(budgets) * validated / 3) / rate

    def warm_up(self, run: Run) -> float:
        """Seconds that a process's first run of an arm takes longer, as compiling does; 0 where nothing is measured."""
        extra = [
            (r.arm == run.arm, r.train_seconds - r.train_tokens / r.tokens_per_s)
            for r in self.results
            if r.rung == run.rung and r.tokens_per_s
        ]
        own = [seconds for same, seconds in extra if same] or [seconds for _, seconds in extra]
        return max([0.0, *own])
