"""Measures a trained model: its result, its loss, the load of its experts, and the experts that a passage selects."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel

from query_experts.data import Corpus, ValidationPart
from query_experts.layers.balance import DEAD_BELOW, relative_entropy, selected_experts
from query_experts.model import costs
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.study.callbacks import Pieces, TokenProgress, ZClipCallback, has_diverged
from query_experts.study.results import (
    Curve,
    ParameterCounts,
    PartLoss,
    Passage,
    Piece,
    RoutingLoad,
    RoutingPoint,
    RunResult,
)
from query_experts.study.settings import RunSettings
from query_experts.training import GQETrainer

P = ParamSpec("P")
T = TypeVar("T")
PASSAGE_TOKENS = 192
MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has four bytes at most
ROUTING_SEQUENCES = 16
LOGGED_ROUTING = {  # field of RoutingPoint -> telemetry's name
    "entropy": "moe/router_entropy_mean",
    "entropy_lowest": "moe/router_entropy_min",
    "highest_load": "moe/load_max",
    "dead": "moe/dead_experts",
}


def as_it_is(measure: Callable[P, T]) -> Callable[P, T]:
    """A measurement that runs compiled models uncompiled: other batch sizes would compile them anew."""

    @wraps(measure)
    def measured(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.compiler.set_stance("force_eager"):
            return measure(*args, **kwargs)

    return measured


def validation_split(settings: RunSettings, corpus: Corpus) -> Subset:
    """`validation_sequences` of the held-out sequences, spread evenly over them, or all where there are fewer.

    The first sequence of each validation file is added where none of its sequences is among them.
    """
    available = len(corpus.validation)
    count = min(settings.validation_sequences or available, available)
    chosen = {i * available // count for i in range(count)}
    missed = [part.first_sequence for part in corpus.validation_parts if chosen.isdisjoint(_positions(part))]
    return Subset(corpus.validation, sorted(chosen.union(missed)))


def routing_split(settings: RunSettings, corpus: Corpus) -> Subset:
    """The held-out sequences whose first ones show the load; with validation files, some of every file."""
    if corpus.validation_parts:
        settings = dataclasses.replace(settings, validation_sequences=ROUTING_SEQUENCES)
    return validation_split(settings, corpus)


def _positions(part: ValidationPart) -> range:
    """Where the part's sequences are within the held-out ones."""
    return range(part.first_sequence, part.first_sequence + part.sequences)


def describe(settings: RunSettings, arm: str, seed: int, trainer: GQETrainer, corpus: Corpus) -> RunResult:
    """Measures the model of a finished run. Evaluates it first where the last step had no validation."""
    model, config = trainer.model, trainer.model.config
    progress, zclip, pieces = (callback_of(trainer, kind) for kind in (TokenProgress, ZClipCallback, Pieces))
    trained_tokens = trainer.state.global_step * settings.tokens_per_step
    validation_curve = _final_validation_curve(trainer, settings.tokens_per_step)
    facts = corpus.facts
    diverged = diverged_run(trainer)
    validation_loss = None if diverged else validation_curve[-1][1]
    routed = is_routed(model) and not diverged
    bytes_per_value = getattr(torch, settings.autocast_dtype()).itemsize
    return RunResult(
        arm=arm,
        seed=seed,
        parameters=ParameterCounts(**costs.parameters(model)),
        active_attention_heads=costs.heads(config).active,
        dense_attention_heads=settings.num_attention_heads,
        intermediate_size=config.intermediate_size,
        flops_per_token=costs.flops_per_token(config, settings.seq_len),
        kv_bytes_per_token=costs.kv_bytes_per_token(config, bytes_per_value),
        tokens_per_s=round(progress.tokens_per_s, 1),
        train_seconds=round(progress.seconds, 1),
        train_tokens=trained_tokens,
        diverged_at_tokens=trained_tokens if diverged else None,
        pieces=[Piece(**piece) for piece in pieces.pieces],
        clipped_steps=zclip.clipped_steps,
        skipped_steps=zclip.skipped_steps or None,
        validation_loss=validation_loss,
        train_curve=curve_of(trainer, "lm_loss", settings.tokens_per_step),
        validation_curve=validation_curve,
        routing=routing_load(model, routing_split(settings, corpus)) if routed else None,
        passage=passage(model, corpus) if routed else None,
        bits_per_byte=None
        if validation_loss is None
        else bits_per_byte(validation_loss, facts.validation_tokens, facts.validation_bytes),
        validation_parts=None if diverged else losses_by_part(model, corpus, settings) or None,
        routing_curve=routing_curve(trainer, settings.tokens_per_step) or None,
    )


def callback_of(trainer: GQETrainer, kind: type) -> Any:
    """The Trainer's callback of a kind; a resumed Trainer has made its own anew."""
    return next(callback for callback in trainer.callback_handler.callbacks if type(callback) is kind)


def diverged_run(trainer: GQETrainer) -> bool:
    """Whether a run has diverged, as far as it has been validated."""
    return has_diverged(trainer.callback_handler.callbacks, trainer.state.log_history)


def is_routed(model: PreTrainedModel) -> bool:
    """Whether a model has routers."""
    return isinstance(model.config, GQEConfig) and model.config.routing != "none"


def curve_of(trainer: GQETrainer, key: str, tokens_per_step: int) -> Curve:
    """The finite losses that the Trainer logged under a key."""
    logged = [(log["step"] * tokens_per_step, log[key]) for log in trainer.state.log_history if key in log]
    return [(tokens, round(loss, 5)) for tokens, loss in logged if math.isfinite(loss)]


def routing_curve(trainer: GQETrainer, tokens_per_step: int) -> list[RoutingPoint]:
    """The routing that telemetry logged, without what isn't finite."""
    logged = [log for log in trainer.state.log_history if {*LOGGED_ROUTING.values()} <= log.keys()]
    finite = [log for log in logged if all(math.isfinite(log[name]) for name in LOGGED_ROUTING.values())]
    return [
        RoutingPoint(tokens=log["step"] * tokens_per_step, **{key: log[name] for key, name in LOGGED_ROUTING.items()})
        for log in finite
    ]


def _final_validation_curve(trainer: GQETrainer, tokens_per_step: int) -> Curve:
    """The validation curve; it ends with the last step unless the run diverged."""
    curve = curve_of(trainer, "eval_loss", tokens_per_step)
    complete = bool(curve) and curve[-1][0] == trainer.state.global_step * tokens_per_step
    if complete or diverged_run(trainer):
        return curve
    trainer.evaluate()
    return curve_of(trainer, "eval_loss", tokens_per_step)


@as_it_is
@torch.no_grad()
def loss_of(model: PreTrainedModel, sequences: Subset, settings: RunSettings) -> float:
    """A model's language-model loss in nats a token, computed as the Trainer computes its validation loss."""
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


def losses_by_part(model: PreTrainedModel, corpus: Corpus, settings: RunSettings) -> list[PartLoss]:
    """A model's language-model loss on each validation file, in the order of `corpus.validation_parts`.

    Taken over those sequences of the validation split that are the file's, in batches and with autocast as `loss_of`
    does. So the mean of the losses, weighted by predicted tokens, is the validation loss. Empty without validation
    files. The model is left in evaluation mode.
    """
    chosen = validation_split(settings, corpus).indices
    losses = []
    for part in corpus.validation_parts:
        own = [position for position in chosen if position in _positions(part)]
        loss = loss_of(model, Subset(corpus.validation, own), settings)
        bits = bits_per_byte(loss, part.tokens, part.text_bytes)
        losses.append(PartLoss(part.name, loss, bits, len(own) * (settings.seq_len - 1)))
    return losses


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """The loss of a text in bits per byte: loss * tokens / text_bytes / ln 2.

    It compares models with different tokenizers. The loss is a mean over predicted tokens, and so over a sample of the
    text; tokens and bytes are those of the whole text.

    Args:
        loss: Mean nats for each predicted token.
        tokens: Tokens of the text, with an end-of-text token for each document.
        text_bytes: Bytes of the text in UTF-8, without end-of-text tokens.
    """
    return loss * tokens / text_bytes / math.log(2)


@as_it_is
@torch.no_grad()
def router_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """input_ids [B, T] -> logits of the routers, [L, B*T, G, M]."""
    model.eval()
    outputs = model(input_ids.to(model.device), output_router_logits=True, use_cache=False, logits_to_keep=1)
    return torch.stack(outputs.router_logits).unflatten(-1, (model.config.num_key_value_heads, -1))


def routing_load(model: PreTrainedModel, validation: Subset) -> RoutingLoad:
    """The load of each expert and the entropy of each router, on held-out sequences."""
    sequences = [validation[i]["input_ids"] for i in range(min(ROUTING_SEQUENCES, len(validation)))]
    logits = router_logits(model, torch.stack(sequences))
    load = selected_experts(logits, model.config.active_query_experts).float().mean(1)  # [L, G, M]
    entropy = relative_entropy(logits).mean(1)  # [L, G]
    return RoutingLoad(
        load=[[[round(x, 4) for x in group] for group in layer] for layer in load.tolist()],
        entropy=[[round(x, 4) for x in layer] for layer in entropy.tolist()],
        dead=int((load < DEAD_BELOW).sum()),
        dead_below=DEAD_BELOW,
    )


def passage(model: PreTrainedModel, corpus: Corpus) -> Passage:
    """A held-out text, and for each layer and group the most probable expert of each token."""
    ids = corpus.validation[0]["input_ids"][:PASSAGE_TOKENS]
    experts = router_logits(model, ids[None]).argmax(-1)  # [L, T, G]
    return Passage(readable_tokens(corpus.tokenizer, ids.tolist()), experts.tolist())


def readable_tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens goes to the last; the others are empty."""
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
