"""Watches training: adds speed, memory and the state of the routers to what GQETrainer logs, and warns of collapse.

    GQETrainer(..., args=TrainingArguments(..., report_to=["tensorboard"]), callbacks=[Telemetry()])

Loads are those of the logged step's whole batch, of all ranks, which the balance loss has counted. What needs
probabilities is measured on fixed tokens, by a forward pass without gradients. Between two logs nothing is measured,
and training computes the same bits with and without it.
"""

from __future__ import annotations

import base64
import json
import random
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import LlamaConfig, TrainerControl, TrainerState, TrainingArguments

from query_experts.common.device import peak_flops as known_peak_flops
from query_experts.layers.attention import GQEAttention
from query_experts.layers.balance import DEAD_BELOW, BalanceWindow
from query_experts.model import costs
from query_experts.model.routing_metrics import PREFIX, churn, details, load_values, probe, routed_layers, summary
from query_experts.training import GQETrainer, LoggedCallback, balance_window_of

COLLAPSED_BELOW = 0.1  # entropy over log M; routers in good order end at 0.7 to 0.8
PATIENCE = 3  # logs in a row
PROBED_TOKENS = 512
NAMED = 4  # places in a warning
MOST_DETAILS = 100_000  # numbers of single groups and experts in the Trainer's history: about 5 MB of a checkpoint
GIB = 2**30


class Onsets:
    """Tells when something has begun: after `PATIENCE` measurements in a row, and again only if it ended for as many.

    Attributes:
        flagged: bool, where it has begun and not ended; None before the first measurement.
        streak: int64, measurements in a row that disagree with `flagged`.
    """

    def __init__(self, flagged: list | None = None, streak: list | None = None):
        self.flagged = None if flagged is None else torch.tensor(flagged, dtype=torch.bool)
        self.streak = None if streak is None else torch.tensor(streak)

    def update(self, bad: Tensor) -> Tensor:
        """Takes a measurement, bool of any shape; returns where it has just begun."""
        if self.flagged is None or self.streak is None or self.flagged.shape != bad.shape:
            self.flagged, self.streak = torch.zeros_like(bad), torch.zeros(bad.shape, dtype=torch.int64)
        self.streak = torch.where(bad == self.flagged, 0, self.streak + 1)
        turned = self.streak >= PATIENCE
        self.flagged = torch.where(turned, bad, self.flagged)
        self.streak = torch.where(turned, 0, self.streak)
        return turned & bad

    def state(self) -> dict[str, Any]:
        if self.flagged is None or self.streak is None:
            return {}
        return {"flagged": self.flagged.int().tolist(), "streak": self.streak.tolist()}


class Telemetry(LoggedCallback):
    """Adds to what `GQETrainer` logs; docs/training.md, Watching a run, lists the names.

    What it remembers from log to log (the last selections, what it has warned of) stands in the Trainer's
    `log_history`, which checkpoints keep; so a resumed run logs the same.

    Args:
        detailed: also log each layer, group and expert. Loggers get them all. The Trainer's `log_history` keeps those
            of the last logs, `MOST_DETAILS` numbers.
        peak_flops: FLOP/s of one device, for the MFU; None for that of the GPU, if it is known. Else there is no MFU.
        tokens: int64 [B, T], the tokens on which entropy, probabilities and churn are measured; None for the first
            rows of the evaluation data set, or else of the training data set. Without `tokens`, and with data sets
            that can't be read by position or have no `input_ids`, these values are left out.
    """

    def __init__(self, detailed: bool = False, peak_flops: float | None = None, tokens: Tensor | None = None):
        self.detailed = detailed
        self.peak_flops = peak_flops
        self.tokens = tokens
        self.inputs: dict[str, Tensor] | None = None  # the fixed tokens
        self.window: BalanceWindow | None = None
        self.step_counts: Any = None  # of the last step: what BalanceWindow.so_far held
        self.before: Tensor | None = None  # bool [L, R, G, M], the last selections
        self.collapsed, self.dead = Onsets(), Onsets()
        self.kept: dict[str, Any] = {}
        self.logs_with_details: deque[dict[str, float]] = deque()  # in the Trainer's history, the oldest first
        self.began = self.ended = self.paused = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.window = balance_window_of(kwargs["model"])
        self.inputs = None
        self._restore(state)
        self.paused = 0.0
        self.began = self.ended = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.step_counts = None if self.window is None else self.window.so_far  # the optimizer empties the window

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ended = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._leave_out_pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._leave_out_pause()

    def _leave_out_pause(self) -> None:
        """Validation and checkpoints come between two steps, and aren't training."""
        now = time.perf_counter()
        self.paused += now - self.ended
        self.ended = now

    def add_to_logs(self, trainer: GQETrainer, logs: dict[str, float]) -> None:
        self._shorten_history(trainer.state)
        logs |= self._speed(trainer)
        layers = routed_layers(trainer.model)
        if layers:
            values = self._routing(trainer, layers)
            logs |= summary(values) | (details(values) if self.detailed else {})
            if "load" in values:
                logs[f"{PREFIX}/dead_experts"] = int((values["load"] < DEAD_BELOW).sum())
            if any(layer.routing == "learned" for layer in layers):
                self._warn(trainer, layers, values)
            self._remember(trainer.state)
        self.began = self.ended = time.perf_counter()
        self.paused = 0.0

    def _shorten_history(self, state: TrainerState) -> None:
        """Takes the details of the oldest logs out of the Trainer's history, which would fill checkpoints."""
        last: dict[str, float] = next((log for log in reversed(state.log_history) if "loss" in log), {})
        if not (names := names_of_details(last)):
            return
        if not self.logs_with_details or self.logs_with_details[-1] is not last:
            self.logs_with_details.append(last)
        while (len(self.logs_with_details) + 1) * len(names) > MOST_DETAILS and len(self.logs_with_details) > 1:
            oldest = self.logs_with_details.popleft()
            for name in names_of_details(oldest):
                del oldest[name]

    def _speed(self, trainer: GQETrainer) -> dict[str, float]:
        """Tokens/s of all devices since the last log, the highest memory of a device in GiB, and the MFU if known."""
        seconds = time.perf_counter() - self.began - self.paused
        device = trainer.args.device
        on_gpu = device.type == "cuda"
        used = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
        by_rank = trainer.accelerator.gather(torch.tensor([[trainer.positions, used]], device=device))
        rate = int(by_rank[:, 0].sum()) / trainer.get_tp_size() / seconds  # tensor-parallel ranks have the same tokens
        found = {"tps": round(rate, 1), "mem": round(int(by_rank[:, 1].max()) / GIB, 3)}
        highest = self.peak_flops
        if highest is None and on_gpu and trainer.args.bf16:
            highest = known_peak_flops(torch.cuda.get_device_name(device))
        config = getattr(trainer.model, "config", None)
        if highest and trainer.row_length and isinstance(config, LlamaConfig):
            flops = 3 * costs.flops_per_token(config, trainer.row_length)
            found["mfu"] = round(rate * flops / (highest * trainer.accelerator.num_processes), 4)
        return found

    def _routing(self, trainer: GQETrainer, layers: Sequence[GQEAttention]) -> dict[str, Tensor]:
        """The values of `load_values`, of the step, and `router_entropy`, `top_prob` and `routing_churn` [L, G]."""
        values: dict[str, Tensor] = {}
        if self.step_counts is not None:
            selected, tokens, *_ = self.step_counts
            load = (selected / tokens.clamp(min=1)).cpu()
            values |= load_values(load, torch.tensor([layer.top_k for layer in layers]))
        if self.inputs is None:
            self.inputs = self._fixed_tokens(trainer)
        if self.inputs:
            with trainer.accelerator.autocast():
                probed = probe(trainer.model_wrapped, layers, self.inputs)
            values |= {"router_entropy": probed.entropy, "top_prob": probed.top_prob}
            if self.before is not None and self.before.shape == probed.selected.shape:
                values["routing_churn"] = churn(self.before, probed.selected)
            self.before = probed.selected
        return values

    def _fixed_tokens(self, trainer: GQETrainer) -> dict[str, Tensor]:
        """`input_ids` [B, T], and `attention_mask` where rows differ; empty without any. Equal on every rank."""
        rows = [*self.tokens] if self.tokens is not None else []
        for data in () if rows else (trainer.eval_dataset, trainer.train_dataset):
            rows = rows or first_rows(next(iter(data.values())) if isinstance(data, dict) else data)
        if not rows:
            return {}
        lengths = torch.tensor([len(row) for row in rows])
        inputs = {"input_ids": pad_sequence(rows, batch_first=True)}
        if lengths.min() < lengths.max():
            inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return {name: value.to(trainer.args.device) for name, value in inputs.items()}

    def _warn(self, trainer: GQETrainer, layers: Sequence[GQEAttention], values: dict[str, Tensor]) -> None:
        """Says once when routers have collapsed and when experts have died: in the log's history, and on stderr."""
        config: Any = layers[0].config
        found = []
        if "router_entropy" in values:
            selects = torch.tensor([layer.top_k < layer.experts_per_group for layer in layers])
            onset = self.collapsed.update((values["router_entropy"] < COLLAPSED_BELOW) & selects[:, None])
            if onset.any():
                found.append(
                    f"routers collapsed (entropy below {COLLAPSED_BELOW} of log M in {PATIENCE} logs in a row) in "
                    f"{places(onset)}; try a router_z_loss_coef above {config.router_z_loss_coef:g}, such as 0.001, "
                    "or a lower learning rate"
                )
        if "load" in values:
            onset = self.dead.update(values["load"] < DEAD_BELOW)
            if onset.any():
                found.append(
                    f"experts died (load below {DEAD_BELOW:.0%} in {PATIENCE} logs in a row) in {places(onset)}; try a "
                    f"router_aux_loss_coef above {config.router_aux_loss_coef:g}, or a longer warm-up"
                )
        for text in found:
            trainer.state.log_history.append({"step": trainer.state.global_step, "warning": text})
            if trainer.is_world_process_zero():
                with suppress(OSError):  # nobody reads
                    tqdm.write(f"Warning: step {trainer.state.global_step}: {text}.", file=sys.stderr)

    def _remember(self, state: TrainerState) -> None:
        """Writes what the next log needs into the one entry of the history that is ours."""
        memory: dict[str, Any] = {"collapsed": self.collapsed.state(), "dead": self.dead.state()}
        if self.before is not None:
            bits = zlib.compress(np.packbits(self.before.numpy()).tobytes())
            memory |= {"shape": [*self.before.shape], "selected": base64.b64encode(bits).decode()}
        if not self.kept:
            state.log_history.append(self.kept)
        self.kept |= {"step": state.global_step, "telemetry": json.dumps(memory)}

    def _restore(self, state: TrainerState) -> None:
        """Takes up what `_remember` wrote before the checkpoint, or begins anew."""
        self.kept = next((log for log in state.log_history if "telemetry" in log), {})
        self.logs_with_details = deque(log for log in state.log_history if names_of_details(log))
        memory = json.loads(self.kept.get("telemetry", "{}"))
        self.collapsed, self.dead = (Onsets(**memory.get(name, {})) for name in ("collapsed", "dead"))
        self.before = None
        if "selected" in memory:
            shape = memory["shape"]
            bits = np.frombuffer(zlib.decompress(base64.b64decode(memory["selected"])), dtype=np.uint8)
            flat = np.unpackbits(bits, count=int(np.prod(shape))).astype(bool)
            self.before = torch.from_numpy(flat).view(shape)


def names_of_details(log: Mapping[str, Any]) -> list[str]:
    """The names in a log that are of single groups and experts."""
    return [name for name in log if name.startswith(f"{PREFIX}/layer_")]


def first_rows(data: Any) -> list[Tensor]:
    """The first rows of a data set without padding, int64 [T] each, `PROBED_TOKENS` tokens in all.

    None of a data set that can't be read by position, or whose rows have no `input_ids`.
    """
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return []
    rows: list[Tensor] = []
    left = PROBED_TOKENS
    with generators_as_before():  # a data set may draw
        while left > 0 and len(rows) < len(data):
            row = data[len(rows)]
            if not isinstance(row, Mapping) or "input_ids" not in row:
                return []
            ids = torch.as_tensor(row["input_ids"]).flatten()
            if (mask := row.get("attention_mask")) is not None:
                ids = ids[torch.as_tensor(mask).flatten().ne(0)]
            rows.append(ids[:left])
            left -= max(1, len(rows[-1]))
    return [row for row in rows if len(row)]


@contextmanager
def generators_as_before() -> Iterator[None]:
    """On exit, the global generators of torch (that of the CPU), numpy and Python are in the state of before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def places(where: Tensor) -> str:
    """The places where a bool tensor [L, G] or [L, G, M] is true, in words; at most `NAMED` of them."""
    names = ("layer", "group", "expert")
    found = [" ".join(f"{name} {i}" for name, i in zip(names, at, strict=False)) for at in where.nonzero().tolist()]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more
