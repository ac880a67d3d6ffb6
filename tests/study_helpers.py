"""What the tests of training and of the study share: a corpus of a few kilobytes, and settings that run in a second."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset

from query_experts.study.arms import ModelSize
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
