"""Files that are either whole or not there, and the disk that they go to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from query_experts.errors import SettingError


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside the target and rename it into place. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises SettingError if the disk of the folder has less room than that."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SettingError(
            f"out is {folder}, whose disk has {free / 1e6:.0f} MB free; this run needs about {num_bytes / 1e6:.0f} MB"
        )
