"""`query-experts generate`: prints text of a GQE checkpoint while the model generates it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from transformers import GenerationConfig, TextStreamer, set_seed

from query_experts.common.checkpoints import load_gqe
from query_experts.common.device import resolve_device
from query_experts.common.errors import SettingError
from query_experts.common.settings import check_seeds

LOWEST_TEMPERATURE = 1e-3  # far below it logits overflow


def generate(
    checkpoint: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str = "auto"
) -> None:
    """Print a prompt and its continuation.

    Args:
        checkpoint: folder of a GQE checkpoint with its tokenizer.
        prompt: the text to continue.
        max_new_tokens: tokens to generate, 1 or more.
        temperature: 0 takes the most probable token; else it must be 0.001 or more.
        seed: of the sampling.
        device: auto, cpu, cuda or mps.

    Raises:
        SettingError: for a setting that can't be used, and for a checkpoint that isn't GQE or can't be loaded.
    """
    if not prompt:
        raise SettingError("prompt is empty; it must hold text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise SettingError(f"prompt is {prompt!r}, which isn't UTF-8; it must be text") from error
    if max_new_tokens < 1:
        raise SettingError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if temperature != 0 and not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise SettingError(f"temperature is {temperature}; it must be 0, or a number from {LOWEST_TEMPERATURE} on")
    check_seeds("seed", [seed])
    device = resolve_device(device)
    model, tokenizer = load_gqe(checkpoint)
    set_seed(seed)
    tokens = tokenizer(prompt, return_tensors="pt").to(device)
    longest, length = model.config.max_position_embeddings, tokens.input_ids.shape[1] + max_new_tokens
    if length > longest:
        print(
            f"query-experts: the text may have {length:,} tokens, and the model was made for {longest:,} "
            "(max_position_embeddings); beyond them it may be worse",
            file=sys.stderr,
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    model.generation_config = GenerationConfig()  # the checkpoint's own may set beams, which can't be streamed
    model.to(device).eval().generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
