"""torch.compile: one graph, the same losses and gradients, the balance window, and decoding without recompilation."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from model_helpers import (
    EAGER,
    EXACT,
    assert_same_tensors,
    checkpoint_activations,
    gradients,
    new_cache,
    random_tokens,
    setting_id,
    tiny_config,
    tiny_model,
)
from query_experts import GQEForCausalLM, GQEForSequenceClassification

# one layer, and one setting for each way through it: compilation is slow
SETTINGS = [
    {"active_query_experts": 2},
    {"active_query_experts": 1, "output_projection": "expert", "shared_head_kv": "first"},
    {"active_query_experts": 2, "variant": "weighted_concat"},
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_layer(**setting) -> GQEForCausalLM:
    return tiny_model(num_hidden_layers=1, **setting)


def padded() -> dict[str, Tensor]:
    ids = random_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trained(model, forward, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = forward(**inputs, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), gradients(model)


@each_setting
def test_a_compiled_training_step_is_one_graph_with_the_same_loss_and_gradients(setting):
    model = one_layer(**setting).train()
    inputs = padded() | {"num_items_in_batch": torch.tensor(18)}
    expected = trained(model, model, **inputs)
    loss, grads = trained(model, torch.compile(model, fullgraph=True, backend="aot_eager"), **inputs)
    torch.testing.assert_close(loss, expected[0], **EXACT)
    assert_same_tensors(grads, expected[1])


def test_a_training_step_of_a_classifying_head_is_one_graph():
    model = GQEForSequenceClassification(tiny_config(num_hidden_layers=1, pad_token_id=0)).double().train()
    inputs = padded() | {"labels": torch.tensor([0, 1]), "num_items_in_batch": torch.tensor(5)}
    expected = trained(model, model, **inputs)
    loss, grads = trained(model, torch.compile(model, fullgraph=True, backend="eager"), **inputs)
    torch.testing.assert_close(loss, expected[0], **EXACT)
    assert_same_tensors(grads, expected[1])


@pytest.mark.full
def test_a_training_step_compiled_by_inductor_is_the_same():
    exact, model = one_layer().train(), one_layer(dtype=torch.float32).train()  # torch 2.11 fails on float64 here
    expected = trained(exact, exact, **padded())
    loss, grads = trained(model, torch.compile(model, fullgraph=True), **padded())
    torch.testing.assert_close(loss, expected[0], check_dtype=False, **EAGER)
    assert_same_tensors(grads, expected[1], check_dtype=False, **EAGER)


def test_a_fresh_model_compiles_without_an_eager_pass_before():
    fresh, model = tiny_model(num_hidden_layers=1).train(), one_layer().train()
    expected = trained(model, model, **padded())
    for _ in range(2):
        loss, grads = trained(fresh, torch.compile(fresh, backend="eager"), **padded())
        torch.testing.assert_close(loss, expected[0], **EXACT)
        assert_same_tensors(grads, expected[1])


@pytest.mark.full
def test_a_compiled_training_step_keeps_packed_documents_apart():
    model = one_layer().train()
    ids = random_tokens(2, 20)
    places = torch.stack([torch.cat([torch.arange(n), torch.arange(20 - n)]) for n in (6, 13)])
    inputs = {"input_ids": ids, "labels": ids, "position_ids": places}
    expected = trained(model, model, **inputs)
    loss, grads = trained(model, torch.compile(model, fullgraph=True, backend="aot_eager"), **inputs)
    torch.testing.assert_close(loss, expected[0], **EXACT)
    assert_same_tensors(grads, expected[1])


@pytest.mark.full
def test_the_balance_window_spans_compiled_micro_batches_without_recompiling_for_each():
    eager, model = one_layer().train(), one_layer().train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for step in range(3):
        micro_batches = 3 + step % 2
        total = torch.tensor(22 * micro_batches)
        for i in range(micro_batches):
            ids = random_tokens(2, 12, seed=10 * step + i)
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False, "num_items_in_batch": total}
            expected = eager(**inputs, output_router_logits=True)
            out = compiled(**inputs, output_router_logits=True)
            torch.testing.assert_close(out.aux_loss, expected.aux_loss, **EXACT)
            torch.testing.assert_close(out.loss, expected.loss, **EXACT)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3  # the first step compiles for an empty window and for one in use


def test_activation_checkpointing_and_compilation_go_together_in_one_graph():
    model = one_layer().train()
    inputs = padded() | {"num_items_in_batch": torch.tensor(18)}
    expected = trained(model, model, **inputs)
    checkpoint_activations(model)
    loss, grads = trained(model, torch.compile(model, fullgraph=True, backend="aot_eager"), **inputs)
    torch.testing.assert_close(loss, expected[0], **EXACT)
    assert_same_tensors(grads, expected[1])


def decode_masks(padded: bool) -> Tensor:
    """[B, 24], the padding of a whole static cache; a mask of one size is what a compiled step gets."""
    mask = torch.ones(2, 24, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    return mask


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.full), True])
@each_setting
@torch.no_grad()
def test_a_compiled_decoding_step_is_one_graph_for_every_position(setting, masked):
    model = one_layer(**setting)
    ids = random_tokens(2, 20)
    mask = decode_masks(True) if masked else None
    places = (decode_masks(masked).cumsum(-1) - 1).clamp(min=0)
    expected = model(
        ids, attention_mask=mask[:, :20] if masked else None, position_ids=places[:, :20], use_cache=False
    ).logits

    cache = StaticCache(config=model.config, max_cache_len=24)
    model(ids[:, :10], attention_mask=mask, position_ids=places[:, :10], past_key_values=cache)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    for t in range(10, 20):
        # clones, as a generation loop makes them: dynamo would tell views at other offsets apart
        one, place = ids[:, t : t + 1].clone(), places[:, t : t + 1].clone()
        out = step(one, attention_mask=mask, position_ids=place, past_key_values=cache)
        torch.testing.assert_close(out.logits[:, 0], expected[:, t], **EXACT)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_compiled_check_of_several_tokens_is_one_graph_too():
    model, ids = one_layer(), random_tokens(2, 22)
    expected = model(ids, use_cache=False).logits
    cache = new_cache("static", model, 24)
    model(ids[:, :10], past_key_values=cache)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    for t in (10, 14, 18):
        out = step(ids[:, t : t + 4].clone(), past_key_values=cache)
        torch.testing.assert_close(out.logits, expected[:, t : t + 4], **EXACT)
    assert counter.frame_count == 1
