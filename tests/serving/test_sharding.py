"""W_O split over tensor-parallel ranks by KV group: the ranks' outputs add up to the layer's. Needs no vLLM."""

import pytest
import torch

from model_helpers import no_router_warning
from query_experts import GQEConfig, GQEForCausalLM
from query_experts.serving.sharding import output_projection_width, shard_for_ranks, shard_output_weight

SHAPE = {
    "vocab_size": 7, "hidden_size": 12, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 2,
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("heads_in_a_group", [1, 3])
def test_what_the_ranks_hold_put_together_again_is_the_whole(ranks, heads_in_a_group):
    D, d, hard = 5, 2, 4 * heads_in_a_group
    weight = torch.randn(D, (hard + 2) * d)
    by_rank = shard_output_weight(weight, d, ranks).chunk(ranks, -1)
    assert {rank.shape[-1] for rank in by_rank} == {(hard // ranks + 2) * d}
    together = [*(rank[:, : -2 * d] for rank in by_rank), by_rank[0][:, -2 * d :]]
    assert torch.cat(together, -1).equal(weight)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("heads_in_a_group", [1, 3])
def test_the_ranks_outputs_add_up_to_the_layers(ranks, heads_in_a_group):
    """Each rank has its own groups' heads, their part of the weighted sum, and the same shared head."""
    T, D, d, G = 7, 5, 2, 4
    weight = torch.randn(D, (G * heads_in_a_group + 2) * d, dtype=torch.float64)
    slots = torch.randn(T, G, heads_in_a_group, d, dtype=torch.float64)
    weights = torch.rand(T, G, heads_in_a_group, 1, dtype=torch.float64)
    shared = torch.randn(T, d, dtype=torch.float64)

    def outputs(own: slice) -> torch.Tensor:
        """What W_O is applied to, of some of the groups."""
        weighted = (weights[:, own] * slots[:, own]).sum((1, 2))
        return torch.cat([slots[:, own].flatten(1), weighted, shared], -1)

    share = G // ranks
    parts = [
        outputs(slice(rank * share, (rank + 1) * share)) @ columns.mT
        for rank, columns in enumerate(shard_output_weight(weight, d, ranks).chunk(ranks, -1))
    ]
    torch.testing.assert_close(sum(parts), outputs(slice(None)) @ weight.mT)


@pytest.mark.parametrize("variant", ["gqe", "hard_concat", "weighted_concat"])
@pytest.mark.parametrize("output_projection", ["slot", "expert"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_width_of_the_output_projection_is_the_models(variant, output_projection, top_k):
    config = GQEConfig(
        **SHAPE, variant=variant, output_projection=output_projection, active_query_experts=top_k, attention_bias=True
    )
    with no_router_warning():
        projection = GQEForCausalLM(config).model.layers[0].self_attn.o_proj
    assert projection.weight.shape[-1] == output_projection_width(config)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_dealt_as_others_are_and_scales_stay(dtype):
    config = GQEConfig(**SHAPE)
    weight = torch.randint(-9, 9, (12, output_projection_width(config))).to(dtype)
    sharded = shard_for_ranks("o_proj.weight", weight, config, 2)
    assert sharded.float().equal(shard_output_weight(weight.float(), 2, 2))
    for name, kept in (("bias", torch.ones(12)), ("weight_scale", torch.ones(12, 1)), ("input_scale", torch.ones(()))):
        assert shard_for_ranks(f"o_proj.{name}", kept, config, 2) is kept


@pytest.mark.parametrize(
    ("name", "shape"),
    [("qweight", (2, 12)), ("weight_scale_inv", (2, 3)), ("weight", (72, 1)), ("weight_packed", (12, 3))],
)
def test_weights_quantised_so_that_rows_cant_be_told_apart_are_refused(name, shape):
    with pytest.raises(ValueError, match=rf"tensor_parallel_size is 2 and o_proj.{name} \[{shape[0]}, {shape[1]}\]"):
        shard_for_ranks(f"o_proj.{name}", torch.zeros(shape), GQEConfig(**SHAPE), 2)
