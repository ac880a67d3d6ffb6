"""The presets that are too large for a test: headers, launches, and options that shrink them to a run of a second."""

from __future__ import annotations

import re
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from query_experts.cli import parse_run
from query_experts.common.settings import presets
from query_experts.study.settings import CompareSettings, TrainSettings

ROOT = Path(__file__).resolve().parents[2]
LARGE = ["paper-250m", "1b", "7b", "ladder-d256", "ladder-d384", "ladder-d512"]
OF_SLURM = re.compile(r"^#SBATCH --(nodes|gpus-per-node)=(\d+)$", re.MULTILINE)


def header(preset: str) -> str:
    """The comment at the top of a preset's file, as one line."""
    lines = presets("recipes")[preset].read_text(encoding="utf-8").splitlines()
    return " ".join(" ".join(line.lstrip("#") for line in lines if line.startswith("#")).split())


def settings_of(preset: str, kind: type = TrainSettings) -> TrainSettings | CompareSettings:
    return parse_run("train" if kind is TrainSettings else "compare", kind, ["--preset", preset])


def shrunk(preset: str) -> dict[str, object]:
    """Options that leave a preset's relations (M, k, MLP over width, tied or not, arms), two layers and two groups."""
    held = settings_of(preset)
    heads = 2 * held.num_attention_heads // held.num_key_value_heads
    assert held.hidden_size == held.num_attention_heads * held.head_dim
    small: dict[str, object] = {
        "device": "cpu", "dtype": "float32", "vocab_size": 300, "seq_len": 16, "hidden_size": 8 * heads,
        "intermediate_size": 8 * heads * held.intermediate_size // held.hidden_size, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 8, "steps": 2, "batch_size": 2,
        "evaluations": 1, "log_every": 1, "validation_sequences": 4,
    }  # fmt: skip
    return small | ({"global_batch_size": 4} if held.global_batch_size is not None else {})


def as_words(options: dict[str, object]) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def launched(line: str) -> tuple[int, list[str]]:
    """The processes that a command line starts, and the words of query-experts that each of them gets."""
    launcher, *words = line.replace("$(which query-experts)", "query-experts").split()
    if launcher == "query-experts":
        return 1, words
    if launcher == "sbatch":
        nodes_and_gpus = dict(OF_SLURM.findall((ROOT / words[0]).read_text(encoding="utf-8")))
        return int(nodes_and_gpus["nodes"]) * int(nodes_and_gpus["gpus-per-node"]), ["train", *words[1:]]
    if launcher == "accelerate":
        started = launch_command_parser().parse_args(words[1:])
        processes = started.num_processes
    else:
        assert launcher == "torchrun"
        started = get_args_parser().parse_args(words)
        processes = int(started.nnodes.split(":")[-1]) * int(started.nproc_per_node)
    assert started.training_script == "query-experts"
    return processes, started.training_script_args


def check_launch(line: str, monkeypatch) -> TrainSettings | CompareSettings:
    """The settings that a command line means on as many processes as it starts, after their checks."""
    processes, (command, *words) = launched(line)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    settings = parse_run(command, {"train": TrainSettings, "compare": CompareSettings}[command], words)
    settings.check()
    return settings
