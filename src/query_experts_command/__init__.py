"""The console command `query-experts`: prints help and the version, and leaves the rest to `query_experts.cli`.

Nothing here imports `query_experts`, which imports torch and takes seconds.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

COMMANDS = {
    "compare": "train arms head to head and report; the main job",
    "train": "train one arm",
    "convert": "make a GQE checkpoint from a dense one",
    "distill": "train a converted checkpoint, with the dense model as its teacher or without one",
    "generate": "write text with a trained GQE checkpoint",
    "evaluate": "score a checkpoint, GQE or dense, on lm-evaluation-harness's tasks",
    "bench": "time GQE against stock Llama: prefill, decoding, training",
    "report": "make the page and the table again from a compared folder",
    "scaling": "train a ladder of sizes, arms and seeds as a queue, and fit its laws",
    "data": "tokenise text once into a folder to train on, resumably, and check such a folder",
    "plan": "estimate memory, time and cost on GPUs; a preset or recipe may come first",
}
INTERRUPTED, CLOSED_PIPE = 130, 141  # exit statuses: 128 + SIGINT, 128 + SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after `query-experts`. None for those of this process, whose Ctrl-C and closed pipes are then
            handled until it ends.

    Returns:
        The exit status. 0: done. 1: time ran out, and the same command goes on. 2: a setting can't be used. 130, 143,
        129: ended by Ctrl-C, SIGTERM, SIGHUP. 141: the reader of stdout is gone.
    """
    replace_what_cannot_be_printed()
    if argv is not None:
        return _run(argv, lambda: None)
    return _run_as_process(sys.argv[1:])


def replace_what_cannot_be_printed() -> None:
    """Prints `?` for a character that the terminal's encoding lacks, where Python would raise UnicodeEncodeError.

    A handler that the user asked for, as in PYTHONIOENCODING=ascii:backslashreplace, stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def refuse(sentence: str, status: int = 2) -> int:
    """Prints a sentence on stderr. Returns the status."""
    with suppress(OSError):  # the reader of a pipe may be gone
        print(f"query-experts: {' '.join(sentence.split())}", file=sys.stderr)
    return status


def _run(argv: list[str], begin: Callable[[], Any]) -> int:
    """Answers at once or runs a command, which calls `begin` when its imports are done and its options understood."""
    if not argv or argv[0] in ("-h", "--help"):
        return _print(_overview(), 0 if argv else 2)
    command = argv[0]
    if command == "--version":
        return _print(f"query-experts {__version__}\n")
    if command not in COMMANDS:
        return refuse(f"command is {command!r}; it must be one of {', '.join(COMMANDS)}")
    if argv[1:] in (["-h"], ["--help"]):
        return _print((Path(__file__).parent / "help" / f"{command}.txt").read_text(encoding="utf-8"))
    from query_experts.cli import run_command

    return _print("", run_command(command, argv[1:], begin))


def _overview() -> str:
    commands = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    return f"""query-experts: Grouped Query Experts, trained, converted, measured and used

  query-experts COMMAND [options]

commands:
{commands}

  query-experts COMMAND --help lists the options of a command, query-experts --version prints the version.
"""


def _print(text: str, status: int = 0) -> int:
    """Prints a text and what is left in the buffer. Returns the status, or another where stdout can't be written."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        return CLOSED_PIPE
    except OSError as error:
        if status:  # that has a sentence of its own
            return status
        return refuse(f"stdout can't be written: {error.strerror}")
    return status


def _run_as_process(argv: list[str]) -> int:
    """Runs a command as the last thing that this process does.

    Ctrl-C ends the process with a sentence and without a traceback. It does so at once while modules are imported,
    since an import may catch or wrap KeyboardInterrupt, and again after the command is done. In between the command
    decides. If Ctrl-C is ignored, it stays ignored.
    """
    listens = threading.current_thread() is threading.main_thread()
    listens = listens and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, _stop_at_once)
    try:
        status = _run(argv, lambda: listens and signal.signal(signal.SIGINT, signal.default_int_handler))
        if listens:
            signal.signal(signal.SIGINT, _stop_at_once)
    except KeyboardInterrupt:  # a second one, while the command ends by the first
        status = refuse("stopped", INTERRUPTED)
    if status == CLOSED_PIPE:  # the interpreter flushes stdout again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _stop_at_once(number: int, frame: Any) -> None:
    with suppress(OSError):
        os.write(2, b"query-experts: stopped\n")
    os._exit(INTERRUPTED)
