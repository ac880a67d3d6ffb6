"""From which length an arm is worth it, by the FLOPs and bytes of costs.py: predicted, nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from query_experts.model import costs

WORTHWHILE = 1.1  # times as fast as dense
LENGTHS = [2**power for power in range(9, 21)]
KINDS = {
    "training": "a whole model, forward and backward, by FLOPs",
    "prefill": "a whole model over a prompt, by FLOPs",
    "decoding": "a whole model over one new token of one sequence, by the bytes that it reads",
}


@dataclass(frozen=True)
class Speed:
    """Predicted speed of an arm, over dense.

    Args:
        kind: A key of KINDS.
        by_length: Times as fast as dense, at each of LENGTHS (in decoding: cached tokens).
        pays_from: The first of LENGTHS that is WORTHWHILE; None if none is.
    """

    kind: str
    arm: str
    by_length: list[float]
    pays_from: int | None


def predict(arm: str, config: LlamaConfig, dense: LlamaConfig) -> list[Speed]:
    """The speed of an arm, for each kind."""
    found = []
    for kind in KINDS:
        speeds = [effort(kind, dense, length) / effort(kind, config, length) for length in LENGTHS]
        worth = [length for length, speed in zip(LENGTHS, speeds, strict=True) if speed >= WORTHWHILE]
        found.append(Speed(kind, arm, speeds, worth[0] if worth else None))
    return found


def effort(kind: str, config: LlamaConfig, length: int) -> float:
    """FLOPs, in decoding bytes."""
    if kind == "decoding":
        return costs.model_work(config, 1, 1, length).bytes
    return costs.model_work(config, 1, length, backward=kind == "training").flops
