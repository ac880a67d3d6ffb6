"""How fast runs train in FLOP/s, and as a share of what the device can do (MFU)."""

from __future__ import annotations

from query_experts.common.device import peak_flops
from query_experts.study.ladder.results import LadderResult
from query_experts.study.ladder.settings import Ladder, Run

ASSUMED_SHARE = 0.25  # of the peak, until a run is measured


def flops_per_s(result: LadderResult) -> float:
    """Of training as it runs: `costs.model_work` of a token times tokens/s."""
    return result.flops / result.train_tokens * result.tokens_per_s


def speed_text(result: LadderResult) -> str:
    """FLOP/s of a result in words, and the share of the device's peak (MFU) where that is known.

    With several processes on a device, all of them: each is taken to be as fast as this one.
    """
    own = flops_per_s(result)
    text = f"{_flops(own)}/s"
    last = result.pieces[-1]
    highest = peak_flops(last.hardware, last.dtype)
    if highest is not None:
        text += f", {own * result.beside / highest:.1%} of the peak of {_flops(highest)}/s"
        text += f" by {result.beside} processes beside one another" if result.beside > 1 else ""
    return text


def assumed_seconds(ladder: Ladder, run: Run, peak: float) -> float:
    """Time for all budgets of a run at a quarter of a device's peak."""
    settings = ladder.run_settings(run)
    tokens = ladder.share_trained(ladder.budgets) * settings.steps * settings.tokens_per_step
    return tokens * ladder.flops_per_token(run) / (ASSUMED_SHARE * peak)


def _flops(value: float) -> str:
    """FLOPs with a unit: 31.4 GFLOP."""
    return f"{value / 1e12:.1f} TFLOP" if value >= 1e12 else f"{value / 1e9:.1f} GFLOP"
