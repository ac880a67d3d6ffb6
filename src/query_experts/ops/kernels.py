"""Chooses between the plain path of torch and the Triton kernels, and says why the latter can't run.

`torch` is the reference and runs on any device. `triton` runs the kernels or refuses with a reason. `auto` takes the
kernels only on a GPU of a family in `MEASURED`, and only for what they cover; else the plain path.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kernels = Literal["auto", "torch", "triton"]
KERNELS = get_args(Kernels)
OLDEST_TRITON = (3, 6)
MEASURED: frozenset[tuple[int, int]] = frozenset()  # compute capabilities for which a green GPU suite is committed
STEPS = (
    "route", "project", "project_queries", "project_keys_values", "normalise", "queries_and_keys", "shared_key_value",
    "combine", "update_caches",
)  # fmt: skip
LARGEST_HEAD_DIM = 256  # a program holds whole heads
MOST_GROUPS = 64  # and all groups of a token


def check_kernels(kernels: Any) -> Kernels:
    """Raises ValueError for a name that isn't one of `KERNELS`."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels is {kernels!r}; it must be one of {', '.join(KERNELS)}")
    return kernels


@torch.compiler.assume_constant_result
def no_triton() -> str | None:
    """Why Triton's kernels can't run in this installation; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which isn't installed"
    import triton

    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"needs triton {oldest} or newer, where {triton.__version__} is installed"
    return None


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton interprets its kernels, which it then does on a CPU (its TRITON_INTERPRET)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def changed_step(layer: Any) -> str | None:
    """A step of the layer that a subclass does in its own way, where there is one."""
    for kind in type(layer).__mro__:
        if "route_and_attend" in vars(kind):  # the class whose steps the kernels compute
            return None
        if step := next((name for name in STEPS if name in vars(kind)), None):
            return step
    return None


def no_triton_on(device: torch.device) -> str | None:
    """Why the kernels can't run on a device; None where they can."""
    return no_triton() or wrong_device(device)


def wrong_device(device: torch.device) -> str | None:
    """What of a device Triton's kernels can't run on, where Triton is installed; None where they can."""
    if device.type == "cuda":
        return "doesn't support ROCm" if torch.version.hip else None
    if device.type == "cpu" and interpreted():
        return None
    return f"needs an NVIDIA GPU, where the device is {device.type}"


def not_covered(layer: Any) -> str | None:
    """What of a layer's layout the kernels don't cover; None where they cover it."""
    if layer.head_dim > LARGEST_HEAD_DIM:
        return f"takes head_dim up to {LARGEST_HEAD_DIM}, where it is {layer.head_dim}"
    if layer.is_group_parallel:
        return "doesn't run on the groups of one rank (tensor parallelism)"
    if step := changed_step(layer):
        return f"runs no subclass's own {step}"
    if layer.num_kv_heads > MOST_GROUPS or layer.experts_per_group > MOST_GROUPS:
        return f"takes up to {MOST_GROUPS} groups and {MOST_GROUPS} experts in a group"
    return None


def not_taken(x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> str | None:
    """What of x, of the angles, or of where the call happens, the kernels don't take; None where they take all."""
    if torch.compiler.is_exporting():
        return "can't be exported"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "doesn't support the transforms of torch.func (vmap, grad, jvp)"
        if torch.autograd.forward_ad._current_level >= 0:
            return "doesn't support forward-mode differentiation"
        if type(x) not in (Tensor, torch.nn.Parameter) and not _is_fake(x):
            return f"takes plain tensors, where x is a {type(x).__name__}"
    if cos_sin is not None and torch.is_grad_enabled() and any(t.requires_grad for t in cos_sin):
        return "gives no gradients of cos and sin"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        return f"takes floating-point inputs, where x is {x.dtype}"
    return None


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor)


def measured_on(device: torch.device) -> bool:
    """Whether `auto` takes the kernels on a device."""
    return bool(MEASURED) and device.type == "cuda" and torch.cuda.get_device_capability(device) in MEASURED


def described(kernels: Kernels, device: torch.device) -> str:
    """`kernels`, and for `auto` what it takes on a device."""
    return f"auto ({'triton' if measured_on(device) else 'torch'})" if kernels == "auto" else kernels


def uses_triton(layer: Any, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the Triton kernels compute this call of a layer. x [B, T, D]; cos and sin [B or 1, T, r], or None.

    Raises:
        ValueError: where `kernels` is `triton` and they can't.
    """
    if check_kernels(layer.kernels) == "torch" or x.numel() == 0:
        return False
    if layer.kernels == "auto":
        return measured_on(x.device) and not (no_triton_on(x.device) or not_covered(layer) or not_taken(x, cos_sin))
    if reason := wrong_device(x.device) or not_taken(x, cos_sin):  # set_kernels has asked about the rest
        raise ValueError(f"kernels is 'triton', which {reason}; kernels='torch' runs here")
    return True
