"""What the tests of training and of the study share: a corpus of a few kilobytes, and settings that run in a second."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import TrainingArguments

from query_experts.model.arms import ModelSize, arm_config, build
from query_experts.model.initialization import initialise_by_name
from query_experts.study.settings import CompareSettings, TrainSettings

TINY: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "vocab_size": 300,
    "seq_len": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "steps": 6,
    "batch_size": 2,
    "evaluations": 2,
    "validation_sequences": 4,
}
SIZE = ModelSize(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    active_query_experts=1,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    router_aux_loss_coef=0.01,
    router_z_loss_coef=0.0,
)
WORDS = ["def", "return", "for", "while", "import", "class", "the", "token", "head", "group", "router", "key", "value"]


def write_text(path: Path, lines: int = 600, seed: int = 0) -> str:
    """A text file of about 40 bytes a line, always the same for a seed."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(rng.choices(WORDS, k=7)) + "\n" for _ in range(lines)), encoding="utf-8")
    return str(path)


def flip_a_bit(file: Path) -> None:
    """Damages a file in its middle, at its full size."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def tiny_train(tmp_path: Path, **changes: Any) -> TrainSettings:
    text = tmp_path / "text.txt"
    data = [str(text) if text.exists() else write_text(text)]
    return TrainSettings(**{"out": str(tmp_path / "out"), "data": data, **TINY, **changes})


def tiny_compare(tmp_path: Path, **changes: Any) -> CompareSettings:
    text = tmp_path / "text.txt"
    data = [str(text) if text.exists() else write_text(text)]
    study = {"arms": ["dense", "gqe"], "seeds": [0], "prefill_lengths": [8, 16], "prefill_repeats": 2}
    return CompareSettings(**{"out": str(tmp_path / "out"), "data": data, **TINY, **study, **changes})


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def said(console: Console) -> str:
    return console.file.getvalue()


class Rows(Dataset):
    """Training rows: random tokens, or the tensors given; rows of `lengths` are padded on the right."""

    def __init__(self, count: int = 24, seq_len: int = 12, lengths: list[int] | None = None, vocab_size: int = 300):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(vocab_size, (count, seq_len), generator=generator)
        self.mask = torch.ones_like(self.ids)
        for row, length in enumerate(lengths or []):
            self.mask[row, length:] = 0
        self.padded = lengths is not None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {"input_ids": self.ids[index], "labels": self.ids[index].masked_fill(self.mask[index] == 0, -100)}
        return row | ({"attention_mask": self.mask[index]} if self.padded else {})


def options(command, out, text, **changes):
    settings = {"out": out, "data": text, **TINY, "steps": 2, **changes}
    argv = [command]
    for name, value in settings.items():
        if value is not None:
            argv += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return argv


LENGTHS = [12, 5, 9, 12, 3, 7, 12, 11, 2, 8, 10, 6]


def model_of(arm="gqe", seed=0, **changes):
    config = arm_config(arm, SIZE)
    for name, value in changes.items():
        setattr(config, name, value)
    model = build(config)
    initialise_by_name(model, seed, model.config.initializer_range)
    return model


def arguments(tmp_path, **changes):
    defaults = {
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True,
        "per_device_eval_batch_size": 4, "max_grad_norm": 0.0, "learning_rate": 1e-3, "save_strategy": "no",
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False,
        "log_level": "error", "lr_scheduler_type": "constant", "prediction_loss_only": True,
    }  # fmt: skip
    return TrainingArguments(**defaults | changes)


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]
