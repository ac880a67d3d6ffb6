"""Records the hardware and package versions of a run."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from query_experts import __version__

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The hardware, versions and day of a run. `dataclasses.asdict` gives its JSON."""

    python: str
    torch: str
    transformers: str
    query_experts: str
    commit: str | None = None  # None outside a git checkout; older files lack it
    device: str
    hardware: str
    dtype: str
    date: str


def environment(device: str, dtype: str) -> Environment:
    """Describes this process.

    Args:
        device: cpu, cuda or mps.
        dtype: the dtype of the run, such as bfloat16.
    """
    threads = torch.get_num_threads()
    processor = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return Environment(
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        query_experts=__version__,
        commit=loaded_commit(),
        device=device,
        hardware=torch.cuda.get_device_name() if device == "cuda" else processor,
        dtype=dtype,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def instructions(device: str) -> str:
    """What decides which kernels torch runs: a GPU's name, or a processor's maker and vector instructions.

    Kernels of other instructions add in another order, and training drifts apart from there.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    matrix = sorted(name for name in found if "amx" in name or "bf16" in name)
    return ", ".join([_cpu_info("vendor_id") or platform.machine(), torch.backends.cpu.get_cpu_capability(), *matrix])


@cache
def loaded_commit() -> str | None:
    """The commit when this process first asked: files may change beside one that runs for hours."""
    return commit()


def commit() -> str | None:
    """The commit of the checkout that holds the package, with `+` if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        inside = subprocess.run([*git, "ls-files", "--error-unmatch", "py.typed"], capture_output=True, timeout=10)
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.decode().strip() or None if inside.returncode == 0 else None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(field: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo, where there is such a file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)
