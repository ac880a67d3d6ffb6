"""W_O dealt out over tensor-parallel ranks by KV group: the ranks' outputs add up to the layer's. Needs no vLLM."""

import pytest
import torch

from query_experts.serving.sharding import deal_output_rows


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("heads_in_a_group", [1, 3])
def test_what_the_ranks_hold_put_together_again_is_the_whole(ranks, heads_in_a_group):
    D, d, hard = 5, 2, 4 * heads_in_a_group
    weight = torch.randn(D, (hard + 2) * d)
    by_rank = deal_output_rows(weight, d, ranks).chunk(ranks, -1)
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

    def rows(own: slice) -> torch.Tensor:
        weighted = (weights[:, own] * slots[:, own]).sum((1, 2))
        return torch.cat([slots[:, own].flatten(1), weighted, shared], -1)

    share = G // ranks
    parts = [
        rows(slice(rank * share, (rank + 1) * share)) @ held.mT
        for rank, held in enumerate(deal_output_rows(weight, d, ranks).chunk(ranks, -1))
    ]
    torch.testing.assert_close(sum(parts), rows(slice(None)) @ weight.mT)
