"""The numbers of a planned run and of each of its arms, as plan.json holds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from query_experts.model import costs
from query_experts.model.arms import arm_config, build
from query_experts.plan.gpus import USABLE
from query_experts.plan.lengths import Speed, predict
from query_experts.plan.memory import Memory, Parts, track
from query_experts.plan.settings import PlanSettings

GIB = 2**30
Setting = int | float | bool | str | list[str] | list[float] | None


@dataclass(frozen=True)
class ArmPlan:
    """What one arm needs.

    Args:
        parameters: All of them; `active_parameters`: those of one token.
        flops_per_token: Active FLOPs of the forward and the backward pass, which is three times the forward pass.
        run_flops: Of all tokens.
        memory: Bytes of one GPU by part, at the moment of a step that needs most, without activation checkpointing.
        memory_checkpointed: Bytes of one GPU in all, with it.
        largest_batch: The most sequences of a micro-batch that fit; 0 if not even one does.
        largest_batch_checkpointed: The same, with activation checkpointing.
        tokens_per_s: Of one GPU, measured or by the assumed MFU; None where neither is known.
        mfu: The share of the GPU's peak that these tokens take.
        hours: Of the whole run on all GPUs.
        cost: In dollars; None without a price.
    """

    arm: str
    parameters: int
    active_parameters: int
    flops_per_token: float
    run_flops: float
    memory: Parts
    memory_checkpointed: float
    largest_batch: int
    largest_batch_checkpointed: int
    tokens_per_s: float | None
    mfu: float | None
    hours: float | None
    cost: float | None

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """All of plan.json.

    Args:
        tokens: Of the whole run.
        room: Bytes of one GPU that the plan takes for usable.
        measured: Whether tokens_per_s were measured; otherwise they come from an assumed MFU.
        speeds: Predicted, over dense.
    """

    settings: dict[str, Setting]
    sequences_per_step: int
    tokens: int
    room: float
    measured: bool
    arms: list[ArmPlan]
    speeds: list[Speed]


def make_plan(settings: PlanSettings) -> Plan:
    """The numbers of a run. Settings are already checked."""
    tokens = settings.steps * settings.sequences_per_step * settings.seq_len
    room = USABLE * settings.machine.memory * GIB
    dense = arm_config("dense", settings.model_size())
    speeds = [
        speed for arm in settings.arms if arm != "dense"
        for speed in predict(arm, arm_config(arm, settings.model_size()), dense)
    ]  # fmt: skip
    return Plan(
        settings={name: value for name, value in dataclasses.asdict(settings).items() if name not in settings.unlisted},
        sequences_per_step=settings.sequences_per_step,
        tokens=tokens,
        room=room,
        measured=bool(settings.tokens_per_s),
        arms=[plan_arm(settings, arm, tokens, room) for arm in tqdm(settings.arms, "tracking memory", leave=False)],
        speeds=speeds,
    )


def plan_arm(settings: PlanSettings, arm: str, tokens: int, room: float) -> ArmPlan:
    config = arm_config(arm, settings.model_size())
    with torch.device("meta"):
        parameters = costs.parameters(build(config))
    flops = 3 * costs.flops_per_token(config, settings.seq_len)
    memory: dict[bool, Memory] = track(config, settings.step(), settings.batch_size)
    speed = tokens_per_s(settings, arm, flops)
    hours = None if speed is None else tokens / (speed * settings.gpus) / 3600
    return ArmPlan(
        arm=arm,
        parameters=parameters["total"],
        active_parameters=parameters["active"],
        flops_per_token=flops,
        run_flops=flops * tokens,
        memory=memory[False].parts(settings.batch_size),
        memory_checkpointed=memory[True].total(settings.batch_size),
        largest_batch=memory[False].largest_batch(room),
        largest_batch_checkpointed=memory[True].largest_batch(room),
        tokens_per_s=speed,
        mfu=None if speed is None else speed * flops / (settings.machine.tflops * 1e12),
        hours=hours,
        cost=None if hours is None or settings.price is None else hours * settings.gpus * settings.price,
    )


def tokens_per_s(settings: PlanSettings, arm: str, flops: float) -> float | None:
    """Of one GPU: measured, or by the assumed share of its peak; None in float32, whose peak isn't known here."""
    if settings.tokens_per_s:
        return settings.tokens_per_s[settings.arms.index(arm)]
    if settings.dtype == "float32":
        return None
    return settings.mfu * settings.machine.tflops * 1e12 / flops
