"""Pipelines, continuous batching and export work with a GQE model, or refuse it with the reason."""

import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from model_helpers import (
    EXACT,
    SETTINGS,
    no_router_warning,
    positions_of,
    random_tokens,
    setting_id,
    tiny_model,
    word_tokenizer,
)

PAGED_ONCE = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
LENGTH = torch.export.Dim("length", min=3, max=4096)
SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # the default cache takes the whole memory


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(padding_side="left")


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_the_pipeline_writes_what_generate_does_alone_and_in_a_padded_batch(setting, tokenizer, tmp_path):
    model = tiny_model(**setting)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with no_router_warning():
        writer = pipeline("text-generation", model=str(tmp_path), dtype=torch.float64, device="cpu")
    prompts = ["w3 w4 w5 w6 w7", "w9", "w1 w1 w2"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    for batch_size in (1, 3):
        written = writer(prompts, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=batch_size)
        assert [one["generated_text"] for (one,) in written] == expected


def batch_generates_what_generate_does(model, lengths=(9, 4, 1)):
    """Whether `generate_batch`, for prompts of mixed lengths, gives what `generate` gives for each prompt."""
    prompts = [random_tokens(1, length, seed=length) for length in lengths]
    one_by_one = [model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1) for ids in prompts]
    asked = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    inputs = [ids[0].tolist() for ids in prompts]
    out = model.generate_batch(inputs, generation_config=asked, continuous_batching_config=SMALL)
    return [result.generated_tokens for result in out.values()] == [
        row[0, length:].tolist() for row, length in zip(one_by_one, lengths, strict=True)
    ]


@pytest.mark.skipif(not PAGED_ONCE, reason="this Transformers' paged cache can't serve the shared head")
@pytest.mark.parametrize("setting", [s for s in SETTINGS if "variant" not in s], ids=setting_id)
def test_continuous_batching_with_the_shared_head_on_sdpa(setting):
    assert batch_generates_what_generate_does(tiny_model(dtype=torch.float32, **setting))


@pytest.mark.parametrize("variant", ["hard_concat", "weighted_concat"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_continuous_batching_without_a_shared_head_on_any_backend(variant, backend):
    assert batch_generates_what_generate_does(tiny_model(backend, torch.float32, variant=variant))


def test_continuous_batching_says_where_the_paged_cache_cannot_serve_the_shared_head(monkeypatch):
    asked = {"generation_config": GenerationConfig(max_new_tokens=1)}
    message = "needs 'sdpa'" if PAGED_ONCE else "needs a newer one"
    with pytest.raises(ValueError, match=message):
        tiny_model("eager", torch.float32).generate_batch([[1, 2]], **asked)
    monkeypatch.setattr(PagedAttentionCache, "update", lambda self, key_states, value_states, layer_idx: None)
    with pytest.raises(ValueError, match=r"transformers is 5\..*can't serve the shared head"):
        tiny_model(dtype=torch.float32).generate_batch([[1, 2]], **asked)


def assert_exports(module, arguments, dynamic_shapes, others):
    """The exported program equals the module on inputs other than those it was traced with."""
    with torch.no_grad():
        program = torch.export.export(module, (), arguments, dynamic_shapes=dynamic_shapes, strict=False).module()
        for other in others:
            torch.testing.assert_close(program(**other), module(**other), **EXACT)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        """input_ids [B, T], with an optional mask and positions -> logits [B, T, V]."""
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits


@pytest.mark.parametrize(
    "setting", [SETTINGS[0], *(pytest.param(each, marks=pytest.mark.full) for each in SETTINGS[1:])], ids=setting_id
)
def test_the_model_exports_for_any_length(setting):
    ids = [{"input_ids": random_tokens(2, length)} for length in (16, 3, 40)]
    assert_exports(Logits(tiny_model(**setting)), ids[0], {"input_ids": {1: LENGTH}}, ids)


def padded(length):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return {"input_ids": random_tokens(2, length), "attention_mask": mask, "position_ids": positions_of(mask)}


@pytest.mark.full
def test_the_model_exports_with_padding_and_positions():
    shapes = {name: {1: LENGTH} for name in ("input_ids", "attention_mask", "position_ids")}
    assert_exports(Logits(tiny_model()), padded(16), shapes, [padded(length) for length in (16, 4, 40)])


@pytest.mark.parametrize(
    "setting", [{}, pytest.param({"variant": "hard_concat"}, marks=pytest.mark.full)], ids=setting_id
)
def test_a_step_of_decoding_over_a_static_cache_exports(setting):
    model, ids = tiny_model(**setting), random_tokens(1, 9)
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": 16, "device": "cpu"},
        pad_token_id=0,
    )
    step = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16).export(
        input_ids=ids[:, :1], cache_position=torch.tensor([0])
    )
    program = step.module()
    with torch.no_grad():
        steps = [program(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(ids.shape[1])]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, **EXACT)
