"""Whatever selects a token's experts selects the same ones: those with the largest logits.

Probabilities would not do: the softmax underflows, and rounds near 0, so that different logits tie.
"""

import functools
import importlib
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor

from model_helpers import random_tokens, tiny_model
from oracle import oracle
from query_experts import GQEAttention
from query_experts.bench import correctness
from query_experts.layers.balance import routing_statistics
from query_experts.replay import replayed_routing
from query_experts.study import measure

pytestmark = pytest.mark.filterwarnings("ignore:the router gets no gradient")


def layer_with(logits: Tensor, top_k: int) -> tuple[GQEAttention, Tensor]:
    """A layer, and tokens [1, R, R] of which token r gets exactly logits[r]; logits: float32 [R, G, M]."""
    R, G, M = logits.shape
    layer = GQEAttention(R, G * M, G, top_k, head_dim=2)
    layer.router.weight.data = logits.flatten(1).mT.clone()
    return layer, torch.eye(R)[None]


def by_layer(logits: Tensor, top_k: int) -> Tensor:
    layer, x = layer_with(logits, top_k)
    return layer.route(x).indices[0]


def by_oracle(logits: Tensor, top_k: int) -> Tensor:
    layer, x = layer_with(logits, top_k)
    G, M = logits.shape[1:]
    sizes = {"num_query_experts": G * M, "num_kv_heads": G, "top_k": top_k, "head_dim": 2}
    return oracle(layer.state_dict(), x, **sizes).indices[0]


def by_benchmarks_definition(logits: Tensor, top_k: int) -> Tensor:
    return correctness._route(*layer_with(logits, top_k))[1][0].argmax(-1)


@functools.cache
def vllm_plugin() -> ModuleType:
    """The plug-in's module with stand-ins for vLLM, of which its routing uses nothing."""
    name = "query_experts.serving.attention"
    stand_ins = [
        "vllm.config", "vllm.distributed", "vllm.forward_context", "vllm.model_executor.layers.attention",
        "vllm.model_executor.layers.layernorm", "vllm.model_executor.layers.linear",
        "vllm.model_executor.layers.rotary_embedding", "vllm.model_executor.models.utils",
    ]  # fmt: skip
    with patch.dict(sys.modules, {name: MagicMock() for name in stand_ins}):
        return importlib.import_module(name)


def by_server(logits: Tensor, top_k: int) -> Tensor:
    layer, x = layer_with(logits, top_k)
    held = SimpleNamespace(groups=logits.shape[1], experts=logits.shape[2], router=layer.router, top_k=top_k)
    return vllm_plugin().VLLMGQEAttention.route(held, x[0])[1]


class GivenRouting:
    """A model of one layer whose routers gave these logits."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor, top_k: int):
        self.config = SimpleNamespace(num_key_value_heads=logits.shape[1], active_query_experts=top_k)
        self.logits = logits.flatten(1)

    def eval(self) -> None:
        pass

    def __call__(self, input_ids: Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(router_logits=(self.logits[input_ids.flatten()],))


def counted(by_token: list[Tensor], top_k: int) -> Tensor:
    """Ones for the selected experts, a tensor [G, M] for each token -> their indices [R, G, k], lowest first."""
    return torch.stack(by_token).float().sort(dim=-1, descending=True, stable=True).indices[..., :top_k].sort(-1).values


def by_balance(logits: Tensor, top_k: int) -> Tensor:
    G = logits.shape[1]
    return counted([routing_statistics((row.flatten()[None],), G, top_k, None).selected[0] for row in logits], top_k)


def by_studys_load(logits: Tensor, top_k: int) -> Tensor:
    model = GivenRouting(logits, top_k)
    loads = [measure.routing_load(model, [{"input_ids": torch.tensor([r])}]).load[0] for r in range(len(logits))]
    return counted([torch.tensor(load) for load in loads], top_k)


def by_studys_passage(logits: Tensor, top_k: int) -> Tensor:
    """The page shows the first of them."""
    ids = torch.arange(len(logits))
    corpus = SimpleNamespace(
        validation=[{"input_ids": ids}], tokenizer=SimpleNamespace(decode=lambda ids: "a" * len(ids))
    )
    return torch.tensor(measure.passage(GivenRouting(logits, top_k), corpus).experts[0])[..., None]


IN_ORDER = [by_layer, by_oracle, by_benchmarks_definition, by_server]
COUNTED = [by_balance, by_studys_load]
everywhere = pytest.mark.parametrize("select", [*IN_ORDER, *COUNTED, by_studys_passage], ids=lambda f: f.__name__)


@everywhere
def test_probabilities_that_underflow_do_not_tie(select):
    logits = torch.tensor([[[0.0, -400.0, -300.0]]])
    assert logits.softmax(-1)[0, 0, 1:].tolist() == [0, 0]
    expected = [0] if select is by_studys_passage else [0, 2]
    assert select(logits, 2).tolist() == [[expected]]


@everywhere
def test_probabilities_that_round_to_the_same_number_do_not_tie(select):
    logits = torch.tensor([[[0.0, 1e-9, -1e-9]]])
    assert len(set(logits.softmax(-1).flatten().tolist())) == 1
    assert select(logits, 1).tolist() == [[[1]]]


def drawn_logits() -> Tensor:
    """float32 [R, 2, 4]: of every size, with ties, underflow and values that differ in their last bit."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(5, 12, 2, 4, generator=generator)
    sizes = torch.tensor([1.0, 1e-9, 300.0, 1e30, 1.0]).view(5, 1, 1, 1)
    logits = random * sizes
    logits[4] = torch.randint(-1, 2, (12, 2, 4), generator=generator).float()
    return logits.flatten(0, 1)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_all_of_them_select_the_same_experts(top_k):
    logits = drawn_logits()
    expected = by_layer(logits, top_k)
    by_probabilities = logits.softmax(-1).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    assert not torch.equal(by_probabilities, expected), "the logits must tell both apart"
    for select in IN_ORDER:
        assert torch.equal(select(logits, top_k), expected), select.__name__
    for select in COUNTED:
        assert torch.equal(select(logits, top_k), expected.sort(-1).values), select.__name__
    assert torch.equal(by_studys_passage(logits, top_k), expected[..., :1])


@torch.no_grad()
def test_a_replay_of_the_experts_with_the_largest_logits_is_what_the_model_does():
    model, ids = tiny_model(active_query_experts=2), random_tokens(2, 9)
    for layer in model.model.layers:
        layer.self_attn.router.weight *= 3000
    out = model(ids, output_router_logits=True, use_cache=False)
    logits = torch.stack(out.router_logits, 1).unflatten(-1, (2, 4))  # [B*T, L, G, M]
    assert (logits.softmax(-1) == 0).sum(-1).max() == 3  # in float64
    first = 4 * torch.arange(2)[:, None]
    experts = (logits.sort(dim=-1, descending=True, stable=True).indices[..., :2] + first).flatten(2)
    with replayed_routing(model, experts.unflatten(0, (2, 9))):
        torch.testing.assert_close(model(ids, use_cache=False).logits, out.logits, rtol=0, atol=0)
