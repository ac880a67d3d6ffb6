"""Tensor parallelism: each rank holds some KV groups of a layer, with their query experts (Transformers 5.20 and on).

The groups of grouped-query attention are independent but for three things, each of which costs a collective:

- the shared head reads the mean of all groups' keys and values: the ranks' sums are added;
- the weighted slot is a sum over all groups: the ranks' parts are added;
- W_O takes the hard slots of all groups: every rank gets them all, and computes some of the output's columns.

Router and shared query are whole on every rank, so every rank knows the routing of all groups, and the balance loss
needs no collective. Backwards, what a rank knows of its own groups alone is added up where it flows into something that
all ranks have: x (by the projections), the router's logits, the weights of QK norm. So no copy gets a gradient of its
own, and copies stay equal.

Shapes: as in `layers.attention`; R ranks, L = G/R groups on each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.distributed.tensor_parallel import _AllReduceBackward as SumOfGradients
from transformers.distributed.tensor_parallel import _AllReduceForward as SumOverRanks

from query_experts.layers.attention import Routing
from query_experts.model.configuration_gqe import KV_GROUPS
from query_experts.model.modeling_gqe import GQESelfAttention
from query_experts.ops.combine import weights_of_selected
from query_experts.ops.select import scatter_experts


class GroupParallelAttention(GQESelfAttention):
    """One rank's part of a layer. q, k and v projections have the rows of its own groups, `num_kv_heads` of them.

    `route` gives the routing of all groups, as every rank needs it.
    """

    is_group_parallel = True
    mesh: DeviceMesh

    def own(self, of_all_groups: Tensor) -> Tensor:
        """[B, T, G, ...] -> [B, T, L, ...], this rank's groups."""
        return of_all_groups.narrow(2, self.mesh.get_local_rank() * self.num_kv_heads, self.num_kv_heads)

    def project_queries(self, x: Tensor, routing: Routing) -> list[Tensor]:
        if routing.logits is not None:  # without a router, every group selects the same
            routing = replace(routing, indices=self.own(routing.indices))
        return super().project_queries(x, routing)

    def normalise(self, queries: list[Tensor], key: Tensor) -> tuple[list[Tensor], Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return queries, key
        routed, *shared = queries  # every rank has the whole shared query, and its whole gradient
        routed, key = self._norm(self.q_norm, routed), self._norm(self.k_norm, key)
        return [routed, *map(self.q_norm, shared)], key

    def _norm(self, norm: nn.Module, own_heads: Tensor) -> Tensor:
        weight = SumOfGradients.apply(norm.weight, self.mesh.get_group())
        return functional_call(norm, {"weight": weight}, (own_heads,))

    def shared_key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared_head_kv == "mean":
            parts = torch.stack([key.sum(1, keepdim=True), value.sum(1, keepdim=True)])
            scale = 1 / (self.num_kv_heads * self.mesh.size())
        else:
            parts = torch.stack([key[:, :1], value[:, :1]]) * (self.mesh.get_local_rank() == 0)
            scale = 1.0
        shared_key, shared_value = self._summed(parts) * scale
        return shared_key, shared_value

    def combine(self, routed: Tensor, shared: Tensor | None, routing: Routing) -> Tensor:
        if routing.logits is not None:
            routing = replace(routing, logits=SumOfGradients.apply(routing.logits, self.mesh.get_group()))
        extra = []
        if self.variant == "gqe":
            assert shared is not None
            extra = [self._weighted_slot(routed, routing), shared]
        elif self.variant == "weighted_concat":
            scores = routing.scores if routing.logits is None else self.own(routing.scores)
            routed = routed * scores.to(routed.dtype)[..., None]
        if self.output_projection == "expert" and self.router is not None:
            routed = scatter_experts(routed, self.own(routing.indices), self.experts_per_group)
        return torch.cat([GatherGroups.apply(routed, self.mesh).flatten(2), *extra], -1)

    def _weighted_slot(self, routed: Tensor, routing: Routing) -> Tensor:
        """routed [B, T, L, k, d] -> [B, T, d], the sum over all ranks' groups."""
        if routing.log_scores is None:
            return self._summed(routed.mean((2, 3))) / self.mesh.size()
        weights = self.own(weights_of_selected(routing.log_scores)).to(routed.dtype)
        return self._summed((weights[..., None] * routed).sum((2, 3)))

    def _summed(self, part: Tensor) -> Tensor:
        return SumOverRanks.apply(part, self.mesh.get_group())


class GatherGroups(torch.autograd.Function):
    """[B, T, L, ...] of each rank -> [B, T, G, ...]. Every rank has the whole gradient, and takes its own part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.first, ctx.count = mesh.get_local_rank() * own.shape[2], own.shape[2]
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        dist.all_gather(parts, own.contiguous(), group=mesh.get_group())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(2, ctx.first, ctx.count), None


class GroupParallel(TensorParallelLayer):
    """The style of a layer's attention in a plan for tensor parallelism. Its projections have styles of their own."""

    def install_forward(self, module: GQESelfAttention, mesh: DeviceMesh) -> GQESelfAttention:
        """Gives an attention layer its rank's part.

        Raises:
            ValueError: for a number of ranks that doesn't divide the groups.
        """
        groups, ranks = module.num_kv_heads, mesh.size()
        if groups % ranks:
            raise ValueError(f"tp_size is {ranks}; it must divide num_key_value_heads, {groups}")
        module.__class__ = GroupParallelAttention
        assert isinstance(module, GroupParallelAttention)
        module.mesh = mesh
        module.num_kv_heads //= ranks
        module.num_query_experts //= ranks
        module.set_kernels(module.kernels)  # refuses kernels that don't cover a part of a layer
        return module


ALL_PARALLEL_STYLES.register(KV_GROUPS, GroupParallel())
