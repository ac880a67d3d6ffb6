"""Quantised loading through Transformers, 8 and 4 bit, on a CPU: bitsandbytes and torchao.

Both packages slow every import of Transformers by seconds, so they have an environment of their own:
`make test-quantized`.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from model_helpers import EXACT, new_cache, random_tokens, tiny_model
from query_experts import GQEForCausalLM
from query_experts.layers.router import Router
from query_experts.ops.select import reads_selected_rows

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-quantized")
pytest.importorskip("torchao", reason="torchao is not installed: make test-quantized")

import bitsandbytes
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup

# M = 8: plain weights would take the path that reads only the selected experts' weights
SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 32,
    "active_query_experts": 1, "initializer_range": 0.08,
}  # fmt: skip
IDS = random_tokens(4, 24)

QUANTISED = {
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao 8 bit": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao 4 bit": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}


class Int8Linear(nn.Module):
    """The roundings of LLM.int8 in plain operations: weights by output row and activations by token, to 8 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1) / 127
        self.rounded = (linear.weight / self.scale[:, None]).round()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() @ self.rounded.T * scale * self.scale


def dequantised(linear: nn.Module) -> Tensor:
    """The weight of a 4-bit or torchao layer, as numbers."""
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    return linear.weight.dequantize()


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter


def plain_run(plain: GQEForCausalLM, quantised: GQEForCausalLM) -> GQEForCausalLM:
    """The plain model with the quantised model's roundings, in plain operations."""
    out = copy.deepcopy(plain)
    for name, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            out.set_submodule(name, Int8Linear(out.get_submodule(name)))
        elif is_quantised(module):
            out.get_submodule(name).weight.copy_(dequantised(module))
    return out


@pytest.fixture(scope="module", params=QUANTISED)
def models(request, tmp_path_factory):
    """The plain model, the quantised one, and the plain one with its roundings; all without gradients."""
    folder = tmp_path_factory.mktemp("model")
    plain = tiny_model(dtype=torch.float32, exact_loss=False, **SIZE)
    plain.save_pretrained(folder)
    asked = {"quantization_config": QUANTISED[request.param](), "device_map": "cpu", "dtype": torch.float32}
    quantised = GQEForCausalLM.from_pretrained(folder, **asked)
    with torch.no_grad():
        yield plain, quantised, plain_run(plain, quantised)


def test_every_projection_is_quantised_and_the_router_is_not(models):
    plain, quantised, _ = models
    names = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert {n for n, m in quantised.named_modules() if is_quantised(m)} == names
    for name, module in plain.named_modules():
        if isinstance(module, Router):
            router = quantised.get_submodule(name)
            assert type(router.weight) is nn.Parameter
            torch.testing.assert_close(router.weight, module.weight, rtol=0, atol=0)


def test_logits_are_as_near_as_the_roundings_of_the_weights_allow(models):
    plain, quantised, by_hand = models
    exact = copy.deepcopy(plain).double()(IDS).logits
    error, allowed = ((m(IDS).logits - exact).abs().max() for m in (quantised, by_hand))
    assert 0 < error <= 2 * allowed


def test_the_selected_experts_weights_are_not_read_past_a_quantised_projection(models):
    plain, quantised, _ = models
    x = torch.randn(1, 1, SIZE["hidden_size"])
    for model, reads in ((plain, True), (quantised, False)):
        layers = [layer.self_attn for layer in model.model.layers]
        found = [
            reads_selected_rows(layer.q_proj, x, layer.route(x).indices, layer.experts_per_group) for layer in layers
        ]
        assert found == [reads] * 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_single_tokens_decode_as_the_whole_sequence_does(models, kind):
    plain, quantised, by_hand = models
    ids = IDS[:1]
    cache = new_cache(kind, quantised)
    steps = [quantised(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    exact = copy.deepcopy(plain).double()(ids).logits
    allowed = (by_hand(ids).logits - exact).abs().max()
    assert (torch.cat(steps, 1) - exact).abs().max() <= 2 * allowed


def test_a_quantised_checkpoint_is_saved_and_loaded(models, tmp_path):
    _, quantised, _ = models
    quantised.save_pretrained(tmp_path)
    again = GQEForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    torch.testing.assert_close(again(IDS).logits, quantised(IDS).logits, **EXACT)


def test_weights_alone_in_few_bits_give_the_logits_of_the_weights_that_they_stand_for(models):
    _, quantised, by_hand = models
    if any(isinstance(m, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit) for m in quantised.modules()):
        pytest.skip("bitsandbytes also computes in few bits")
    torch.testing.assert_close(quantised(IDS).logits, by_hand(IDS).logits, rtol=0, atol=1e-4)


def test_lora_trains_on_a_quantised_model(models):
    peft = pytest.importorskip("peft")
    _, quantised, _ = models
    quantised = copy.deepcopy(quantised)
    with torch.enable_grad():
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=["router"])
        wrapped = peft.get_peft_model(quantised, lora).train()
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(10):
            loss = wrapped(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
