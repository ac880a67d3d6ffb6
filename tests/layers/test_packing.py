"""Documents packed into one row, with position_ids that restart: each gets the logits that it has alone."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model_helpers import (
    EXACT,
    SETTINGS,
    attention_backend,
    in_chunks,
    new_cache,
    random_tokens,
    setting_id,
    tiny_model,
)

each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
each_cache = pytest.mark.parametrize("cache", ["dynamic", "static"])

LENGTH = 26
CUTS = [[5, 14], [1, 17, 25]]  # where documents begin in each row, beside 0


def positions(cuts: list[list[int]] = CUTS, first: int = 0) -> Tensor:
    rows = []
    for row in cuts:
        starts = [0, *row, LENGTH]
        rows.append(torch.cat([torch.arange(b - a) for a, b in pairwise(starts)]) + first)
    return torch.stack(rows)


@torch.no_grad()
def alone(ids: Tensor, cuts: list[list[int]] = CUTS, first: int = 0, **setting) -> Tensor:
    """Logits [B, T, V] of documents that were each run in a row of their own, on sdpa in float64."""
    model = tiny_model(**setting)
    rows = []
    for row, row_cuts in zip(ids, cuts, strict=True):
        starts = [0, *row_cuts, LENGTH]
        documents = [row[None, a:b] for a, b in pairwise(starts)]
        places = [torch.arange(d.shape[1])[None] + first for d in documents]
        rows.append(
            torch.cat(
                [model(d, position_ids=p, use_cache=False).logits for d, p in zip(documents, places, strict=True)], 1
            )
        )
    return torch.cat(rows)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("mask", ["none", "all_ones"])
@each_setting
def test_packed_documents_give_the_logits_of_each_alone(setting, mask, use_cache, backend):
    ids = random_tokens(2, LENGTH)
    mask = torch.ones_like(ids) if mask == "all_ones" else None
    with attention_backend(backend, **setting) as (model, tolerance):
        packed = model(ids, attention_mask=mask, position_ids=positions(), use_cache=use_cache).logits
    torch.testing.assert_close(packed, alone(ids, **setting), **tolerance)


def test_the_documents_would_otherwise_see_each_other():
    """What the tests here would miss if they could not tell."""
    ids = random_tokens(2, LENGTH)
    assert (tiny_model()(ids).logits - alone(ids))[:, 5:].abs().max() > 0.1


@pytest.mark.parametrize("short", [1, 3, 8])
@pytest.mark.parametrize("use_cache", [None, False])
def test_short_packed_rows_are_kept_apart_too(short, use_cache):
    """So few tokens with a cache are decoded in one read, where the mask is made another way."""
    model = tiny_model()
    ids = random_tokens(1, short + 2)
    restart = torch.cat([torch.arange(short), torch.arange(2)])[None]
    packed = model(ids, position_ids=restart, use_cache=use_cache).logits
    expected = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :short], ids[:, short:])], 1)
    torch.testing.assert_close(packed, expected, **EXACT)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_right_padding_after_packed_documents_changes_nothing(backend):
    ids = random_tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 21:] = 0
    mask[1, 19:] = 0
    for padded_positions in (positions(), positions() * mask):  # collators put anything there
        with attention_backend(backend) as (model, tolerance):
            packed = model(ids, attention_mask=mask, position_ids=padded_positions).logits
        torch.testing.assert_close(packed[mask.bool()], alone(ids)[mask.bool()], **tolerance)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("use_cache", [None, False])
def test_documents_may_start_at_position_one(use_cache, backend):
    ids = random_tokens(2, LENGTH)
    with attention_backend(backend) as (model, tolerance):
        packed = model(ids, position_ids=positions(first=1), use_cache=use_cache).logits
    torch.testing.assert_close(packed, alone(ids, first=1), **tolerance)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("use_cache", [None, False])
def test_padding_between_packed_documents_changes_nothing(use_cache, first):
    """Each document padded to a multiple of 8, as some packers do; padded tokens count on or stand at 0."""
    model, ids = tiny_model(), random_tokens(1, 24)
    mask = torch.ones_like(ids)
    mask[:, 5:8] = mask[:, 14:16] = 0
    counted_on = torch.cat([torch.arange(8), torch.arange(8), torch.arange(8)])[None] + first
    for places in (counted_on, counted_on * mask):
        packed = model(ids, attention_mask=mask, position_ids=places, use_cache=use_cache).logits
        for begin, end in ((0, 5), (8, 14), (16, 24)):
            document = model(ids[:, begin:end], position_ids=counted_on[:, begin:end], use_cache=False).logits
            torch.testing.assert_close(packed[:, begin:end], document, **EXACT)


def test_one_row_of_position_ids_serves_a_whole_batch():
    ids = random_tokens(2, LENGTH)
    packed = tiny_model()(ids, position_ids=positions([[9]])).logits
    torch.testing.assert_close(packed, alone(ids, [[9], [9]]), **EXACT)


def test_positions_that_do_not_restart_leave_one_document():
    model, ids = tiny_model(), random_tokens(2, LENGTH)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=torch.arange(LENGTH)[None]).logits, whole, **EXACT)
    shifted = model(ids, position_ids=torch.arange(LENGTH)[None] + 7).logits  # RoPE is relative; angles are float32
    torch.testing.assert_close(shifted, whole, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# With a cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("mask", ["none", "all_ones"])
@each_cache
@torch.no_grad()
def test_packed_documents_stay_apart_across_chunked_prefill(cache, mask, backend):
    ids = random_tokens(2, LENGTH)
    mask = torch.ones_like(ids) if mask == "all_ones" else None
    with attention_backend(backend) as (model, tolerance):
        for cuts in ([10], [3, 5, 14, 15], [2, 12, 13, 24], [8, 16]):
            packed = in_chunks(model, ids, cuts, new_cache(cache, model), attention_mask=mask, position_ids=positions())
            torch.testing.assert_close(packed, alone(ids), **tolerance)


@each_cache
@each_setting
@torch.no_grad()
def test_decoding_after_packed_documents_sees_only_the_last_one(setting, cache):
    model, ids = tiny_model(**setting), random_tokens(2, LENGTH)
    past = new_cache(cache, model)
    in_chunks(model, ids[:, :20], [], past, position_ids=positions()[:, :20])
    decoded = in_chunks(model, ids[:, 20:], [1, 2, 5], past, 20, position_ids=positions()[:, 20:])
    torch.testing.assert_close(decoded, alone(ids, **setting)[:, 20:], **EXACT)


@each_cache
@torch.no_grad()
def test_right_padding_between_packed_documents_and_a_later_chunk_is_skipped(cache):
    """Row 0 has 14 real tokens in two documents and then padding; its second document goes on in the next chunk."""
    model, ids = tiny_model(), random_tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    mask[:, 14:18] = 0
    place = torch.cat([torch.arange(6), torch.arange(8), torch.zeros(4).long(), torch.arange(8, 16)])[None]
    past = new_cache(cache, model)
    decoded = in_chunks(model, ids, [18, 21], past, attention_mask=mask, position_ids=place)
    second = torch.cat([ids[:, 6:14], ids[:, 18:]], 1)
    torch.testing.assert_close(decoded[:, 18:], model(second, use_cache=False).logits[:, 8:], **EXACT)


@pytest.mark.xfail(
    strict=True,
    reason="a cache keeps no positions: of a document that starts at 1 in an earlier chunk, one token too many is seen",
)
@torch.no_grad()
def test_documents_that_start_at_position_one_stay_apart_across_chunks():
    model, ids = tiny_model(), random_tokens(2, LENGTH)
    packed = in_chunks(model, ids, [10, 20], new_cache("dynamic", model), position_ids=positions(first=1))
    torch.testing.assert_close(packed, alone(ids, first=1), **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Training and generation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_no_gradient_leaks_from_one_document_to_another(backend, use_cache):
    with attention_backend(backend) as (model, _):
        embeds = model.get_input_embeddings()(random_tokens(2, LENGTH)).detach().requires_grad_()
        for row, cuts in enumerate(CUTS):
            starts = [0, *cuts, LENGTH]
            for begin, end in pairwise(starts):
                logits = model.train()(inputs_embeds=embeds, position_ids=positions(), use_cache=use_cache).logits
                (gradient,) = torch.autograd.grad(logits[row, end - 1].square().sum(), embeds)
                reached = gradient.abs().amax(-1) > 0
                expected = torch.zeros(2, LENGTH, dtype=torch.bool)
                expected[row, begin:end] = True
                assert torch.equal(reached, expected)


def test_training_on_packed_documents_is_training_on_each():
    """Labels at a document's first token would ask the one before to predict it, so they are left out."""
    ids = random_tokens(2, LENGTH)
    labels = ids.masked_fill(positions() == 0, -100)
    count = labels.ne(-100).sum()
    packed, apart = (tiny_model(router_aux_loss_coef=0.0).train() for _ in range(2))
    packed(ids, position_ids=positions(), labels=labels, num_items_in_batch=count).loss.backward()
    for row, cuts in zip(ids, CUTS, strict=True):
        starts = [0, *cuts, LENGTH]
        for begin, end in pairwise(starts):
            if end - begin > 1:
                document = row[None, begin:end]
                apart(document, labels=document, num_items_in_batch=count).loss.backward()
    for (name, ours), (_, expected) in zip(packed.named_parameters(), apart.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_left_padding_is_no_document():
    """Generation gives padded tokens a position too, so that the first real one restarts."""
    model = tiny_model()
    ids = random_tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = model(ids[1:, 7:]).logits[0]
    counted = mask.cumsum(-1) - 1
    for place in (counted.clamp(min=0), counted.masked_fill(mask == 0, 1), counted):
        for use_cache in (None, False):
            logits = model(ids, attention_mask=mask, position_ids=place, use_cache=use_cache).logits
            torch.testing.assert_close(logits[1, 7:], expected, **EXACT)
            torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], **EXACT)
