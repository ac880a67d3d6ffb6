"""What a preset means doesn't change when the demo or a default does: results made by it stay comparable."""

import dataclasses

import pytest

from query_experts.cli import parse_run
from query_experts.study.settings import CompareSettings

ANY_SIZE = {
    "data": [], "validation": [], "cache_dir": None, "text_field": "text", "tokenizer": None, "device": "auto",
    "dtype": "auto", "compile": False, "stop_after_minutes": None, "active_query_experts": 1, "head_dim": 32,
    "tie_word_embeddings": True, "initializer_range": 0.02, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.0,
    "min_learning_rate_ratio": 0.02, "warmup_fraction": 0.1, "decay_fraction": 0.2, "weight_decay": 0.1,
    "seeds": [0, 1, 2], "prefill_repeats": 5, "report_to": [], "telemetry": "brief", "log_every": None,
    "peak_flops": None, "fsdp_size": None, "tp_size": 1, "activation_checkpointing": False, "global_batch_size": None,
    "rank_timeout_minutes": 30.0, "keep": 2,
}  # fmt: skip
PRESETS = {
    "small": {
        "max_bytes": 80_000_000, "validation_sequences": 256, "vocab_size": 8192, "seq_len": 512, "hidden_size": 256,
        "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "steps": 2000, "batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 2e-3, "evaluations": 20,
        "arms": ["dense", "static", "gqe", "gqe-m4"], "prefill_lengths": [1024, 4096, 16384],
    },
    "gpu": {
        "max_bytes": 1_500_000_000, "validation_sequences": 512, "vocab_size": 16384, "seq_len": 2048,
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "steps": 2400, "batch_size": 32, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "evaluations": 24, "prefill_lengths": [4096, 16384, 65536],
        "arms": ["dense", "static", "half", "frozen", "gqe", "gqe-m4", "gqe-expert"],
    },
    "paper-250m": {
        "max_bytes": None, "validation_sequences": 512, "vocab_size": 32000, "seq_len": 2048, "hidden_size": 1024,
        "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": False, "steps": 28600, "batch_size": 8, "global_batch_size": 512,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-4, "evaluations": 110, "log_every": 10,
        "prefill_lengths": [4096, 16384, 65536],
        "arms": ["dense", "static", "half", "gqe", "hard", "weighted", "gqe-m4"],
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_the_larger_presets_mean_what_they_meant(preset):
    settings = dataclasses.asdict(parse_run("compare", CompareSettings, ["--preset", preset]))
    assert settings == ANY_SIZE | PRESETS[preset] | {"out": f"runs/{preset}", "kernels": "auto"}
