"""The settings of `query-experts plan`: those of a run, and the GPUs that are to do it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from query_experts.common.errors import SettingError
from query_experts.common.fields import Bounds, Count, Distinct, Elsewhere, NonNegative, OutFolder, Seed, option
from query_experts.common.formatting import plural
from query_experts.common.settings import validate
from query_experts.distributed.layout import require_one_process
from query_experts.model.arms import ARMS, check_arms
from query_experts.plan.gpus import GPUS, Gpu
from query_experts.plan.memory import Step
from query_experts.study.settings import RunSettings, TrainSettings

Positive = Annotated[float, Bounds(above=0)]
WITHOUT_EFFECT = {
    "compile", "kernels", "device", "seed", "stop_after_minutes", "rank_timeout_minutes", "activation_checkpointing",
    "keep", "learning_rate", "min_learning_rate_ratio", "warmup_fraction",
    "decay_fraction", "weight_decay", "evaluations", "initializer_range", "router_aux_loss_coef", "router_z_loss_coef",
}  # fmt: skip


@dataclass
class PlanSettings(RunSettings):
    """`query-experts plan`: takes what `train` takes, so that its preset, recipe or command line can be planned."""

    elsewhere = Elsewhere(
        TrainSettings.elsewhere.defaults, "which plan doesn't take: it plans a run of train or compare"
    )
    unlisted = (
        frozenset(f.name for f in fields(RunSettings) if f.metadata["group"] in ("data", "watching")) | WITHOUT_EFFECT
    )
    not_of_recipes = frozenset({"arms", "arm", "seed"})

    out: OutFolder = option("runs/plan", "folder for the numbers and the plot", "output", metavar="FOLDER")
    arms: Annotated[list[str], Distinct()] = option(
        ["dense", "static", "gqe"], f"any of {', '.join(ARMS)}", "arms", metavar="ARM"
    )
    arm: str | None = option(None, "one arm, as train names it, in place of arms", "arms", metavar="ARM")
    seed: Seed = option(0, "of train; it changes nothing", "arms")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "autocast dtype; float32: no autocast; auto: bfloat16", "machine"
    )
    gpus: Count = option(8, "GPUs, with one process for each", "machine")
    gpu: str = option(
        "h100",
        f"kind of GPU: one of {', '.join(GPUS)}, or any with gpu_memory and gpu_tflops",
        "machine",
        metavar="NAME",
    )
    gpu_memory: Positive | None = option(None, "memory of a GPU in GiB; default: that of gpu", "machine")
    gpu_tflops: Positive | None = option(
        None, "peak of dense matrix products in bf16, in TFLOP/s; default: that of gpu", "machine"
    )
    fsdp_size: Count | None = option(
        None, "GPUs that share one copy of the model (FSDP2); default: each has its own (DDP)", "processes"
    )
    tp_size: Count = option(1, "GPUs that share each layer (tensor parallelism); only 1 can be planned", "processes")
    mfu: Annotated[float, Bounds(above=0, most=1)] = option(
        0.4, "share of the GPU's peak that training reaches: an assumption, the same for all arms", "time and cost"
    )
    tokens_per_s: list[Positive] = option(
        [], "measured tokens/s of one GPU, a number for each arm; default: what mfu gives", "time and cost"
    )
    price: NonNegative | None = option(None, "dollars for an hour of one GPU", "time and cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arm is not None:
            self.arms = [self.arm]

    @property
    def machine(self) -> Gpu:
        if self.gpu_memory is not None and self.gpu_tflops is not None:
            return Gpu(self.gpu_memory, self.gpu_tflops)
        known = GPUS[self.gpu]
        return Gpu(self.gpu_memory or known.memory, self.gpu_tflops or known.tflops)

    @property
    def shards(self) -> int:
        return self.fsdp_size or 1

    @property
    def data_parallel_ranks(self) -> int:
        """Not the processes of this launch, but those that are planned."""
        return self.gpus

    def step(self) -> Step:
        return Step(self.gpus, self.shards, self.seq_len, self.micro_batches > 1, self.dtype != "float32")

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed. It doesn't matter what is here."""
        validate(self)
        require_one_process("plan")
        if self.arm is not None and "arms" in self.given:
            raise SettingError(f"arm is {self.arm!r}, and arms is set too; one of them must be left out")
        check_arms(self.arms, self.model_size())
        lacks = [name for name in ("gpu_memory", "gpu_tflops") if getattr(self, name) is None]
        if self.gpu not in GPUS and lacks:
            raise SettingError(
                f"gpu is {self.gpu!r}; it must be one of {', '.join(GPUS)}, or have gpu_memory and gpu_tflops "
                f"(missing: {', '.join(lacks)})"
            )
        if self.tp_size != 1:
            raise SettingError(f"tp_size is {self.tp_size}; the memory of shared layers isn't planned: it must be 1")
        if self.gpus % self.shards:
            raise SettingError(f"fsdp_size is {self.fsdp_size}; it must divide gpus, which is {self.gpus}")
        self.check_batch()
        if self.tokens_per_s and len(self.tokens_per_s) != len(self.arms):
            raise SettingError(
                f"tokens_per_s holds {plural(len(self.tokens_per_s), 'number')}; it must hold one for each arm: "
                f"{', '.join(self.arms)}"
            )
