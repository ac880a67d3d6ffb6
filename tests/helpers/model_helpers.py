"""Tiny models, batches and references that the model's tests share.

Values are compared in float64. Logits of these models are of order 10, and a forward pass is some thousand roundings
of 1e-16 each, so that two orders of the same arithmetic stay within EXACT (1e-11 is typical of the worst of them),
while a token that sees one key too many moves logits by more than 1e-3. Transformers' eager attention is made for
float32: its softmax is float32 whatever the dtype, and its masks overflow there in float64. EAGER allows for as many
roundings of 6e-8.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    logging,
    masking_utils,
)
from transformers.integrations import flex_attention as flex_integration

from query_experts import GQEConfig, GQEForCausalLM

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCABULARY = 31
EXACT = {"rtol": 0.0, "atol": 1e-10}
EAGER = {"rtol": 0.0, "atol": 2e-4}

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# every path through the layer: ranks and experts, with and without a shared head, a mean and one group's keys
SETTINGS = [
    {"active_query_experts": 1},
    {"active_query_experts": 2},
    {"active_query_experts": 2, "output_projection": "expert"},
    {"active_query_experts": 4, "routing": "none"},
    {"active_query_experts": 1, "shared_head_kv": "first"},
    {"active_query_experts": 2, "variant": "hard_concat"},
    {"active_query_experts": 2, "variant": "weighted_concat", "output_projection": "expert"},
]


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A token for each of the words w0, w1, ...; special: keyword arguments such as padding_side."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **special)


def setting_id(setting: dict[str, Any]) -> str:
    return "-".join(f"k{v}" if k == "active_query_experts" else str(v) for k, v in setting.items())


def tiny_config(**changes: Any) -> GQEConfig:
    return GQEConfig(**(COMMON | {"active_query_experts": 2} | changes))


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(COMMON | changes))


@contextlib.contextmanager
def no_router_warning() -> Iterator[None]:
    """A router without a gradient from the language-model loss is meant in many tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the router gets no gradient", UserWarning)
        yield


def tiny_model(
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    exact_loss: bool = True,
    **changes: Any,
) -> GQEForCausalLM:
    """A model in eval mode. `exact_loss`: cross-entropy in the model's dtype; Transformers' own is float32."""
    torch.manual_seed(seed)
    config = tiny_config(**changes)
    config._attn_implementation = attention
    with no_router_warning():
        model = GQEForCausalLM(config).to(dtype).eval()
    if exact_loss:
        model.loss_function = cross_entropy
    return model


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Transformers' ForCausalLMLoss, without its cast to float32."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    if num_items_in_batch is None:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_items_in_batch


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **(tolerance or EXACT), msg=lambda m, n=name: f"{n}: {m}")


def new_cache(kind: str, model: nn.Module, length: int = 48) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length)


def checkpoint_activations(model: nn.Module, use_reentrant: bool = False) -> None:
    """Under the method's name in newer and in older Transformers."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


def in_chunks(
    model: nn.Module, ids: Tensor, cuts: list[int], cache: Cache, past: int = 0, **per_token: Tensor | None
) -> Tensor:
    """Logits [B, T, V] of `ids` given to the model piece by piece, each piece ending where `cuts` say.

    attention_mask [B, past + T] is cut as generation cuts it (all up to the piece's end), position_ids [B, T] as ids.
    """
    mask, positions = per_token.get("attention_mask"), per_token.get("position_ids")
    pieces, start = [], 0
    for end in [*cuts, ids.shape[1]]:
        pieces.append(
            model(
                ids[:, start:end],
                attention_mask=mask[:, : past + end] if mask is not None else None,
                position_ids=positions[:, start:end] if positions is not None else None,
                past_key_values=cache,
            ).logits
        )
        start = end
    return torch.cat(pieces, 1)


def positions_of(mask: Tensor) -> Tensor:
    """Position ids as generation counts them: real tokens only."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def uncompiled_flex() -> Iterator[None]:
    """FlexAttention by its own dense reference: in float64, and without a compiler run for each shape."""

    def dense(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
        return flex_attention(query, key, value, **kwargs)

    def block_mask(*args: Any, _compile: bool = False, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    compiled: Callable = flex_integration.compile_friendly_flex_attention
    flex_integration.compile_friendly_flex_attention = dense
    masking_utils.create_block_mask = block_mask
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            yield
    finally:
        flex_integration.compile_friendly_flex_attention = compiled
        masking_utils.create_block_mask = create_block_mask


@contextlib.contextmanager
def attention_backend(name: str, **changes: Any) -> Iterator[tuple[GQEForCausalLM, dict[str, float]]]:
    """A tiny model on this backend, and how near its logits are to the same model's on sdpa in float64.

    Flex has no gradients on a CPU.
    """
    with contextlib.ExitStack() as stack:
        if name == "flex_attention":
            stack.enter_context(uncompiled_flex())
            stack.enter_context(torch.no_grad())
        dtype = torch.float32 if name == "eager" else torch.float64
        yield tiny_model(name, dtype, **changes), EAGER | {"check_dtype": False} if name == "eager" else EXACT


def balance_by_hand(selected_from: list[Tensor], probs_from: list[Tensor], groups: int, top_k: int) -> Tensor:
    """The balance loss, token by token: f counted over `selected_from`, P averaged over `probs_from`.

    Both hold, for each layer, router logits [tokens, N].
    """
    total = torch.zeros((), dtype=probs_from[0].dtype)
    for counted, averaged in zip(selected_from, probs_from, strict=True):
        counted, averaged = counted.unflatten(-1, (groups, -1)), averaged.unflatten(-1, (groups, -1))
        experts = counted.shape[-1]
        for g in range(groups):
            selections = [0] * experts
            for token in counted[:, g].tolist():
                for m in sorted(range(experts), key=lambda m, token=token: (-token[m], m))[:top_k]:
                    selections[m] += 1
            fraction = torch.tensor(selections, dtype=total.dtype) / len(counted)
            total = total + experts * (fraction * averaged[:, g].softmax(-1).mean(0)).sum() / groups
    return total
