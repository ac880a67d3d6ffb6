"""What works with the base dependencies alone, in an environment that has only the built wheel: `make test-base`.

Each failure is an AssertionError or the error itself.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import query_experts
from query_experts import GQEAttention, GQEConfig, GQEForCausalLM
from query_experts_command import COMMANDS

SOURCE = Path(__file__).resolve().parents[1] / "src"
COMMAND = Path(sys.prefix) / "bin" / "query-experts"
OF_EXTRAS = ("accelerate", "datasets", "lm_eval", "matplotlib", "peft", "pyarrow", "pytest", "scipy", "trl", "vllm")


def check_environment() -> None:
    """The package is the installed one, with all its files, and no extra is there to help."""
    assert Path(sys.prefix).resolve() in Path(query_experts.__file__).resolve().parents, query_experts.__file__
    present = [name for name in OF_EXTRAS if importlib.util.find_spec(name)]
    assert not present, f"{', '.join(present)}: of an extra, and must not be in this environment"
    files = {path.relative_to(SOURCE).as_posix() for path in SOURCE.glob("query_experts*/**/*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name and ".egg-info/" not in name}
    missing = files - {str(path) for path in distribution("query-experts").files or ()}
    assert files, SOURCE
    assert not missing, f"not in the wheel: {sorted(missing)}"


def check_layer() -> None:
    layer = GQEAttention(hidden_size=16, num_query_experts=4, num_kv_heads=2, rope_theta=10_000.0)
    y, routing = layer(torch.randn(2, 5, 16), output_routing=True)
    (y.square().mean() + 0.01 * routing.balance_loss).backward()
    assert y.shape == (2, 5, 16)
    assert all(weight.grad.abs().sum() > 0 for weight in layer.parameters())


def check_model() -> None:
    """A tiny model learns, is saved, and gives the same logits when it is loaded."""
    config = GQEConfig(
        vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, active_query_experts=1,
    )  # fmt: skip
    model, tokens = GQEForCausalLM(config), torch.randint(17, (2, 6))
    model(input_ids=tokens, labels=tokens).loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is GQEForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 9)


def check_command() -> None:
    """Help needs no extra. A command that lacks one names it and exits with status 2."""
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        subprocess.run([COMMAND, *words], check=True, capture_output=True)
    refused = subprocess.run([COMMAND, "compare"], capture_output=True, text=True)
    assert refused.returncode == 2, refused
    assert "pip install query-experts[study]" in refused.stderr, refused.stderr


if __name__ == "__main__":
    for check in (check_environment, check_layer, check_model, check_command):
        check()
        print(f"{check.__name__.replace('check_', '')}: works")
