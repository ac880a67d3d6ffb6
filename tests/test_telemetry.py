"""Telemetry: what it logs against routing by hand, that training stays bit for bit the same, and its warnings."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import TrainerCallback

from model_helpers import checkpoint_activations
from query_experts import telemetry as telemetry_module
from query_experts.distillation import DistillationTrainer
from query_experts.layers.balance import relative_entropy
from query_experts.layers.router import select_top_k
from query_experts.model import costs
from query_experts.model.heads import GQEForSequenceClassification
from query_experts.model.initialization import initialise_by_name
from query_experts.model.routing_metrics import churn, load_values, probe, routed_layers
from query_experts.study.callbacks import TokenProgress, ZClipCallback
from query_experts.telemetry import PATIENCE, Onsets, Telemetry, first_rows, names_of_details
from query_experts.training import GQETrainer
from study_helpers import LENGTHS, Rows, arguments, logged, model_of

PADDED = Rows(12, lengths=LENGTHS)
MEASURED = ("load", "expert_utilization", "cv", "load_imbalance", "dead_expert_frac", "expert_diversity",
            "router_entropy", "top_prob")  # fmt: skip


def one_layer(**changes):
    return model_of(num_hidden_layers=1, **changes)


def trained(
    model, tmp_path, telemetry=None, data=PADDED, kind=GQETrainer, more=(), resume=None, options=None, **changes
):
    callbacks = [*([telemetry] if telemetry else []), *more]
    args = arguments(tmp_path, **{"per_device_train_batch_size": 12, **changes})
    trainer = kind(model, args, train_dataset=data, callbacks=callbacks, **options or {})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def real_logits(model, rows=PADDED):
    """Router logits of the rows' real tokens, [layer][tokens, G, M]."""
    with torch.no_grad():
        out = model.eval()(rows.ids, attention_mask=rows.mask, output_router_logits=True)
    real = rows.mask.flatten().bool()
    return [logits[real].unflatten(-1, (model.config.num_key_value_heads, -1)) for logits in out.router_logits]


def loads_by_hand(model):
    """The share of the real tokens that select each expert, [layer][group][expert], counted one by one."""
    k, found = model.config.active_query_experts, []
    for logits in real_logits(model):
        tokens, groups, experts = logits.shape
        counts = [[0] * experts for _ in range(groups)]
        for token in range(tokens):
            for group in range(groups):
                for expert in select_top_k(logits[token, group], k).tolist():
                    counts[group][expert] += 1
        found.append([[count / tokens for count in group] for group in counts])
    return found


def triton(model):
    pytest.importorskip("triton")
    model.set_kernels("triton")


WAYS = {
    "plain": (lambda model: None, {}),
    "in three micro-batches": (
        lambda model: None,
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    ),
    "checkpointed": (checkpoint_activations, {}),
    "triton": (triton, {}),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.full if way == "triton" else ()) for way in WAYS])
def test_logged_loads_are_those_of_the_steps_real_tokens(way, tmp_path):
    model = one_layer()
    expected = loads_by_hand(model)
    prepare, changes = WAYS[way]
    prepare(model)
    trainer = trained(model, tmp_path, Telemetry(detailed=True), learning_rate=0.0, **changes)
    (log,) = logs_of(trainer)
    for group in range(2):
        for expert in range(2):
            value = log[f"moe/layer_0/group_{group}/load_expert_{expert}"]
            assert value == pytest.approx(expected[0][group][expert], abs=1e-6)


def test_means_and_extremes_of_all_values_are_logged_as_python_floats_and_details_only_if_asked_for(tmp_path):
    brief, detailed = (
        logs_of(trained(model_of(), tmp_path, Telemetry(detailed=asked), max_steps=2))[-1] for asked in (False, True)
    )
    for name in (*MEASURED, "routing_churn"):
        assert brief[f"moe/{name}_min"] <= brief[f"moe/{name}_mean"] <= brief[f"moe/{name}_max"]
    assert {type(value) for value in detailed.values()} <= {float, int}
    more = detailed.keys() - brief.keys()
    by_expert, by_group = (sum(name[-1].isdigit() == wanted for name in more) for wanted in (True, False))
    assert (by_expert, by_group) == (2 * 2 * 2 * 2, 2 * 2 * 7)  # layers, groups, experts or not, values
    assert not [name for name in brief if "layer" in name]


def test_the_page_on_training_explains_every_name_that_is_logged(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    more = [ZClipCallback()]
    (log, *_) = logs_of(trained(one_layer(), tmp_path, Telemetry(peak_flops=1e12), more=more, max_steps=2))[::-1]
    names = {re.sub("_(mean|min|max)$", "", name) for name in log} - {"epoch", "step", "learning_rate"}
    assert len(names) > 15
    assert not [name for name in names if f"`{name}`" not in page]


def test_values_of_load_are_those_of_nemo_and_olmo():
    load = torch.tensor([[[0.7, 0.3, 0.995, 0.005]]])  # k = 2 of 4
    values = {name: value.squeeze().tolist() for name, value in load_values(load, torch.tensor([2])).items()}
    assert values["expert_utilization"] == pytest.approx([1.4, 0.6, 1.99, 0.01])
    mean, n = 0.5, 4
    assert values["cv"] == pytest.approx(
        math.sqrt(sum((x - mean) ** 2 for x in load.flatten().tolist()) / (n - 1)) / mean
    )
    assert values["load_imbalance"] == pytest.approx(0.995 / mean)
    assert values["dead_expert_frac"] == 0.25
    shares = [x / 2 for x in load.flatten().tolist()]
    assert values["expert_diversity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)) / n)


def test_a_single_expert_that_gets_all_tokens_is_alone_and_undecided_nowhere():
    values = load_values(torch.tensor([[[1.0, 0.0]]]), torch.tensor([1]))
    assert values["expert_diversity"].item() == pytest.approx(0.5)
    assert values["dead_expert_frac"].item() == 0.5
    lone = load_values(torch.ones(1, 2, 1), torch.tensor([1]))  # M = 1
    assert lone["cv"].tolist() == [[0.0, 0.0]]
    assert relative_entropy(torch.zeros(3, 1)).tolist() == [1.0] * 3


def test_entropy_and_top_probability_are_the_routers_own_on_the_fixed_tokens(tmp_path):
    model = model_of()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.router.weight.mul_(30)
    probs = [logits.softmax(-1) for logits in real_logits(model)]
    trainer = trained(model, tmp_path, Telemetry(), learning_rate=0.0)
    (log,) = logs_of(trainer)
    entropies = [-(p * p.log()).sum(-1).mean(0) / math.log(2) for p in probs]
    assert log["moe/router_entropy_mean"] == pytest.approx(torch.stack(entropies).mean().item(), abs=1e-5)
    assert log["moe/router_entropy_min"] == pytest.approx(torch.stack(entropies).min().item(), abs=1e-5)
    top = torch.stack([p.amax(-1).mean(0) for p in probs])
    assert log["moe/top_prob_max"] == pytest.approx(top.max().item(), abs=1e-5)


class Labelled(Rows):
    """Rows of two classes."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"labels": torch.tensor(index % 2)}


def test_a_classifier_that_takes_one_row_at_a_time_is_probed_row_by_row(tmp_path):
    found = []
    for pad in (None, 0):
        config = one_layer(pad_token_id=pad).config
        model = GQEForSequenceClassification(config)
        initialise_by_name(model, 0, 1.0)
        data = Labelled(4, lengths=LENGTHS[:4])
        trainer = trained(
            model, tmp_path, Telemetry(detailed=True), data=data, per_device_train_batch_size=1, max_steps=2,
            learning_rate=0.1,
        )  # fmt: skip
        names = [name for name in logs_of(trainer)[-1] if re.search("entropy|top_prob|churn", name)]
        found.append({name: logs_of(trainer)[-1][name] for name in names})
    assert len(found[0]) == 3 * 3 + 3 * 2  # of a layer, with two groups
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_probe_that_fails_leaves_the_model_in_its_mode():
    model = one_layer().train()
    with pytest.raises(IndexError):
        probe(model, routed_layers(model), {"input_ids": torch.full((1, 4), 300)})
    assert all(module.training for module in model.modules())


def test_reading_the_fixed_tokens_shifts_no_generator_of_a_data_set_that_draws():
    class Drawn(Rows):
        def __getitem__(self, index):
            torch.rand(1), random.random(), np.random.rand()
            return super().__getitem__(index)

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1:3]

    before = repr(states())
    assert len(first_rows(Drawn(3))) == 3
    assert repr(states()) == before


def test_churn_is_the_share_of_tokens_whose_selected_set_changed(tmp_path):
    before = torch.tensor([[[[1, 0, 1, 0]], [[0, 1, 1, 0]], [[1, 1, 0, 0]]]]).bool()  # [L, R, G, M], k = 2 of 4
    now = torch.tensor([[[[1, 0, 1, 0]], [[0, 1, 0, 1]], [[0, 0, 1, 1]]]]).bool()
    assert churn(before, now).tolist() == [[pytest.approx(2 / 3)]]
    still = trained(one_layer(), tmp_path, Telemetry(), learning_rate=0.0, max_steps=3)
    assert logged(still, "moe/routing_churn_max") == [0.0, 0.0]  # none at the first log
    moved = trained(one_layer(), tmp_path, Telemetry(), learning_rate=0.1, max_steps=3)
    assert max(logged(moved, "moe/routing_churn_max")) > 0.01


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_logged_losses_add_up_to_the_loss(accumulation, tmp_path):
    model = model_of(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    trainer = trained(
        model, tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=12 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    for log in logs_of(trainer):
        assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["aux_loss"] + 0.25 * log["z_loss"], rel=1e-5)
        assert log["aux_loss"] == pytest.approx(2, abs=0.5)  # two layers, each about 1 in balance


def test_distillation_logs_the_divergence_apart(tmp_path):
    trainer = trained(
        model_of(router_aux_loss_coef=0.5), tmp_path, kind=DistillationTrainer, data=Rows(12),
        options={"teacher": model_of("dense", seed=3), "weight": 0.7},
    )  # fmt: skip
    (log,) = logs_of(trainer)
    expected = 0.3 * log["lm_loss"] + 0.7 * log["kd_loss"] + 0.5 * log["aux_loss"]
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_is_bit_for_bit_the_same_with_telemetry(tmp_path):
    """Also where dropout draws random numbers between two logs."""
    runs = []
    for telemetry in (None, Telemetry(detailed=True)):
        model = one_layer(attention_dropout=0.2)
        runs.append(trained(model, tmp_path, telemetry, max_steps=4, logging_steps=2, per_device_train_batch_size=4))
    plain, watched = runs
    for name in ("loss", "lm_loss", "grad_norm"):
        assert logged(plain, name) == logged(watched, name)
    for ours, theirs in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_telemetry_neither_breaks_nor_recompiles_a_compiled_model(tmp_path):
    graphs, losses, loads = [], [], []
    for telemetry in (None, Telemetry()):
        torch._dynamo.reset()
        model, counter = one_layer(), CompileCounterWithBackend("eager")
        model.compile(dynamic=False, fullgraph=True, backend=counter)
        trainer = trained(model, tmp_path, telemetry, max_steps=4, logging_steps=2, per_device_train_batch_size=4)
        graphs.append(counter.frame_count)
        losses.append(logged(trainer, "loss"))
        loads = logged(trainer, "moe/load_max")
    torch._dynamo.reset()
    assert graphs == [graphs[0]] * 2
    assert losses[0] == losses[1]
    eager = trained(one_layer(), tmp_path, Telemetry(), max_steps=4, logging_steps=2, per_device_train_batch_size=4)
    assert loads == logged(eager, "moe/load_max")


class Passes(TrainerCallback):
    """Counts a model's forward passes by step."""

    def __init__(self, model):
        self.counts, self.now = [], 0
        model.register_forward_hook(self.count)

    def count(self, *_):
        self.now += 1

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = 0

    def on_log(self, args, state, control, **kwargs):
        self.counts.append((state.global_step, self.now))

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append((state.global_step, self.now))


def test_nothing_is_measured_between_two_logs(tmp_path):
    model = one_layer()
    passes = Passes(model)
    trained(model, tmp_path, Telemetry(), more=[passes], max_steps=4, logging_steps=2)
    by_step = dict(passes.counts[:-1])  # the last is the Trainer's own log of its end
    assert by_step == {1: 1, 2: 2, 3: 1, 4: 2}


def test_a_resumed_run_logs_what_an_uninterrupted_one_logs(tmp_path):
    def run(folder, resume=None):
        model = one_layer()
        with torch.no_grad():
            model.model.layers[0].self_attn.router.weight.mul_(1e4)  # collapsed
        return trained(
            model, folder, Telemetry(), max_steps=6, per_device_train_batch_size=4, save_strategy="steps",
            save_steps=2, learning_rate=0.1, resume=resume,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "run" / "checkpoint-2")
    timed = {"tps", "mem"}
    expected, actual = (
        [{k: v for k, v in log.items() if k not in timed} for log in logs_of(run)] for run in (whole, resumed)
    )
    assert actual == expected
    assert "moe/routing_churn_mean" in actual[2]
    warnings = [[log for log in run.state.log_history if "warning" in log] for run in (whole, resumed)]
    assert warnings[0] == warnings[1]
    assert [log["step"] for log in warnings[0]] == [PATIENCE]
    ours = [log for log in resumed.state.log_history if "telemetry" in log]
    assert len(ours) == 1
    assert json.loads(ours[0]["telemetry"])["shape"] == [1, 97, 2, 2]


def test_history_keeps_the_details_of_the_last_logs_and_loggers_get_them_all(tmp_path, monkeypatch):
    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            got.extend([len(names_of_details(logs))] if "loss" in logs else [])

    got: list[int] = []
    options = {"save_strategy": "steps", "save_steps": 4, "more": [Logger()]}
    first = logs_of(trained(one_layer(), tmp_path / "all", Telemetry(detailed=True), max_steps=1))
    numbers = len(names_of_details(first[0])) + 2  # the churn of each of two groups comes with the second log
    monkeypatch.setattr(telemetry_module, "MOST_DETAILS", 3 * numbers)
    trainer = trained(one_layer(), tmp_path / "few", Telemetry(detailed=True), max_steps=8, **options)
    held = [len(names_of_details(log)) for log in logs_of(trainer)]
    assert [count > 0 for count in held] == [False] * 5 + [True] * 3
    assert got == [numbers - 2] + 7 * [numbers]
    assert all("moe/cv_mean" in log for log in logs_of(trainer))
    at = tmp_path / "few" / "run" / "checkpoint-4"
    resumed = trained(one_layer(), tmp_path / "few", Telemetry(detailed=True), max_steps=8, resume=at, **options)
    assert [len(names_of_details(log)) for log in logs_of(resumed)] == held


@pytest.mark.parametrize("arm", ["dense", "static"])
def test_a_model_without_a_router_logs_speed_and_memory_alone(arm, tmp_path):
    (log,) = logs_of(trained(model_of(arm), tmp_path, Telemetry(detailed=True)))
    assert log["tps"] > 0
    assert 0.05 < log["mem"] < 64
    assert not [name for name in log if name.startswith("moe/") or name in ("aux_loss", "z_loss", "mfu")]


def test_speed_is_tokens_over_the_time_since_the_last_log_without_validation(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("query_experts.telemetry.time.perf_counter", lambda: now[0])

    class Time(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            now[0] += 2.0

        def on_evaluate(self, args, state, control, **kwargs):
            now[0] += 50.0

    telemetry, times = Telemetry(peak_flops=1e9), Time()
    trainer = trained(
        model_of(), tmp_path, None, more=[times, telemetry], max_steps=6, logging_steps=3, eval_strategy="steps",
        eval_steps=2, options={"eval_dataset": PADDED},
    )  # fmt: skip
    assert logged(trainer, "tps") == [3 * 12 * 12 / 6.0] * 2
    flops = 3 * costs.flops_per_token(trainer.model.config, 12)
    assert logged(trainer, "mfu") == [pytest.approx(72 * flops / 1e9, abs=1e-4)] * 2


def test_data_sets_that_cannot_be_read_by_position_still_give_loads(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Rows(12)[i] for i in range(12))

        def __len__(self):
            return 12

    (log,) = logs_of(trained(one_layer(), tmp_path, Telemetry(), data=Stream()))
    assert "moe/load_max" in log
    assert "moe/router_entropy_mean" not in log
    given = Telemetry(tokens=Rows(2).ids)
    (log,) = logs_of(trained(one_layer(), tmp_path, given, data=Stream()))
    assert "moe/router_entropy_mean" in log


def test_an_onset_is_told_once_and_again_only_after_as_long_an_end():
    onsets = Onsets()
    told = []
    for bad in (1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1):
        onsets = Onsets(**json.loads(json.dumps(onsets.state())))  # as a checkpoint keeps it
        told.append(int(onsets.update(torch.tensor([bad == 1, False]))[0]))
    assert told == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_a_collapsed_router_and_a_dead_expert_are_warned_of_once_with_what_to_try(tmp_path, capsys):
    model = one_layer()
    with torch.no_grad():  # all tokens look alike to the router, and it is certain
        model.model.embed_tokens.weight.mul_(0.01).add_(1)
        router = model.model.layers[0].self_attn.router.weight
        router.fill_(5.0)
        router[1::2] = -5.0
    more = [TokenProgress("run", 144)]  # whose bar the lines don't break
    trainer = trained(model, tmp_path, Telemetry(), more=more, learning_rate=0.0, max_steps=5)
    collapse, death = [log for log in trainer.state.log_history if "warning" in log]
    assert collapse["step"] == death["step"] == PATIENCE
    assert "routers collapsed" in collapse["warning"]
    assert "layer 0 group 0, layer 0 group 1;" in collapse["warning"]
    assert "router_z_loss_coef above 0, such as 0.001" in collapse["warning"]
    assert "layer 0 group 0 expert 1, layer 0 group 1 expert 1;" in death["warning"]
    assert "router_aux_loss_coef above 0.01" in death["warning"]
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert [line for line in lines if "Warning:" in line] == [
        f"Warning: step {PATIENCE}: {log['warning']}." for log in (collapse, death)
    ]


def test_a_frozen_router_is_measured_and_not_warned_of(tmp_path, capsys):
    model = model_of("frozen", num_hidden_layers=1)
    model.model.layers[0].self_attn.router.weight.mul_(1e4)
    trainer = trained(model, tmp_path, Telemetry(), max_steps=PATIENCE)
    assert logged(trainer, "moe/router_entropy_max")[-1] < 0.1
    assert "Warning" not in capsys.readouterr().err
