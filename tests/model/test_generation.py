"""Generation and cached decoding: whatever the cache, the chunks and the strategy, the logits are those of one pass."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache

from model_helpers import (
    EXACT,
    SETTINGS,
    attention_backend,
    in_chunks,
    new_cache,
    positions_of,
    random_tokens,
    setting_id,
    tiny_model,
)

each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
each_cache = pytest.mark.parametrize("cache", ["dynamic", "static"])

# pieces of a 30-token row: one token, a few (up to 8 are decoded in one read of the cache), more than that
CUTS = {
    "token_by_token": list(range(1, 30)),
    "prefill_then_tokens": [12, 13, 14, 15],
    "prefill_then_a_few": [12, 14, 17, 25],
    "eight_then_nine": [4, 12, 21],
    "two_halves": [15],
}


def generate(model, ids: Tensor, steps: int = 8, **options) -> tuple[Tensor, Tensor]:
    """Greedy unless options say otherwise: all tokens, and the logits [B, steps, V] of the new ones."""
    options = {"do_sample": False, "max_new_tokens": steps} | options
    if options.get("cache_implementation") == "static":
        options.setdefault("disable_compile", True)
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, 1)


def assert_same_generation(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], **tolerance: Any) -> None:
    assert actual[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(actual[1], expected[1], **(tolerance or EXACT))


def left_padded(batch: int = 3, length: int = 13) -> tuple[Tensor, Tensor]:
    ids = random_tokens(batch, length)
    mask = torch.ones_like(ids)
    for b in range(batch):
        mask[b, : 3 * b] = 0
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------------
# Cached logits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS)
@each_cache
@each_setting
@torch.no_grad()
def test_logits_from_a_cache_are_those_of_one_pass_for_any_chunking(setting, cache, cuts):
    model, ids = tiny_model(**setting), random_tokens(2, 30)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(in_chunks(model, ids, CUTS[cuts], new_cache(cache, model)), whole, **EXACT)


@pytest.mark.parametrize("cuts", ["prefill_then_a_few", "eight_then_nine"])
@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
@each_cache
@each_setting
@torch.no_grad()
def test_logits_from_a_cache_are_those_of_one_pass_in_every_backend(setting, cache, backend, cuts):
    ids = random_tokens(2, 30)
    whole = tiny_model(**setting)(ids, use_cache=False).logits
    with attention_backend(backend, **setting) as (model, tolerance):
        pieces = in_chunks(model, ids, CUTS[cuts], new_cache(cache, model))
    torch.testing.assert_close(pieces, whole, **tolerance)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
@each_cache
@torch.no_grad()
def test_chunked_prefill_respects_the_padding_mask(cache, backend):
    ids, mask = left_padded(3, 30)
    expected = tiny_model()(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
    with attention_backend(backend) as (model, tolerance):
        for cuts in CUTS.values():
            pieces = in_chunks(
                model, ids, cuts, new_cache(cache, model), attention_mask=mask, position_ids=positions_of(mask)
            )
            torch.testing.assert_close(pieces[mask.bool()], expected[mask.bool()], **tolerance)


@each_cache
@torch.no_grad()
def test_later_tokens_never_reach_earlier_logits(cache):
    model, ids = tiny_model(), random_tokens(2, 30)
    other = ids.clone()
    other[:, 20:] = (ids[:, 20:] + 1) % 31
    for cuts in CUTS.values():
        first, second = (in_chunks(model, t, cuts, new_cache(cache, model)) for t in (ids, other))
        torch.testing.assert_close(first[:, :20], second[:, :20], rtol=0, atol=0)
        assert (first[:, 20:] - second[:, 20:]).abs().amax() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Strategies
# ---------------------------------------------------------------------------------------------------------------------


@each_setting
def test_greedy_decoding_is_the_same_without_a_cache_and_with_either(setting):
    model, ids = tiny_model(**setting), random_tokens(2, 9)
    expected = generate(model, ids, use_cache=False)
    assert_same_generation(generate(model, ids), expected)
    assert_same_generation(generate(model, ids, cache_implementation="static"), expected)
    assert_same_generation(generate(model, ids, past_key_values=DynamicCache(config=model.config)), expected)


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
@each_setting
def test_greedy_decoding_is_the_same_in_every_backend(setting, backend):
    ids, mask = left_padded()
    expected = generate(tiny_model(**setting), ids, attention_mask=mask)
    with attention_backend(backend, **setting) as (model, tolerance):
        assert_same_generation(generate(model, ids, attention_mask=mask), expected, **tolerance)


@each_setting
def test_a_left_padded_batch_generates_what_each_row_does_alone(setting):
    model = tiny_model(**setting)
    ids, mask = left_padded()
    alone = [generate(model, row[keep.bool()][None]) for row, keep in zip(ids, mask, strict=True)]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        tokens, logits = generate(model, ids, attention_mask=mask, **options)
        for b, (row, row_logits) in enumerate(alone):
            assert tokens[b, 3 * b :].tolist() == row[0].tolist()
            torch.testing.assert_close(logits[b], row_logits[0], **EXACT)


def test_sampling_with_a_seed_is_the_same_with_and_without_a_cache():
    model, ids = tiny_model(), random_tokens(3, 9)
    samples = []
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        samples.append(generate(model, ids, 12, do_sample=True, top_k=8, temperature=0.9, **options))
    assert_same_generation(samples[1], samples[0])
    assert_same_generation(samples[2], samples[0])
    assert samples[0][0].tolist() != generate(model, ids, 12)[0].tolist()


def test_beam_search_is_the_same_with_and_without_a_cache():
    model = tiny_model()
    ids, mask = left_padded()
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 8,
        "num_beams": 4,
        "num_return_sequences": 2,
    }
    expected = model.generate(ids, use_cache=False, **options)
    assert model.generate(ids, **options).tolist() == expected.tolist()
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert static.tolist() == expected.tolist()


@pytest.mark.parametrize("size", [1, 3, 8, 9])
@each_cache
def test_chunked_prefill_in_generation_changes_nothing(cache, size):
    model = tiny_model()
    ids, mask = left_padded()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    expected = generate(model, ids, attention_mask=mask)
    assert_same_generation(generate(model, ids, attention_mask=mask, prefill_chunk_size=size, **options), expected)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_a_prompt_of_embeddings_gives_the_tokens_of_its_ids(options):
    model = tiny_model()
    ids, mask = left_padded()
    expected, _ = generate(model, ids, attention_mask=mask, **options)
    tokens, _ = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, **options)
    assert tokens.tolist() == expected[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_that_no_token_has_still_count_where_longrope_recomputes_the_cache(with_ids):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1], "long_factor": [1.5, 2.0],
        "original_max_position_embeddings": 12,
    }  # fmt: skip
    model, ids = tiny_model(rope_parameters=rope), random_tokens(2, 9)
    embeddings = model.get_input_embeddings()(ids) + torch.linspace(-1, 1, 24)
    tokens, logits = generate(model, ids if with_ids else None, 6, inputs_embeds=embeddings)
    new = tokens[:, -6:]
    whole = model(inputs_embeds=torch.cat([embeddings, model.get_input_embeddings()(new)], 1), use_cache=False).logits
    # from 13 tokens on all have long factors; generation keeps logits in float32
    torch.testing.assert_close(logits[:, -2:], whole[:, -3:-1].float(), rtol=0, atol=1e-5)


def repeated_prompt() -> Tensor:
    return random_tokens(1, 5).repeat(1, 4)


@each_setting
def test_prompt_lookup_decoding_gives_the_greedy_tokens(setting):
    """Several candidate tokens are checked at once over the cache, which is then cropped to those accepted."""
    model, ids = tiny_model(**setting), repeated_prompt()
    windows = []
    forward = type(model).forward
    model.forward = lambda *a, **k: windows.append(k["input_ids"].shape[1]) or forward(model, *a, **k)
    expected = model.generate(ids, do_sample=False, max_new_tokens=24)
    windows.clear()
    looked_up = model.generate(ids, do_sample=False, max_new_tokens=24, prompt_lookup_num_tokens=3)
    assert looked_up.tolist() == expected.tolist()
    assert max(windows[1:]) > 1, "no candidates were ever checked"


@pytest.mark.parametrize("assistant_seed", [0, 1], ids=["right_guesses", "wrong_guesses"])
def test_assisted_decoding_gives_the_greedy_tokens(assistant_seed):
    model, assistant = tiny_model(), tiny_model(seed=assistant_seed)
    ids = random_tokens(1, 9)
    expected = model.generate(ids, do_sample=False, max_new_tokens=24)
    assisted = model.generate(ids, do_sample=False, max_new_tokens=24, assistant_model=assistant)
    assert assisted.tolist() == expected.tolist()


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_dropped_tokens_had_never_been():
    model, ids = tiny_model(), random_tokens(2, 20)
    cache = new_cache("dynamic", model)
    model(ids[:, :12], past_key_values=cache)
    model((ids[:, 12:15] + 3) % 31, past_key_values=cache)
    cache.crop(-3)
    pieces = in_chunks(model, ids[:, 12:], [3], cache)
    torch.testing.assert_close(pieces, model(ids, use_cache=False).logits[:, 12:], **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# A conversation: going on from a cache
# ---------------------------------------------------------------------------------------------------------------------


@each_setting
def test_a_second_turn_from_the_cache_is_the_whole_conversation_anew(setting):
    model = tiny_model(**setting)
    cache = new_cache("dynamic", model)
    first = model.generate(random_tokens(2, 9), do_sample=False, max_new_tokens=6, past_key_values=cache)
    conversation = torch.cat([first, random_tokens(2, 5, seed=3)], 1)
    expected = generate(model, conversation, use_cache=False)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert_same_generation(generate(model, conversation, past_key_values=cache), expected)


@pytest.mark.parametrize("new", [3, 8, 11])
@each_cache
def test_a_second_turn_does_not_see_the_padding_after_a_shorter_first_turn(cache, new):
    """The mask then has zeros in its middle."""
    model = tiny_model()
    turns = random_tokens(2, 9), random_tokens(2, new, seed=3)
    lengths = [9, 6]
    first_mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    mask = torch.cat([first_mask.long(), torch.ones(2, new).long()], 1)
    past = new_cache(cache, model)
    with torch.no_grad():
        model(turns[0], attention_mask=first_mask.long(), past_key_values=past)
        logits = in_chunks(
            model, turns[1], [new // 2], past, 9, attention_mask=mask, position_ids=positions_of(mask)[:, 9:]
        )
        for b, length in enumerate(lengths):
            alone = torch.cat([turns[0][b, :length], turns[1][b]])[None]
            torch.testing.assert_close(logits[b], model(alone, use_cache=False).logits[0, length:], **EXACT)


def test_generation_goes_on_from_a_right_padded_first_turn():
    model = tiny_model()
    turns = random_tokens(2, 9), random_tokens(2, 4, seed=3)
    lengths = [9, 6]
    first_mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    mask = torch.cat([first_mask, torch.ones(2, 4).long()], 1)
    cache = new_cache("dynamic", model)
    with torch.no_grad():
        model(turns[0], attention_mask=first_mask, past_key_values=cache)
    _, logits = generate(model, torch.cat(turns, 1), attention_mask=mask, past_key_values=cache)
    for b, length in enumerate(lengths):
        alone = torch.cat([turns[0][b, :length], turns[1][b]])[None]
        torch.testing.assert_close(logits[b], generate(model, alone, use_cache=False)[1][0], **EXACT)


def test_a_mask_of_the_new_tokens_alone_does_not_break_a_forward_pass_without_labels():
    """As in Llama: it stands for the first keys, and the rest are hidden."""
    model, ids = tiny_model(), random_tokens(2, 12)
    cache = new_cache("dynamic", model)
    model(ids, past_key_values=cache)
    assert model(ids[:, :2], attention_mask=torch.ones(2, 2), past_key_values=cache).logits.shape == (2, 2, 31)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_generation_with_a_compiled_step_over_a_static_cache_is_greedy_decoding():
    model = tiny_model()
    ids, mask = left_padded()
    expected = generate(model, ids, attention_mask=mask)
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True  # generation compiles only for a GPU unless told so
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = generate(
        model, ids, attention_mask=mask, cache_implementation="static", disable_compile=False, compile_config=compiling
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert_same_generation(compiled, expected)


@pytest.mark.full
def test_generation_by_a_compiled_forward_is_greedy_decoding_and_other_prompts_compile_nothing_more():
    model = tiny_model()
    ids, mask = left_padded()
    expected = generate(model, ids, attention_mask=mask)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    model.forward = torch.compile(model.forward, backend="aot_eager")
    options = {"cache_implementation": "static"}
    assert_same_generation(generate(model, ids, attention_mask=mask, **options), expected)
    assert graphs["unique_graphs"] > 0, "nothing was compiled"
    generate(model, ids[:, 1:], attention_mask=mask[:, 1:], **options)
    compiled = graphs["unique_graphs"]
    generate(model, ids[:, 2:], attention_mask=mask[:, 2:], **options)
    assert graphs["unique_graphs"] == compiled
