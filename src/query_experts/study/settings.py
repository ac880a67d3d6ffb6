"""Settings of training runs: dataclasses that the command line, recipes in YAML and presets all fill."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from query_experts.common.device import has_bfloat16, require_one_process, resolve_device
from query_experts.common.errors import SettingError
from query_experts.common.settings import check_seeds, default_of, field
from query_experts.model.arms import ARMS, ModelSize, check_arms


@dataclass
class RunSettings:
    """One training run. The defaults are the `demo` preset, but for its dtype."""

    out: str = field("runs/demo", "folder for checkpoints, results and the report")
    data: list[str] = field([], "text files or folders, a hub dataset, or a folder of tokens from cache_dir; default: "
                            "the source code of Python's standard library")  # fmt: skip
    cache_dir: str | None = field(None, "folder for tokenised data; default: cache/ in out")
    text_field: str = field("text", "field of a jsonl line or parquet column that holds the text")
    tokenizer: str | None = field(None, "tokenizer by name or folder; default: a byte-level BPE trained on the data")
    max_bytes: int | None = field(12_000_000, "read at most so many bytes of text; none: all of it")
    validation_sequences: int = field(128, "sequences for the validation loss, spread over the held-out text")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field(
        "auto", "autocast dtype: bfloat16, float32 for none, or auto: bfloat16 where the hardware has it"
    )
    stop_after_minutes: float | None = field(None, "save and stop then; the same command goes on from there")

    vocab_size: int = field(2048, "vocabulary; an own tokenizer must fit into it")
    seq_len: int = field(256, "tokens in a training sequence")
    hidden_size: int = field(192, "hidden size D")
    intermediate_size: int = field(512, "MLP width")
    num_hidden_layers: int = field(4, "layers")
    num_attention_heads: int = field(8, "query heads N of the dense arm, query experts of the others")
    num_key_value_heads: int = field(4, "KV heads G")
    active_query_experts: int = field(1, "experts that a token wakes in a group, k")
    head_dim: int = field(32, "head dim")
    tie_word_embeddings: bool = field(True, "one table for input and output embeddings")
    router_aux_loss_coef: float = field(0.01, "weight of the balance loss; with init, its own unless given")
    router_z_loss_coef: float = field(0.0, "weight of the router z-loss; with init, its own unless given")

    steps: int = field(240, "optimizer steps")
    batch_size: int = field(4, "sequences in a micro-batch")
    gradient_accumulation_steps: int = field(1, "micro-batches in an optimizer step")
    learning_rate: float = field(2e-3, "peak learning rate (WSD: warm-up, stable, decay)")
    min_learning_rate_ratio: float = field(0.02, "the schedule's lowest learning rate over its peak")
    warmup_fraction: float = field(0.1, "share of the steps that warm up")
    decay_fraction: float = field(0.2, "share of the steps that decay")
    weight_decay: float = field(0.1, "AdamW's weight decay")
    evaluations: int = field(5, "validations, and checkpoints, along the run")

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    def model_size(self) -> ModelSize:
        held = {f.name: getattr(self, f.name) for f in fields(ModelSize) if hasattr(self, f.name)}
        return ModelSize(max_position_embeddings=self.seq_len, **held)

    def autocast_dtype(self) -> str:
        """bfloat16 or float32."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if has_bfloat16(resolve_device(self.device)) else "float32"

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        if not self.out:
            raise SettingError("out is empty; it must be a folder")
        for name in ("vocab_size", "seq_len", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                     "num_attention_heads", "num_key_value_heads", "active_query_experts", "steps", "batch_size",
                     "gradient_accumulation_steps", "evaluations", "validation_sequences"):  # fmt: skip
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise SettingError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of num_key_value_heads, "
                f"{self.num_key_value_heads}"
            )
        experts = self.num_attention_heads // self.num_key_value_heads
        if self.active_query_experts > experts:
            raise SettingError(f"active_query_experts is {self.active_query_experts}; it must be 1 to {experts}")
        if self.head_dim % 2:
            raise SettingError(f"head_dim is {self.head_dim}; rotary position embedding needs an even number")
        if not 0 < self.learning_rate < math.inf:
            raise SettingError(f"learning_rate is {self.learning_rate}; it must be a number above 0")
        for name in ("weight_decay", "router_aux_loss_coef", "router_z_loss_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be a number, 0 or more")
        for name in ("warmup_fraction", "decay_fraction", "min_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be 0 to 1")
        if self.warmup_fraction + self.decay_fraction > 1:
            total = self.warmup_fraction + self.decay_fraction
            raise SettingError(f"warmup_fraction + decay_fraction is {total}; it must be 1 or less")
        if self.stop_after_minutes is not None and not 0 <= self.stop_after_minutes < math.inf:
            raise SettingError(f"stop_after_minutes is {self.stop_after_minutes}; it must be a number, 0 or more")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise SettingError(f"max_bytes is {self.max_bytes}; it must be 1 or more")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise SettingError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")
        resolve_device(self.device)
        require_one_process()


@dataclass
class TrainSettings(RunSettings):
    """`query-experts train`: one arm, one seed."""

    out: str = field("runs/train", "folder for checkpoints, the model and its result")
    arm: str = field("gqe", f"one of {', '.join(ARMS)}")
    seed: int = field(0, "seed of initial values and data order")
    init: str | None = field(None, "GQE checkpoint to train on, in place of an arm of the sizes above")
    teacher: str | None = field(None, "checkpoint whose predictions init learns: the dense model that it was made of")
    distillation: float = field(0.9, "weight of KL(teacher || model); that of the language-model loss is the rest of 1")
    sparsify_fraction: float = field(0.0, "share of the steps in which k falls from all experts to that of init")

    given: ClassVar[frozenset[str]] = frozenset()  # what the user set, be it to the default

    def is_given(self, name: str) -> bool:
        return name in self.given or getattr(self, name) != default_of(self, name)

    def check(self) -> None:
        super().check()
        check_seeds("seed", [self.seed])
        check_arms([self.arm], self.model_size())
        if not 0 <= self.distillation <= 1:
            raise SettingError(f"distillation is {self.distillation}; it must be 0 to 1")
        if not 0 <= self.sparsify_fraction < 1:
            raise SettingError(f"sparsify_fraction is {self.sparsify_fraction}; it must be 0 or more and below 1")
        if self.init == "":  # as the preset has it
            raise SettingError("init is empty; it must be a GQE checkpoint's folder")
        if self.teacher == "":
            raise SettingError(
                "teacher is empty; it must be the dense model's checkpoint, or none for the language-model loss alone"
            )
        if self.teacher is None and self.distillation != default_of(self, "distillation"):
            raise SettingError(f"distillation is {self.distillation}, which needs teacher; teacher must be given")
        if self.init is None:
            for name in ("teacher", "sparsify_fraction"):
                if getattr(self, name):
                    raise SettingError(f"{name} is {getattr(self, name)!r}, which needs init; init must be given")


@dataclass
class CompareSettings(RunSettings):
    """`query-experts compare`: several arms and seeds, on the same tokens in the same order."""

    arms: list[str] = field(["dense", "static", "gqe"], f"any of {', '.join(ARMS)}")
    seeds: list[int] = field([0, 1], "seeds; more may be added later to the same folder")
    prefill_lengths: list[int] = field([512, 2048, 8192], "prompt lengths at which prefill is timed")
    prefill_repeats: int = field(5, "timings of each arm at each length, arms taking turns")

    def check(self) -> None:
        super().check()
        for name in ("arms", "seeds", "prefill_lengths"):
            held = getattr(self, name)
            if not held or len(set(held)) != len(held):
                raise SettingError(f"{name} holds {held}; it must hold one or more, each once")
        if min(self.prefill_lengths) < 1 or self.prefill_repeats < 1:
            held = f"prefill_lengths is {self.prefill_lengths} and prefill_repeats {self.prefill_repeats}"
            raise SettingError(f"{held}; all must be 1 or more")
        check_seeds("seeds", self.seeds)
        check_arms(self.arms, self.model_size())
