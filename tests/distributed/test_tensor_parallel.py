"""Ranks that share each layer, and copies of the model, get the gradients and the tokens of one process.

Run as a script, this file is one of the ranks.
"""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model_helpers import cross_entropy, random_tokens, tiny_model
from query_experts import GQEForCausalLM
from query_experts.distributed.layout import copies_of_shards
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from rank_helpers import run_ranks

needs_sharding = pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers below 5.20 doesn't shard by KV group")
PAPER = {
    "num_attention_heads": 16, "num_key_value_heads": 8, "active_query_experts": 1, "num_hidden_layers": 1,
    "intermediate_size": 32, "vocab_size": 31, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "two_of_four": {"num_attention_heads": 32, "active_query_experts": 2},
    "expert": {"output_projection": "expert"},
    "first": {"shared_head_kv": "first"},
    "weighted_concat": {"variant": "weighted_concat"},
    "hard_concat": {"variant": "hard_concat"},
    "static": {"routing": "none", "active_query_experts": 2},
    "frozen": {"routing": "frozen"},
    "bias": {"attention_bias": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm_weighted": {"qk_norm": True, "variant": "weighted_concat"},
    "tied": {"tie_word_embeddings": True},
}
# ranks that share a layer, ranks that share a copy of the model, and copies
LAYOUTS = {
    "tp2": (2, 1, 1), "fsdp2": (1, 2, 1), "fsdp2_tp2": (2, 2, 1), "two_of_fsdp2": (1, 2, 2), "two_of_tp2": (2, 1, 2),
}  # fmt: skip
IN_FOUR = ("paper", "qk_norm", "expert", "tied")  # four processes share two cores
MICRO_BATCHES = (1, 2)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels [4, 12]; each row has its own padding."""
    ids = random_tokens(4, 12, seed=5)
    mask = (torch.arange(12) < 12 - torch.tensor([0, 3, 7, 1])[:, None]).long()
    return ids, mask, ids.masked_fill(mask == 0, -100)


def gradients(model: Any, micro_batches: int) -> dict[str, Tensor]:
    """Of one step over the whole batch, which all ranks have, and its loss."""
    model.train().zero_grad()
    ids, mask, labels = batch()
    counts = {"num_items_in_batch": labels[:, 1:].ne(-100).sum(), "num_tokens_in_batch": mask.sum()}
    loss = torch.zeros(())
    for tokens, kept, target in zip(*(t.chunk(micro_batches) for t in (ids, mask, labels)), strict=True):
        out = model(input_ids=tokens, attention_mask=kept, labels=target, **counts)
        out.loss.backward()
        loss = loss + out.loss.detach()
    model.balance_window.so_far = None  # as after an optimizer's step
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items()} | {"loss": loss}


def generated(model: Any, cache: str) -> Tensor:
    """Greedy tokens after two prompts of unequal length."""
    ids, mask, _ = batch()
    return model.eval().generate(
        ids[:2], attention_mask=mask[:2].flip(-1), max_new_tokens=6, do_sample=False, cache_implementation=cache
    )


def everything(model: Any) -> dict[str, Tensor]:
    found = {f"{name} in {n}": g for n in MICRO_BATCHES for name, g in gradients(model, n).items()}
    return found | {cache: generated(model, cache) for cache in ("dynamic", "static")}


def cases_of(layout: str) -> list[str]:
    return [*CASES] if math.prod(LAYOUTS[layout]) == 2 else list(IN_FOUR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder with the checkpoints of all cases, and with what one process got."""
    path = tmp_path_factory.mktemp("sharded")
    for case, more in CASES.items():
        model = tiny_model(seed=3, **PAPER | more)
        model.save_pretrained(path / case)
        torch.save(everything(model), path / f"{case}.one.pt")
    return path


def main(folder: Path, layout: str) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    tp, fsdp, copies = LAYOUTS[layout]
    more = {"dp_replicate_size": copies} if copies > 1 else {}
    for case in cases_of(layout):
        sharding = DistributedConfig(tp_size=tp, fsdp_size=fsdp, **more)
        model = GQEForCausalLM.from_pretrained(folder / case, distributed_config=sharding, dtype=torch.float64)
        model.loss_function = cross_entropy
        torch.save(everything(model), folder / f"{case}.{layout}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


def of_rank(folder: Path, layout: str, case: str, rank: int) -> dict[str, Tensor]:
    """What a rank got; the first call for a layout runs all its cases."""
    ranks = math.prod(LAYOUTS[layout])
    if not (folder / f"{cases_of(layout)[-1]}.{layout}.{ranks - 1}.pt").exists():
        run_ranks(__file__, ranks, folder, layout)
    return torch.load(folder / f"{case}.{layout}.{rank}.pt")


def parameter(layout: str, case: str) -> Any:
    if LAYOUTS[layout][2] == 1:  # four processes share two cores
        return pytest.param(layout, case, marks=[pytest.mark.full] if math.prod(LAYOUTS[layout]) == 4 else [])
    old = not (SHARDS_BY_GROUP and copies_of_shards())
    skip = pytest.mark.skipif(old, reason="Transformers below 5.23 has no copies of models that ranks share")
    return pytest.param(layout, case, marks=[pytest.mark.full, skip])


@needs_sharding
@pytest.mark.parametrize(
    ("layout", "case"), [parameter(layout, case) for layout in LAYOUTS for case in cases_of(layout)]
)
def test_ranks_get_the_gradients_and_tokens_of_one_process(layout, case, folder):
    expected = torch.load(folder / f"{case}.one.pt")
    for rank in range(math.prod(LAYOUTS[layout])):
        found = of_rank(folder, layout, case, rank)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].to(value.dtype), value, rtol=1e-9, atol=1e-9, msg=name)


@needs_sharding
def test_a_number_of_ranks_that_does_not_divide_the_groups_is_refused_by_name():
    from query_experts.model.tensor_parallel import GroupParallel

    class Three:
        def size(self) -> int:
            return 3

    layer = tiny_model(num_key_value_heads=4).model.layers[0].self_attn
    with pytest.raises(ValueError, match="tp_size is 3; it must divide num_key_value_heads, 4"):
        GroupParallel().install_forward(layer, Three())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
