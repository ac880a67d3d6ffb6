"""GQEForCausalLM as a Transformers model: its loss and outputs, files, dtypes, backends, checkpointing and caches."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from model_helpers import (
    EAGER,
    EXACT,
    SETTINGS,
    VOCABULARY,
    assert_same_tensors,
    attention_backend,
    balance_by_hand,
    checkpoint_activations,
    gradients,
    new_cache,
    no_router_warning,
    random_tokens,
    setting_id,
    tiny_config,
    tiny_llama_config,
    tiny_model,
)
from query_experts import GQEForCausalLM, GQEModel
from query_experts.model.modeling_gqe import GQESelfAttention
from query_experts.ops.attend import CausalKernel

each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)


def right_padded(batch: int = 3, length: int = 14) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and labels; row b has b * 3 padded tokens, and labels leave out more than padding."""
    ids = random_tokens(batch, length)
    mask = torch.ones_like(ids)
    for b in range(batch):
        mask[b, length - 3 * b :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return ids, mask, labels


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, False, True])
def test_the_loss_is_the_language_model_loss_plus_the_weighted_router_losses_whether_or_not_they_are_asked_for(asked):
    model = tiny_model(router_aux_loss_coef=0.3, router_z_loss_coef=0.07)
    ids, mask, labels = right_padded()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels, output_router_logits=asked)
        logits = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    real = [layer[mask.flatten().bool()] for layer in logits]
    z_loss = sum(layer.unflatten(-1, (2, 4)).logsumexp(-1).square().mean() for layer in real)
    balance = balance_by_hand(real, real, groups=2, top_k=2)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.3 * balance + 0.07 * z_loss, **EXACT)
    assert (out.aux_loss is not None) == bool(asked)
    assert (out.router_logits is not None) == bool(asked)


def test_the_config_can_ask_for_router_logits():
    ids = random_tokens(1, 4)
    assert tiny_model(output_router_logits=True)(ids).router_logits is not None
    assert tiny_model(output_router_logits=True)(ids, output_router_logits=False).router_logits is None


def test_the_language_model_loss_is_transformers_own_cross_entropy():
    model = tiny_model(exact_loss=False)
    ids, mask, labels = right_padded()
    out = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.lm_loss, ForCausalLMLoss(out.logits, labels, VOCABULARY), rtol=0, atol=0)
    by_hand = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.lm_loss.double(), by_hand, rtol=1e-6, atol=0)
    counted = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=50)
    torch.testing.assert_close(counted.lm_loss.double(), by_hand * labels[:, 1:].ne(-100).sum() / 50, rtol=1e-6, atol=0)


def test_without_labels_there_is_no_loss():
    out = tiny_model()(random_tokens(1, 4), output_router_logits=True)
    assert out.loss is None
    assert out.lm_loss is None
    assert out.aux_loss is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_router_logits_are_float32_one_row_a_token_in_every_layer(dtype):
    out = tiny_model(dtype=dtype)(random_tokens(2, 5), output_router_logits=True)
    assert [(t.shape, t.dtype) for t in out.router_logits] == [((10, 8), torch.float32)] * 2
    assert out.aux_loss.dtype == torch.float32


def test_router_logits_are_float32_under_autocast():
    model = tiny_model(dtype=torch.float32)
    ids = random_tokens(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids, output_router_logits=True)
    assert {t.dtype for t in out.router_logits} == {torch.float32}
    first = model.model.layers[0]
    x = first.input_layernorm(model.model.embed_tokens(ids)).float()
    expected = F.linear(x, first.self_attn.router.weight).flatten(0, 1)
    torch.testing.assert_close(out.router_logits[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_aux_loss_is_the_sum_of_the_layers_balance_losses(top_k):
    model = tiny_model(active_query_experts=top_k, num_hidden_layers=3)
    out = model(random_tokens(2, 9), output_router_logits=True)
    layers = [balance_by_hand([t], [t], groups=2, top_k=top_k) for t in out.router_logits]
    assert len(layers) == 3
    torch.testing.assert_close(out.aux_loss, sum(layers), **EXACT)


def test_padding_does_not_count_in_the_balance_loss_but_tokens_without_labels_do():
    model = tiny_model()
    ids, mask, labels = right_padded()
    out = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    real = [layer[mask.flatten().bool()] for layer in out.router_logits]
    torch.testing.assert_close(out.aux_loss, balance_by_hand(real, real, 2, 2), **EXACT)
    other = ids.masked_fill(mask == 0, 7)
    again = model(other, attention_mask=mask, labels=labels, output_router_logits=True)
    torch.testing.assert_close(again.aux_loss, out.aux_loss, **EXACT)
    torch.testing.assert_close(again.loss, out.loss, **EXACT)


def test_labels_on_padding_rule_the_language_model_loss():
    model = tiny_model()
    ids, mask, labels = right_padded()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=ids)
        masked = model(ids, attention_mask=mask, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.lm_loss, expected, **EXACT)
    assert (out.lm_loss - masked.lm_loss).abs() > 1e-3


def test_the_routers_z_loss_trains_the_router_alone_where_its_coefficient_is_set():
    ids = random_tokens(2, 9)
    plain, z = tiny_model(router_z_loss_coef=0.0), tiny_model(router_z_loss_coef=1.0)
    for model in (plain, z):
        model(ids, labels=ids).loss.backward()
    assert (gradients(plain)["lm_head.weight"] - gradients(z)["lm_head.weight"]).abs().max() < 1e-12
    name = "model.layers.1.self_attn.router.weight"
    assert (gradients(plain)[name] - gradients(z)[name]).abs().max() > 1e-3


def test_a_second_forward_and_backward_pass_gives_the_same_loss_and_gradients():
    model = tiny_model().train()
    ids, mask, labels = right_padded()
    seen = []
    for _ in range(3):
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=labels[:, 1:].ne(-100).sum())
        out.loss.backward(retain_graph=True)
        first = gradients(model)
        out.loss.backward()
        assert_same_tensors(gradients(model), {n: 2 * g for n, g in first.items()})
        seen.append((out.loss.detach(), first))
    for loss, grads in seen[1:]:
        torch.testing.assert_close(loss, seen[0][0], rtol=0, atol=0)
        assert_same_tensors(grads, seen[0][1])


# ---------------------------------------------------------------------------------------------------------------------
# Routing that is frozen or absent
# ---------------------------------------------------------------------------------------------------------------------


def test_without_routing_there_is_no_router_and_no_router_loss():
    model = tiny_model(active_query_experts=4, routing="none")
    ids = random_tokens(2, 6)
    out = model(ids, labels=ids, output_router_logits=True)
    assert not [name for name, _ in model.named_parameters() if "router" in name]
    assert out.aux_loss is None
    assert out.router_logits is None
    torch.testing.assert_close(out.loss, out.lm_loss, rtol=0, atol=0)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_frozen_router_does_not_change_in_an_optimizer_step(loaded, tmp_path):
    model = tiny_model(routing="frozen")
    if loaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_tokens(2, 6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("router" in name), name
        assert p.requires_grad == ("router" not in name), name


def test_a_frozen_router_still_reports_its_balance_loss():
    model = tiny_model(routing="frozen")
    ids = random_tokens(2, 6)
    out = model(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, balance_by_hand(out.router_logits, out.router_logits, 2, 2), **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Dense models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projection", ["slot", "expert"])
def test_with_every_expert_active_and_plain_slots_the_logits_are_those_of_llama(projection, bias):
    """`slot` without a router (index order), `expert` with one (any order)."""
    llama = LlamaForCausalLM(tiny_llama_config(attention_bias=bias)).double().eval()
    routing = "none" if projection == "slot" else "learned"
    model = tiny_model(
        active_query_experts=4,
        variant="hard_concat",
        output_projection=projection,
        routing=routing,
        attention_bias=bias,
    )
    missing = model.load_state_dict(llama.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all("router" in name for name in missing.missing_keys)
    ids, mask, _ = right_padded()
    for attention_mask in (None, mask):
        expected = llama(ids, attention_mask=attention_mask).logits
        torch.testing.assert_close(model(ids, attention_mask=attention_mask).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@each_setting
def test_the_cache_holds_exactly_the_bytes_of_the_dense_models_cache(setting, kind):
    ids = random_tokens(2, 7)

    def held(model):
        cache = new_cache(kind, model)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        return [(layer.keys.shape, layer.values.shape, layer.keys.dtype) for layer in cache.layers]

    llama = LlamaForCausalLM(tiny_llama_config()).double().eval()
    assert held(tiny_model(**setting)) == held(llama)


# ---------------------------------------------------------------------------------------------------------------------
# Files, copies, devices
# ---------------------------------------------------------------------------------------------------------------------


def attention_names(setting: dict) -> set[str]:
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    names |= {"router"} if setting.get("routing") != "none" else set()
    return names | ({"q_shared"} if setting.get("variant", "gqe") == "gqe" else set())


@each_setting
def test_the_state_dict_has_llamas_names_and_the_layers_own(setting):
    ours = set(tiny_model(**setting).state_dict())
    llama = {name for name in LlamaForCausalLM(tiny_llama_config()).state_dict() if "self_attn" not in name}
    layers = {f"model.layers.{i}.self_attn.{name}.weight" for i in range(2) for name in attention_names(setting)}
    assert ours == llama | layers


@each_setting
def test_a_saved_model_loads_bit_for_bit(setting, tmp_path):
    model = tiny_model(**setting)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    with no_router_warning():
        loaded, info = GQEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_tensors(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    ids = random_tokens(1, 5)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)


def test_a_saved_model_loads_onto_a_device_map_and_into_the_bare_decoder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert_same_tensors(mapped.state_dict(), model.state_dict(), rtol=0, atol=0)
    bare = GQEModel.from_pretrained(tmp_path)
    assert_same_tensors(bare.state_dict(), model.model.state_dict(), rtol=0, atol=0)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_a_model_made_on_the_meta_device_takes_weights_later():
    model = tiny_model()
    with torch.device("meta"):
        empty = GQEForCausalLM(tiny_config())
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    filled = empty.to_empty(device="cpu").double().eval()
    filled.load_state_dict(model.state_dict())
    # the rotary frequencies are no part of a state_dict: Transformers makes them anew in from_pretrained
    filled.model.rotary_emb = type(filled.model.rotary_emb)(filled.config)
    ids = random_tokens(2, 5)
    assert torch.equal(filled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("without_values", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
@pytest.mark.parametrize("given", [[], ["position_ids"], ["position_ids", "attention_mask"]], ids=str)
def test_a_model_without_values_runs_to_give_shapes(without_values, given):
    with without_values():
        model = GQEForCausalLM(tiny_config(num_hidden_layers=1))
        ids = torch.zeros(2, 5, dtype=torch.long)
        out = model(ids, labels=ids, output_router_logits=True, **{name: torch.ones_like(ids) for name in given})
        out.loss.backward()
        decoded = model(ids[:, :1], position_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert out.logits.shape == (2, 5, VOCABULARY)
    assert decoded.logits.shape == (2, 1, VOCABULARY)
    assert out.router_logits[0].shape == (10, 8)


def test_initial_router_weights_are_small_and_random_and_never_tie():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GQEForCausalLM(tiny_config(initializer_range=0.02))
    for layer in model.model.layers:
        weight = layer.self_attn.router.weight
        assert weight.unique().numel() == weight.numel()
        assert 0.01 < weight.std() < 0.04


def test_tied_embeddings_stay_tied_through_a_file(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = GQEForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = random_tokens(1, 5)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("tied", [False, True])
def test_token_embeddings_resize(tied):
    model = tiny_model(tie_word_embeddings=tied)
    ids = random_tokens(2, 5)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    out = model(ids, labels=ids + 5)
    assert out.logits.shape[-1] == model.config.vocab_size == VOCABULARY + 9
    torch.testing.assert_close(out.logits[..., :VOCABULARY], before, **EXACT)
    assert out.loss.isfinite()


def test_a_copy_or_a_pickle_of_a_model_gives_the_same_and_shares_nothing():
    model = tiny_model().train()
    ids = random_tokens(2, 6)
    copies = [pickle.loads(pickle.dumps(model))]  # Transformers' output hooks, once installed, can't be pickled
    model(ids, labels=ids, num_items_in_batch=40)
    copies.append(copy.deepcopy(model))
    for other in copies:
        other.loss_function = model.loss_function
        out = other(ids, labels=ids, num_items_in_batch=10, output_router_logits=True)
        torch.testing.assert_close(
            out.router_logits[1], model(ids, output_router_logits=True).router_logits[1], **EXACT
        )
        out.loss.backward()
        assert not gradients(model)
    for name, p in copies[1].named_parameters():
        assert p.data_ptr() != dict(model.named_parameters())[name].data_ptr()


# ---------------------------------------------------------------------------------------------------------------------
# Outputs, backends, dtypes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
@each_setting
def test_every_backend_gives_sdpas_logits(setting, backend, padded):
    ids, mask, _ = right_padded()
    mask = mask if padded else torch.ones_like(mask)
    expected = tiny_model("sdpa", **setting)(ids, attention_mask=mask).logits
    with attention_backend(backend, **setting) as (model, tolerance):
        actual = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **tolerance)


@each_setting
def test_the_eager_backends_gradients_are_sdpas(setting):
    ids, mask, labels = right_padded()
    models = [tiny_model(backend, **setting) for backend in ("eager", "sdpa")]
    for model in models:
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert_same_tensors(*(gradients(model) for model in models), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_compiled_flex_attention_is_as_near_to_float64_as_eager_attention_is():
    ids, mask, _ = right_padded()
    with torch.no_grad():
        exact = tiny_model(dtype=torch.float64)(ids, attention_mask=mask).logits[mask.bool()]
        eager, flex = (
            tiny_model(name, torch.float32)(ids, attention_mask=mask).logits[mask.bool()].double()
            for name in ("eager", "flex_attention")
        )
    assert (flex - exact).abs().max() <= 2 * (eager - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sdpa_in_low_precision_is_at_most_twice_as_far_off_as_eager(dtype):
    """Every expert active, each with its own output rows: no rounding can change the selection."""
    setting = {"active_query_experts": 4, "output_projection": "expert"}
    ids = random_tokens(4, 40)
    rounded = tiny_model(dtype=dtype, **setting).double()
    exact = rounded(ids).logits
    errors = {
        name: (tiny_model(name, dtype, **setting)(ids).logits.double() - exact).abs().max()
        for name in ("sdpa", "eager")
    }
    assert errors["sdpa"] <= 2 * errors["eager"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_setting
def test_every_setting_trains_in_low_precision(setting, dtype):
    model = tiny_model(dtype=dtype, exact_loss=False, **setting).train()
    ids, mask, labels = right_padded()
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert all(g.isfinite().all() and g.dtype == dtype for g in gradients(model).values())


def test_outputs_hold_attention_weights_and_hidden_states_in_eager():
    model = tiny_model("eager")
    ids, mask, _ = right_padded()
    out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert [t.shape for t in out.attentions] == [(3, 2 * 2 + 1, 14, 14)] * 2
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, 14, dtype=weights.dtype), **EAGER)
        assert not weights.triu(1).any()
        assert not (weights * (mask == 0)[:, None, None, :])[mask.bool()[:, None].expand(-1, 5, -1)].any()
    assert [t.shape for t in out.hidden_states] == [(3, 14, 24)] * 3
    torch.testing.assert_close(out.hidden_states[0], model.model.embed_tokens(ids), rtol=0, atol=0)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, **EXACT)


@each_setting
def test_the_attention_weights_that_are_returned_are_on_the_way_to_the_loss(setting):
    model = tiny_model("eager", **setting)
    ids = random_tokens(2, 14)
    out = model(ids, labels=ids, output_attentions=True)
    for weights in out.attentions:
        weights.retain_grad()
    out.lm_loss.backward()
    assert all(weights.grad[:, head].any() for weights in out.attentions for head in range(weights.shape[1]))


def test_decoding_gives_the_same_attention_weights_as_one_pass():
    model = tiny_model("eager")
    ids, cache = random_tokens(2, 12), new_cache("dynamic", model)
    whole = model(ids, output_attentions=True).attentions
    model(ids[:, :9], past_key_values=cache)
    pieces = model(ids[:, 9:], past_key_values=cache, output_attentions=True).attentions
    for piece, full in zip(pieces, whole, strict=True):
        torch.testing.assert_close(piece, full[:, :, 9:], **EAGER)


@pytest.mark.parametrize("length", [6, 14])
@pytest.mark.parametrize("use_cache", [None, False])
def test_attention_dropout_acts_in_training_and_only_there(use_cache, length):
    """A cache that training makes by default, and few tokens: the path that decoding takes."""
    model = tiny_model(attention_dropout=0.5)
    ids = random_tokens(2, length)

    def again() -> float:
        return (model(ids, use_cache=use_cache).logits - model(ids, use_cache=use_cache).logits).abs().max()

    assert again() == 0
    model.train()
    assert again() > 1e-3


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_short_training_pass_with_dropout_is_causal(backend, use_cache):
    model = tiny_model(backend, torch.float32, attention_dropout=0.5).train()
    embeds = model.get_input_embeddings()(random_tokens(1, 6)).detach().requires_grad_()
    for t in range(6):
        logits = model(inputs_embeds=embeds, use_cache=use_cache).logits
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embeds)
        assert not gradient[0, t + 1 :].any()
        assert gradient[0, t].any()


def test_without_return_dict_the_outputs_are_a_tuple_that_starts_with_the_loss():
    model = tiny_model()
    ids = random_tokens(2, 6)
    out = model(ids, labels=ids, return_dict=False)
    assert isinstance(out, tuple)
    torch.testing.assert_close(out[0], model(ids, labels=ids).loss, rtol=0, atol=0)
    torch.testing.assert_close(out[1], model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [1, 3, "some"])
def test_logits_to_keep_leaves_the_other_logits_out(keep):
    model = tiny_model()
    ids = random_tokens(2, 6)
    columns = [0, 4] if keep == "some" else list(range(6))[-keep:]
    kept = model(ids, logits_to_keep=torch.tensor(columns) if keep == "some" else keep).logits
    torch.testing.assert_close(kept, model(ids).logits[:, columns], **EXACT)


def test_embeddings_may_stand_in_for_tokens():
    model = tiny_model()
    ids, mask, labels = right_padded()
    embeds = model.get_input_embeddings()(ids)
    out = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, model(ids, attention_mask=mask, labels=labels).loss, rtol=0, atol=0)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)


def test_a_prepared_four_dimensional_mask_is_taken_as_it_is():
    model = tiny_model()
    ids, mask, _ = right_padded()
    prepared = torch.ones(14, 14).tril().bool() & mask.bool()[:, None, None, :]
    out = model(ids, attention_mask=prepared).logits
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], **EXACT)


def test_a_prepared_block_mask_is_taken_as_it_is():
    """Older Transformers hands one over from `generate` with flex_attention and a static cache."""
    ids = random_tokens(2, 14)
    expected = tiny_model()(ids).logits
    prepared = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 14, 14, device="cpu")
    with attention_backend("flex_attention") as (model, tolerance):
        for places in (None, torch.arange(14)[None]):
            out = model(ids, attention_mask=prepared, position_ids=places).logits
            torch.testing.assert_close(out, expected, **tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("setting", [*SETTINGS, {"routing": "frozen"}], ids=setting_id)
def test_activation_checkpointing_changes_neither_the_loss_nor_a_gradient(setting, use_reentrant):
    ids, mask, labels = right_padded()
    losses, grads = [], []
    for checkpointing in (False, True):
        model = tiny_model(router_aux_loss_coef=0.5, **setting).train()
        model.enable_input_require_grads()  # reentrant checkpointing needs it, in Llama as well
        if checkpointing:
            checkpoint_activations(model, use_reentrant)
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        out = model(
            ids, attention_mask=mask, labels=labels, num_items_in_batch=40, output_router_logits=True, use_cache=False
        )
        out.loss.backward()
        losses.append((out.loss, out.aux_loss))
        grads.append(gradients(model))
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert_same_tensors(*grads, rtol=0, atol=1e-14)


def test_activation_checkpointing_records_each_layers_router_logits_once(monkeypatch):
    model = tiny_model().train()
    checkpoint_activations(model)
    runs = []
    forward = GQESelfAttention.forward
    monkeypatch.setattr(GQESelfAttention, "forward", lambda self, *a, **k: runs.append(1) or forward(self, *a, **k))
    ids = random_tokens(2, 6)
    out = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    assert len(out.router_logits) == 2
    out.loss.backward()
    assert len(runs) == 4, "the layers were not recomputed, so this test shows nothing"
    assert len(out.router_logits) == 2


def test_the_layer_is_a_plain_module_of_llamas_decoder():
    model = tiny_model()
    llama = LlamaForCausalLM(tiny_llama_config())
    for ours, theirs in zip(model.model.layers, llama.model.layers, strict=True):
        assert isinstance(ours, nn.Module)
        assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
        assert type(ours.mlp) is type(theirs.mlp)


def test_the_decoder_may_be_cut_short_as_llamas_may():
    model = tiny_model().train()
    model.config.num_hidden_layers = 1
    ids = random_tokens(2, 6)
    out = model(ids, labels=ids, output_router_logits=True)
    assert len(out.router_logits) == 1
    out.loss.backward()


def test_a_model_without_a_router_has_no_router_logits():
    model = tiny_model(routing="none", active_query_experts=4)
    ids = random_tokens(2, 6)
    assert model(ids, output_router_logits=True).router_logits is None
    assert model.model(ids, output_router_logits=True).router_logits is None


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_balance_loss_of_a_chunk_counts_that_chunks_tokens(kind):
    model = tiny_model()
    ids = random_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, :2] = 0
    cache = new_cache(kind, model)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    out = model(ids[:, 8:], attention_mask=mask, past_key_values=cache, labels=ids[:, 8:], output_router_logits=True)
    seen = [layer.detach() for layer in out.router_logits]  # all of the new tokens are real
    torch.testing.assert_close(out.aux_loss.detach(), balance_by_hand(seen, seen, 2, 2), **EXACT)


def test_router_losses_refuse_a_mask_without_columns_for_the_cached_keys():
    model = tiny_model()
    ids, cache = random_tokens(2, 9), DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask has 3 columns; .* 9 cached and 3 new tokens"):
        model(ids[:, :3], attention_mask=torch.ones(2, 3), past_key_values=cache, labels=ids[:, :3])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_no_kernel_gets_keys_or_values_of_more_than_the_kv_heads_and_the_shared_one(backend, top_k, monkeypatch):
    seen = []
    forward = CausalKernel.forward

    def spy(self, query, key, value, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1], value.shape[1], key.data_ptr(), key.stride()))
        return forward(self, query, key, value, *args, **kwargs)

    monkeypatch.setattr(CausalKernel, "forward", spy)
    with attention_backend(backend, active_query_experts=top_k) as (model, _):
        model(random_tokens(2, 14))
    calls = {1: [(3, 3, 3)], 2: [(4, 2, 2), (1, 1, 1)]}[top_k]
    assert [heads[:3] for heads in seen] == calls * 2


def test_generation_with_prepared_masks_keeps_packed_documents_apart():
    model = tiny_model()
    embeds = model.get_input_embeddings()(random_tokens(1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    mask = GQEForCausalLM.create_masks_for_generate(
        model.config, embeds, None, new_cache("static", model), position_ids=positions
    )
    assert not mask[0, 0, 6:12, :6].any()
    packed = model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=new_cache("static", model)
    )
    alone = model(inputs_embeds=embeds[:, 6:])
    torch.testing.assert_close(packed.logits[:, 6:], alone.logits, **EXACT)


def test_a_decoder_layer_takes_llamas_arguments_in_llamas_order():
    model = tiny_model()
    layer, x = model.model.layers[0], torch.randn(1, 5, 24, dtype=torch.float64)
    angles = model.model.rotary_emb(x, position_ids=torch.arange(5)[None])
    hidden = torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e300)
    torch.testing.assert_close(
        layer(x, hidden, position_embeddings=angles), layer(x, position_embeddings=angles), **EXACT
    )


@pytest.mark.parametrize("shape", [(0, 5), (0, 1), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_an_empty_batch_and_no_tokens_give_empty_logits_and_a_loss_of_nothing(shape, backend):
    ids = torch.zeros(shape).long()
    model = tiny_model(backend, output_router_logits=True, num_hidden_layers=1).train()
    given = {"attention_mask": torch.ones_like(ids), "position_ids": ids}
    for arguments in ({"use_cache": False}, given, {"past_key_values": new_cache("static", model)}):
        out = model(ids, labels=ids, num_items_in_batch=7, **arguments)
        assert out.logits.shape == (*shape, VOCABULARY)
        assert out.loss == out.aux_loss == 0
    out.loss.backward()
    assert all(not gradient.any() for gradient in gradients(model).values())
    assert gradients(model).keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("routing", ["learned", "frozen"])
def test_a_model_made_on_the_meta_device_draws_its_weights_later(routing):
    setting = {"routing": routing, "qk_norm": True, "num_hidden_layers": 1, "initializer_range": 0.02}
    with torch.device("meta"):
        model = GQEForCausalLM(tiny_config(**setting))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    router = model.model.layers[0].self_attn.router.weight
    assert 0.01 < router.std() < 0.04
    rotary = GQEForCausalLM(tiny_config(**setting)).model.rotary_emb
    assert_same_tensors(dict(model.model.rotary_emb.named_buffers()), dict(rotary.named_buffers()))
    assert model(random_tokens(2, 5)).logits.isfinite().all()


def test_weights_that_a_file_lacks_are_drawn_and_the_others_stay(tmp_path):
    saved = tiny_model(routing="frozen", dtype=torch.float32)
    tensors = saved.state_dict()
    lacking = "model.layers.0.self_attn."
    saved.save_pretrained(tmp_path, state_dict={k: v for k, v in tensors.items() if not k.startswith(lacking)})
    loaded = GQEForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == tensors.keys()
    for name, tensor in loaded.items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, tensors[name]) != name.startswith(lacking)
    assert 0.1 < loaded[f"{lacking}router.weight"].std() < 0.6  # initializer_range is 0.3


# ---------------------------------------------------------------------------------------------------------------------
# The router's dtype
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def float32_checkpoint(tmp_path):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "float32")
    return tmp_path / "float32", model.model.layers[0].self_attn.router.weight.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loaded_router_has_the_model_s_dtype_and_float32_logits(float32_checkpoint, dtype):
    """FSDP shards a layer only if all its parameters have one dtype."""
    folder, weight = float32_checkpoint
    model = GQEForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {model.dtype} == {dtype}
    router, x = model.model.layers[0].self_attn.router, torch.randn(1, 3, 24).to(dtype)
    assert torch.equal(router(x), x[0].float() @ weight.to(dtype).float().T)


def test_a_router_asked_to_stay_in_float32_stays_exact_through_loading_and_saving(
    float32_checkpoint, tmp_path, monkeypatch
):
    folder, weight = float32_checkpoint
    monkeypatch.setattr(GQEForCausalLM, "_keep_in_fp32_modules_strict", ["router"])
    model = GQEForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == {
        "model.layers.0.self_attn.router.weight"
    }
    ids = random_tokens(1, 5)
    logits = model(ids, labels=ids).logits
    assert logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    again = GQEForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.model.layers[0].self_attn.router.weight, weight)
    assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 6).tril().long(), r"shape \[6, 6\]; it must have a row for each of the 2 rows"),
        (torch.ones(3, 6).long(), r"shape \[3, 6\]; it must have a row for each of the 2 rows"),
    ],
    ids=["causal", "another batch's"],
)
def test_a_mask_of_another_shape_is_refused_with_and_without_labels(mask, message, labels):
    ids = random_tokens(2, 6)
    with pytest.raises(ValueError, match=message):
        tiny_model(num_hidden_layers=1)(ids, attention_mask=mask, labels=ids if labels else None)


def test_a_mask_of_one_row_serves_all_rows():
    model, ids = tiny_model(num_hidden_layers=1), random_tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    alone, all_rows = (model(ids, attention_mask=m, labels=ids) for m in (mask, mask.expand(2, -1)))
    assert torch.equal(alone.logits[:, 2:], all_rows.logits[:, 2:])
    assert torch.equal(alone.loss, all_rows.loss)
