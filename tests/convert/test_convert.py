"""Converting dense models: with all experts active a converted model equals the dense one, to the last bit if possible.

The families have everything that could be mapped wrongly: biases, QK norm, fused projections, tied embeddings, scaled
and partial rotary embedding. Norms and biases are random, so that no two can be confused.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    logging,
)

from query_experts import GQEForCausalLM
from query_experts.common.errors import SettingError
from query_experts.convert import (
    calibration,
    convert_model,
    dense_tensors,
    from_dense,
    from_reference,
    make_plan,
    weight_map,
)
from query_experts.convert.calibration import contributions, fit_router, kept_share, rank_shares

logging.set_verbosity_error()
logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:the router gets no gradient")

SIZE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1],
    "long_factor": [1.5, 2.0], "original_max_position_embeddings": 32,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZE, head_dim=8),
    "llama-biased-tied-scaled": LlamaConfig(
        **SIZE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "llama-with-a-partial-factor": LlamaConfig(**SIZE, head_dim=8, rope_parameters=PARTIAL),  # which it ignores
    "llama-proportional": LlamaConfig(**SIZE, head_dim=8, rope_parameters=PROPORTIONAL),
    "llama-with-a-window": LlamaConfig(**SIZE, head_dim=8, sliding_window=16),  # which Llama doesn't have
    "mistral": MistralConfig(**SIZE, sliding_window=None),
    "mistral-window-beyond-its-length": MistralConfig(**SIZE, sliding_window=128),
    "qwen2": Qwen2Config(**SIZE),
    "qwen2-window-in-no-layer": Qwen2Config(
        **SIZE, use_sliding_window=True, sliding_window=64, layer_types=["full_attention"] * 2
    ),
    "qwen3-tied": Qwen3Config(**SIZE, head_dim=16, tie_word_embeddings=True),
    "phi3": Phi3Config(**SIZE),
    "phi3-partial": Phi3Config(**SIZE, rope_parameters=PARTIAL),
    "phi3-longrope": Phi3Config(**SIZE, rope_parameters=LONGROPE, original_max_position_embeddings=32),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def dense_model(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = type(FAMILIES[family]).from_dict(FAMILIES[family].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(dtype)


def tokens(rows: int = 2, length: int = 61, seed: int = 0) -> Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Exact with all experts active


@each_family
@torch.no_grad()
def test_with_all_experts_active_logits_are_the_dense_models_in_float64(family):
    dense = dense_model(family)
    converted = from_dense(dense)
    assert converted.dtype == torch.float64
    torch.testing.assert_close(converted(tokens()).logits, dense(tokens()).logits, rtol=0, atol=1e-9)


@each_family
@torch.no_grad()
def test_in_float32_its_error_is_at_most_twice_the_dense_models(family):
    exact = dense_model(family)(tokens()).logits
    dense = dense_model(family, torch.float32)
    own = (dense(tokens()).logits - exact).abs().max()
    assert (from_dense(dense)(tokens()).logits - exact).abs().max() <= 2 * own


@each_family
@torch.no_grad()
def test_it_generates_what_the_dense_model_does(family):
    """Also beyond longrope's original length, where Phi-3 of Transformers 5.17 goes wrong with a cache."""
    dense = dense_model(family)
    options = {"max_new_tokens": 40, "do_sample": False}
    expected = dense.generate(tokens(2, 9), use_cache=False, **options)
    assert torch.equal(from_dense(dense).generate(tokens(2, 9), **options), expected)


@each_family
def test_there_and_back_every_tensor_has_the_same_bytes(family):
    dense = dense_model(family, torch.bfloat16)
    back = dense_tensors(from_dense(dense), dense.config.model_type)
    there = dense.state_dict()
    if dense.config.tie_word_embeddings:
        del there["lm_head.weight"]
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name].view(torch.int16), there[name].view(torch.int16)) for name in there)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_wrong_map_is_noticed(family, monkeypatch):
    """Tests the tests above: with two projections exchanged, the logits differ."""

    def exchanged(rule: weight_map.WeightRule) -> weight_map.WeightRule:
        swap = {"mlp.gate_proj.weight": "mlp.up_proj.weight", "mlp.up_proj.weight": "mlp.gate_proj.weight"}
        return replace(rule, gqe=tuple(swap.get(name, name) for name in rule.gqe))

    dense = dense_model(family)
    wrong = tuple(exchanged(rule) for rule in weight_map.LAYER_RULES[family])
    monkeypatch.setitem(weight_map.LAYER_RULES, family, wrong)
    assert (from_dense(dense)(tokens()).logits - dense(tokens()).logits).abs().max() > 1e-3


@torch.no_grad()
def test_an_output_embedding_that_is_not_the_input_s_is_kept_whatever_the_configuration_says():
    dense = dense_model("qwen3-tied")
    dense.lm_head.weight = torch.nn.Parameter(torch.randn_like(dense.lm_head.weight))
    converted = from_dense(dense)
    assert not converted.config.tie_word_embeddings
    assert dense.config.tie_word_embeddings
    torch.testing.assert_close(converted(tokens()).logits, dense(tokens()).logits, rtol=0, atol=1e-9)


def test_the_converted_model_has_weights_of_its_own_and_the_generation_settings():
    dense = dense_model()
    dense.generation_config.temperature = 0.7
    converted = from_dense(dense)
    assert converted.generation_config.temperature == 0.7
    assert converted.generation_config is not dense.generation_config
    before = converted(tokens()).logits
    for parameter in dense.parameters():
        parameter.data.zero_()
    assert torch.equal(converted(tokens()).logits, before)


def test_the_extra_slots_start_at_zero_and_learn():
    converted = from_dense(dense_model(), top_k=1)
    attention = converted.model.layers[0].self_attn
    assert attention.o_proj.weight[:, 8 * 8 :].eq(0).all()
    converted(tokens(), labels=tokens()).loss.backward()
    assert attention.o_proj.weight.grad[:, 8 * 8 :].abs().amin(0).gt(0).all()


@torch.no_grad()
def test_k_can_be_changed_while_it_runs():
    dense = dense_model()
    converted = from_dense(dense, top_k=1)
    sparse = converted(tokens()).logits
    converted.set_top_k(4)
    torch.testing.assert_close(converted(tokens()).logits, dense(tokens()).logits, rtol=0, atol=1e-9)
    assert converted.config.active_query_experts == 4
    converted.set_top_k(1)
    assert torch.equal(converted(tokens()).logits, sparse)
    with pytest.raises(ValueError, match="top_k is 5; it must be 1 to 4"):
        converted.set_top_k(5)
    for wrong in (1.5, True, "a", None):
        with pytest.raises(ValueError, match=re.escape(f"top_k is {wrong!r}; it must be 1 to 4")):
            converted.set_top_k(wrong)
    assert converted.config.active_query_experts == 1
    by_slot = convert_model(dense, 1, output_projection="slot", router="random")[0]
    with pytest.raises(ValueError, match="output_projection is 'slot'"):
        by_slot.set_top_k(2)


def test_a_sparse_conversion_trains_saves_and_loads(tmp_path):
    converted = from_dense(dense_model("qwen3-tied", torch.float32), top_k=2)
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, GQEForCausalLM)
    assert torch.equal(loaded(tokens()).logits, converted(tokens()).logits)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = loaded(tokens(), labels=tokens()).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# What can't be converted

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "one head a group": (LlamaConfig(**SIZE | {"num_key_value_heads": 8}), "nothing to route"),
    "sliding windows": (MistralConfig(**SIZE, sliding_window=64), "sliding_window is 64"),
    "some sliding layers": (
        Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "layer_types hold 'sliding_attention', sliding_window is 64",
    ),
    "partial and scaled": (
        LlamaConfig(**SIZE, rope_parameters=LLAMA3 | {"partial_rotary_factor": 0.5}),
        "rope_type 'llama3' and partial_rotary_factor 0.5; .* partial_rotary_factor must be 1 for llama",
    ),
    "latent attention": (DeepseekV3Config(num_hidden_layers=1), "latent attention"),
    "attention sinks": (GptOssConfig(num_hidden_layers=1), "sinks"),
    "capped logits": (Gemma2Config(num_hidden_layers=1), "caps"),
    "residual dropout": (Phi3Config(**SIZE, resid_pdrop=0.1), "resid_pdrop is 0.1"),
    "embedding dropout": (Phi3Config(**SIZE, embd_pdrop=0.2), "embd_pdrop is 0.2"),
    "experts in the MLP": (MixtralConfig(num_hidden_layers=1), "'mixtral', which has a mixture of experts"),
    "many experts in the MLP": (Qwen3MoeConfig(num_hidden_layers=1), "'qwen3_moe', which has a mixture of experts"),
    "layers without rotary embedding": (SmolLM3Config(num_hidden_layers=1), "has layers without rotary embedding"),
    "quantised weights": (
        LlamaConfig(**SIZE, quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config is set"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_gqe_form_is_refused_with_the_reason(case):
    config, reason = REFUSED[case]
    with pytest.raises(SettingError, match=reason):
        make_plan(config, None, "expert", "gqe", None, 0, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 5}, "top_k is 5; it must be 1 to 4"),
        ({"top_k": 0}, "top_k is 0"),
        ({"output_projection": "rank"}, "output_projection is 'rank'"),
        ({"variant": "weighted_concat"}, "variant is 'weighted_concat'"),
        ({"router": "norm"}, "router is 'norm'; it must be one of random"),
        ({"router": "calibrated"}, "router is 'calibrated', which is fitted to text"),
        ({"router": "none"}, "router is 'none', which is fitted to text"),
        ({"calibration": tokens(4)}, "5 sequences or more"),
        ({"calibration": torch.rand(8, 8)}, "must be token ids"),
        ({"calibration": [[1, 2]]}, "calibration is a list; it must be a tensor of token ids"),
        ({"calibration": tokens(8).bool()}, "dtype torch.bool; it must be token ids"),
        ({"calibration": tokens(8) + 1}, "holds token 97; it must be 0 or more and below vocab_size, 97"),
        ({"calibration": tokens(8) - 1}, "holds token -1; it must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_used_are_named(options, words):
    with pytest.raises(SettingError, match=words):
        from_dense(dense_model(), **options)


def test_a_model_that_is_no_language_model_is_refused():
    with pytest.raises(SettingError, match="model is LlamaModel"):
        from_dense(dense_model().model)
    with pytest.raises(SettingError, match="model is Linear"):
        from_dense(torch.nn.Linear(2, 2))


def test_tensors_that_do_not_fit_the_configuration_are_refused():
    dense = dense_model("qwen2")
    dense.config.vocab_size = 90
    with pytest.raises(SettingError, match=r"model.embed_tokens.weight has shape \[97, 48\]"):
        from_dense(dense)
    dense = dense_model("llama")
    dense.config.num_hidden_layers = 1
    with pytest.raises(SettingError, match=r"has a tensor model.layers.1.input_layernorm.weight, for which GQE has no"):
        from_dense(dense)
    dense = dense_model("llama")
    dense.config.attention_bias = True
    with pytest.raises(SettingError, match=r"no tensor model.layers.0.self_attn.k_proj.bias"):
        from_dense(dense)
    dense = dense_model("phi3")
    dense.config.intermediate_size = 63
    with pytest.raises(SettingError, match=r"layers.0.mlp.gate_up_proj.weight has 128 rows; by its config it must"):
        from_dense(dense)


# ---------------------------------------------------------------------------------------------------------------------
# Where the router starts


def test_a_heads_contribution_is_the_norm_of_what_it_adds():
    heads, o_proj = torch.randn(7, 4, 6).double(), torch.randn(20, 24).double()
    added = [(heads[:, n] @ o_proj[:, n * 6 : n * 6 + 6].T).norm(dim=-1) for n in range(4)]
    torch.testing.assert_close(contributions(heads, o_proj), torch.stack(added, -1).float(), rtol=1e-5, atol=1e-5)


def test_the_fit_finds_a_router_that_is_there_to_be_found():
    torch.manual_seed(0)
    x, router = torch.randn(600, 12), torch.randn(8, 12)
    strength = (x @ router.T).unflatten(1, (2, 4)).softmax(-1).flatten(1)
    held_out = torch.arange(600) % 5 == 4
    fit = fit_router(x, strength, 2, 1, held_out)
    found, there = (w.unflatten(0, (2, 4)) - w.unflatten(0, (2, 4)).mean(1, keepdim=True) for w in (fit.weight, router))
    assert torch.cosine_similarity(found, there, dim=-1).min() > 0.99
    assert fit.best - 1e-3 < fit.kept <= fit.best
    assert fit.fixed < fit.kept - 0.1
    nothing = fit_router(x, torch.rand(600, 8), 2, 1, held_out)
    assert nothing.kept < nothing.best - 0.1


def test_the_fit_is_to_the_rows_that_are_not_held_out(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(calibration, "RIDGES", (1e-2,))
    monkeypatch.setattr(calibration, "ROWS", 7)
    x, strength, held_out = torch.randn(60, 6), torch.rand(60, 8), torch.arange(60) % 5 == 4
    fit = fit_router(x, strength, 2, 1, held_out)
    target = strength.double().log().unflatten(1, (2, 4))
    target = (target - target.mean(-1, keepdim=True)).flatten(1)[~held_out]
    seen = x[~held_out].double()
    ridge = 1e-2 * seen.square().sum(0).mean() * torch.eye(6)
    torch.testing.assert_close(fit.weight, torch.linalg.solve(seen.T @ seen + ridge, seen.T @ target).T.float())
    other = strength.clone()
    other[held_out] = other[held_out].flip(-1)
    again = fit_router(x, other, 2, 1, held_out)
    assert torch.equal(again.weight, fit.weight)
    assert again.kept != fit.kept


def test_rank_shares_count_each_expert_at_its_rank():
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 2.0]])
    expected = [[[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]]]
    torch.testing.assert_close(rank_shares(score, 1, 2), torch.tensor(expected, dtype=torch.float64))


def test_kept_shares_are_of_squared_strength():
    strength = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    assert kept_share(strength, strength, 2, 1) == pytest.approx((9 + 4) / 18)
    assert kept_share(strength, -strength, 2, 1) == pytest.approx((1 + 4) / 18)
    assert kept_share(strength, strength, 2, 2) == pytest.approx(1)


@torch.no_grad()
@each_family
def test_what_a_calibration_observes_is_what_the_dense_model_does(family):
    """Layer by layer on their own, the losses and the divergence are those of the whole models."""
    dense, text = dense_model(family), tokens(10, 40)
    converted, report = convert_model(dense, 1, calibration=text)
    held_out = text[4::5]
    logs = [model(held_out).logits[:, :-1].float().log_softmax(-1) for model in (dense, converted)]
    losses = [-log.gather(-1, held_out[:, 1:, None]).mean() for log in logs]
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    measured = [report.dense_loss, report.gqe_loss, report.kl]
    torch.testing.assert_close(measured, [float(x) for x in (*losses, divergence)], rtol=1e-4, atol=1e-4)
    assert report.tokens == 2 * 39
    assert len(report.fits) == 2


@torch.no_grad()
@pytest.mark.parametrize("router", ["query_norm", "calibrated", "none"])
def test_a_checkpoint_of_several_dtypes_is_calibrated(router):
    dense = dense_model("qwen2", torch.bfloat16)
    for name, parameter in dense.named_parameters():
        if "norm" in name or "q_proj" in name:
            parameter.data = parameter.data.float()
    report = convert_model(dense, 1, router=router, calibration=tokens(10, 40))[1]
    exact = convert_model(dense_model("qwen2", torch.float32), 1, router=router, calibration=tokens(10, 40))[1]
    assert report.dense_loss == pytest.approx(exact.dense_loss, rel=0.02)


@torch.no_grad()
def test_a_dense_model_that_overflows_on_the_text_is_refused():
    dense = dense_model("llama", torch.float16)
    dense.model.layers[1].mlp.down_proj.weight.mul_(1e4)
    with pytest.raises(SettingError, match=r"of float16, and model.layers.1 of the dense model overflows on"):
        from_dense(dense, 1, calibration=tokens(10, 40))
    dense = dense_model("llama", torch.float16)
    dense.lm_head.weight.fill_(6e4)
    with pytest.raises(SettingError, match=r"of float16, and the output embedding overflows on .* bfloat16 or float32"):
        from_dense(dense, 1, calibration=tokens(10, 40))


@torch.no_grad()
def test_a_converted_model_that_overflows_where_the_dense_one_does_not_is_refused():
    """Of four equal heads two cancel the other two; only one of them overflows float16."""
    dense = dense_model("llama", torch.float16)
    for layer in dense.model.layers:
        attention = layer.self_attn
        q = attention.q_proj.weight.unflatten(0, (2, 4, 8))
        q.copy_(q[:, :1].expand_as(q))
        attention.v_proj.weight.fill_(1.0)
        o = attention.o_proj.weight.unflatten(1, (2, 4, 8))
        o.copy_(torch.tensor([1.0, -1, 1, -1])[:, None] * 3e4)
    dense.model.embed_tokens.weight.abs_()
    assert dense(tokens(10, 40)).logits.isfinite().all()
    with pytest.raises(SettingError, match="of float16, and the converted model overflows on"):
        from_dense(dense, 1, calibration=tokens(10, 40))


@torch.no_grad()
@pytest.mark.parametrize(("silent", "best"), [([0, 1, 3, 4, 6, 7], 1), ([*range(8)], 0)])
def test_heads_that_add_nothing_leave_the_fit_finite(silent, best):
    dense = dense_model()
    for layer in dense.model.layers:
        layer.self_attn.o_proj.weight.unflatten(1, (8, 8))[:, silent] = 0
    converted, report = convert_model(dense, 1, calibration=tokens(10, 40))
    assert all(layer.self_attn.router.weight.isfinite().all() for layer in converted.model.layers)
    assert [fit.best for fit in report.fits] == [pytest.approx(best)] * 2


@torch.no_grad()
def test_a_dense_model_with_attention_dropout_is_observed_without_it():
    dense, text = dense_model(attention_dropout=0.5), tokens(10, 40)
    report = convert_model(dense, calibration=text)[1]
    assert report.dense_loss == pytest.approx(convert_model(dense_model(), calibration=text)[1].dense_loss, rel=1e-6)
    assert report.kl == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_with_all_experts_active_nothing_diverges_whatever_the_router():
    for router in ("random", "query_norm", "calibrated"):
        report = convert_model(dense_model(), router=router, calibration=tokens(10, 40))[1]
        assert report.kl == pytest.approx(0, abs=1e-6)
        assert all(fit.best < 0.99 for fit in report.fits if fit is not None)  # judged at one expert per group


@torch.no_grad()
def test_a_calibrated_router_selects_stronger_heads_than_a_random_one():
    dense, text = dense_model(hidden_size=16, num_hidden_layers=1), tokens(200, 30)
    dense.model.embed_tokens.weight.abs_()  # a norm is even in its input: at a mean of zero no linear map predicts it
    layer = dense.model.layers[0]
    heads: list[Tensor] = []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    seen: list[Tensor] = []
    layer.input_layernorm.register_forward_hook(lambda _, __, out: seen.append(out))
    unseen = tokens(40, 30, seed=1)
    dense(unseen)
    strength = contributions(heads[0].flatten(0, 1).unflatten(-1, (8, -1)), layer.self_attn.o_proj.weight)
    kept = {}
    for router in ("random", "calibrated"):
        converted, _ = convert_model(dense, 1, router=router, calibration=text)
        weight = converted.model.layers[0].self_attn.router.weight
        kept[router] = kept_share(strength, seen[0].flatten(0, 1) @ weight.T, 2, 1)
    assert kept["calibrated"] > kept["random"] + 0.02


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2"])
def test_query_norm_is_fitted_to_the_norms_of_the_queries(family):
    dense = dense_model(family, num_hidden_layers=1, layer_types=None)
    report = convert_model(dense, 1, router="query_norm", calibration=tokens(100, 30))[1]
    layer = dense.model.layers[0]
    x = layer.input_layernorm(dense.model.embed_tokens(tokens(100, 30)[4::5])).flatten(0, 1)
    query = layer.self_attn.q_proj(x).unflatten(-1, (8, -1))
    norms = getattr(layer.self_attn, "q_norm", torch.nn.Identity())(query).norm(dim=-1)
    assert report.fits[0].best == pytest.approx(kept_share(norms, norms, 2, 1), rel=1e-4)


@torch.no_grad()
def test_without_a_router_the_strongest_heads_stay_and_are_the_dense_ones():
    """With the columns of W_O of the other heads at zero, the dense model is the one that is kept."""
    dense, text = dense_model(), tokens(10, 40)
    kept = []
    for layer in dense.model.layers:
        columns = layer.self_attn.o_proj.weight.unflatten(1, (8, 8))
        columns[:, [0, 1, 3, 4, 6, 7]] = 0  # leaves head 2 of the first group and head 1 of the second
        kept.append(columns)
    control = convert_model(dense, 1, router="none", calibration=text)[0]
    assert control.config.routing == "none"
    assert control.config.num_attention_heads == 2
    torch.testing.assert_close(control(text).logits, dense(text).logits, rtol=0, atol=1e-9)


@torch.no_grad()
def test_slots_start_at_the_mean_of_their_groups_output_rows():
    dense = dense_model()
    slot = convert_model(dense, 2, output_projection="slot", router="random")[0]
    slots = slot.model.layers[0].self_attn.o_proj.weight[:, : 4 * 8].unflatten(1, (2, 2, 8))
    experts = dense.model.layers[0].self_attn.o_proj.weight.unflatten(1, (2, 4, 8)).mean(2)
    torch.testing.assert_close(slots, experts[:, :, None].expand_as(slots), rtol=0, atol=1e-6)
    observed = convert_model(dense, 2, output_projection="slot", calibration=tokens(10, 40))[0].model.layers[0]
    x = dense.model.layers[0].input_layernorm(dense.model.embed_tokens(tokens(10, 40))).flatten(0, 1)
    scores = (x @ observed.self_attn.router.weight.T).unflatten(1, (2, 4))
    columns = dense.model.layers[0].self_attn.o_proj.weight.unflatten(1, (2, 4, 8))
    for rank, selected in enumerate(scores.topk(2).indices.unbind(-1)):
        for group in range(2):
            share = torch.bincount(selected[:, group], minlength=4) / len(x)
            expected = (columns[:, group] * share[:, None]).sum(1)
            start = (2 * group + rank) * 8
            found = observed.self_attn.o_proj.weight[:, start : start + 8]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_seed_gives_the_same_model_and_another_seed_another():
    routers = [from_dense(dense_model(), 1, seed=seed).model.layers[1].self_attn.router.weight for seed in (3, 3, 4)]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert routers[0].std().item() == pytest.approx(0.2, rel=0.1)  # initializer_range


# ---------------------------------------------------------------------------------------------------------------------
# The paper's reference layer

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@torch.no_grad()
def test_the_reference_layers_weights_give_the_reference_layers_output(path):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        case = json.loads(file.metadata()["case"])
    weights = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    layer = from_reference(weights, case["variant"], case["rope_theta"] if case["rope"] else None)
    torch.testing.assert_close(layer(tensors["x"]), tensors["hidden_states"], rtol=1e-9, atol=1e-9)
    assert layer.top_k == case["top_k"]


def test_tensors_that_are_no_reference_layer_are_refused():
    weights = {name.removeprefix("param."): t for name, t in load_file(GOLDEN[0]).items() if name.startswith("param.")}
    with pytest.raises(SettingError, match=r"no router.weight"):
        from_reference({name: t for name, t in weights.items() if name != "router.weight"})
    with pytest.raises(SettingError, match="no gqe layer"):
        from_reference(weights | {"o_proj.weight": weights["o_proj.weight"][:, :-1]})
    with pytest.raises(SettingError, match="no gqe layer"):
        from_reference(weights | {"gate.weight": torch.zeros(2)})


# ---------------------------------------------------------------------------------------------------------------------
# QK norm, biases and partial rotary embedding in the layer's other paths


@torch.no_grad()
@each_family
@pytest.mark.parametrize("top_k", [1, 4])
def test_decoding_from_a_cache_gives_the_logits_of_one_pass(family, top_k):
    converted = from_dense(dense_model(family), top_k)
    for layer in converted.model.layers:
        layer.self_attn.o_proj.weight.normal_(0, 0.1)  # the extra slots too
    ids = tokens(2, 30)
    whole = converted(ids).logits
    cut = converted(ids[:, :20], use_cache=True)
    logits, cache = [cut.logits], cut.past_key_values
    for t in range(20, 30):
        step = converted(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-9)


def test_the_configuration_of_a_conversion_survives_a_saved_file(tmp_path):
    config = from_dense(dense_model("qwen2")).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.attention_bias is True
    assert loaded.attention_output_bias is False


def test_the_configuration_of_a_conversion_is_the_dense_models_wherever_both_have_a_field():
    """Each field at a value that isn't its default."""
    fields = SIZE | {
        "hidden_act": "gelu", "rms_norm_eps": 1e-3, "use_cache": False, "pad_token_id": 3, "bos_token_id": 4,
        "eos_token_id": [5, 6], "attention_dropout": 0.25, "tie_word_embeddings": True, "dtype": torch.bfloat16,
        "rope_parameters": LLAMA3,
    }  # fmt: skip
    config = make_plan(LlamaConfig(**fields), 2, "expert", "gqe", None, 0, False).final
    assert {name: getattr(config, name) for name in fields} == fields
