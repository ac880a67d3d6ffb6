"""The settings of `query-experts bench`, which the command line and presets in YAML fill."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from query_experts.common.device import resolve_device
from query_experts.common.errors import SettingError
from query_experts.common.settings import field
from query_experts.model.arms import ModelSize, arm_config, check_arms
from query_experts.model.configuration_gqe import GQEConfig

SUITES = {
    "prefill": "a layer over a prompt, into an empty dynamic cache",
    "chunk": "a layer over the last chunk of a prompt, the rest of it cached",
    "decode": "a layer over one new token for each cached sequence",
    "train": "a layer forwards and backwards",
    "parts": "where the time of the gqe layer goes, by stage",
    "model": "the whole model over a prompt, into an empty dynamic cache, logits of the last token",
    "model-train": "the whole model forwards and backwards",
}
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ARMS = ("dense", "static", "gqe", "gqe-expert", "gqe-m4", "half")


@dataclass
class BenchSettings:
    """One benchmark. The defaults are the `cpu` preset."""

    out: str = field("runs/bench", "folder for the numbers and the plot")
    suites: list[str] = field(["prefill", "chunk", "decode", "train", "parts"], f"any of {', '.join(SUITES)}")
    arms: list[str] = field(["dense", "static", "gqe"], f"dense and any of {', '.join(ARMS[1:])}")
    device: str = field("auto", "auto, cpu or cuda")
    dtype: str = field("bfloat16", "bfloat16, float16 or float32")
    attn_implementation: str = field("sdpa", "attention backend of all arms")
    sdpa_backend: str | None = field(None, f"kernel of sdpa: {', '.join(SDPA_BACKENDS)}; none: torch chooses")
    fused_decode: bool = field(False, "decode gqe's single tokens by its Triton kernel")
    compile: bool = field(False, "compile every call with torch.compile")
    cuda_graph: bool = field(False, "time replays of a CUDA graph of every call, as serving engines decode")
    repeats: int = field(7, "timings of each arm at each point, arms taking turns")

    hidden_size: int = field(1024, "hidden size D")
    num_attention_heads: int = field(16, "query heads N of the dense arm, query experts of the others")
    num_key_value_heads: int = field(8, "KV heads G")
    active_query_experts: int = field(1, "experts that a token wakes in a group, k")
    head_dim: int = field(64, "head dim")
    intermediate_size: int = field(2816, "MLP width of the models")
    num_hidden_layers: int = field(16, "layers of the models")
    vocab_size: int = field(32_000, "vocabulary of the models")

    lengths: list[int] = field([2048, 8192, 16384], "prompt lengths of prefill and of the models")
    chunk_size: int = field(2048, "tokens of a chunk")
    train_lengths: list[int] = field([2048, 8192], "sequence lengths of training")
    cached_lengths: list[int] = field([4096, 32768], "cached tokens in decoding, and the prompt that a chunk ends")
    batch_sizes: list[int] = field([1, 8], "sequences in decoding")
    caches: list[str] = field(["static", "dynamic"], "caches in decoding: static, dynamic")

    def size(self, max_length: int) -> ModelSize:
        return ModelSize(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            active_query_experts=self.active_query_experts,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
            router_aux_loss_coef=0.01,
            router_z_loss_coef=0.0,
        )

    def config(self, arm: str, max_length: int) -> GQEConfig:
        config = arm_config(arm, self.size(max_length))
        config._attn_implementation = self.attn_implementation
        return config

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        for name, allowed in (("suites", SUITES), ("arms", ARMS), ("caches", ("static", "dynamic"))):
            if not getattr(self, name):
                raise SettingError(f"{name} is empty; it must hold one or more of {', '.join(allowed)}")
            for held in getattr(self, name):
                if held not in allowed:
                    raise SettingError(f"{name} holds {held!r}; allowed are {', '.join(allowed)}")
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise SettingError(f"{name} holds {getattr(self, name)}; it must hold each once")
        if "dense" not in self.arms:
            raise SettingError(f"arms holds {self.arms}; it must hold dense, which the others are measured against")
        for name in ("lengths", "train_lengths", "cached_lengths", "batch_sizes"):
            if min(getattr(self, name), default=0) < 1:
                raise SettingError(f"{name} holds {getattr(self, name)}; it must hold numbers of 1 or more")
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise SettingError(f"{name} holds {getattr(self, name)}; it must hold each number once")
        for name in ("repeats", "chunk_size", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size",
                     "num_attention_heads", "num_key_value_heads", "active_query_experts", "head_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.out:
            raise SettingError("out is empty; it must be a folder")
        backends = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in name]
        if self.attn_implementation not in backends:
            raise SettingError(
                f"attn_implementation is {self.attn_implementation!r}; it must be one of {', '.join(backends)} (eager, "
                "the reference, forms the whole square of scores: its speed says nothing)"
            )
        if self.sdpa_backend is not None and self.sdpa_backend not in SDPA_BACKENDS:
            raise SettingError(f"sdpa_backend is {self.sdpa_backend!r}; it must be {', '.join(SDPA_BACKENDS)} or none")
        if self.fused_decode and importlib.util.find_spec("triton") is None:
            raise SettingError("fused_decode is True, which needs triton; pip install triton, or leave it False")
        if self.fused_decode and resolve_device(self.device) == "cpu" and not os.environ.get("TRITON_INTERPRET"):
            raise SettingError(
                "fused_decode is True, which needs a GPU (on a CPU, TRITON_INTERPRET=1); it must be False"
            )
        if self.cuda_graph and resolve_device(self.device) != "cuda":
            raise SettingError("cuda_graph is True, which needs a CUDA device; it must be False")
        if self.cuda_graph and not {"prefill", "decode", "model"} >= set(self.suites):
            raise SettingError(
                f"suites holds {self.suites}; with cuda_graph it must hold prefill, decode or model alone"
            )
        if self.cuda_graph and "decode" in self.suites and self.caches != ["static"]:
            raise SettingError(f"caches holds {self.caches}; with cuda_graph it must be static, as a graph can't grow")
        if self.compile and "parts" in self.suites:
            raise SettingError(
                "suites holds 'parts', which times a layer's stages by themselves; with compile it can't"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise SettingError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of num_key_value_heads, "
                f"{self.num_key_value_heads}"
            )
        experts = self.num_attention_heads // self.num_key_value_heads
        if self.active_query_experts > experts:
            raise SettingError(f"active_query_experts is {self.active_query_experts}; it must be 1 to {experts}")
        if self.head_dim % 2:
            raise SettingError(f"head_dim is {self.head_dim}; rotary position embedding needs an even number")
        self._check_memory()
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise SettingError(f"dtype is {self.dtype!r}; it must be bfloat16, float16 or float32")
        if "chunk" in self.suites and self.chunk_size >= min(self.cached_lengths):
            raise SettingError(
                f"chunk_size is {self.chunk_size}; it must be below the shortest of cached_lengths, "
                f"{min(self.cached_lengths)}"
            )
        check_arms(self.arms, self.size(max(self.lengths)))
        resolve_device(self.device)

    def _check_memory(self) -> None:
        """Raises SettingError for weights, drawn in float32 on the host, that its memory can't hold for all arms."""
        attention = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim * self.hidden_size
        numbers = attention
        if any(suite.startswith("model") for suite in self.suites):
            numbers = self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)
            numbers += 2 * self.vocab_size * self.hidden_size
        need = 4 * numbers * len(self.arms)
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > there:
            raise SettingError(
                f"hidden_size is {self.hidden_size}; with it and the other sizes the arms' weights need about "
                f"{need / 1e9:.0f} GB, where this machine has {there / 1e9:.0f}; it must be smaller"
            )
