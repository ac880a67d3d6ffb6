"""Small runs of the commands on two ranks, as torchrun starts them, and what stops them."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from query_experts.cli import main
from query_experts.distributed.layout import copies_of_shards
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from rank_helpers import outcomes, start_ranks
from study_helpers import write_text

SIZE = {
    "device": "cpu", "dtype": "float32", "vocab_size": 300, "seq_len": 16, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "steps": 12,
    "evaluations": 4, "validation_sequences": 5, "global_batch_size": 4, "router_aux_loss_coef": 0.0,
}  # fmt: skip
LAYOUTS = {
    "ddp": {"batch_size": 2},
    "fsdp": {"batch_size": 2, "fsdp_size": 2},
    "tp": {"batch_size": 4, "tp_size": 2},
    "checkpointed": {"batch_size": 1, "fsdp_size": 2, "activation_checkpointing": True},
}
sharded = pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers below 5.20 doesn't share models of this kind")
resuming = pytest.mark.skipif(
    not SHARDS_BY_GROUP, reason="Transformers below 5.20 can't load an optimizer in several processes on a CPU"
)
SLOW = pytest.mark.full
COPIES = SHARDS_BY_GROUP and copies_of_shards()
PARAMETERS = [
    pytest.param(name, marks=[*([sharded] if name != "ddp" else []), *([SLOW] if name == "checkpointed" else [])])
    for name in LAYOUTS
]
EACH_KIND = [  # of which the second one stands for all where time is short
    pytest.param("ddp", marks=SLOW), pytest.param("fsdp", marks=sharded), pytest.param("tp", marks=[sharded, SLOW]),
]  # fmt: skip


def words(command: str, folder: Path, out: str, **changes) -> list[str]:
    settings = SIZE | {"data": folder / "text.txt", "out": folder / out} | changes
    return [command, *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def start(command: list[str]) -> list[subprocess.Popen]:
    return start_ranks(["-m", "query_experts.cli", *command], 2)


def on_two_ranks(command: list[str]) -> list[tuple[int, str, str]]:
    return outcomes(start(command))


def result(folder: Path, out: str) -> dict:
    return json.loads((folder / out / "result.json").read_text())


def curves(folder: Path, out: str) -> tuple:
    held = result(folder, out)
    return held["train_curve"], held["validation_curve"], held["clipped_steps"]


def train_alone(path: Path) -> Path:
    """Writes a text into a folder, and the run of one process, as `one`."""
    write_text(path / "text.txt")
    assert main(words("train", path, "one", batch_size=4)) == 0
    return path


def wait_for(path: Path, processes: list[subprocess.Popen], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline and all(p.poll() is None for p in processes):
        time.sleep(0.005)


FROM_STEP = """
import sys, time
import query_experts.study.callbacks as callbacks
from query_experts.distributed.ranks import rank
from query_experts_command import main
before = callbacks.TokenProgress.on_step_begin
def on_step_begin(self, args, state, control, **more):
    if rank() in {ranks} and state.global_step == {step}:
        {what}
    before(self, args, state, control, **more)
callbacks.TokenProgress.on_step_begin = on_step_begin
sys.exit(main(sys.argv[1:]))
"""


def with_rank_1(step: int, what: str, command: list[str]) -> list[tuple[int, str, str]]:
    return outcomes(start_ranks(["-c", FROM_STEP.format(ranks=(1,), step=step, what=what), *command], 2), timeout=120)
