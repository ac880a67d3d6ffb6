"""Where and with what something ran: hardware and versions, kept with every result."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from query_experts import __version__

PACKAGE = Path(__file__).resolve().parent.parent


def environment(device: str, dtype: str) -> dict[str, Any]:
    """device: cpu, cuda or mps. -> Python and package versions, hardware, dtype and today's date (UTC), JSON-able."""
    threads = torch.get_num_threads()
    processor = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    hardware = torch.cuda.get_device_name() if device == "cuda" else processor
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "query_experts": __version__,
        "commit": commit(),
        "device": device,
        "hardware": hardware,
        "dtype": dtype,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def commit() -> str | None:
    """Of the checkout that the package is imported from, with `+` behind it where files differ; None elsewhere."""
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
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
