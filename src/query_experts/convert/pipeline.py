"""Converts a model one layer at a time and, if there is text, runs the dense and the converted model on it meanwhile.

The dense model's hidden states pass from layer to layer as the conversion proceeds. The converted model's hidden states
do so too, on the held-out sequences. After the last layer the output embedding gives both models' losses and their
divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig

from query_experts.common.checkpoints import is_finite
from query_experts.common.errors import SettingError
from query_experts.convert.calibration import HELD_OUT, Fit
from query_experts.convert.layers import LayerActivations, Plan, convert_layer
from query_experts.convert.weight_map import IGNORED_TENSORS, LAYER_PREFIX, LAYER_RULES, OUTSIDE_RULES, to_gqe
from query_experts.model.modeling_gqe import GQEForCausalLM

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PASS_TOKENS = 4096  # tokens that pass through a layer at a time


class DenseTensors(Protocol):
    """A dense model's tensors, in parts."""

    config: PreTrainedConfig

    def outside(self) -> dict[str, Tensor]:
        """The tensors outside of the decoder layers, by their full names: embeddings and the last norm."""

    def layer(self, number: int) -> dict[str, Tensor]:
        """A decoder layer's tensors, by their names after `model.layers.N.`."""


@dataclass
class Report:
    """What a conversion measured. All but `fits` needs text to calibrate on, and stays empty without.

    Attributes:
        fits: the router's fit of each layer; None for a layer whose router isn't fitted.
        tokens: predicted tokens of the held-out sequences.
        dense_loss: the dense model's loss on them, in nats per token.
        gqe_loss: the converted model's loss on them, in nats per token.
        kl: KL(dense || converted) on them, in nats per token.
    """

    fits: list[Fit | None] = field(default_factory=list)
    tokens: int = 0
    dense_loss: float | None = None
    gqe_loss: float | None = None
    kl: float | None = None


def convert_in_parts(
    dense: DenseTensors, plan: Plan, text: Tensor | None, report: Report
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors outside of the layers, then each layer's, by their full names; fill the report.

    text: token ids [sequences, T] to calibrate on; every fifth sequence is held out. Raises SettingError for tensors
    that can't be converted, and for text that can't be used.
    """
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GQEForCausalLM(plan.final).state_dict().items()}
    if plan.final.tie_word_embeddings:
        del shapes["lm_head.weight"]
    outside = check_values(dense.outside())
    run = CalibrationRun(dense.config, plan, outside, text) if text is not None else None
    converted = check_shapes(to_gqe(outside, OUTSIDE_RULES, plan.full), shapes)
    check_none_missing([name for name in shapes if not name.startswith(LAYER_PREFIX)])
    yield converted
    del outside, converted
    for number in range(plan.full.num_hidden_layers):
        yield convert_next_layer(dense, number, plan, run, shapes, report)
    if run is not None:
        run.measure(report)


def convert_next_layer(
    dense: DenseTensors,
    number: int,
    plan: Plan,
    run: CalibrationRun | None,
    shapes: dict[str, torch.Size],
    report: Report,
) -> dict[str, Tensor]:
    """A converted layer's tensors, by their full names.

    A function of its own, so that nothing holds these tensors, or the dense layer's, after it returns.
    """
    prefix = f"{LAYER_PREFIX}{number}."
    dense_tensors = check_values(dense.layer(number), prefix)
    tensors = to_gqe(dense_tensors, LAYER_RULES[plan.model_type], plan.full, prefix)
    activations = run.observe(dense_tensors, prefix) if run is not None else None
    tensors, fit = convert_layer(tensors, plan, prefix, activations)
    named = check_shapes({prefix + name: tensor for name, tensor in tensors.items()}, shapes)
    check_none_missing([name for name in shapes if name.startswith(prefix)])
    report.fits.append(fit)
    if run is not None:
        run.run_converted(tensors)
    return named


def check_values(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The same tensors. Raises SettingError for a dtype that no weight has, and for NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise SettingError(
                f"checkpoint's {prefix}{name} is of {dtype}; it must be of float16, bfloat16, float32 or float64"
            )
        if not is_finite(tensor):
            raise SettingError(f"checkpoint's {prefix}{name} holds numbers that aren't finite; all must be")
    return tensors


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The same tensors, whose names it removes from `shapes`.

    Raises SettingError for a tensor that isn't in `shapes`, or has another shape there.
    """
    for name, tensor in tensors.items():
        shape = shapes.pop(name, None)
        if shape != tensor.shape:
            allowed = f"have shape {list(shape)}" if shape is not None else "not be there"
            raise SettingError(f"{name} has shape {list(tensor.shape)}; by config.json it must {allowed}")
    return tensors


def check_none_missing(missing: list[str]) -> None:
    """Raises SettingError for the first name of a missing tensor."""
    if missing:
        raise SettingError(f"checkpoint has no tensor {min(missing)}; by its config.json it must have it")


class CalibrationRun:
    """Runs the dense and the converted model on text, one layer of each at a time.

    Raises SettingError for text that isn't token ids of the model, or is too short.
    """

    def __init__(self, config: PreTrainedConfig, plan: Plan, outside: dict[str, Tensor], text: Tensor):
        check_calibration(text, plan)
        self.text = text
        self.held_out = torch.arange(len(text)) % HELD_OUT == HELD_OUT - 1
        embeddings = outside["model.embed_tokens.weight"]
        self.output_embedding = outside.get("lm_head.weight", embeddings).to(embeddings.dtype)
        self.dtype = embeddings.dtype  # both models run in it, even if the checkpoint has norms of another dtype
        self.dense_hidden = F.embedding(text.to(embeddings.device), embeddings)  # [sequences, T, D]
        self.converted_hidden = self.dense_hidden[self.held_out.to(self.dense_hidden.device)]
        position_ids = torch.arange(text.shape[1], device=embeddings.device)[None]
        self.dense_layer, self.norm, dense_rotary = skeleton(config, AutoModelForCausalLM.from_config)
        self.converted_layer, _, converted_rotary = skeleton(plan.final, GQEForCausalLM._from_config)
        self.norm.load_state_dict({"weight": outside["model.norm.weight"].to(self.dtype)}, assign=True)
        self.dense_positions, self.converted_positions = (
            {"position_embeddings": rotary(self.dense_hidden, position_ids), "position_ids": position_ids}
            for rotary in (dense_rotary, converted_rotary)
        )

    @torch.no_grad()
    def observe(self, tensors: dict[str, Tensor], prefix: str) -> LayerActivations:
        """Run a dense layer over the dense hidden states, and return what it computes.

        prefix: text before the tensors' names in the model. Raises SettingError for tensors that don't fit the
        configuration, and for hidden states that overflow.
        """
        layer, inputs, heads = self.dense_layer, [], []
        try:
            kept = {n: t.to(self.dtype) for n, t in tensors.items() if not n.endswith(IGNORED_TENSORS)}
            layer.load_state_dict(kept, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise SettingError(f"checkpoint's tensors {prefix}* aren't those of its config.json: {reason}") from error
        attention = layer.self_attn
        hooks = [
            layer.input_layernorm.register_forward_hook(lambda _, __, out: inputs.append(out)),
            attention.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0])),
        ]
        try:
            self.dense_hidden = self._run_layer(layer, self.dense_hidden, self.dense_positions)
        finally:
            for hook in hooks:
                hook.remove()
            layer.to("meta")
        self.check_finite(self.dense_hidden, f"{prefix[:-1]} of the dense model")
        rows = self.held_out.to(self.dense_hidden.device).repeat_interleave(self.dense_hidden.shape[1])
        by_head = torch.cat(heads).flatten(0, 1).unflatten(-1, (-1, attention.head_dim))
        return LayerActivations(torch.cat(inputs).flatten(0, 1), by_head, rows)

    @torch.no_grad()
    def run_converted(self, tensors: dict[str, Tensor]) -> None:
        """Run a converted layer over the converted model's hidden states. Raises SettingError if they overflow."""
        layer = self.converted_layer
        layer.load_state_dict({name: tensor.to(self.dtype) for name, tensor in tensors.items()}, assign=True)
        self.converted_hidden = self._run_layer(layer, self.converted_hidden, self.converted_positions)
        layer.to("meta")
        self.check_finite(self.converted_hidden, "the converted model")

    def check_finite(self, tensor: Tensor, source: str) -> None:
        """Raises SettingError, naming the source, for NaN or infinity."""
        if not is_finite(tensor):
            dtype = str(self.dtype).removeprefix("torch.")
            allowed = (
                "must be saved in bfloat16 or float32" if self.dtype == torch.float16 else "must hold other weights"
            )
            raise SettingError(
                f"checkpoint is of {dtype}, and {source} overflows on the text to calibrate on; it {allowed}"
            )

    def _run_layer(self, layer: nn.Module, hidden: Tensor, positions: dict[str, Any]) -> Tensor:
        sequences = max(1, PASS_TOKENS // hidden.shape[1])
        return torch.cat([layer(part, attention_mask=None, **positions) for part in hidden.split(sequences)])

    @torch.no_grad()
    def measure(self, report: Report) -> None:
        """Fill in both models' losses and KL(dense || converted) on the held-out sequences, in nats per token."""
        sums = torch.zeros(3, dtype=torch.float64)
        held_out = self.text[self.held_out]
        dense_hidden = self.dense_hidden[self.held_out.to(self.dense_hidden.device)]
        for ids, dense, converted in zip(held_out, dense_hidden, self.converted_hidden, strict=True):
            log_probs = [self.log_probabilities(hidden) for hidden in (dense, converted)]
            labels = ids[1:].to(self.output_embedding.device)
            losses = [F.nll_loss(log, labels, reduction="sum") for log in log_probs]
            divergence = F.kl_div(log_probs[1], log_probs[0], reduction="sum", log_target=True)
            sums += torch.stack([*losses, divergence]).double().cpu()
        self.check_finite(sums, "the output embedding")
        report.tokens = held_out.shape[0] * (held_out.shape[1] - 1)
        report.dense_loss, report.gqe_loss, report.kl = (sums / report.tokens).tolist()

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """The last layer's hidden states [T, D] -> log-probabilities of the next tokens, float32 [T - 1, V]."""
        return F.linear(self.norm(hidden), self.output_embedding).float().log_softmax(-1)[:-1]


def check_calibration(text: Tensor, plan: Plan) -> None:
    """Raises SettingError unless the text is token ids [sequences, T] of the model, with enough sequences."""
    if not isinstance(text, Tensor):
        raise SettingError(
            f"calibration is a {type(text).__name__}; it must be a tensor of token ids [sequences, tokens]"
        )
    if text.ndim != 2 or text.dtype not in (torch.int64, torch.int32) or text.shape[0] < HELD_OUT or text.shape[1] < 2:
        raise SettingError(
            f"calibration has shape {list(text.shape)} and dtype {text.dtype}; it must be token ids [sequences, "
            f"tokens], {HELD_OUT} sequences or more of 2 tokens or more"
        )
    for extreme in (int(text.min()), int(text.max())):
        if not 0 <= extreme < plan.full.vocab_size:
            raise SettingError(
                f"calibration holds token {extreme}; it must be 0 or more and below vocab_size, {plan.full.vocab_size}"
            )


def skeleton(config: PreTrainedConfig, build: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """A decoder layer and the last norm of a model on the meta device, without memory, and its rotary embedding."""
    one_layer = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1, "layer_types": None})
    with torch.device("meta"):
        model = build(one_layer, attn_implementation="sdpa").eval()
    return model.model.layers[0], model.model.norm, type(model.model.rotary_emb)(config=one_layer)
