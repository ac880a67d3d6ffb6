"""Memory of one GPU in a training step, by torch's memory trackers on fake tensors: no GPU, no data, seconds.

A step is the trainer's: float32 weights, sharded as Transformers shards them (FSDP2), bf16 autocast, fused AdamW. Four
phases of it are tracked apart. In each of them the peak grows by the same bytes with every layer and with every
sequence of the micro-batch, so two shallow models and two batch sizes tell that of a deep model with a large batch.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, PreTrainedModel, masking_utils

from query_experts.common.errors import SettingError
from query_experts.model.arms import build

Parts = dict[str, float]  # bytes by part
PARTS = {  # part -> the trackers' categories
    "weights": ("Sharded Param", "Parameter", "Buffer"),
    "gradients": ("Sharded Grad", "Gradient"),
    "optimizer": ("OptState", "Optstate"),
    "activations": ("Activation", "Temp", "Inputs", "Other"),
    "unsharded": ("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"),
}
PHASES = ("forward", "backward", "first layer's backward", "optimizer")
SHALLOW = (3, 4)  # layers of the models that are tracked in place of a deeper one: FSDP2 gathers up to three at once


@dataclass(frozen=True)
class Step:
    """What of a run decides the memory of one of its GPUs.

    Args:
        gpus: Processes, one a GPU.
        fsdp_size: GPUs that hold a copy of the model between them; it divides gpus. 1: each holds all of it.
        seq_len: Tokens of a sequence.
        accumulates: Whether a step has several micro-batches. FSDP2 over all GPUs then keeps whole gradients between
            them; with several copies of the model, it keeps their shards.
        autocast: Whether matrices are multiplied in bf16.
    """

    gpus: int
    fsdp_size: int
    seq_len: int
    accumulates: bool
    autocast: bool


@dataclass(frozen=True)
class Memory:
    """The memory of one GPU by phase, linear in the sequences of a micro-batch.

    Args:
        base, each: Bytes by phase and part: without a sequence, and of every one.
    """

    base: dict[str, Parts]
    each: dict[str, Parts]

    def parts(self, batch: int) -> Parts:
        """Bytes by part at the moment of a step that needs most."""
        by_phase = [
            {part: base + batch * self.each[phase][part] for part, base in self.base[phase].items()}
            for phase in self.base
        ]
        return max(by_phase, key=lambda parts: sum(parts.values()))

    def total(self, batch: int) -> float:
        return sum(self.parts(batch).values())

    def largest_batch(self, room: float) -> int:
        """The most sequences of a micro-batch that take `room` bytes at most; 0 if not even one does."""
        fits = []
        for phase, base in self.base.items():
            each = sum(self.each[phase].values())
            left = room - sum(base.values())
            if left < each:
                return 0
            if each > 0:
                fits.append(int(left // each))
        return min(fits)


def track(config: LlamaConfig, step: Step, batch: int) -> dict[bool, Memory]:
    """The memory of a model's training step, without and with activation checkpointing (the keys).

    Args:
        batch: Sequences of a micro-batch; it and its double are tracked.

    Raises:
        SettingError: This process belongs to a process group.
    """
    layers = config.num_hidden_layers
    depths: tuple[int, ...] = SHALLOW if layers > max(SHALLOW) else (layers,)
    with fake_processes(step) as mesh:
        found = [track_shallow(config, depth, step, (batch, 2 * batch), mesh) for depth in depths]
    deep = found[-1]
    if len(found) == 2:
        deep = {key: extended(found[0][key], found[1][key], layers - depths[1]) for key in deep}
    return {
        checkpointing: linear(batch, deep[checkpointing, batch], deep[checkpointing, 2 * batch])
        for checkpointing in (False, True)
    }


def extended(shallow: dict[str, Parts], deeper: dict[str, Parts], layers: int) -> dict[str, Parts]:
    """The peaks of a model that has so many layers more than the deeper one, which has one more than the shallow."""
    return {
        phase: {part: value + layers * (value - shallow[phase][part]) for part, value in parts.items()}
        for phase, parts in deeper.items()
    }


def linear(batch: int, once: dict[str, Parts], twice: dict[str, Parts]) -> Memory:
    """The line through the peaks of a micro-batch and of one with twice the sequences."""
    each = {phase: {p: (twice[phase][p] - value) / batch for p, value in once[phase].items()} for phase in once}
    base = {phase: {p: value - batch * each[phase][p] for p, value in once[phase].items()} for phase in once}
    return Memory(base, each)


@contextmanager
def fake_processes(step: Step) -> Iterator[DeviceMesh]:
    """The mesh of a process group in which only this process exists, and collectives do nothing.

    Raises SettingError where there is a process group: it must not be replaced.
    """
    if dist.is_initialized():
        raise SettingError("this process belongs to a process group; plan must run in a process without one")
    hook = sys.excepthook
    dist.init_process_group("fake", rank=0, world_size=step.gpus, store=FakeStore())
    sys.excepthook = hook  # torch's own puts the rank before every line
    try:
        copies = step.gpus // step.fsdp_size
        shape, names = ((copies, step.fsdp_size), ("copies", "shards")) if copies > 1 else ((step.fsdp_size,), None)
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def track_shallow(
    config: LlamaConfig, depth: int, step: Step, batches: tuple[int, ...], mesh: DeviceMesh
) -> dict[tuple[bool, int], dict[str, Parts]]:
    """Peaks by phase of a model of `depth` layers, for each checkpointing and batch size."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = depth
    with FakeTensorMode(), one_document_a_sequence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FSDP2, about views that nothing writes to
        model = build(config).train()
        model.config.use_cache = False  # as the Trainer sets it
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        if step.fsdp_size > 1:
            shard(model, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        fill_optimizer(optimizer)
        if step.autocast:
            forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
            model.forward = convert_outputs_to_fp32(forward)  # as Accelerate wraps it
        # DistributedDataParallel keeps its buckets, as large as all gradients, next to them
        buckets = parameters if step.fsdp_size == 1 and step.gpus > 1 else 0
        tracked = TrackedModel(model, optimizer, step, buckets)
        with tracked.tracker:
            return {
                (checkpointing, batch): tracked.peaks(batch, checkpointing)
                for checkpointing in (False, True)
                for batch in batches
            }


@contextmanager
def one_document_a_sequence() -> Iterator[None]:
    """Transformers doesn't look for several documents in a sequence, as it does by the values of position ids.

    Fake tensors have no values, so it would assume several, and give SDPA a mask of [batch, 1, seq_len, seq_len] and
    repeated keys and values, where the trainer's sequences only have `is_causal`.
    """
    with patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        yield


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards a model by FSDP2 as it is loaded: by Transformers' plan, tied embeddings with the root (model.tied)."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings
    for module in [*([] if tied else [table]), *model.model.layers]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard([model.model.norm, *([] if tied else [head])], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def fill_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Makes the moments, which exist from the first step on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


class TrackedModel:
    """A model and its optimizer under a memory tracker.

    Args:
        buckets: Bytes that are there all the time and that the tracker doesn't see.
    """

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: Step, buckets: int):
        self.model, self.optimizer, self.step, self.buckets = model, optimizer, step, buckets
        if step.fsdp_size > 1:
            self.tracker: MemTracker = FSDPMemTracker(model, optimizer)
        else:
            self.tracker = MemTracker()
            self.tracker.track_external(model, optimizer)
        self.found: dict[str, Parts] = {}
        model.model.layers[0].register_forward_hook(self._end_backward_at)

    def peaks(self, batch: int, checkpointing: bool) -> dict[str, Parts]:
        """The peak of each phase of a step; the highest of its micro-batches."""
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        self.found = {}
        for last in (False, True) if self.step.accumulates else (True,):
            if self.step.fsdp_size == self.step.gpus > 1:  # as the Trainer does
                self.model.set_requires_gradient_sync(last)
            self._micro_batch(batch)
        self.optimizer.step()
        self._end("optimizer")
        self.optimizer.zero_grad()
        return self.found

    def _micro_batch(self, batch: int) -> None:
        self.tracker.reset_mod_stats()
        self._begin()
        ids = torch.zeros(batch, self.step.seq_len, dtype=torch.int64)
        loss = self.model(input_ids=ids, labels=ids).loss
        self._end("forward")
        loss.backward()
        self._end("first layer's backward")

    def _end_backward_at(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Ends the phase when the gradient of the first layer's output is there."""
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._end("backward"))

    def _begin(self) -> None:
        """Forgets the peak so far."""
        self.tracker._peak_mem.clear()
        self.tracker._peak_mem_snap.clear()

    def _end(self, phase: str) -> None:
        """Keeps the peak of a phase if it is the highest so far, and begins the next."""
        peak = self.tracker.get_tracker_snapshot("peak") or self.tracker.get_tracker_snapshot("current")
        (bytes_by_category,) = peak.values()
        named = {getattr(category, "value", category): value for category, value in bytes_by_category.items()}
        parts = {part: float(sum(named.get(name, 0) for name in names)) for part, names in PARTS.items()}
        parts["unsharded"] += self.buckets
        if sum(parts.values()) >= sum(self.found.get(phase, {}).values()):
            self.found[phase] = parts
        self._begin()
