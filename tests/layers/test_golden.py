"""The layer and its oracle against the tensors of the paper's reference layer (tests/golden), in float64.

Each file holds one setting of the layer: inputs, parameters, outputs, every gradient of
L = sum(output * cotangent) + 0.37 * balance_loss, decoding one token at a time, and the cache that it leaves behind.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache

from oracle import oracle, parameter_shapes
from query_experts import GQEAttention

GOLDEN_FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
pytestmark = pytest.mark.filterwarnings("ignore:the router gets no gradient")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True)
class Golden:
    case: dict
    tensors: dict[str, Tensor]
    kernels: str

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors called `prefix.NAME`, by NAME."""
        return {name.removeprefix(f"{prefix}."): t for name, t in self.tensors.items() if name.startswith(f"{prefix}.")}

    @property
    def heads(self) -> dict:
        return {name: self.case[name] for name in ("num_query_experts", "num_kv_heads", "top_k", "head_dim", "variant")}

    @property
    def rope_theta(self) -> float | None:
        return self.case["rope_theta"] if self.case["rope"] else None

    def layer(self) -> GQEAttention:
        layer = GQEAttention(self.case["dim"], **self.heads, rope_theta=self.rope_theta, bias=self.case["bias"])
        layer.set_kernels(self.kernels)
        layer = layer.double()
        layer.load_state_dict(self.group("param"))
        return layer

    def loss(self, y: Tensor, balance_loss: Tensor) -> Tensor:
        return (y * self["cotangent"]).sum() + self.case["aux_loss_weight"] * balance_loss


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=GOLDEN_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, kernels: str) -> Golden:
    with safe_open(request.param, "pt") as file:
        case = json.loads(file.metadata()["case"])
    return Golden(case, load_file(request.param), kernels)


def dynamic_cache(golden: Golden) -> Cache:
    return DynamicCache()


def static_cache(golden: Golden) -> Cache:
    """With room to spare: the keys that it hands out are longer than what was written."""
    return StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=golden["x"].shape[1] + 3)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


def test_all_seven_golden_files_are_here():
    assert [path.stem for path in GOLDEN_FILES] == [
        "all_active",
        "bias",
        "hard_concat",
        "no_rope",
        "paper_layout",
        "top2_of_4",
        "weighted_concat",
    ]


def test_the_oracle_equals_the_reference_layer_in_output_routing_cache_and_gradients(golden: Golden):
    x = golden["x"].clone().requires_grad_()
    params = {name: tensor.clone().requires_grad_() for name, tensor in golden.group("param").items()}
    result = oracle(params, x, **golden.heads, rope_theta=golden.rope_theta)

    assert_close(result.y, golden["hidden_states"])
    assert_close(result.probs, golden["router_probs"])
    assert torch.equal(result.indices, golden["expert_indices"])
    assert_close(result.balance_loss, golden["aux_loss"].squeeze())
    assert_close(result.keys, golden["cache.key"])
    assert_close(result.values, golden["cache.value"])

    golden.loss(result.y, result.balance_loss).backward()
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in params.items()}
    assert_all_close(gradients, golden.group("grad"))


def test_the_oracle_names_and_shapes_the_parameters_as_the_reference_layer_does(golden: Golden):
    shapes = parameter_shapes(hidden_size=golden.case["dim"], **golden.heads, bias=golden.case["bias"])
    assert shapes == {name: tuple(tensor.shape) for name, tensor in golden.group("param").items()}


def test_the_state_dict_has_exactly_the_golden_names(golden: Golden):
    layer = golden.layer()
    assert set(layer.state_dict()) == set(golden.group("param"))
    assert {name for name, _ in layer.named_parameters()} == set(golden.group("param"))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, golden[f"param.{name}"]), f"{name} does not survive loading and saving"


def test_the_output_and_the_routing_are_the_reference_layers(golden: Golden):
    y, routing = golden.layer()(golden["x"], output_routing=True)
    assert_close(y, golden["hidden_states"])
    assert_close(routing.probs, golden["router_probs"])
    assert torch.equal(routing.indices, golden["expert_indices"])
    assert_close(routing.balance_loss, golden["aux_loss"].squeeze())


def test_asking_for_the_routing_does_not_change_the_output(golden: Golden):
    layer = golden.layer()
    assert torch.equal(layer(golden["x"]), layer(golden["x"], output_routing=True)[0])


def test_every_gradient_is_the_reference_layers(golden: Golden):
    layer = golden.layer()
    x = golden["x"].clone().requires_grad_()
    y, routing = layer(x, output_routing=True)
    golden.loss(y, routing.balance_loss).backward()
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert_all_close(gradients, golden.group("grad"))


@pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache])
@torch.no_grad()
def test_decoding_one_token_at_a_time_gives_the_reference_layers_output_and_cache(golden: Golden, make_cache):
    layer, cache = golden.layer(), make_cache(golden)
    length = golden["x"].shape[1]
    y = torch.cat([layer(golden["x"][:, t : t + 1], past_key_values=cache) for t in range(length)], dim=1)

    assert_close(y, golden["decode.hidden_states"])
    assert int(cache.get_seq_length()) == length
    # Transformers keeps [B, G, T, head_dim].
    assert_close(cache.layers[0].keys[:, :, :length], golden["cache.key"].transpose(1, 2))
    assert_close(cache.layers[0].values[:, :, :length], golden["cache.value"].transpose(1, 2))
    assert not cache.layers[0].keys[:, :, length:].any(), "something was written past the last token"
