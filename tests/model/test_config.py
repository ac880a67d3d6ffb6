"""GQEConfig: what it holds, what it refuses, where it registers, and the warning about a router without a gradient."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from model_helpers import (
    COMMON,
    VOCABULARY,
    no_router_warning,
    random_tokens,
    tiny_config,
    tiny_llama_config,
    tiny_model,
)
from query_experts import GQEAttention, GQEConfig, GQEForCausalLM, GQEModel
from query_experts.convert import from_dense
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP

OURS = {
    "active_query_experts": 1,
    "variant": "gqe",
    "output_projection": "slot",
    "routing": "learned",
    "shared_head_kv": "mean",
    "attention_output_bias": None,
    "qk_norm": False,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.0,
    "output_router_logits": False,
}


def test_the_defaults_are_the_papers_layer_on_llamas_settings():
    config = GQEConfig()
    assert {name: getattr(config, name) for name in OURS} == OURS
    llama = LlamaConfig().to_dict()
    ours = config.to_dict()
    assert {k: v for k, v in ours.items() if k not in OURS and k != "model_type"} == {
        k: v for k, v in llama.items() if k != "model_type"
    }
    assert config.model_type == "gqe"


def test_settings_survive_json_and_a_saved_file(tmp_path):
    changed = {
        "active_query_experts": 3,
        "variant": "weighted_concat",
        "output_projection": "expert",
        "routing": "frozen",
        "shared_head_kv": "first",
        "router_aux_loss_coef": 0.5,
        "attention_output_bias": False,
        "qk_norm": True,
        "router_z_loss_coef": 0.25,
        "output_router_logits": True,
    }
    config = tiny_config(**changed)
    config.save_pretrained(tmp_path)
    for copy in (
        GQEConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        GQEConfig.from_dict(json.loads(config.to_json_string())),
        GQEConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert type(copy) is GQEConfig
        assert {name: getattr(copy, name) for name in OURS} == changed
        assert {name: getattr(copy, name) for name in COMMON} == COMMON


REFUSED = [
    ({"num_attention_heads": 7}, ["num_attention_heads", "7", "multiple", "2"]),
    ({"num_key_value_heads": 3}, ["num_attention_heads", "8", "multiple", "3"]),
    ({"active_query_experts": 0}, ["active_query_experts", "0", "1 to 4"]),
    ({"active_query_experts": 5}, ["active_query_experts", "5", "1 to 4"]),
    ({"head_dim": 5}, ["head_dim", "5", "even"]),
    ({"variant": "paper"}, ["variant", "'paper'", "gqe, hard_concat, weighted_concat"]),
    ({"output_projection": "rank"}, ["output_projection", "'rank'", "slot, expert"]),
    ({"routing": "random"}, ["routing", "'random'", "learned, frozen, none"]),
    ({"shared_head_kv": "last"}, ["shared_head_kv", "'last'", "mean, first"]),
    ({"active_query_experts": 1.5}, ["active_query_experts", "1.5"]),
    ({"active_query_experts": "2"}, ["active_query_experts", "'2'"]),
    ({"routing": "none", "active_query_experts": 3}, ["routing", "'none'", "active_query_experts", "3", "4"]),
]


@pytest.mark.parametrize(("setting", "said"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_a_bad_setting_is_refused_with_its_name_what_it_held_and_what_is_allowed(setting, said):
    with pytest.raises((StrictDataclassError, ValueError)) as refused:
        tiny_config(**setting)
    for part in said:
        assert part in str(refused.value)


def test_a_hidden_size_that_the_heads_dont_divide_needs_a_head_dim():
    for make in (
        lambda **more: GQEConfig(hidden_size=34, num_attention_heads=8, num_key_value_heads=4, **more),
        lambda **more: GQEAttention(34, 8, 4, **more),
    ):
        with pytest.raises(ValueError, match=r"hidden_size is 34; without head_dim it must be a multiple of num_.*, 8"):
            make()
        assert make(head_dim=4).head_dim == 4


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "x", None])
def test_a_loss_coefficient_must_be_a_number_from_zero_on(name, value):
    with pytest.raises(StrictDataclassError, match=f"{name} is {value!r}; it must be a number, 0 or more"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("rms_norm_eps", "a number, 0 or more"), ("attention_dropout", "a number, 0 or more and below 1")],
)
def test_other_numbers_that_a_layer_takes_are_refused_by_the_configurations_name(name, allowed):
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(StrictDataclassError, match=f"{name} is {value!r}; it must be {allowed}"):
            tiny_config(**{name: value})


ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "proportional": {"partial_rotary_factor": 0.5},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 32, "attention_factor": None},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    },
    "longrope": {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("rope_type", ROPE)
def test_rotary_parameters_that_give_an_error_or_nan_are_refused_by_their_names(rope_type):
    right = {"rope_type": rope_type, "rope_theta": 1e4, **ROPE[rope_type]}
    assert tiny_config(rope_parameters=dict(right)).rope_parameters["rope_type"] == rope_type
    for name in right.keys() - {"rope_type", "short_factor", "long_factor"}:
        for value in (-1.0, float("nan"), float("inf"), "2", True, [1.0]):
            with pytest.raises(StrictDataclassError, match=re.escape(f"{name} is {value!r}; it must be a number")):
                tiny_config(rope_parameters=right | {name: value})
        if name != "partial_rotary_factor":
            with pytest.raises(StrictDataclassError, match=f"{name} is 0; it must be a number"):
                tiny_config(rope_parameters=right | {name: 0})


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_lists_of_rotary_factors_must_fit_the_rotated_dimensions(name):
    right = {"rope_type": "longrope", "rope_theta": 1e4, **ROPE["longrope"]}
    for numbers in ([1.0, "x"], [1.0, 0], [1.0, -1.0], [1.0, float("nan")], [1.0, True], "x", 1.0, None):
        with pytest.raises(StrictDataclassError, match=re.escape(f"{name} is {numbers!r}; it must be a list of")):
            tiny_config(rope_parameters=right | {name: numbers})
    for numbers in ([], [1.0], [1.0] * 3):
        with pytest.raises(StrictDataclassError, match=f"{name} has {len(numbers)} numbers; it must have 2, one for"):
            tiny_config(rope_parameters=right | {name: numbers})
    half = {"partial_rotary_factor": 0.5, "short_factor": [1.0], "long_factor": [2.0]}
    assert tiny_config(rope_parameters=right | half).rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("rope_type", ROPE)
def test_none_counts_as_left_out_and_so_does_all_that_the_rope_type_does_not_read(rope_type):
    right = {"rope_type": rope_type, "rope_theta": 1e4, **ROPE[rope_type]}
    expected = Phi3RotaryEmbedding(tiny_config(rope_parameters=dict(right))).inv_freq
    names = {name for values in ROPE.values() for name in values} | {"partial_rotary_factor", "mscale"}
    for name in names - right.keys():
        config = tiny_config(rope_parameters=right | {name: None})
        torch.testing.assert_close(Phi3RotaryEmbedding(config).inv_freq, expected)
    if rope_type == "default":
        assert tiny_config(rope_parameters=right | {"factor": "x", "long_factor": 3})


def test_a_checkpoint_of_an_old_version_whose_rotary_values_are_null_loads_and_converts(tmp_path):
    old = {"rope_type": "default", "rope_theta": 1e4, "factor": None, "partial_rotary_factor": None}
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_parameters": old}))
    assert GQEForCausalLM.from_pretrained(tmp_path)(random_tokens(1, 5)).logits.isfinite().all()
    dense = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=1, rope_parameters=old))
    assert from_dense(dense)(random_tokens(1, 5)).logits.isfinite().all()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
def test_factors_of_yarn_s_attention_must_be_numbers(name):
    assert tiny_config(rope_parameters=YARN | {"mscale": 0, "mscale_all_dim": 0.7})
    for value in ("1.0", float("nan"), True):
        with pytest.raises(StrictDataclassError, match=f"{name} is {value!r}; it must be a number, or None"):
            tiny_config(rope_parameters=YARN | {name: value})


UNFIT = {
    "a logarithm of 1": YARN | {"rope_theta": 1.0},
    "a negative attention factor": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": -5.0},
    "one position": ROPE["longrope"] | {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 1},
    "angles beyond float32": {"rope_type": "linear", "factor": 1e-38},
    "one frequency": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rotary_parameters_that_fail_together_are_refused(case, device):
    rope = {"rope_theta": 1e4} | UNFIT[case]
    with torch.device(device), pytest.raises(StrictDataclassError, match="must give finite frequencies and an"):
        tiny_config(rope_parameters=rope)
    with torch.device(device):
        assert tiny_config(rope_parameters=dict(YARN))


def test_rotary_parameters_by_layer_type_are_refused():
    for layer_types in ({}, {"layer_types": ["full_attention"] * 2}):
        with pytest.raises(StrictDataclassError, match="hold a dictionary for 'full_attention'; they must be one dict"):
            tiny_config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}}, **layer_types)


def test_an_unknown_rope_type_is_refused():
    for rope_type in ("weird", 3, None):
        with pytest.raises(StrictDataclassError, match=f"rope_type is {rope_type!r}; it must be default or one of"):
            tiny_config(rope_parameters={"rope_type": rope_type, "rope_theta": 1e4})


def test_counts_may_be_any_whole_numbers_and_nothing_else():
    assert GQEAttention(64, np.int64(8), np.int64(4)).top_k == 1
    for bad in ("8", 8.0, None):
        with pytest.raises(ValueError, match=f"^num_query_experts is {bad!r}; it must be a whole number"):
            GQEAttention(64, bad, 4)
    with pytest.raises((StrictDataclassError, ValueError), match="num_attention_heads"):
        GQEConfig(num_attention_heads=0)
    for name in ("hidden_size", "num_query_experts", "num_kv_heads"):
        with pytest.raises(ValueError, match=rf"^{name} is -1; it must be 1 or more"):
            GQEAttention(**{"hidden_size": 64, "num_query_experts": 8, "num_kv_heads": 4, name: -1})


def test_the_layer_s_names_of_the_configuration_s_fields_are_refused_naming_those():
    for name, field in (("top_k", "active_query_experts"), ("num_query_experts", "num_attention_heads")):
        with pytest.raises(ValueError, match=f"{name} is 2; in GQEConfig this field is called {field}"):
            GQEConfig(**{name: 2})


@pytest.mark.parametrize(("name", "value"), [("kernels", "triton"), ("fused_decode", True)])
def test_kernels_are_no_field_of_the_configuration(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it is no field: a model's set_kernels chooses the ker"):
        GQEConfig(**{name: value})


@pytest.mark.parametrize(("setting", "said"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_the_layer_refuses_the_same_settings_with_a_value_error(setting, said):
    names = {
        "num_attention_heads": "num_query_experts",
        "num_key_value_heads": "num_kv_heads",
        "active_query_experts": "top_k",
    }
    arguments = {"num_query_experts": 8, "num_kv_heads": 2, "head_dim": 4, "rope_theta": 1e4}
    arguments |= {names.get(name, name): value for name, value in setting.items()}
    with pytest.raises(ValueError, match=r"must be|needs") as refused:
        GQEAttention(24, **arguments)
    for part in said:
        assert names.get(part, part) in str(refused.value)


def test_an_odd_head_dim_is_fine_without_rotary_embedding():
    GQEAttention(24, 8, 2, head_dim=5)


def test_hidden_size_need_not_divide_by_the_heads_when_head_dim_is_given():
    model = tiny_model(hidden_size=26, head_dim=6)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (8 * 6, 26)
    assert model(random_tokens(1, 5)).logits.isfinite().all()


def test_the_auto_classes_build_the_model_from_its_config():
    config = tiny_config()
    assert type(AutoConfig.for_model("gqe")) is GQEConfig
    assert type(AutoModel.from_config(config)) is GQEModel
    assert type(AutoModelForCausalLM.from_config(config)) is GQEForCausalLM


def test_the_auto_classes_load_what_was_saved(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is GQEModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GQEForCausalLM


def test_tensor_parallelism_leaves_router_and_shared_query_whole_and_attention_where_transformers_cannot_split_it():
    model = tiny_model()
    for plan in (model.config.base_model_tp_plan, model.tp_plan, model.model.tp_plan):
        assert not [name for name in plan if "router" in name or "q_shared" in name]
        assert any("mlp" in name for name in plan)
        assert any("attn" in name for name in plan) == SHARDS_BY_GROUP


# ---------------------------------------------------------------------------------------------------------------------
# A router without a gradient from the language-model loss
# ---------------------------------------------------------------------------------------------------------------------

NO_GRADIENT = [
    {"num_attention_heads": 2, "active_query_experts": 1},
    {"num_attention_heads": 2, "active_query_experts": 1, "variant": "weighted_concat"},
    {"num_key_value_heads": 1, "active_query_experts": 1},
    {"num_key_value_heads": 1, "active_query_experts": 1, "output_projection": "expert"},
    {"variant": "hard_concat"},
    {"variant": "hard_concat", "active_query_experts": 4},
]
FED = [
    {"active_query_experts": 1},
    {"active_query_experts": 4},
    {"num_key_value_heads": 1, "active_query_experts": 2},
    {"num_key_value_heads": 1, "active_query_experts": 1, "variant": "weighted_concat"},
    {"variant": "weighted_concat", "output_projection": "expert"},
]


def router_gradients_of_the_language_model_loss(**setting):
    model = tiny_model(**setting)
    ids = random_tokens(2, 9)
    routers = [layer.self_attn.router.weight for layer in model.model.layers]
    out = model(ids, labels=ids)
    alone = torch.autograd.grad(out.lm_loss, routers, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(routers, alone, strict=True)]


@pytest.mark.parametrize("setting", NO_GRADIENT, ids=str)
def test_a_router_that_the_language_model_loss_cannot_reach_is_warned_about_and_gets_no_gradient(setting):
    with pytest.warns(UserWarning, match="router gets no gradient from the language-model loss"):
        GQEForCausalLM(tiny_config(**setting))
    for gradient in router_gradients_of_the_language_model_loss(**setting):
        assert gradient.abs().max() < 1e-15  # p / p leaves a rounding of 1e-16; a gradient proper is above 1e-4


@pytest.mark.parametrize("setting", FED, ids=str)
def test_a_router_that_the_language_model_loss_reaches_is_not_warned_about(setting):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GQEForCausalLM(tiny_config(**setting))
    for gradient in router_gradients_of_the_language_model_loss(**setting):
        assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("routing", ["frozen", "none"])
def test_a_router_that_does_not_train_is_not_warned_about(routing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GQEForCausalLM(tiny_config(variant="hard_concat", routing=routing, active_query_experts=4))


@pytest.mark.parametrize("variant", ["gqe", "hard_concat", "weighted_concat"])
def test_the_balance_loss_reaches_every_learned_router(variant):
    model = tiny_model(variant=variant)
    ids = random_tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.router.weight.grad.abs().max() > 1e-6


def test_the_warning_names_the_reason():
    for setting, reason in (
        ({"num_attention_heads": 2, "active_query_experts": 1}, "M = 1"),
        (NO_GRADIENT[2], "G = 1"),
    ):
        with pytest.warns(UserWarning, match=reason):
            GQEForCausalLM(tiny_config(**setting))
    with no_router_warning():
        assert GQEForCausalLM(tiny_config(variant="hard_concat")).vocab_size == VOCABULARY
