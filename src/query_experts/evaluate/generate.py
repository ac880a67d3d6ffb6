"""`query-experts generate`: prints text of a GQE checkpoint while the model generates it.

The prompt is continued as it is: no chat template is applied.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, TextStreamer, set_seed
from transformers.generation import BaseStreamer

from query_experts.common.checkpoints import load_gqe, reason, tokens_after_text
from query_experts.common.errors import SettingError
from query_experts.evaluate.settings import GenerateSettings
from query_experts.model.kernel_choice import use_kernels

# fields of generation_config.json: those that the text follows, and those that the command's options replace or that
# change no text. Any other, such as num_beams, is named to the user as not used.
FOLLOWED = (
    "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "forced_eos_token_id", "stop_strings", "min_new_tokens",
    "min_length",
)  # fmt: skip
REPLACED = (
    "max_length", "max_new_tokens", "do_sample", "temperature", "bos_token_id", "eos_token_id", "pad_token_id",
    "use_cache", "cache_implementation", "cache_config", "return_dict_in_generate", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "transformers_version", "_from_model_config",
)  # fmt: skip


def generate(settings: GenerateSettings) -> None:
    """Print a prompt and its continuation, up to any eos token of the checkpoint or its tokenizer.

    Args:
        settings: the checkpoint, the prompt and how to sample.

    Raises:
        SettingError: for a setting that can't be used, and for a checkpoint that isn't GQE or can't be loaded.
    """
    settings.check()
    model, tokenizer = load_gqe(Path(settings.checkpoint))
    use_kernels(model, settings.kernels)
    set_seed(settings.seed)
    ids = prompt_ids(settings.prompt_text, tokenizer, model.generation_config.bos_token_id)
    longest, length = model.config.max_position_embeddings, len(ids) + settings.max_new_tokens
    if length > longest:
        note(
            f"the text may have {length:,} tokens, and the model was made for {longest:,} (max_position_embeddings); "
            "beyond them it may be worse"
        )
    greedy = settings.temperature == 0
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": settings.temperature}
    ends = eos_token_ids(settings.checkpoint, model, tokenizer)
    followed = follow_checkpoint(model)
    check_followed(settings.checkpoint, model, ends)
    model.generation_config.min_new_tokens = fewest_new_tokens(model, len(ids), settings.max_new_tokens)
    model.generation_config.min_length = None
    input_ids = torch.tensor([ids], device=settings.torch_device)
    try:
        model.to(settings.torch_device).eval().generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends or None,
            streamer=LatePrompt(TextStreamer(tokenizer, skip_special_tokens=True)),
            tokenizer=tokenizer,
            **sampling,
        )
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        if not followed:
            raise
        raise SettingError(
            f"checkpoint is {settings.checkpoint}, whose generation_config.json holds what can't be used in "
            f"{', '.join(followed)}: {reason(error)}"
        ) from error


class LatePrompt(BaseStreamer):
    """Holds the prompt back until the first token is there: what can't be used is refused before anything is printed.

    Args:
        streamer: what prints the prompt and the tokens.
    """

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = None
        self._begun = False

    def put(self, value: Tensor) -> None:
        if self._prompt is None:
            self._prompt = value
            return
        if not self._begun:
            self._streamer.put(self._prompt)
            self._begun = True
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def note(sentence: str) -> None:
    print(f"query-experts: {sentence}", file=sys.stderr)


def prompt_ids(prompt: str, tokenizer: Any, bos_token_id: int | None) -> list[int]:
    """The ids to go on from: a prompt that is no token begins with the bos token. Raises SettingError without any."""
    ids = tokenizer(prompt).input_ids
    added = len(tokens_after_text(tokenizer))
    ids = ids[: len(ids) - added]
    if ids:
        return ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos_token_id
    if first is None:
        raise SettingError(
            f"prompt is {prompt!r}, of which the checkpoint's tokenizer makes no token, and it has no bos_token to "
            "begin with; prompt must hold text"
        )
    return [first]


def eos_token_ids(checkpoint: str, model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends a text. Raises SettingError for what is no id."""
    size = model.config.vocab_size
    found = {token for token in as_list(tokenizer.eos_token_id) if token < size}
    for named in (model.generation_config.eos_token_id, model.config.eos_token_id):
        ids = as_list(named)
        if not are_ids(ids, size):
            raise SettingError(
                f"checkpoint is {checkpoint}, whose eos_token_id is {named!r}; it must be an id or a list of ids, from "
                f"0 to {size - 1}"
            )
        found.update(ids)
    return sorted(found)


def as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def are_ids(ids: list[Any], size: int) -> bool:
    """Whether all are ids of a vocabulary of `size`."""
    return all(type(token) is int and 0 <= token < size for token in ids)


def check_followed(checkpoint: str, model: PreTrainedModel, ends: list[int]) -> None:
    """Raises SettingError for fields that generating would pass over, or find only at the end of a text.

    Args:
        checkpoint: its folder.
        model: the model, with the generation settings that the text follows.
        ends: the ids that end a text.
    """

    def refuse(name: str, why: str) -> None:
        raise SettingError(
            f"checkpoint is {checkpoint}, whose generation_config.json holds what can't be used in {name}: {why}"
        )

    config, size = model.generation_config, model.config.vocab_size
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        if not are_ids(as_list(held := getattr(config, name)), size):
            refuse(name, f"it is {held!r}; it must hold ids from 0 to {size - 1}")
    for name in ("min_new_tokens", "min_length"):
        held = getattr(config, name)
        if held is not None and (type(held) is not int or held < 0):
            refuse(name, f"it is {held!r}; it must be a number of tokens, 0 or more")
    if config.exponential_decay_length_penalty is not None and not ends:
        refuse("exponential_decay_length_penalty", "it needs an eos token, and there is none")


def fewest_new_tokens(model: PreTrainedModel, prompt: int, most: int) -> int | None:
    """The tokens that must come, by min_new_tokens and min_length, which counts the prompt's; None without either."""
    asked = model.generation_config.min_new_tokens, model.generation_config.min_length
    if asked == (None, None):
        return None
    fewest = max(asked[0] or 0, (asked[1] or 0) - prompt)
    if fewest > most:
        note(
            f"the checkpoint's generation_config.json asks for {fewest:,} new tokens or more; the text ends after "
            f"{most:,} (max_new_tokens)"
        )
    return min(fewest, most)


def follow_checkpoint(model: PreTrainedModel) -> list[str]:
    """Leaves in the model's generation settings what the text follows, and notes what isn't used.

    Returns the names of what is left.
    """
    asked = model.generation_config.to_diff_dict()
    if unused := sorted(asked.keys() - {*FOLLOWED, *REPLACED}):
        note(f"the checkpoint's generation_config.json sets {', '.join(unused)}, which this command doesn't use")
    followed = {name: asked[name] for name in FOLLOWED if name in asked}
    model.generation_config = GenerationConfig(**followed)
    return [*followed]
