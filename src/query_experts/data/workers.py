"""Tokenises pieces of text in several processes, and gives the tokens in the order of the pieces."""

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np

from query_experts.common.errors import SettingError
from query_experts.data.documents import SPLITS, Split
from query_experts.data.tokenizing import DocumentTokenizer

_MOST_WORKERS = 16  # one process reads for all of them
_AHEAD = 3  # pieces for each worker that may be done before it is their turn
_AHEAD_CHARACTERS = 1 << 23  # for each worker, of pieces that are read and whose turn it isn't yet


@dataclass(frozen=True)
class Piece:
    """Whole documents that are tokenised together.

    mark: the state after them, from which their reading goes on. digests: of their texts and of those dropped.
    """

    documents: list[tuple[Split, str, int]]
    mark: dict[str, Any]
    digests: bytes

    @property
    def characters(self) -> int:
        return sum(len(text) for _, text, _ in self.documents)


class Encoded(NamedTuple):
    """The tokens of a split in a piece, as bytes of its dtype on disk."""

    ids: bytes
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens on disk: the tokenizer as JSON, the id of its eos token, and the dtype."""

    serialized: str
    end: int
    dtype: str


def default_workers() -> int:
    """The CPU cores that this process may use, 16 at most."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if hasattr(os, "sched_getaffinity") else 1


def encode_pieces(
    pieces: Iterator[Piece], encoding: Encoding, workers: int
) -> Generator[tuple[Piece, dict[Split, Encoded]]]:
    """The pieces in their order with their tokens.

    Args:
        pieces: read in this process; with several workers ahead, up to three pieces and eight million characters for
            each worker, and one piece beyond that.
        encoding: for all of them.
        workers: processes that tokenise; 1 for this process, with the threads of the tokenizer.

    Raises SettingError where a worker has died.
    """
    if workers > 1:
        with _Workers(encoding, workers) as running:
            yield from running.encode(pieces)
        return
    tokenizer = DocumentTokenizer(encoding.serialized, encoding.end)
    for piece in pieces:
        yield piece, _encode(piece.documents, tokenizer, encoding.dtype)


def _encode(documents: list[tuple[Split, str, int]], tokenizer: DocumentTokenizer, dtype: str) -> dict[Split, Encoded]:
    parts: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    count, size = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for tokens in tokenizer.tokens(documents):
        parts[tokens.split].append(np.asarray(tokens.ids, dtype=dtype).tobytes())
        count[tokens.split] += tokens.ends_document
        size[tokens.split] += tokens.text_bytes
    return {split: Encoded(b"".join(parts[split]), count[split], size[split]) for split in SPLITS if parts[split]}


class _Workers:
    """Processes that tokenise. They end with this one, also where it is killed: their pipes then end."""

    def __init__(self, encoding: Encoding, count: int) -> None:
        self._encoding, self._count = encoding, count
        self._processes: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "_Workers":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the server's imports end by no Ctrl-C
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for _ in range(self._count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, self._encoding), daemon=True)
            process.start()
            there.close()
            self._processes[here] = process
        return self

    def __exit__(self, *error: object) -> None:
        for connection, process in self._processes.items():
            process.kill()
            connection.close()
        for process in self._processes.values():
            process.join()

    def encode(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, dict[Split, Encoded]]]:
        """Each idle worker gets the next piece; what is done early waits for its turn.

        The next piece is read before a worker is idle. None is read while `_AHEAD_CHARACTERS` a worker are held.
        """
        waiting: dict[int, Piece] = {}  # number -> a piece that isn't yielded yet
        done: dict[int, dict[Split, Encoded]] = {}
        busy: dict[Connection, int] = {}
        first = number = held = 0
        following: Piece | None = None  # read, and not sent yet
        finished = False
        while True:
            if following is None and not finished and held < _AHEAD_CHARACTERS * self._count:
                following = next(pieces, None)
                finished = following is None
                held += following.characters if following else 0
            if following is None and not waiting:
                return
            idle = next((one for one in self._processes if one not in busy), None)
            if following is not None and idle is not None and len(waiting) < _AHEAD * self._count:
                self._send(idle, following.documents)
                waiting[number], busy[idle] = following, number
                number, following = number + 1, None
                continue
            for connection in wait([*busy]):
                assert isinstance(connection, Connection)
                done[busy.pop(connection)] = self._receive(connection)
            while first in done:
                piece = waiting.pop(first)
                held -= piece.characters
                yield piece, done.pop(first)
                first += 1

    def _send(self, connection: Connection, documents: list[tuple[Split, str, int]]) -> None:
        try:
            connection.send(documents)
        except OSError as error:
            raise self._died(connection) from error

    def _receive(self, connection: Connection) -> dict[Split, Encoded]:
        try:
            found = connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(connection) from error
        if isinstance(found, Exception):
            raise found
        return found

    def _died(self, connection: Connection) -> SettingError:
        process = self._processes[connection]
        process.join()
        return SettingError(
            f"workers is {self._count}, of which one has died (exit status {process.exitcode}; -9 is often for lack of "
            "memory); the same command goes on from what is finished, with fewer workers if memory was short"
        )


def _work(connection: Connection, encoding: Encoding) -> None:
    """Answers pieces until the pipe ends. Signals to the terminal's processes are for the one that waits."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = DocumentTokenizer(encoding.serialized, encoding.end)
    while True:
        try:
            documents = connection.recv()
            try:
                answer: Any = _encode(documents, tokenizer, encoding.dtype)
            except Exception as error:
                answer = error
            connection.send(answer)
        except (EOFError, OSError):
            return
