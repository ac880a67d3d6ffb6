"""Runs a test file as the ranks of one launch over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def environment_of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def start_ranks(command: list[str], ranks: int) -> list[subprocess.Popen]:
    """Starts `python COMMAND` once for each rank."""
    port = free_port()
    shared = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=shared | environment_of_rank(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def outcomes(processes: list[subprocess.Popen], timeout: float = 180) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each process. Kills those that don't end in time."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, said, strict=True)]


def run_ranks(file: str, ranks: int, folder: Path, *words: str) -> None:
    """Runs a file as a script on so many ranks, with a folder as its first argument; all must succeed."""
    ended = outcomes(start_ranks([file, str(folder), *words], ranks))
    assert all(status == 0 for status, _, _ in ended), "\n".join(err for _, _, err in ended)
