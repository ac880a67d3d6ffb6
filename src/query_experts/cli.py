"""The console command `query-experts`: compare, train, convert, generate, evaluate, bench, report.

Every setting of `compare` and `train` is an option; a preset or a recipe (YAML) sets them first, and the command
line has the last word. A setting that can't be used ends in one sentence and exit status 2.
"""

from __future__ import annotations

import argparse
import errno
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from query_experts import __version__
from query_experts.common.errors import SettingError

COMMANDS = {
    "compare": "train arms head to head and report; the main job",
    "train": "train one arm",
    "convert": "make a GQE checkpoint from a dense one",
    "generate": "write text with a trained GQE checkpoint",
    "evaluate": "score a checkpoint, GQE or dense, on lm-evaluation-harness's tasks",
    "bench": "time GQE against stock Llama: prefill, decoding, training",
    "report": "make the page and the table again from a compared folder",
}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # torch on CUDA, and on a CPU


class Terminated(SystemExit):
    """By a signal that asks a process to end."""

    code: int


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its status.

    0: done. 1: the time was up, and the same command goes on. 2: a setting is unusable. 130, 143, 129: ended by
    Ctrl-C, SIGTERM, SIGHUP.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"query-experts {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: query-experts COMMAND [options]; COMMAND --help tells more\n")
        print("\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        print("  --version  print the version")
        return 0 if argv else 2
    try:
        match argv[0]:
            case "compare" | "train":
                return run_study(argv[0], argv[1:])
            case "convert":
                return run_convert(argv[1:])
            case "generate":
                return run_generate(argv[1:])
            case "evaluate":
                return run_evaluate(argv[1:])
            case "bench":
                return run_bench(argv[1:])
            case "report":
                return run_report(argv[1:])
        raise SettingError(f"command is {argv[0]!r}; it must be one of {', '.join(COMMANDS)}")
    except Terminated as ended:
        return refuse("stopped", ended.code)
    except KeyboardInterrupt:
        kept = "; the same command goes on from the last checkpoint" if argv[0] in ("compare", "train") else ""
        return refuse(f"stopped{kept}", 130)
    except SettingError as error:
        return refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("query_experts"):
            raise
        extra = "evaluate" if argv[0] == "evaluate" else "study"
        return refuse(f"{error.name} is not installed; pip install query-experts[{extra}]")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return refuse(
            f"memory doesn't suffice for this model, batch and length; one of them must be smaller ({reason})"
        )
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return refuse(f"out has no room left on its disk ({error.filename or 'device full'})")
        return refuse(
            f"{error.filename} can't be read or written: {error.strerror}"
            if error.filename
            else str(error) or type(error).__name__
        )


def refuse(sentence: str, status: int = 2) -> int:
    with suppress(OSError):  # nobody reads a pipe's end that is closed
        print(f"query-experts: {' '.join(sentence.split())}", file=sys.stderr)
    return status


def run_study(command: str, argv: list[str]) -> int:
    from rich.console import Console

    from query_experts.common.settings import parse_settings
    from query_experts.study import compare as study
    from query_experts.study import distill
    from query_experts.study.settings import CompareSettings, TrainSettings

    both = {f.name for settings in (CompareSettings, TrainSettings) for f in fields(settings)}
    common: dict[str, Any] = {"about": COMMANDS[command], "folder": "recipes", "preset": "demo", "also_known": both}
    prog, console = f"query-experts {command}", Console()
    if command == "compare":
        done = study.compare(parse_settings(CompareSettings, argv, prog=prog, **common), console)
    else:
        done = distill.train(
            parse_settings(TrainSettings, argv, prog=prog, out_follows_preset=False, **common), console
        )
    return 0 if done else 1


def run_bench(argv: list[str]) -> int:
    from rich.console import Console

    from query_experts.bench import run
    from query_experts.bench.settings import BenchSettings
    from query_experts.common.settings import parse_settings

    settings = parse_settings(
        BenchSettings, argv, prog="query-experts bench", about=COMMANDS["bench"], folder="recipes/bench", preset="cpu",
        out_follows_preset=False,
    )  # fmt: skip
    run.bench(settings, Console())
    return 0


def options_of(command: str) -> argparse.ArgumentParser:
    from query_experts.common.settings import Options

    return Options(
        prog=f"query-experts {command}", description=COMMANDS[command],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip


def run_convert(argv: list[str]) -> int:
    parser = options_of("convert")
    parser.add_argument("checkpoint", help="folder of a dense checkpoint, or its name on the hub")
    parser.add_argument("out", help="new folder for the GQE checkpoint")
    parser.add_argument(
        "--top_k", "--top-k", type=int, help="experts that a token wakes in a group, 1 to all of them; default: all"
    )
    parser.add_argument("--output_projection", "--output-projection", default="expert",
                        help="expert, exact with all experts awake, or slot, the paper's")  # fmt: skip
    parser.add_argument("--router", help="where it starts: random, query_norm, calibrated, or none for the control; "
                                         "default: calibrated with --calibrate, else random")  # fmt: skip
    parser.add_argument("--calibrate", nargs="+", default=[], metavar="TEXT",
                        help="text files or folders, or a hub dataset, on which the dense model's heads are "
                             "observed and the difference is measured")  # fmt: skip
    parser.add_argument("--calibration_tokens", "--calibration-tokens", type=int,
                        help="read so many tokens of it, five sequences or more; default: 16,384")  # fmt: skip
    parser.add_argument("--calibration_length", "--calibration-length", type=int,
                        help="tokens in a sequence, 2 or more; default: 512, or as many as it takes")  # fmt: skip
    parser.add_argument("--text_field", "--text-field",
                        help="field of a jsonl line or parquet column that holds the text; default: text")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args(argv)

    from rich.console import Console
    from rich.text import Text

    from query_experts.common.device import resolve_device
    from query_experts.common.settings import check_seeds
    from query_experts.convert.folder import ConvertSettings, convert_folder, print_report
    from query_experts.convert.sidecar_files import tokenizer_note

    check_seeds("seed", [options.seed])
    settings = ConvertSettings(**vars(options) | {"device": resolve_device(options.device)})
    with signals_as_exceptions():
        plan, report = convert_folder(settings)
    console = Console()
    print_report(plan, report, console)
    if (note := tokenizer_note(Path(settings.out).resolve())) is not None:
        console.print(Text(f"Note: {note}.", style="yellow"))
    console.print(Text(f"Checkpoint: {settings.out}"))
    return 0


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process with 143 and 129 and not at once, so that what is half written is removed."""
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    ours = ours if threading.current_thread() is threading.main_thread() else []

    def end(number: int, _: Any) -> None:
        raise Terminated(128 + number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def run_generate(argv: list[str]) -> int:
    parser = options_of("generate")
    parser.add_argument("checkpoint", help="folder of a GQE checkpoint, with its tokenizer")
    parser.add_argument("--prompt", default="def ", help="text to go on from")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=100, help="length of the text")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args(argv)

    from query_experts.evaluate.generate import generate

    generate(
        Path(options.checkpoint), options.prompt, options.max_new_tokens, options.temperature, options.seed,
        options.device,
    )  # fmt: skip
    return 0


def run_evaluate(argv: list[str]) -> int:
    parser = options_of("evaluate")
    parser.add_argument(
        "checkpoint", help="a causal model as Transformers saves it, with its tokenizer; or its name on the hub"
    )
    parser.add_argument(
        "--tasks", nargs="+", required=True, help="lm-eval's tasks, groups or tags: hellaswag,arc_easy,piqa"
    )
    parser.add_argument(
        "--data_dir", "--data-dir", help="benchmark files in their original format, in place of the hub"
    )
    parser.add_argument("--batch_size", "--batch-size", type=int, default=8, help="requests in a batch")
    parser.add_argument("--limit", type=int, help="so many questions of each task alone, to try things")
    parser.add_argument(
        "--num_fewshot", "--num-fewshot", type=int, help="examples before a question; default: the task's own"
    )
    parser.add_argument(
        "--max_length", "--max-length", type=int, help="tokens given at once; default: max_position_embeddings"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto: as the checkpoint says")
    parser.add_argument("--out", help="a new file for the results, JSON")
    options = vars(parser.parse_args(argv))

    from rich.console import Console

    from query_experts.evaluate.harness import evaluate

    evaluate(options.pop("checkpoint"), options.pop("tasks"), Console(), **options)
    return 0


def run_report(argv: list[str]) -> int:
    parser = options_of("report")
    parser.add_argument("folder", help="a compared folder, with comparison.json")
    named = parser.parse_args(argv).folder
    folder = Path(named)

    from rich.console import Console

    from query_experts.study.report import print_summary, write_report

    console = Console()
    if not named:
        raise SettingError("folder is empty; it must be a compared folder")
    source = folder / "comparison.json"
    wanted = (
        f"folder is {folder}; it must hold comparison.json as compare wrote it, and the same compare command writes it "
        "again"
    )
    try:
        comparison = json.loads(source.read_text(encoding="utf-8"))
        finished = len(comparison["runs"])
        if finished:
            page = write_report(comparison, folder / "report.html")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and source.exists():
            raise
        raise SettingError(wanted) from error
    if not finished:
        raise SettingError(f"folder is {folder}, in which no run has finished yet; it must hold one")
    print_summary(comparison, console)
    print(f"Page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
