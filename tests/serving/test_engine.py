"""Every variant of the layer in vLLM's engine, held to Transformers: tokens in float32, routing and logits in bf16."""

from pathlib import Path

import pytest
import torch

from query_experts import GQEForCausalLM
from query_experts.serving.attention import GQEAttention
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
    "many-groups": {"num_key_value_heads": 8, "num_attention_heads": 16, "active_query_experts": 1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_are_transformers(setting, tmp_path: Path):
    cases = sure_cases(save_checkpoint(tmp_path, **SETTINGS[setting]), mixed_prompts(), STEPS)
    with engine(tmp_path, dtype="float32") as llm:
        for _ in range(2):  # the second time from cached blocks
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
    """Both against float64 with the same experts awake: at most twice the error (root mean square)."""
    setting = {"active_query_experts": 2, "output_projection": output_projection, "num_hidden_layers": 3}
    model = save_checkpoint(tmp_path, torch.bfloat16, **setting)
    exact = GQEForCausalLM.from_pretrained(tmp_path).double().eval()
    with engine(tmp_path, dtype="bfloat16", **recording_options(model.config, 512)) as llm:
        found = agreement(llm, model, exact, [random_prompt(300, seed) for seed in range(4)])
    with capsys.disabled():
        print(f"\n{output_projection}: {sentence(found)}")
    assert found["flipped"] / found["woken_experts"] < 0.05
    assert found["tokens_before_a_flip"] > 0
    assert found["vllm_error_replayed"] <= 2 * found["transformers_error_replayed"]
    assert found["difference_before_a_flip"] <= 3 * found["transformers_error_replayed"]  # the errors of both


def test_routing_is_recorded_from_a_compiled_model_that_was_told_to(tmp_path: Path, monkeypatch):
    """vLLM refuses the option itself on a CPU, so the layers are told in its place."""
    options = recording_options(save_checkpoint(tmp_path, active_query_experts=2).config, 512) | {"dtype": "float32"}
    prompt = random_prompt(100, 0)
    with engine(tmp_path, **options) as llm:
        _, expected = recorded(llm, prompt)
    records = GQEAttention._records_routing
    monkeypatch.setattr(GQEAttention, "_records_routing", lambda self: records(self) or True)
    with engine(tmp_path, enforce_eager=False, **options) as llm:
        _, experts = recorded(llm, prompt)
    assert experts.tolist() == expected.tolist()
