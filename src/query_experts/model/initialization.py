"""Initial values from a seed and a tensor's name, so that models of different arms start alike."""

from __future__ import annotations

import hashlib
from itertools import chain

import torch
from torch import nn


@torch.no_grad()
def initialise_by_name(model: nn.Module, seed: int, std: float) -> None:
    """Draws every matrix from N(0, std) with a generator seeded by (seed, name).

    Models of different arms then start with equal values in all tensors of equal name and shape. Vectors (norms,
    biases) keep their constants.
    """
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):  # a frozen router is a buffer
        if parameter.dim() >= 2:
            values = torch.randn(parameter.shape, generator=named_generator(seed, name)) * std
            parameter.copy_(values.to(parameter.device, parameter.dtype))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A random number generator seeded by the seed and a tensor's name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
