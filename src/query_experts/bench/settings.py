"""The settings of `query-experts bench`, which the command line and presets in YAML fill."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch.nn.attention import SDPBackend
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from query_experts.common.device import Device, check_device, resolve_device
from query_experts.common.errors import SettingError
from query_experts.common.fields import Count, Counts, Distinct, Elsewhere, OutFolder, Settings, option
from query_experts.common.settings import validate
from query_experts.model.arms import (
    ModelSize,
    arm_config,
    check_arms,
    fused_dense_config,
    model_size,
    size_option,
)
from query_experts.model.kernel_choice import Kernels, check_kernels_setting, kernels_option

Suite = Literal["prefill", "chunk", "decode", "train", "parts", "model", "model-train"]
SUITES: dict[Suite, str] = {
    "prefill": "a layer over a prompt, into an empty dynamic cache",
    "chunk": "a layer over the last chunk of a prompt whose rest is cached",
    "decode": "a layer over one new token for each cached sequence",
    "train": "a layer, forward and backward",
    "parts": "the time of each stage of the gqe layer, by kernels torch",
    "model": "the whole model over a prompt, into an empty dynamic cache, logits of the last token",
    "model-train": "the whole model, forward and backward",
}
SdpaBackend = Literal["flash", "cudnn", "efficient", "math"]
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Arm = Literal["dense", "dense-fused", "static", "gqe", "gqe-expert", "gqe-m4", "half"]
ARMS = get_args(Arm)
BASELINE = "dense"  # stock Llama, the arm that every speed is relative to
FUSED_BASELINE = "dense-fused"  # the same by the kernels that gqe runs, which every speed is relative to as well
CacheKind = Literal["static", "dynamic"]


@dataclass
class BenchSettings(Settings):
    """One benchmark. The defaults are the `cpu` preset.

    Attributes:
        torch_device: The device that `device` means on this machine.
        older: Fields of older result files, the fields that they have become, and what their values mean there.
    """

    elsewhere = Elsewhere(
        {"fused_decode": None},
        "which has become kernels; it must be left out: --kernels torch or triton takes its place",
    )
    older: ClassVar[dict[str, tuple[str, dict[bool, str]]]] = {
        "fused_decode": ("kernels", {False: "torch", True: "triton"})
    }

    out: OutFolder = option("runs/bench", "folder for the numbers and the plot", "output", metavar="FOLDER")
    suites: Annotated[list[Suite], Distinct(tuple(SUITES))] = option(
        ["prefill", "chunk", "decode", "train", "parts"],
        "; ".join(f"{name}: {text}" for name, text in SUITES.items()), "what to time", metavar="SUITE",
    )  # fmt: skip
    arms: Annotated[list[Arm], Distinct(ARMS)] = option(
        ["dense", "static", "gqe"],
        f"dense and any of {', '.join(ARMS[1:])} (dense by gqe's kernels is dense-fused)",
        "what to time",
        metavar="ARM",
    )
    device: Device = option("auto", "device to time; auto: cuda where there is one, else cpu", "machine")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "dtype of weights and inputs", "kernels")
    attn_implementation: str = option("sdpa", "attention backend of all arms", "kernels", metavar="NAME")
    sdpa_backend: SdpaBackend | None = option(None, "kernel of sdpa; none, the default: torch chooses", "kernels")
    kernels: Kernels = kernels_option("kernels")
    compile: bool = option(False, "compile every call with torch.compile", "kernels")
    cuda_graph: bool = option(False, "time replays of a CUDA graph of every call, as serving engines decode", "kernels")
    repeats: Count = option(7, "timings of each arm at each point, with the arms taking turns", "what to time")

    hidden_size: Count = size_option("hidden_size", 1024)
    num_attention_heads: Count = size_option("num_attention_heads", 16)
    num_key_value_heads: Count = size_option("num_key_value_heads", 8)
    active_query_experts: Count = size_option("active_query_experts", 1)
    head_dim: Count = size_option("head_dim", 64)
    intermediate_size: Count = size_option("intermediate_size", 2816)
    num_hidden_layers: Count = size_option("num_hidden_layers", 16)
    vocab_size: Count = size_option("vocab_size", 32_000)

    lengths: Counts = option([2048, 8192, 16384], "prompt lengths of prefill and of the models", "what to time")
    chunk_size: Count = option(2048, "tokens in a chunk", "what to time")
    train_lengths: Counts = option([2048, 8192], "sequence lengths of training", "what to time")
    train_batch_size: Count = option(1, "sequences in training", "what to time")
    cached_lengths: Counts = option(
        [4096, 32768], "cached tokens in decoding, and the length of the prompt that a chunk ends", "what to time"
    )
    batch_sizes: Counts = option([1, 8], "sequences in decoding", "what to time")
    caches: Annotated[list[CacheKind], Distinct(get_args(CacheKind))] = option(
        ["static", "dynamic"], "caches in decoding", "what to time"
    )

    def __post_init__(self) -> None:
        self.torch_device = resolve_device(self.device)

    def size(self, max_length: int) -> ModelSize:
        return model_size(
            self, max_position_embeddings=max_length, tie_word_embeddings=False, router_aux_loss_coef=0.01,
            router_z_loss_coef=0.0,
        )  # fmt: skip

    def config(self, arm: str, max_length: int) -> Any:
        """The configuration of an arm, Llama's or GQE's, for sequences of up to `max_length` tokens."""
        size = self.size(max_length)
        config = fused_dense_config(size) if arm == FUSED_BASELINE else arm_config(arm, size)
        config._attn_implementation = self.attn_implementation
        return config

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        validate(self)
        if "dense" not in self.arms:
            raise SettingError(f"arms holds {self.arms}; it must hold dense, the baseline of the others")
        if "chunk" in self.suites and self.chunk_size >= min(self.cached_lengths):
            raise SettingError(
                f"chunk_size is {self.chunk_size}; it must be below the shortest of cached_lengths, "
                f"{min(self.cached_lengths)}"
            )
        self._check_backend()
        if self.cuda_graph:
            self._check_cuda_graph()
        self._check_memory()
        longest = max(self.lengths)
        check_arms([arm for arm in self.arms if arm != FUSED_BASELINE], self.size(longest))
        check_device(self.device)
        check_kernels_setting(self.kernels, self.torch_device, [self.config(arm, longest) for arm in self.arms])

    def _check_backend(self) -> None:
        backends = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in name]
        if self.attn_implementation not in backends:
            raise SettingError(
                f"attn_implementation is {self.attn_implementation!r}; it must be one of {', '.join(backends)} (eager, "
                "the reference, forms the whole square of scores, so its speed says nothing)"
            )
        if self.compile and "parts" in self.suites:
            raise SettingError("suites holds 'parts', which times the stages of a layer; with compile it must not")
        if self.kernels == "triton" and self.suites == ["parts"]:
            raise SettingError(
                "kernels is 'triton', where 'parts' times the plain path's stages; it must be torch or auto"
            )

    def _check_cuda_graph(self) -> None:
        if self.torch_device != "cuda":
            raise SettingError("cuda_graph is True, which needs a CUDA device; it must be False")
        if not {"prefill", "decode", "model"} >= {*self.suites}:
            raise SettingError(
                f"suites holds {self.suites}; with cuda_graph it must hold prefill, decode or model, no other"
            )
        if "decode" in self.suites and self.caches != ["static"]:
            raise SettingError(f"caches holds {self.caches}; with cuda_graph it must be static, as a graph can't grow")

    def _check_memory(self) -> None:
        """Raises SettingError for weights of all arms, in float32, that the host's memory can't hold."""
        attention = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim * self.hidden_size
        numbers = attention
        if any(suite.startswith("model") for suite in self.suites):
            numbers = self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)
            numbers += 2 * self.vocab_size * self.hidden_size
        needed = 4 * numbers * len(self.arms)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise SettingError(
                f"hidden_size is {self.hidden_size}; with it and the other sizes the arms' weights need about "
                f"{needed / 1e9:.0f} GB, where this machine has {memory / 1e9:.0f}; it must be smaller"
            )
