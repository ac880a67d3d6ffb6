"""Converting a model layer by layer, so that one layer is held at a time; beside it, if there is text, both run on it.

The dense model's hidden states go from layer to layer as the conversion does, and so do the converted model's on the
sequences that are held out; at the end both meet the output embedding, and their losses and divergence are known.
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
from query_experts.convert.layers import Observed, Plan, convert_layer
from query_experts.convert.weight_map import LAYER, LAYERS, LEFT_OUT, OUTSIDE, to_gqe
from query_experts.model.modeling_gqe import GQEForCausalLM

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PASS_TOKENS = 4096  # that go through a layer at once


class Dense(Protocol):
    """Where a dense model's tensors come from."""

    config: PreTrainedConfig

    def outside(self) -> dict[str, Tensor]:
        """Embeddings and the last norm."""

    def layer(self, number: int) -> dict[str, Tensor]:
        """A decoder layer's tensors, by their names behind `model.layers.N.`."""


@dataclass
class Report:
    """What a conversion came to. fits: a layer's router each. Losses in nats a token, on the held-out sequences."""

    fits: list[Fit | None] = field(default_factory=list)
    tokens: int = 0
    dense_loss: float | None = None
    gqe_loss: float | None = None
    kl: float | None = None


def convert(dense: Dense, plan: Plan, text: Tensor | None, report: Report) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors outside of the layers, then each layer's, by their full names; fills the report.

    text: token ids [sequences, T] to calibrate on, every fifth sequence held out.
    """
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in GQEForCausalLM(plan.final).state_dict().items()}
    if plan.final.tie_word_embeddings:
        del wanted["lm_head.weight"]
    outside = check_values(dense.outside())
    run = CalibrationRun(dense.config, plan, outside, text) if text is not None else None
    mapped = check_shapes(to_gqe(outside, OUTSIDE, plan.full), wanted)
    if missing := [name for name in wanted if not name.startswith(LAYERS)]:
        raise SettingError(f"checkpoint has no tensor {min(missing)}; by its config.json it must have it")
    yield mapped
    del outside, mapped
    for number in range(plan.full.num_hidden_layers):
        yield converted_layer(dense, number, plan, run, wanted, report)
    if run is not None:
        run.judge(report)


def converted_layer(
    dense: Dense, number: int, plan: Plan, run: CalibrationRun | None, wanted: dict[str, torch.Size], report: Report
) -> dict[str, Tensor]:
    """A layer's tensors by their full names; nothing else holds them, or the dense layer's, once this has returned."""
    where = f"{LAYERS}{number}."
    tensors = check_values(dense.layer(number), where)
    mapped = to_gqe(tensors, LAYER[plan.model_type], plan.full, where)
    observed = run.observe(tensors, where) if run is not None else None
    ours, fit = convert_layer(mapped, plan, where, observed)
    complete = check_shapes({where + name: tensor for name, tensor in ours.items()}, wanted)
    if missing := [name for name in wanted if name.startswith(where)]:
        raise SettingError(f"checkpoint has no tensor {min(missing)}; by its config.json it must have it")
    report.fits.append(fit)
    if run is not None:
        run.follow(ours)
    return complete


def check_values(tensors: dict[str, Tensor], where: str = "") -> dict[str, Tensor]:
    """The tensors as they are. Raises SettingError for one that isn't of a weight's dtype, or holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise SettingError(
                f"checkpoint's {where}{name} is of {dtype}; it must be of float16, bfloat16, float32 or float64"
            )
        if not is_finite(tensor):
            raise SettingError(f"checkpoint's {where}{name} holds numbers that aren't finite; all must be")
    return tensors


def check_shapes(tensors: dict[str, Tensor], wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors, taken off the list of what is wanted. Raises SettingError for one that isn't, or for its shape."""
    for name, tensor in tensors.items():
        shape = wanted.pop(name, None)
        if shape != tensor.shape:
            allowed = f"have shape {list(shape)}" if shape is not None else "not be there"
            raise SettingError(f"{name} has shape {list(tensor.shape)}; by config.json it must {allowed}")
    return tensors


class CalibrationRun:
    """The dense and the converted model at work on text, one layer of each at a time."""

    def __init__(self, config: PreTrainedConfig, plan: Plan, outside: dict[str, Tensor], text: Tensor):
        check_text(text, plan)
        self.text = text
        self.held_out = torch.arange(len(text)) % HELD_OUT == HELD_OUT - 1
        embeddings = outside["model.embed_tokens.weight"]
        self.head = outside.get("lm_head.weight", embeddings).to(embeddings.dtype)
        self.dtype = embeddings.dtype  # in which both run, though a checkpoint may keep its norms in another
        self.hidden = F.embedding(text.to(embeddings.device), embeddings)  # [sequences, T, D]
        self.ours = self.hidden[self.held_out.to(self.hidden.device)]
        positions = torch.arange(text.shape[1], device=embeddings.device)[None]
        self.dense_layer, self.norm, dense_rotary = skeleton(config, AutoModelForCausalLM.from_config)
        self.gqe_layer, _, gqe_rotary = skeleton(plan.final, GQEForCausalLM._from_config)
        self.norm.load_state_dict({"weight": outside["model.norm.weight"].to(self.dtype)}, assign=True)
        self.dense_place, self.gqe_place = (
            {"position_embeddings": rotary(self.hidden, positions), "position_ids": positions}
            for rotary in (dense_rotary, gqe_rotary)
        )

    @torch.no_grad()
    def observe(self, tensors: dict[str, Tensor], where: str) -> Observed:
        """Run a dense layer over the hidden states, and keep its input and its heads' outputs.

        Raises SettingError for tensors that aren't those of the configuration; where: what stands before their names.
        """
        layer, seen, heads = self.dense_layer, [], []
        try:
            held = {n: t.to(self.dtype) for n, t in tensors.items() if not n.endswith(LEFT_OUT)}
            layer.load_state_dict(held, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise SettingError(f"checkpoint's tensors {where}* aren't those of its config.json: {reason}") from error
        attention = layer.self_attn
        hooks = [
            layer.input_layernorm.register_forward_hook(lambda _, __, out: seen.append(out)),
            attention.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0])),
        ]
        try:
            self.hidden = self._run(layer, self.hidden, self.dense_place)
        finally:
            for hook in hooks:
                hook.remove()
            layer.to("meta")
        self.require_finite(self.hidden, f"{where[:-1]} of the dense model")
        head_dim = attention.head_dim
        rows = self.held_out.to(self.hidden.device).repeat_interleave(self.hidden.shape[1])
        return Observed(
            torch.cat(seen).flatten(0, 1), torch.cat(heads).flatten(0, 1).unflatten(-1, (-1, head_dim)), rows
        )

    @torch.no_grad()
    def follow(self, ours: dict[str, Tensor]) -> None:
        """Run the converted layer over its own hidden states of the held-out sequences."""
        self.gqe_layer.load_state_dict({name: tensor.to(self.dtype) for name, tensor in ours.items()}, assign=True)
        self.ours = self._run(self.gqe_layer, self.ours, self.gqe_place)
        self.gqe_layer.to("meta")
        self.require_finite(self.ours, "the converted model")

    def require_finite(self, tensor: Tensor, what: str) -> None:
        """Raises SettingError where it isn't."""
        if not is_finite(tensor):
            dtype = str(self.dtype).removeprefix("torch.")
            wanted = (
                "must be saved in bfloat16 or float32" if self.dtype == torch.float16 else "must hold other weights"
            )
            raise SettingError(
                f"checkpoint is of {dtype}, beyond whose numbers {what} comes on the text to calibrate on; it {wanted}"
            )

    def _run(self, layer: nn.Module, hidden: Tensor, place: dict[str, Any]) -> Tensor:
        sequences = max(1, PASS_TOKENS // hidden.shape[1])
        return torch.cat([layer(part, attention_mask=None, **place) for part in hidden.split(sequences)])

    @torch.no_grad()
    def judge(self, report: Report) -> None:
        """Losses of both models and KL(dense || GQE), in nats a token, on the held-out sequences."""
        sums = torch.zeros(3, dtype=torch.float64)
        held_out = self.text[self.held_out]
        held_out_hidden = self.hidden[self.held_out.to(self.hidden.device)]
        for ids, dense, ours in zip(held_out, held_out_hidden, self.ours, strict=True):
            logs = [F.linear(self.norm(h), self.head).float().log_softmax(-1)[:-1] for h in (dense, ours)]
            labels = ids[1:].to(self.head.device)
            losses = [F.nll_loss(log, labels, reduction="sum") for log in logs]
            divergence = F.kl_div(logs[1], logs[0], reduction="sum", log_target=True)
            sums += torch.stack([*losses, divergence]).double().cpu()
        self.require_finite(sums, "the output embedding")
        report.tokens = held_out.shape[0] * (held_out.shape[1] - 1)
        report.dense_loss, report.gqe_loss, report.kl = (sums / report.tokens).tolist()


def check_text(text: Tensor, plan: Plan) -> None:
    """Raises SettingError for text that is no [sequences, T] of token ids, or too little of it."""
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
    """A decoder layer and the last norm of a model, without memory, and its rotary embedding."""
    one = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1, "layer_types": None})
    with torch.device("meta"):
        model = build(one, attn_implementation="sdpa").eval()
    return model.model.layers[0], model.model.norm, type(model.model.rotary_emb)(config=one)
