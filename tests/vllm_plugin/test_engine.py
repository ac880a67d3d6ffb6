"""Every variant of the layer in vLLM's engine against Transformers: tokens in float32, routing and logits in bf16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from query_experts import GQEForCausalLM
from query_experts.serving.attention import VLLMGQEAttention
from serve_agreement import agreement, recorded, recording_options, sentence, through_transformers
from serving_helpers import engine, generated, mixed_prompts, random_prompt, save_checkpoint, sure_cases

STEPS = 24
BIASED = {"attention_bias": True, "mlp_bias": True}
SETTINGS = {
    "first": {"active_query_experts": 2, "shared_head_kv": "first", "tie_word_embeddings": True},
    "hard_concat": {"active_query_experts": 2, "variant": "hard_concat"},
    "weighted_concat-expert": {
        "active_query_experts": 2,
        "variant": "weighted_concat",
        "output_projection": "expert",
        "routing": "frozen",
    },
    "all-experts": {"active_query_experts": 4, "routing": "none"},
    "all-experts-by-rank": {"active_query_experts": 4, "output_projection": "expert"},
    "biases": {"active_query_experts": 1, **BIASED},
    "biases-but-on-o": {"active_query_experts": 1, **BIASED, "attention_output_bias": False},
    "qk_norm": {"active_query_experts": 2, "output_projection": "expert", "qk_norm": True},
    "llama3-rope": {
        "active_query_experts": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "partial-rope": {
        "active_query_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "linear-rope": {
        "active_query_experts": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2},
    },
    "yarn-rope": {
        "active_query_experts": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "longrope": {
        "active_query_experts": 1,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1 + i / 10 for i in range(16)],
            "long_factor": [1 + i / 10 for i in range(16)],
            "original_max_position_embeddings": 128,
            "attention_factor": 0.7,
        },
    },
    "many-groups": {"num_key_value_heads": 8, "num_attention_heads": 16, "active_query_experts": 1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_are_transformers(setting, tmp_path: Path):
    cases = sure_cases(save_checkpoint(tmp_path, **SETTINGS[setting]), mixed_prompts(), STEPS)
    with engine(tmp_path, dtype="float32") as llm:
        for _ in range(2):  # the second time from cached blocks
            assert generated(llm, cases) == [case.continuation for case in cases]


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message), engine(folder, dtype="float32", **options):
        pass


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 128),
    ],
    ids=["yarn", "dynamic"],
)
def test_more_positions_than_the_rotary_embedding_has_are_refused(rope, reach, tmp_path: Path):
    positions = 128 if rope["rope_type"] == "dynamic" else 512
    changes = {"rope_parameters": {"rope_theta": 10_000.0} | rope, "max_position_embeddings": positions}
    cases = sure_cases(save_checkpoint(tmp_path, **changes), [random_prompt(n, n) for n in (1, 60, reach - 8)], 8)
    refused(tmp_path, f"max_model_len is 512; with rope_type '{rope['rope_type']}' .* knows {reach} positions")
    with engine(tmp_path, dtype="float32", max_model_len=reach) as llm:
        assert generated(llm, cases) == [case.continuation for case in cases]


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_shared.weight", "model.layers.0.self_attn.k_proj.bias",
     "model.layers.1.mlp.up_proj.weight", "lm_head.weight"],
)  # fmt: skip
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name, tmp_path: Path):
    save_checkpoint(tmp_path, attention_bias=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, f"checkpoint lacks {name}; it must hold every tensor")


@pytest.mark.parametrize(("name", "value"), [("logit_scale", 0.5), ("is_causal", False)])
def test_a_field_that_vllm_alone_would_obey_is_refused(name, value, tmp_path: Path):
    save_checkpoint(tmp_path)
    change_config(tmp_path, **{name: value})
    refused(tmp_path, f"{name} is {value}; GQE has no such field")


@pytest.mark.parametrize(
    ("rope_type", "name"), [("dynamic", "alpha"), ("dynamic", "max_trained_positions"), ("default", "rope_dim")]
)
def test_a_rotary_parameter_that_vllm_alone_would_obey_is_refused(rope_type, name, tmp_path: Path):
    save_checkpoint(tmp_path)
    parameters = {"rope_type": rope_type, "rope_theta": 10_000.0, name: 16}
    change_config(tmp_path, rope_parameters=parameters | ({"factor": 2.0} if rope_type == "dynamic" else {}))
    refused(tmp_path, f"rope_parameters hold {name}; they must hold nothing but")


@pytest.mark.parametrize("foreign", [{"qkv_bias": False}, {"qkv_bias": True, "bias": True}])
def test_projections_have_biases_where_transformers_has_them(foreign, tmp_path: Path):
    cases = sure_cases(save_checkpoint(tmp_path, attention_bias=not foreign["qkv_bias"]), mixed_prompts(), 8)
    change_config(tmp_path, **foreign)
    with engine(tmp_path, dtype="float32") as llm:
        assert generated(llm, cases) == [case.continuation for case in cases]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"active_query_experts": 5}, "active_query_experts is 5; it must be 1 to 4"),
        ({"variant": "concat"}, "variant is 'concat'; it must be one of gqe"),
        ({"active_query_experts": 2}, r"o_proj.weight is \[64, 128\]; with active_query_experts 2, .* \[64, 192\]"),
    ],
)
def test_overrides_that_the_weights_dont_fit_are_refused(overrides, message, tmp_path: Path):
    save_checkpoint(tmp_path)
    refused(tmp_path, message, hf_overrides=overrides)


@pytest.mark.parametrize("output_projection", ["slot", "expert"])
def test_lora_adapters_of_all_projections_give_the_merged_models_tokens(output_projection, tmp_path: Path):
    model = save_checkpoint(tmp_path, active_query_experts=2, output_projection=output_projection)
    adapter, names = tmp_path / "adapter", ["q_proj", "k_proj", "v_proj", "o_proj", "q_shared", "down_proj"]
    tensors = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in names:
                down, up = torch.randn(8, module.in_features) / 10, torch.randn(module.out_features, 8) / 10
                module.weight += 2 * up @ down
                tensors |= {f"base_model.model.{name}.lora_{at}.weight": t for at, t in (("A", down), ("B", up))}
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": names, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    cases = sure_cases(model, mixed_prompts(), 8)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    with engine(tmp_path, dtype="float32", enable_lora=True, max_lora_rank=8) as llm:
        prompts = [{"prompt_token_ids": case.prompt} for case in cases]
        outs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=LoRARequest("all", 1, str(adapter)))
    assert [list(out.outputs[0].token_ids) for out in outs] == [case.continuation for case in cases]


def test_weights_may_come_in_pieces_where_none_were_loaded(tmp_path: Path, monkeypatch):
    """As reinforcement learning sends them (here before vLLM packs them for a CPU)."""
    cases = sure_cases(save_checkpoint(tmp_path, active_query_experts=2), mixed_prompts(), 8)
    tensors = sorted(load_file(tmp_path / "model.safetensors").items())
    pieces = tensors[:5], tensors[5:]
    monkeypatch.setattr(
        DummyModelLoader, "load_weights", lambda self, model, _: [model.load_weights(piece) for piece in pieces]
    )
    with engine(tmp_path, dtype="float32", load_format="dummy") as llm:
        assert generated(llm, cases) == [case.continuation for case in cases]


@torch.no_grad()
@pytest.mark.parametrize("output_projection", ["slot", "expert"])
def test_recorded_routing_is_transformers_in_float32(output_projection, tmp_path: Path):
    model = save_checkpoint(tmp_path, active_query_experts=2, output_projection=output_projection)
    case = sure_cases(model, [random_prompt(n, n) for n in (300, 301, 302)], 1)[0]
    with engine(tmp_path, dtype="float32", **recording_options(model.config, 512)) as llm:
        log_probs, experts = recorded(llm, case.prompt)
    expected_log_probs, expected_experts = through_transformers(model, case.prompt)
    assert experts.tolist() == expected_experts.tolist()
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("output_projection", ["slot", "expert"])
def test_in_bf16_the_engine_errs_as_transformers_does_once_its_routing_is_replayed(output_projection, tmp_path, capsys):
    """Both compared with float64 and the same selected experts: at most twice the error (root mean square)."""
    setting = {"active_query_experts": 2, "output_projection": output_projection, "num_hidden_layers": 3}
    model = save_checkpoint(tmp_path, torch.bfloat16, **setting)
    exact = GQEForCausalLM.from_pretrained(tmp_path).double().eval()
    with engine(tmp_path, dtype="bfloat16", **recording_options(model.config, 512)) as llm:
        found = agreement(llm, model, exact, [random_prompt(300, seed) for seed in range(4)])
    with capsys.disabled():
        print(f"\n{output_projection}: {sentence(found)}")
    assert found.flipped / found.selected_experts < 0.05
    assert found.tokens_before_a_flip > 0
    assert found.vllm_error_replayed <= 2 * found.transformers_error_replayed
    assert found.difference_before_a_flip <= 3 * found.transformers_error_replayed  # the errors of both


def test_routing_is_recorded_from_a_compiled_model_that_was_told_to(tmp_path: Path, monkeypatch):
    """vLLM refuses the option itself on a CPU, so the layers are set directly."""
    options = recording_options(save_checkpoint(tmp_path, active_query_experts=2).config, 512) | {"dtype": "float32"}
    prompt = random_prompt(100, 0)
    with engine(tmp_path, **options) as llm:
        _, expected = recorded(llm, prompt)
    records = VLLMGQEAttention._records_routing
    monkeypatch.setattr(VLLMGQEAttention, "_records_routing", lambda self: records(self) or True)
    with engine(tmp_path, enforce_eager=False, **options) as llm:
        _, experts = recorded(llm, prompt)
    assert experts.tolist() == expected.tolist()
