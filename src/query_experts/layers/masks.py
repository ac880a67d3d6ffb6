"""Builds attention masks: causal, without padding, one document at a time.

Transformers builds the masks of every attention backend. This file adds the document rule, which also holds with a
cache and with an all-ones attention mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchdynamo_compiling
from transformers.utils.generic import is_flash_attention_requested

from query_experts.ops.attend import is_empty

MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclass
class AttentionBackend:
    """The part of a model's config that Transformers' mask and attention interfaces read, for a layer without one."""

    _attn_implementation: str


SDPA = AttentionBackend("sdpa")


def attention_backend(name: str) -> AttentionBackend:
    """The backend of that name. Raises ValueError for one that Transformers doesn't know."""
    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if name not in known:
        raise ValueError(f"attn_implementation is {name!r}; it must be one of {', '.join(known)}")
    return AttentionBackend(name)


@dataclass(frozen=True)
class CacheLengths:
    """The lengths of a cache before this step, under the methods that mask functions call.

    A static cache's length is a live tensor that `update` advances; FlexAttention evaluates its mask after that.
    """

    past: Any  # int, or a tensor for a static cache
    num_keys: int
    offset: int
    is_compileable: bool
    is_sliding: tuple[bool, ...] = (False,)

    @classmethod
    def of(cls, cache: Cache | None, num_tokens: int, layer_idx: int) -> CacheLengths | None:
        if cache is None:
            return None
        past = cache.get_seq_length(layer_idx)
        past = past.clone() if isinstance(past, Tensor) else past
        num_keys, offset = cache.get_mask_sizes(num_tokens, layer_idx)
        return cls(past, num_keys, offset, bool(getattr(cache, "is_compileable", False)))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.num_keys, self.offset


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read: not on the meta device, nor those of a fake or another special tensor."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def padding_mask(mask: Tensor, batch: int) -> Tensor:
    """A model's attention mask [B or 1, S], nonzero for real tokens, with B rows.

    Raises:
        ValueError: for another number of rows, as a causal [T, T] mask has.
    """
    if mask.shape[0] not in (1, batch):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; it must have a row for each of the {batch} rows of tokens, "
            "nonzero for real tokens (no mask is needed for causality)"
        )
    return mask.expand(batch, -1)


def causal_mask(
    config: Any,
    x: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
    materialise: bool = False,
    layer_idx: int = 0,
) -> Any:
    """Builds the mask for `config._attn_implementation`, in the form that its kernel takes.

    None: causal by flag, or no tokens.

    Args:
        config: a model's config, or an `AttentionBackend`.
        x: [B, T, D]; its shape, dtype and device are read.
        attention_mask: [B, S], nonzero for real tokens; or a prepared 4D mask, which is returned as it is; or None.
        past_key_values: the cache, before the new tokens are added.
        position_ids: [B or 1, T], given only where positions may restart.
        materialise: for decoding, give sdpa's boolean [B, 1, T, S] whatever the backend (None where a single new token
            sees every key).
        layer_idx: the layer of the cache whose length counts.

    Raises:
        ValueError: for a dtype or packed documents that flash attention can't serve, and for packed documents without
            causality.
    """
    if is_empty(x):
        return None
    flash = is_flash_attention_requested(config)
    if flash and x.dtype not in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"dtype is {x.dtype}; {config._attn_implementation} takes float16 or bfloat16")
    cache = CacheLengths.of(past_key_values, x.shape[1], layer_idx)
    documents = None
    if position_ids is not None and (attention_mask is None or len(attention_mask.shape) == 2):
        documents = document_rule(x, attention_mask, cache, position_ids)
    causal = getattr(config, "is_causal", True)  # Transformers' switch, which makes an encoder of a decoder
    if documents is not None and not causal:
        raise ValueError("is_causal is False, and position_ids restart; a row must then hold one document")
    if materialise and causal:
        config = SDPA
    elif flash and documents is not None and position_ids is not None:
        return _flash_documents(position_ids, x.shape[0], attention_mask, cache)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        past_key_values=cache,
        and_mask_function=documents,
        allow_is_causal_skip=not (materialise and x.shape[1] > 1),
    )
    if isinstance(mask, Tensor) and mask.dtype == torch.float64:
        # eager takes its softmax in float32, where float64's lowest number is -inf and a row of them is NaN
        mask = mask.clamp(min=torch.finfo(torch.float32).min)
    return mask


def document_rule(
    x: Tensor, attention_mask: Tensor | None, cache: CacheLengths | None, position_ids: Tensor
) -> MaskFunction | None:
    """Returns a mask function that keeps the documents of a row apart, or None where no row is seen to hold two.

    A token at position p is the r-th real token of its row. Its document began p real tokens ago, so it sees real keys
    of rank r - p and later. This needs no document numbers and holds across a cache; padding doesn't count. Where the
    position doesn't increase from one real token to the next, a new document begins whatever its position. (Only the
    first rule reaches across chunks: a document that begins with a chunk must begin at position 0.)
    """
    batch_size, length = x.shape[:2]
    position_ids = position_ids.expand(batch_size, -1)
    past, num_keys = (cache.past, cache.num_keys) if cache is not None else (0, length)
    if attention_mask is None:
        real = torch.ones(batch_size, num_keys, dtype=torch.bool, device=x.device)
    else:
        num_keys = max(num_keys, attention_mask.shape[-1])
        real = F.pad(attention_mask.to(x.device).bool(), (0, num_keys - attention_mask.shape[-1]))
    key_rank = real.cumsum(-1) - 1  # [B, S]
    steps = torch.arange(length, device=x.device)
    new = steps + past  # [T], positions of the new tokens among the keys
    query_rank, query_real = key_rank[:, new], real[:, new]  # [B, T]

    last_real = torch.where(query_real, steps, -1).cummax(-1).values
    previous = F.pad(last_real[:, :-1], (1, 0), value=-1)  # [B, T], the previous real token; -1: none in this chunk
    restarts = query_real & (previous >= 0) & (position_ids <= position_ids.gather(1, previous.clamp(min=0)))
    restarted_at = torch.where(restarts, query_rank, 0).cummax(-1).values
    first_rank = torch.maximum(query_rank - position_ids, restarted_at)  # [B, T]
    if not is_torchdynamo_compiling() and has_values(first_rank) and bool((first_rank[query_real] <= 0).all()):
        return None

    def same_document(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key_rank[batch, key] >= first_rank[batch, query - past]

    return same_document


def _flash_documents(
    position_ids: Tensor, batch_size: int, attention_mask: Tensor | None, cache: CacheLengths | None
) -> None:
    """Checks that FlashAttention can separate the documents: it does so in one row without padding or cached keys.

    It cuts the row wherever position_ids has its lowest value. A compiled graph can't read tensor values: there
    position_ids count as packed, a mask counts as padding, and the starts of documents aren't checked.
    """
    compiling = is_torchdynamo_compiling()
    padded = attention_mask is not None and (compiling or not bool(attention_mask.all()))
    if batch_size > 1 or padded or (cache is not None and (compiling or cache.past > 0)):
        hint = "; under torch.compile, leave out position_ids that separate nothing" if compiling else ""
        raise ValueError(
            "attn_implementation: flash attention separates packed documents only in a batch of one row, without "
            f"padding and before anything is cached; use sdpa, eager or flex_attention here{hint}"
        )
    if compiling:
        return
    positions = position_ids[0]
    starts = torch.cat([positions[:1], positions[1:][positions[1:] <= positions[:-1]]])
    if bool((starts != positions.min()).any()):
        raise ValueError(
            f"position_ids: documents begin at {sorted(set(starts.tolist()))}; flash attention separates them only "
            "where all begin at the same position; use sdpa, eager or flex_attention here"
        )
