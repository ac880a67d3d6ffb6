"""`query-experts generate`: prints text of a GQE checkpoint while the model generates it."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import GenerationConfig, TextStreamer, set_seed

from query_experts.common.checkpoints import load_gqe
from query_experts.evaluate.settings import GenerateSettings


def generate(settings: GenerateSettings) -> None:
    """Print a prompt and its continuation.

    Args:
        settings: the checkpoint, the prompt and how to sample.

    Raises:
        SettingError: for a setting that can't be used, and for a checkpoint that isn't GQE or can't be loaded.
    """
    settings.check()
    model, tokenizer = load_gqe(Path(settings.checkpoint))
    set_seed(settings.seed)
    tokens = tokenizer(settings.prompt_text, return_tensors="pt").to(settings.torch_device)
    longest, length = model.config.max_position_embeddings, tokens.input_ids.shape[1] + settings.max_new_tokens
    if length > longest:
        print(
            f"query-experts: the text may have {length:,} tokens, and the model was made for {longest:,} "
            "(max_position_embeddings); beyond them it may be worse",
            file=sys.stderr,
        )
    greedy = settings.temperature == 0
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": settings.temperature}
    model.generation_config = GenerationConfig()  # the checkpoint's own may set beams, which can't be streamed
    model.to(settings.torch_device).eval().generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
