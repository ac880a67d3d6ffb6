"""What the tests of the ladder's queue share: a ladder that trains in a second, and its settings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from query_experts.common.errors import SettingError
from query_experts.study.callbacks import StopRequest
from query_experts.study.ladder.settings import ScalingSettings
from study_helpers import write_text

RUNG = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
LADDER: dict[str, Any] = {
    "results": "results",
    "data": ["train.txt"],
    "validation": ["held-out.txt", "other.txt"],
    "tokens_per_parameter": 1,
    "budgets": [0.25, 0.5, 1],
    "settings": {
        "device": "cpu", "dtype": "float32", "vocab_size": 300, "seq_len": 16, "batch_size": 2,
        "validation_sequences": 8,
    },
    "rungs": {"small": RUNG, "large": RUNG | {"hidden_size": 32}},
    "plan": [{"rungs": ["small", "large"], "arms": ["dense", "gqe"], "seeds": 2}],
}  # fmt: skip
TIMES = {"train_seconds", "tokens_per_s", "pieces"}


def write_ladder(folder: Path, **changes: Any) -> Path:
    """A ladder's file with its texts beside it; changes replace entries of LADDER."""
    for seed, name in enumerate(("train.txt", "held-out.txt", "other.txt")):
        if not (folder / name).exists():
            write_text(folder / name, lines=600 if seed == 0 else 60, seed=seed)
    file = folder / "ladder.yaml"
    file.write_text(yaml.safe_dump(LADDER | changes, sort_keys=False))
    return file


def scaling(file: Path, action: str = "run", **more: Any) -> ScalingSettings:
    data = {"data": str(file.parent)} if action == "run" else {}
    return ScalingSettings(**{"action": action, "ladder": str(file), "out": str(file.parent / "out"), **data, **more})


def results_of(folder: Path) -> dict[str, Any]:
    """File name -> the result without what differs from run to run."""
    files = sorted((folder / "results").glob("*.json"))
    return {
        file.name: {name: value for name, value in json.loads(file.read_text()).items() if name not in TIMES}
        for file in files
    }


class StopAfterLooks(StopRequest):
    """A request that is made once it has been looked at so often, as after each log of a piece."""

    def __init__(self, looks: int):
        super().__init__()
        self.left = looks

    @property
    def made(self) -> bool:
        self.left -= 1
        return self.left < 0


def wait_until_asked(folder: str) -> None:
    """The work of a process that waits for a signal."""
    stop = StopRequest()
    with stop.listening():
        (Path(folder) / f"ready-{os.getpid()}").touch()
        while not stop.made:
            time.sleep(0.05)
    (Path(folder) / f"saved-{os.getpid()}").touch()


def refuse() -> None:
    """The work of a process that can't work."""
    raise SettingError("steps is 0; it must be 1 or more")
