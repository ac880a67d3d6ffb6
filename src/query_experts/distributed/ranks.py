"""The processes of one launch (torchrun, `accelerate launch`): who prints and writes, and how all of them end.

Every rank runs the same program. Rank 0 alone prints and writes what the ranks have in common. What only one rank may
do, or see, is shared by `first_rank` and `agreed`, which every rank must call.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import sys
import threading
import time
import traceback
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO, TypeVar

import torch
import torch.distributed as dist

from query_experts.common.errors import SettingError

T = TypeVar("T")


class HungRank(RuntimeError):
    """A rank doesn't answer in time. The sentence names it."""


LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
MOST_IN_STORE = 4 * 2**20  # bytes of a value; torch's store takes 8 MiB
HEARD_AFTER = 3.0  # seconds in which rank 0 may say an error that several ranks have
LINGERS = 0.5  # seconds
SAID_AFTER = 15.0  # seconds until a rank says for what it waits
ASKED_AGAIN = 5.0  # seconds that a rank has to answer once it has been waited for
ERROR, DONE, STOP = "query-experts/error", "query-experts/done", "query-experts/stop"  # keys of the ranks' store


def num_processes() -> int:
    """Processes of this launch; 1 where there is no launcher. Raises SettingError for what is no such number."""
    return _set_by_launcher("WORLD_SIZE", least=1, default=1)


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0")) if num_processes() > 1 else 0


def _set_by_launcher(name: str, least: int, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise SettingError(f"{name} is {value!r}; it must be a whole number, {least} or more, or not be set")
    return int(value)


def check_launch() -> None:
    """Raises SettingError where some of a launcher's variables are set and not all, or contradict one another."""
    there = [name for name in LAUNCH if name in os.environ]
    missing = [name for name in LAUNCH if name not in os.environ]
    processes = num_processes()
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        _set_by_launcher(name, least=0, default=0)
    if missing and ("WORLD_SIZE" in missing or processes > 1):
        verb = "is" if len(missing) == 1 else "are"
        raise SettingError(
            f"{there[0]} is {os.environ[there[0]]}, and {', '.join(missing)} {verb} not set; a launcher must set them "
            "all (torchrun, accelerate launch), or none may be set"
        )
    for name in ("RANK", "LOCAL_RANK"):
        if int(os.environ.get(name, "0")) >= processes:
            raise SettingError(f"{name} is {os.environ[name]}; it must be less than WORLD_SIZE, {processes}")


def is_first() -> bool:
    return rank() == 0


def run_as_rank(work: Callable[[], tuple[str | None, int]], say: Callable[[str, int], int]) -> int:
    """Runs a command's work as one rank of several, joined by a process group. It doesn't return after an error.

    Args:
        work: gives a sentence about what went wrong, or None, and the exit status.
        say: prints a sentence and returns the status. An error is said by one rank, which names itself.
    """
    heard = sys.stderr
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    trace, sentence, status = "", None, 0
    try:
        join_ranks(heard)
        sentence, status = work()
        if not status:
            dist.barrier()  # rank 0 has the store, which others may still read
    except HungRank as error:
        sentence, status = str(error), 1
    except Exception as error:  # of any kind: a rank that stays silent leaves the others waiting
        sentence, status, trace = f"{type(error).__name__}: {error}", 1, traceback.format_exc()
    sys.stderr = heard
    if sentence is not None and (not dist.is_initialized() or says_it()):
        sys.stderr.write(trace)
        say(f"rank {rank()}: {sentence}", status)
    sys.stderr.flush()
    if status and is_first():
        time.sleep(LINGERS)  # it has the store, by which others see that it ends
    if status:
        os._exit(status)  # a group in which ranks are missing can't be left in order
    dist.destroy_process_group()
    return status


def join_ranks(said: TextIO | None = None) -> None:
    """Joins this launch's process group: gloo on a CPU, and NCCL too where there are GPUs.

    said: gets a sentence where others don't come for some seconds; None for stderr.
    """
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():  # else on CPUs
        torch.cuda.set_device(local_rank())
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = f"query-experts: rank {rank()}: waiting for {num_processes()} processes to meet at {where}\n"
    timer = threading.Timer(SAID_AFTER, lambda: (said or sys.stderr).write(waiting))
    timer.daemon = True
    timer.start()
    try:
        dist.init_process_group()
    finally:
        timer.cancel()
    _watch.append(dist.new_group(backend="gloo"))


_patience = [math.inf]  # seconds that ranks wait for rank 0's work
_waits: list[float] = []  # the timeout of that group
_watch: list[dist.ProcessGroup] = []  # a group of its own for the barrier that names missing ranks: it stays usable


def store() -> dist.Store:
    """What all ranks can write to and read without a collective."""
    return dist.distributed_c10d._get_default_store()


def says_it() -> bool:
    """Whether this rank is to say an error: the first that has one does, or rank 0 if it has one a moment later."""
    try:
        if not is_first():
            deadline = time.monotonic() + HEARD_AFTER
            while time.monotonic() < deadline and not store().check([ERROR]):
                time.sleep(0.05)
        return store().compare_set(ERROR, "", str(rank())) == str(rank()).encode()
    except RuntimeError:  # the store went with rank 0, which ended before, or fails rank 0 itself
        return is_first()


def first_rank(work: Callable[[], T]) -> T:
    """Runs work on rank 0 alone, and gives its result to every rank, which waits for it.

    Raises:
        RuntimeError: on the other ranks, where it failed on rank 0.
        HungRank: on the other ranks within `naming_hung_ranks`, where it takes rank 0 longer than its time.
    """
    if num_processes() == 1:
        return work()
    key = f"{DONE}/{next_number()}"
    if is_first():
        result = work()
        text = b64encode(pickle.dumps(result)).decode()
        starts = range(0, len(text), MOST_IN_STORE)
        for number, start in enumerate(starts):
            store().set(f"{key}/{number}", text[start : start + MOST_IN_STORE])
        store().set(key, str(len(starts)))
        return result
    began = time.monotonic()
    while not store().check([key]):
        if store().check([ERROR]):
            raise RuntimeError("rank 0 has ended")
        if time.monotonic() > began + _patience[-1]:
            raise HungRank(f"rank 0 didn't answer within {_patience[-1]:g} s; it hangs")
        time.sleep(0.05)
    parts = int(store().get(key))
    return pickle.loads(b64decode(b"".join(store().get(f"{key}/{number}") for number in range(parts))))


_numbers = iter(range(sys.maxsize))


def next_number() -> int:
    """Counts the calls of `first_rank`, which every rank makes in the same order."""
    return next(_numbers)


def rank_and_number() -> tuple[int, int]:
    """This process's rank and the number of ranks in the process group; 0 and 1 without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: T) -> list[T]:
    """The values of all ranks, on rank 0; elsewhere only this rank's. Every rank must call this.

    Args:
        value: What JSON holds.
    """
    rank, number = rank_and_number()
    key = f"{DONE}/{next_number()}"
    if rank:
        store().set(f"{key}/{rank}", json.dumps(value))
        return [value]
    return [value, *(json.loads(store().get(f"{key}/{other}")) for other in range(1, number))]


def agreed(value: T) -> T:
    """Rank 0's value, on every rank."""
    return first_rank(lambda: value)


def greatest(value: float, device: torch.device) -> float:
    """The greatest of all ranks' values, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    found = torch.tensor(float(value), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def stops_after(step: int, asked: bool) -> bool:
    """Whether all ranks stop after this step, since one of them was asked to. Every rank calls it after every step.

    The rank that is asked names the next step in the ranks' store. A step's collectives keep ranks within one step, so
    every rank has read it by the end of that step.

    Args:
        step: The number of the step that has ended.
        asked: Whether this rank is asked to stop.
    """
    if asked:
        store().compare_set(STOP, "", str(step + 1))
    return store().check([STOP]) and step >= int(store().get(STOP))


def require_all_ranks(seconds: float) -> None:
    """Waits until every rank is here.

    Raises:
        HungRank: naming the ranks that didn't come in time.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    try:
        dist.monitored_barrier(_watch[0] if _watch else None, timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        said = str(error)
        missing = re.search(r"[Rr]anks? ([\d, ]+) failed", said) or re.search(r"from rank (\d+)", said)
        if missing is None:  # rank 0 knows
            raise
        raise HungRank(f"rank {missing[1].strip(' ,')} didn't answer within {seconds:g} s; it hangs") from error


@contextmanager
def naming_hung_ranks(seconds: float) -> Iterator[None]:
    """Gives collectives within it so many seconds. Where one runs out of time, the ranks that are missing are named.

    NCCL ends a process whose collective runs out of time by itself; there only `require_all_ranks` names ranks.
    """
    if num_processes() > 1 and dist.is_initialized():
        if not _waits or _waits[-1] != seconds:  # ranks other than 0 wait as long as the group was made for
            require_all_ranks(seconds)  # one that is late can't be named while a group is made
            _waits.append(seconds)
            _watch[:] = [dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))]
        for group in dist.distributed_c10d._world.pg_map:  # those of meshes too
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    _patience.append(seconds)
    try:
        yield
    except RuntimeError as error:
        if "imed out" in str(error):
            require_all_ranks(ASKED_AGAIN)
        raise
    finally:
        _patience.pop()
