"""Runs a function in several processes beside one another, on one device that one of them doesn't fill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from query_experts.common.errors import SettingError
from query_experts.study.callbacks import StopRequest
from query_experts_command import replace_what_cannot_be_printed


def run_beside(work: Callable[..., None], arguments: tuple[Any, ...], count: int, stop: StopRequest) -> list[int]:
    """Calls `work(*arguments)` in new processes and waits until all have ended.

    A signal that comes to this process within `stop.listening` goes on to all of them as SIGTERM, once.

    Args:
        work: A function of a module, which the new processes import.
        arguments: They travel as pickles.

    Returns:
        The exit status of each; negative for a signal.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(work, arguments)) for _ in range(count)]
    try:
        for number, process in enumerate(processes):
            with _bar_at(number):
                process.start()
        _wait(processes, stop)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    return [process.exitcode or 0 for process in processes]


def _wait(processes: Sequence[BaseProcess], stop: StopRequest) -> None:
    asked = False
    for process in processes:
        while process.is_alive():
            process.join(0.5)
            if stop.signal is not None and not asked:
                asked = True
                for one in processes:
                    one.terminate()


def _work(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    replace_what_cannot_be_printed()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the first process passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*arguments)
    except SettingError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """Asks this process to save and stop once the one that started it is gone, as after a kill."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _bar_at(line: int) -> Iterator[None]:
    """The progress bars of a process that is started within are drawn on a line of their own."""
    os.environ["TQDM_POSITION"] = str(line)
    try:
        yield
    finally:
        del os.environ["TQDM_POSITION"]
