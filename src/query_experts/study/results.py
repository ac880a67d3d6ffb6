"""What a finished run comes to, as the report reads it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel

from query_experts.common.errors import SettingError
from query_experts.common.files import read_json
from query_experts.data.corpus import Corpus
from query_experts.layers.router import select_top_k
from query_experts.model import costs
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.study.callbacks import Pieces, TokenProgress, ZClipCallback, losses_are_finite
from query_experts.study.settings import RunSettings
from query_experts.training import GQETrainer

PASSAGE_TOKENS = 192


MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has four bytes at most


ROUTING_SEQUENCES = 16


DEAD_BELOW = 0.01  # an expert that fewer tokens than this wake counts as dead


def read_result(file: Path) -> dict[str, Any]:
    """A run's result. Raises SettingError for a file that isn't one."""
    remedy = "delete it, and that run is trained again"
    result = read_json(file, remedy)
    if not {"arm", "seed", "train_tokens", "validation_loss", "parameters"} <= result.keys():
        raise SettingError(f"{file} is no run's result; {remedy}")
    return result


def describe(
    settings: RunSettings, arm: str, seed: int, trainer: GQETrainer, corpus: Corpus, validation: Subset
) -> dict[str, Any]:
    """The result of a finished run, JSON-able; its fields are those of `comparison.json`'s runs."""
    model, callbacks = trainer.model, {type(c): c for c in trainer.callback_handler.callbacks}
    progress, zclip, pieces = callbacks[TokenProgress], callbacks[ZClipCallback], callbacks[Pieces]
    trained_tokens = trainer.state.global_step * settings.tokens_per_step
    diverged = not losses_are_finite(trainer.state.log_history)

    def curve(key: str) -> list[list[float]]:
        logged = [(log["step"] * settings.tokens_per_step, log[key]) for log in trainer.state.log_history if key in log]
        return [[tokens, round(loss, 5)] for tokens, loss in logged if math.isfinite(loss)]

    validation_curve = curve("eval_loss")
    if not diverged and (not validation_curve or validation_curve[-1][0] != trained_tokens):
        trainer.evaluate()
        diverged = not losses_are_finite(trainer.state.log_history)
        validation_curve = curve("eval_loss")
    head_counts = costs.heads(model.config)
    routed = isinstance(model.config, GQEConfig) and model.config.routing != "none"
    return {
        "arm": arm,
        "seed": seed,
        "parameters": costs.parameters(model),
        "active_attention_heads": head_counts.active,
        "dense_attention_heads": settings.num_attention_heads,
        "intermediate_size": model.config.intermediate_size,
        "flops_per_token": costs.flops_per_token(model.config, settings.seq_len),
        "kv_bytes_per_token": costs.kv_bytes_per_token(
            model.config, getattr(torch, settings.autocast_dtype()).itemsize
        ),
        "tokens_per_s": round(progress.tokens_per_s, 1),
        "train_seconds": round(progress.seconds, 1),
        "train_tokens": trained_tokens,
        "diverged_at_tokens": trained_tokens if diverged else None,
        "pieces": pieces.pieces,
        "clipped_steps": zclip.clipped_steps,
        "validation_loss": None if diverged else validation_curve[-1][1],
        "train_curve": curve("lm_loss"),
        "validation_curve": validation_curve,
        "routing": routing_load(model, validation) if routed and not diverged else None,
        "passage": passage(model, corpus) if routed and not diverged else None,
    }


@torch.no_grad()
def loss_of(model: PreTrainedModel, sequences: Subset, settings: RunSettings) -> float:
    """A model's language-model loss in nats a token, as the Trainer validates."""
    total, predicted = 0.0, 0
    for begin in range(0, len(sequences), settings.batch_size):
        chosen = range(begin, min(begin + settings.batch_size, len(sequences)))
        ids = torch.stack([sequences[i]["input_ids"] for i in chosen]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.autocast_dtype() == "bfloat16"):
            outputs = model.eval()(ids, labels=ids, use_cache=False)
        loss = outputs.get("lm_loss", outputs.loss)
        count = ids[:, 1:].numel()
        total, predicted = total + float(loss) * count, predicted + count
    return total / predicted


@torch.no_grad()
def router_probabilities(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """input_ids [B, T] -> probabilities [L, B*T, G, M]."""
    model.eval()
    outputs = model(input_ids.to(model.device), output_router_logits=True, use_cache=False, logits_to_keep=1)
    logits = torch.stack(outputs.router_logits).unflatten(-1, (model.config.num_key_value_heads, -1))
    return logits.softmax(-1)


def routing_load(model: PreTrainedModel, validation: Subset) -> dict[str, Any]:
    """How often each expert wakes on held-out text, the router's entropy as a share of log M, and dead experts."""
    sequences = [validation[i]["input_ids"] for i in range(min(ROUTING_SEQUENCES, len(validation)))]
    probs = router_probabilities(model, torch.stack(sequences))
    num_experts = probs.shape[-1]
    chosen = select_top_k(probs, model.config.active_query_experts)
    load = torch.nn.functional.one_hot(chosen, num_experts).sum(-2).float().mean(1)  # [L, G, M]
    entropy = -(probs * probs.clamp_min(1e-12).log()).sum(-1).mean(1)  # [L, G]
    share = entropy / torch.log(torch.tensor(float(num_experts))) if num_experts > 1 else torch.ones_like(entropy)
    return {
        "load": [[[round(x, 4) for x in group] for group in layer] for layer in load.tolist()],
        "entropy": [[round(x, 4) for x in layer] for layer in share.tolist()],
        "dead": int((load < DEAD_BELOW).sum()),
        "dead_below": DEAD_BELOW,
    }


def passage(model: PreTrainedModel, corpus: Corpus) -> dict[str, Any]:
    """A held-out text, token by token, and for each layer and group the most probable expert that it woke."""
    ids = corpus.validation[0]["input_ids"][:PASSAGE_TOKENS]
    experts = router_probabilities(model, ids[None]).argmax(-1)  # [L, T, G]
    return {"tokens": readable_tokens(corpus.tokenizer, ids.tolist()), "experts": experts.tolist()}


def readable_tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text. Of tokens that share a character, the last has it and the others are empty."""
    texts, shown, waiting = [], "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        waiting += 1
        if text.endswith("\ufffd") and waiting < MAX_CHARACTER_TOKENS:
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        shown, waiting = text, 0
    return texts
