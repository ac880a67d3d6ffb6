"""Every variant of the layer in vLLM's engine, held to Transformers: tokens in float32, routing and logits in bf16."""

from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)

from query_experts.replay import replayed_routing
from query_experts.serving.attention import GQEAttention
from serving_helpers import (
    engine,
    generated,
    log_probs_of_prompt,
    mixed_prompts,
    random_prompt,
    save_checkpoint,
    sure_cases,
)

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


def recorded(llm, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One prompt through the engine: log-probabilities [T - 1], woken experts [T, L, G*k], by vLLM's own recorder."""
    recorder = RoutedExpertsCapturer(512, llm.llm_engine.vllm_config)
    llm.apply_model(lambda model: bind_routed_experts_capturer(model, recorder))
    log_probs = log_probs_of_prompt(llm, prompt)
    return log_probs, recorder.snapshot_routing_data(len(prompt)).long()


def woken_by(model, tokens: torch.Tensor) -> torch.Tensor:
    """The experts [T, L, G*k] that Transformers wakes."""
    config = model.config
    routing = model(tokens, output_router_logits=True, use_cache=False).router_logits
    experts = config.num_attention_heads // config.num_key_value_heads
    first = torch.arange(0, config.num_attention_heads, experts)[:, None]
    by_group = [logits.unflatten(-1, (-1, experts)).topk(config.active_query_experts).indices for logits in routing]
    return torch.stack([(chosen + first).flatten(1) for chosen in by_group], 1)


def log_probs_by(model, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens, use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None]).squeeze(-1)


RECORDING = {
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": False,
    "hf_overrides": {"num_experts": 8, "num_experts_per_tok": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("output_projection", ["slot", "expert"])
def test_recorded_routing_is_transformers_in_float32(output_projection, tmp_path: Path):
    model = save_checkpoint(tmp_path, active_query_experts=2, output_projection=output_projection)
    case = sure_cases(model, [random_prompt(n, n) for n in (300, 301, 302)], 1)[0]
    with engine(tmp_path, dtype="float32", **RECORDING) as llm:
        log_probs, experts = recorded(llm, case.prompt)
    tokens = torch.tensor([case.prompt])
    assert experts.tolist() == woken_by(model, tokens).tolist()
    torch.testing.assert_close(log_probs.double(), log_probs_by(model, tokens), rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("output_projection", ["slot", "expert"])
def test_in_bf16_the_engine_errs_no_more_than_transformers_once_its_routing_is_replayed(
    output_projection, tmp_path: Path, record_property, capsys
):
    """Both against float64 with the same experts awake: at most twice the error (root mean square)."""
    model = save_checkpoint(
        tmp_path, torch.bfloat16, active_query_experts=2, output_projection=output_projection, num_hidden_layers=3
    )
    exact = save_checkpoint(
        tmp_path / "again", torch.bfloat16, active_query_experts=2, output_projection=output_projection,
        num_hidden_layers=3,
    ).double()  # fmt: skip
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    flipped, decisions, served_errors, trained_errors, unflipped = 0, 0, [], [], []
    with engine(tmp_path, dtype="bfloat16", **RECORDING) as llm:
        for seed in range(4):
            prompt = random_prompt(300, seed)
            tokens = torch.tensor([prompt])
            served, experts = recorded(llm, prompt)
            differs = experts != woken_by(model, tokens)
            flipped, decisions = flipped + int(differs.sum()), decisions + differs.numel()
            same_so_far = ~differs.flatten(1).any(1).cummax(0).values[:-1]
            unflipped.append((served - log_probs_by(model, tokens))[same_so_far])
            with replayed_routing(exact, experts[None]):
                expected = log_probs_by(exact, tokens)
            with replayed_routing(model, experts[None]):
                trained_errors.append(log_probs_by(model, tokens) - expected)
            served_errors.append(served - expected)
    served_error, trained_error, difference = (
        torch.cat(errors).square().mean().sqrt().item() for errors in (served_errors, trained_errors, unflipped)
    )
    with capsys.disabled():
        print(
            f"\n{output_projection}: {flipped} of {decisions} woken experts differ ({flipped / decisions:.2%}); "
            f"log-probabilities of the {len(torch.cat(unflipped))} tokens before the first: {difference:.4f} apart "
            f"(rms); against float64 with the same experts awake vLLM errs by {served_error:.4f}, Transformers by "
            f"{trained_error:.4f}"
        )
    assert flipped / decisions < 0.05
    assert served_error <= 2 * trained_error


def test_routing_is_recorded_from_a_compiled_model_that_was_told_to(tmp_path: Path, monkeypatch):
    """vLLM refuses the option itself on a CPU, so the layers are told in its place."""
    save_checkpoint(tmp_path, active_query_experts=2)
    prompt = random_prompt(100, 0)
    with engine(tmp_path, dtype="float32", **RECORDING) as llm:
        _, expected = recorded(llm, prompt)
    records = GQEAttention._records_routing
    monkeypatch.setattr(GQEAttention, "_records_routing", lambda self: records(self) or True)
    with engine(tmp_path, dtype="float32", enforce_eager=False, **RECORDING) as llm:
        _, experts = recorded(llm, prompt)
    assert experts.tolist() == expected.tolist()
