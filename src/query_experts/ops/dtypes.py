"""The dtype in which router logits, scores and sums are computed."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32. (`torch.promote_types` says the same, by a call of an operator.)"""
    return torch.float64 if dtype == torch.float64 else torch.float32
