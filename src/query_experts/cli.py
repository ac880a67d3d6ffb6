"""What each command of `query-experts` does: import what it needs, understand its options, and work.

Every setting of a command is an option. A preset or a recipe (YAML) sets some of them first, and the command line has
the last word. A setting that can't be used ends in one sentence and exit status 2.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from query_experts.common.errors import SettingError
from query_experts.common.fields import Settings
from query_experts_command import CLOSED_PIPE, COMMANDS, INTERRUPTED, main, refuse

if TYPE_CHECKING:
    from query_experts.study.settings import RunSettings

Work = Callable[[], int]  # returns the exit status
Kind = TypeVar("Kind", bound=Settings)
Run = TypeVar("Run", bound="RunSettings")

EXAMPLES = {
    "compare": "query-experts compare --data my-texts/ --arms dense static gqe --seeds 0 1 2 --out runs/mine",
    "train": "query-experts train --arm gqe-expert --seed 3 --data corpus.jsonl.xz --out runs/expert",
    "convert": "query-experts convert runs/mine/runs/dense-seed0/model runs/converted --top_k 1 --calibrate my-texts/",
    "distill": "query-experts distill --init runs/converted --teacher runs/mine/runs/dense-seed0/model --data texts/",
    "generate": 'query-experts generate runs/mine/runs/gqe-seed0/model --prompt "def "',
    "evaluate": "query-experts evaluate runs/mine/runs/gqe-seed0/model --tasks hellaswag,arc_easy,piqa",
    "bench": "query-experts bench --lengths 2048 8192 --arms dense static gqe",
    "report": "query-experts report runs/mine",
    "data": "query-experts data prepare HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer gpt2 --out tokens/edu",
    "plan": "query-experts plan gpu --gpus 8 --gpu h100 --price 2.5",
    "scaling": "query-experts scaling run benchmarks/ladder/cpu.yaml --data my-texts/ --hours 2",
}
TRAINING = ("accelerate", "filelock", "pydantic", "rich", "tqdm")
REPORTING = ("jinja2", "matplotlib", "pydantic", "rich", "scipy")
# command -> its extra, and the packages of it without which the command isn't begun: some are imported at its end
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "compare": ("study", (*TRAINING, *REPORTING)),
    "train": ("train", TRAINING),
    "distill": ("train", TRAINING),
    "convert": ("train", ("filelock", "pydantic", "rich", "tqdm")),
    "generate": ("train", ()),
    "evaluate": ("evaluate", ("accelerate", "datasets", "lm_eval", "pydantic", "rich")),
    "bench": ("study", ("rich",)),
    "report": ("study", REPORTING),
    "data": ("train", ("filelock", "pydantic", "rich", "tqdm")),
    "plan": ("study", ("accelerate", "matplotlib", "pydantic", "rich")),
    "scaling": ("study", tuple(sorted({*TRAINING, *REPORTING}))),
}
ON_RANKS = ("compare", "train", "distill")  # that a launcher of several processes may start
GOES_ON = dict.fromkeys(("compare", "train", "distill", "scaling"), "checkpoint") | {"data": "finished piece"}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # torch on CUDA, and on a CPU


class Terminated(SystemExit):
    """A signal that asks a process to end."""

    code: int


def run_command(command: str, argv: list[str], begin: Callable[[], Any] = lambda: None) -> int:
    """Runs one command, as one of several ranks where a launcher started several and the command takes them.

    Args:
        command: A key of `COMMANDS`.
        argv: The words after it.
        begin: Called when imports are done and the options understood; from then on KeyboardInterrupt ends the work.

    Returns:
        The exit status, as `main` explains it.
    """
    if command in ON_RANKS and {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & os.environ.keys():
        from query_experts.distributed.ranks import check_launch, num_processes, run_as_rank

        try:
            check_launch()
        except SettingError as error:
            return refuse(str(error))
        if num_processes() > 1:
            return run_as_rank(lambda: outcome_of(command, argv, begin), refuse)
    sentence, status = outcome_of(command, argv, begin)
    return status if sentence is None else refuse(sentence, status)


def outcome_of(command: str, argv: list[str], begin: Callable[[], Any]) -> tuple[str | None, int]:
    """Runs one command. Returns a sentence about why it ended early, or None, and the exit status."""
    try:
        work = LOADERS[command](command, argv)
        begin()
        return None, work()
    except Terminated as ended:
        return "stopped", ended.code
    except SystemExit as ended:  # after --help, or of a run that a signal has stopped, with its checkpoint saved
        if ended.code is None or isinstance(ended.code, int):
            return None, ended.code or 0
        return str(ended.code), 1
    except KeyboardInterrupt:
        last = GOES_ON.get(command)
        kept = f"; the same command goes on from the last {last}, if there is one" if last else ""
        return f"stopped{kept}", INTERRUPTED
    except SettingError as error:
        return str(error), 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("query_experts"):
            raise
        return f"{error.name} is not installed; pip install query-experts[{EXTRAS[command][0]}]", 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return f"memory doesn't suffice for this model, batch and length; one of them must be smaller ({reason})", 2
    except BrokenPipeError:
        return None, CLOSED_PIPE
    except OSError as error:
        return describe_os_error(error), 2


def describe_os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"out has no room left on its disk ({error.filename or 'device full'})"
    if error.filename:
        return f"{error.filename} can't be read or written: {error.strerror}"
    return str(error) or type(error).__name__


def require_extra(command: str) -> None:
    """Raises ModuleNotFoundError for what the command needs and isn't installed, though it needs it only at its end."""
    for module in EXTRAS[command][1]:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(name=module)


def terminal() -> Any:
    """A rich Console that raises BrokenPipeError where nobody reads."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:  # rich's own exits with status 1
            raise BrokenPipeError

    return Terminal()


def parse(command: str, kind: type[Kind], argv: list[str], **more: Any) -> Kind:
    """The settings of a command, before it imports what its extra holds."""
    from query_experts.common.settings import parse_settings

    about, example = COMMANDS[command], EXAMPLES[command]
    settings = parse_settings(kind, argv, prog=f"query-experts {command}", about=about, example=example, **more)
    require_extra(command)
    return settings


def parse_run(command: str, kind: type[Run], argv: list[str], preset: str = "demo", **more: Any) -> Run:
    """The settings of a command that trains, whose recipes may be those of others."""
    settings = parse(command, kind, argv, folder="recipes", preset=preset, also_known=known_to_recipes(), **more)
    from query_experts.study.workspace import go_on_with_first_demo

    go_on_with_first_demo(settings)
    return settings


def known_to_recipes() -> set[str]:
    """The settings of all commands that train."""
    from query_experts.study.settings import CompareSettings, DistillSettings, TrainSettings

    return {f.name for settings in (CompareSettings, TrainSettings, DistillSettings) for f in fields(settings)}


def load_compare(command: str, argv: list[str]) -> Work:
    from query_experts.study.settings import CompareSettings

    settings = parse_run(command, CompareSettings, argv)
    from query_experts.study import compare as study

    return lambda: 0 if study.compare(settings, terminal()) else 1


def load_train(command: str, argv: list[str]) -> Work:
    from query_experts.study.settings import TrainSettings

    settings = parse_run(command, TrainSettings, argv, out_follows_preset=False)
    from query_experts.study import single

    return lambda: 0 if single.train(settings, terminal()) else 1


def load_distill(command: str, argv: list[str]) -> Work:
    from query_experts.study.settings import DistillSettings

    settings = parse_run(command, DistillSettings, argv, preset="distill", out_follows_preset=False)
    from query_experts.study import distill

    return lambda: 0 if distill.distill(settings, terminal()) else 1


def load_bench(command: str, argv: list[str]) -> Work:
    from query_experts.bench.settings import BenchSettings

    settings = parse(command, BenchSettings, argv, folder="recipes/bench", preset="cpu", out_follows_preset=False)
    from query_experts.bench import run

    def work() -> int:
        run.bench(settings, terminal())
        return 0

    return work


def load_convert(command: str, argv: list[str]) -> Work:
    from query_experts.convert.settings import ConvertSettings

    settings = parse(command, ConvertSettings, argv)
    from rich.text import Text

    from query_experts.convert.folder import convert_folder, print_report
    from query_experts.convert.sidecar_files import tokenizer_note

    def work() -> int:
        with signals_as_exceptions():
            plan, report = convert_folder(settings)
        console = terminal()
        print_report(plan, report, console)
        if (note := tokenizer_note(Path(settings.out).resolve())) is not None:
            console.print(Text(f"Note: {note}.", style="yellow"))
        console.print(Text(f"Checkpoint: {settings.out}"))
        return 0

    return work


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated, with 143 and 129, so that half-written files are removed."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    numbers = numbers if threading.current_thread() is threading.main_thread() else []

    def end(number: int, _: Any) -> None:
        raise Terminated(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def load_generate(command: str, argv: list[str]) -> Work:
    from query_experts.evaluate.settings import GenerateSettings

    settings = parse(command, GenerateSettings, argv)
    from query_experts.evaluate.generate import generate

    def work() -> int:
        generate(settings)
        return 0

    return work


def load_evaluate(command: str, argv: list[str]) -> Work:
    from query_experts.evaluate.settings import EvaluateSettings

    settings = parse(command, EvaluateSettings, argv)
    from query_experts.evaluate.harness import evaluate

    def work() -> int:
        evaluate(settings, terminal())
        return 0

    return work


def load_report(command: str, argv: list[str]) -> Work:
    from query_experts.study.settings import ReportSettings

    settings = parse(command, ReportSettings, argv)
    from query_experts.study.report import print_summary, write_report
    from query_experts.study.results import read_comparison

    def work() -> int:
        settings.check()
        folder = Path(settings.folder)
        comparison = read_comparison(folder)
        if not comparison.runs:
            raise SettingError(f"folder is {folder}, in which no run has finished yet; it must hold one")
        page = folder / "report.html"
        write_report(comparison, page)
        print_summary(comparison, terminal())
        print(f"Page: {page}")
        return 0

    return work


def load_data(command: str, argv: list[str]) -> Work:
    from query_experts.data.settings import DataSettings

    settings = parse(command, DataSettings, argv)
    from query_experts.data import command as data
    from query_experts.distributed.layout import require_one_process

    def work() -> int:
        settings.check()
        require_one_process(f"data {settings.action}")
        with signals_as_exceptions():
            (data.prepare_tokens if settings.action == "prepare" else data.check_tokens)(settings, terminal())
        return 0

    return work


def load_plan(command: str, argv: list[str]) -> Work:
    from query_experts.plan.settings import PlanSettings

    settings = parse(
        command, PlanSettings, with_preset(argv), folder="recipes", preset="demo", also_known=known_to_recipes(),
        out_follows_preset=False,
    )  # fmt: skip
    from query_experts.plan import run

    def work() -> int:
        run.plan(settings, terminal())
        return 0

    return work


def with_preset(argv: list[str]) -> list[str]:
    """The words with the option that the first one stands for: a preset, or a recipe's file.

    Raises SettingError where that option is there too.
    """
    if not argv or argv[0].startswith("-"):
        return argv
    option = "--recipe" if Path(argv[0]).suffix in (".yaml", ".yml") else "--preset"
    if any(word.partition("=")[0] == option for word in argv):
        raise SettingError(f"{option[2:]} is {argv[0]!r}, and {option} is set too; one of them must be left out")
    return [option, *argv]


def load_scaling(command: str, argv: list[str]) -> Work:
    from query_experts.study.ladder.settings import ScalingSettings

    settings = parse(command, ScalingSettings, argv)
    from query_experts.study.ladder import read, status, tokens, worker

    def work() -> int:
        settings.check()
        match settings.action:
            case "run":
                return 0 if worker.run_queue(settings, terminal()) else 1
            case "status":
                status.print_status(settings, terminal())
            case "fit":
                read.print_laws(settings, terminal())
            case "report":
                read.report(settings, terminal())
            case "tokens":
                tokens.write_tokens(settings, terminal())
        return 0

    return work


LOADERS: dict[str, Callable[[str, list[str]], Work]] = {
    "compare": load_compare,
    "train": load_train,
    "convert": load_convert,
    "distill": load_distill,
    "generate": load_generate,
    "evaluate": load_evaluate,
    "bench": load_bench,
    "report": load_report,
    "data": load_data,
    "plan": load_plan,
    "scaling": load_scaling,
}


if __name__ == "__main__":
    sys.exit(main())
