"""The settings of `compare`, `train` and `distill`, which the command line, recipes in YAML and presets fill."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

from query_experts.common.device import (
    Device,
    check_compiler,
    check_device,
    has_bfloat16,
    resolve_device,
)
from query_experts.common.errors import SettingError
from query_experts.common.fields import (
    Bounds,
    Count,
    Counts,
    Distinct,
    Elsewhere,
    NonNegative,
    NotEmpty,
    OutFolder,
    Seed,
    Settings,
    Share,
    argument,
    option,
)
from query_experts.common.settings import default_of, validate
from query_experts.distributed.layout import (
    check_device_of_shards,
    check_groups,
    check_layout_of_ranks,
    data_parallel_ranks,
)
from query_experts.model.arms import ARMS, ModelSize, arm_config, check_arms, model_size, size_option
from query_experts.model.kernel_choice import Kernels, check_kernels_setting, kernels_option

INSTEAD = "which there isn't; it must be left out: fsdp_size and tp_size say how processes share a model"
TEACHER = NotEmpty("be the dense model's checkpoint, or none to train with only the language-model loss")


def check_loggers(names: Sequence[str]) -> None:
    """Raises SettingError for a logger whose package isn't installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SettingError(
                f"report_to holds {name!r}, which isn't installed: pip install query-experts[watch], or leave it out"
            )


@dataclass
class RunSettings(Settings):
    """What all training runs of the study have in common. The defaults are what the demo was at first.

    Attributes:
        torch_device: The device that `device` means on this machine.
        given: What the command line or a recipe sets, even to the default.
    """

    given: ClassVar[frozenset[str]] = frozenset()
    refused = dict.fromkeys(("cp_size", "sp_size"), f"asks for context parallelism, {INSTEAD}") | {
        "pp_size": f"asks for pipeline parallelism, {INSTEAD}",
        "ep_size": f"asks for expert parallelism, {INSTEAD}",
    }

    out: OutFolder = option("runs/demo", "folder for checkpoints, results and the report", "output", metavar="FOLDER")
    data: list[str] = option(
        [], "text files or folders, a hub dataset, or a folder of tokens from cache_dir or data prepare; default: the "
            "source code of Python's standard library", "data", metavar="PATH",
    )  # fmt: skip
    validation: list[str] = option(
        [], "text files or folders that are held out whole, up to 400,000 tokens of each file, in place of the 2% of "
            "data that are held out without it", "data", metavar="PATH",
    )  # fmt: skip
    cache_dir: str | None = option(None, "folder for tokenised data; default: cache/ in out", "data", metavar="FOLDER")
    text_field: str = option("text", "field of a jsonl line or parquet column that holds the text", "data")
    tokenizer: str | None = option(
        None, "tokenizer by name or folder; default: a byte-level BPE trained on the data", "data", metavar="NAME"
    )
    max_bytes: Count | None = option(12_000_000, "read at most N bytes of data; none: all of it", "data")
    validation_sequences: Count | None = option(
        128, "sequences for the validation loss, spread evenly over the held-out text, with one of each validation "
             "file at least; none: all of them", "data",
    )  # fmt: skip
    device: Device = option("auto", "device to train on; auto: cuda where there is one, else cpu", "machine")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "autocast dtype; float32: no autocast; auto: bfloat16 where the hardware has it", "machine"
    )
    compile: bool = option(
        False, "compile the model with torch.compile, which needs a C++ compiler on a CPU", "machine"
    )
    kernels: Kernels = kernels_option("machine")
    fsdp_size: Count | None = option(
        None, "processes that share one copy of the model (FSDP2); default: each has its own (DDP)", "processes"
    )
    tp_size: Count = option(
        1, "processes that share each layer (tensor parallelism); it must divide num_key_value_heads", "processes"
    )
    activation_checkpointing: bool = option(
        False, "compute activations again in the backward pass, which saves memory", "machine"
    )
    rank_timeout_minutes: Annotated[float, Bounds(above=0)] = option(
        30.0, "time after which a process that doesn't answer is named, and all end", "processes"
    )
    stop_after_minutes: NonNegative | None = option(
        None, "save and stop after X minutes; the same command goes on from there", "machine"
    )

    vocab_size: Count = size_option("vocab_size", 2048)
    report_to: list[Literal["tensorboard", "wandb"]] = option(
        [], "loggers that get the curves too; tensorboard: in the run's folder; wandb: by its own variables, such as "
            "WANDB_PROJECT; default: none", "watching", metavar="NAME",
    )  # fmt: skip
    telemetry: Literal["none", "brief", "detailed"] = option(
        "brief", "what is logged beside the losses: speed, memory and the state of the routers; detailed: that of each "
                 "layer, group and expert too", "watching",
    )  # fmt: skip
    log_every: Count | None = option(
        None, "steps between two logs, or fewer, so that checkpoints fall on logs; default: 50 logs or more in a run",
        "watching",
    )  # fmt: skip
    peak_flops: Annotated[float, Bounds(above=0)] | None = option(
        None, "FLOP/s of one device, for the MFU; default: that of a known GPU", "watching"
    )

    seq_len: Count = option(256, "tokens in a training sequence", "training")
    hidden_size: Count = size_option("hidden_size", 192)
    intermediate_size: Count = size_option("intermediate_size", 512)
    num_hidden_layers: Count = size_option("num_hidden_layers", 4)
    num_attention_heads: Count = size_option("num_attention_heads", 8)
    num_key_value_heads: Count = size_option("num_key_value_heads", 4)
    active_query_experts: Count = size_option("active_query_experts", 1)
    head_dim: Count = size_option("head_dim", 32)
    tie_word_embeddings: bool = size_option("tie_word_embeddings", True)
    initializer_range: NonNegative = size_option("initializer_range", 0.02)
    router_aux_loss_coef: NonNegative = size_option("router_aux_loss_coef", 0.01)
    router_z_loss_coef: NonNegative = size_option("router_z_loss_coef", 0.0)

    steps: Count = option(240, "optimizer steps", "training")
    batch_size: Count = option(4, "sequences in a micro-batch of one process", "training")
    gradient_accumulation_steps: Count = option(1, "micro-batches of a process in an optimizer step", "training")
    global_batch_size: Count | None = option(
        None, "sequences in an optimizer step over all processes, in place of gradient_accumulation_steps", "training"
    )
    learning_rate: Annotated[float, Bounds(above=0)] = option(
        2e-3, "peak learning rate; the schedule is warm-up, stable, decay (WSD)", "training"
    )
    min_learning_rate_ratio: Share = option(0.02, "lowest learning rate over the peak", "training")
    warmup_fraction: Share = option(0.1, "share of the steps that warm up", "training")
    decay_fraction: Share = option(0.2, "share of the steps that decay", "training")
    weight_decay: NonNegative = option(0.1, "weight decay of AdamW", "training")
    evaluations: Count = option(5, "validations, and checkpoints, along the run", "training")
    keep: Annotated[int, Bounds(least=2)] = option(2, "checkpoints to keep", "training")

    def __post_init__(self) -> None:
        self.torch_device = resolve_device(self.device)

    @property
    def data_parallel_ranks(self) -> int:
        """Processes that train on sequences of their own."""
        return data_parallel_ranks(self.tp_size)

    @property
    def is_sharded(self) -> bool:
        """Whether several processes share a copy of the model."""
        return (self.fsdp_size or 1) * self.tp_size > 1

    @property
    def rank_timeout(self) -> float:
        """In seconds."""
        return 60 * self.rank_timeout_minutes

    @property
    def micro_batches(self) -> int:
        """Those of one process in an optimizer step."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        return self.global_batch_size // (self.batch_size * self.data_parallel_ranks)

    @property
    def sequences_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.micro_batches * self.data_parallel_ranks

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_fraction * self.steps)

    @property
    def decay_steps(self) -> int:
        return round(self.decay_fraction * self.steps)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    def model_size(self) -> ModelSize:
        return model_size(self, max_position_embeddings=self.seq_len)

    def autocast_dtype(self) -> str:
        """bfloat16 or float32."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if has_bfloat16(self.torch_device) else "float32"

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        validate(self)
        if self.warmup_fraction + self.decay_fraction > 1:
            total = self.warmup_fraction + self.decay_fraction
            raise SettingError(f"warmup_fraction + decay_fraction is {total}; it must be 1 or less")
        check_device(self.device)
        check_compiler(self.compile, self.torch_device)
        check_kernels_setting(self.kernels, self.torch_device)
        check_layout_of_ranks(self.fsdp_size, self.tp_size)
        if self.tp_size > 1 and self.compile and self.activation_checkpointing:
            raise SettingError(
                f"tp_size is {self.tp_size}, with which torch can't compile what activation_checkpointing computes "
                "again; compile or activation_checkpointing must be False"
            )
        if self.is_sharded:
            check_device_of_shards(self.torch_device)
        check_loggers(self.report_to)
        self.check_batch()

    def check_batch(self) -> None:
        """Raises SettingError for a global batch that the processes' micro-batches don't fill."""
        if self.global_batch_size is None:
            return
        if self.gradient_accumulation_steps != 1 and "gradient_accumulation_steps" in self.given:
            raise SettingError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, and global_batch_size sets it; "
                "one of them must be left out"
            )
        together = self.batch_size * self.data_parallel_ranks
        if self.global_batch_size % together:
            raise SettingError(
                f"global_batch_size is {self.global_batch_size}; it must be a multiple of batch_size times the "
                f"processes with data of their own, {self.batch_size} x {self.data_parallel_ranks}"
            )

    def check_arms(self, arms: list[str]) -> None:
        """Raises SettingError for arms that can't be built, or that the kernels don't cover."""
        check_groups(self.tp_size, self.num_key_value_heads)
        check_arms(arms, self.model_size())
        configs = [arm_config(arm, self.model_size()) for arm in arms]
        check_kernels_setting(self.kernels, self.torch_device, configs)


@dataclass
class TrainSettings(RunSettings):
    """`query-experts train`: one arm, one seed."""

    elsewhere = Elsewhere(
        {"init": None, "teacher": None, "distillation": 0.9, "sparsify_fraction": 0.0},
        "which train doesn't take; query-experts distill trains a converted checkpoint, with the same options",
    )

    out: OutFolder = option("runs/train", "folder for checkpoints, model and result", "output", metavar="FOLDER")
    arm: str = option("gqe", f"one of {', '.join(ARMS)}", "arms", metavar="ARM")
    seed: Seed = option(0, "seed of initial values and data order", "arms")

    def check(self) -> None:
        super().check()
        self.check_arms([self.arm])


@dataclass
class DistillSettings(RunSettings):
    """`query-experts distill`: a converted checkpoint, with a teacher or without."""

    elsewhere = Elsewhere({"arm": "gqe"}, "and init brings its own; it must be left out")
    unlisted = frozenset(f.name for f in fields(ModelSize) if f.metadata["group"] == "model") | {"tokenizer"}

    out: OutFolder = option("runs/distill", "folder for checkpoints, model and result", "output", metavar="FOLDER")
    router_aux_loss_coef: NonNegative = option(0.01, "weight of the balance loss; default: that of init", "training")
    router_z_loss_coef: NonNegative = option(0.0, "weight of the router z-loss; default: that of init", "training")
    seed: Seed = option(0, "seed of the data order", "training")
    init: Annotated[str, NotEmpty("be a GQE checkpoint's folder")] = option(
        "", "required: GQE checkpoint to train, as query-experts convert makes it; its sizes and tokenizer are used",
        "distillation", metavar="FOLDER",
    )  # fmt: skip
    teacher: Annotated[str, TEACHER] | None = option(
        None, "checkpoint whose predictions are learnt: the dense model that init was made from; none: only the "
              "language-model loss", "distillation", metavar="FOLDER",
    )  # fmt: skip
    distillation: Share = option(
        0.9, "weight of KL(teacher || model); the language-model loss has the rest of 1", "distillation"
    )
    sparsify_fraction: Annotated[float, Bounds(least=0, below=1)] = option(
        0.0, "share of the steps in which k falls from all experts to that of init", "distillation"
    )

    def is_given(self, name: str) -> bool:
        return name in self.given or getattr(self, name) != default_of(self, name)

    def check(self) -> None:
        super().check()
        check_arms(["gqe"], self.model_size())
        if self.teacher is None and self.distillation != default_of(self, "distillation"):
            raise SettingError(f"distillation is {self.distillation}, which needs teacher; teacher must be given")


@dataclass
class CompareSettings(RunSettings):
    """`query-experts compare`: several arms and seeds, on the same tokens in the same order."""

    arms: Annotated[list[str], Distinct()] = option(
        ["dense", "static", "gqe"], f"any of {', '.join(ARMS)}", "arms", metavar="ARM"
    )
    seeds: Annotated[list[Seed], Distinct()] = option(
        [0, 1], "seeds of initial values and data order; more may be added later to the same folder", "arms"
    )
    prefill_lengths: Counts = option([512, 2048, 8192], "prompt lengths at which prefill is timed", "prefill")
    prefill_repeats: Count = option(5, "timings of each arm at each length, with the arms taking turns", "prefill")

    def check(self) -> None:
        super().check()
        self.check_arms(self.arms)


@dataclass
class ReportSettings(Settings):
    """`query-experts report`: the folder of a comparison."""

    folder: Annotated[str, NotEmpty("be a compared folder")] = argument("a compared folder, with comparison.json")

    def check(self) -> None:
        """Raises SettingError for an empty name."""
        validate(self)
