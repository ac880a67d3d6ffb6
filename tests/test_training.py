"""GQETrainer: what it logs, what it passes to the model, data order, resuming; and equal initial values."""

import copy
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from query_experts.study.callbacks import StopRequest, StopWhenAsked, TokenProgress, ZClipCallback
from query_experts.study.settings import TrainSettings
from query_experts.study.train import training_arguments
from query_experts.training import GQETrainer, count_tokens
from study_helpers import LENGTHS, TINY, Rows, arguments, logged, model_of


@torch.no_grad()
def language_model_loss(model, rows):
    """Cross-entropy of the next token, mean over the rows' real targets: from logits, row by row, without padding."""
    total, count = 0.0, 0
    for ids, mask in zip(rows.ids, rows.mask, strict=True):
        ids = ids[: int(mask.sum())]
        logits = model.eval()(ids[None]).logits[0].double()
        total += float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


class Inputs:
    """Records the keyword arguments of a model's forward passes in training."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, model, args, kwargs):
        if model.training:
            self.calls.append(dict(kwargs))


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    """Raises at the beginning of a step, as if the process was killed."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("arm", ["dense", "gqe", "static"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_logged_lm_loss_is_the_language_model_loss_of_the_steps_real_tokens(tmp_path, arm, accumulation):
    rows = Rows(12, lengths=LENGTHS)
    model = model_of(arm)
    expected = language_model_loss(copy.deepcopy(model), rows)
    args = arguments(tmp_path, per_device_train_batch_size=12 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = GQETrainer(model, args, train_dataset=rows)
    trainer.train()
    assert logged(trainer, "lm_loss") == [pytest.approx(expected, rel=1e-5)]


def test_the_logged_lm_loss_is_the_mean_over_the_steps_since_the_last_log(tmp_path):
    def curve(every):
        trainer = GQETrainer(
            model_of(), arguments(tmp_path, max_steps=6, logging_steps=every), train_dataset=Rows(12, lengths=LENGTHS)
        )
        trainer.train()
        return logged(trainer, "lm_loss")

    steps = curve(1)
    assert len(steps) == 6
    assert curve(3) == pytest.approx([sum(steps[:3]) / 3, sum(steps[3:]) / 3], rel=1e-6)


def test_validations_between_two_logs_do_not_enter_the_logged_lm_loss(tmp_path):
    def curve(**changes):
        args = arguments(tmp_path, max_steps=4, logging_steps=2, **changes)
        trainer = GQETrainer(model_of(), args, train_dataset=Rows(12), eval_dataset=Rows(8))
        trainer.train()
        return logged(trainer, "lm_loss")

    assert curve(eval_strategy="steps", eval_steps=1) == curve()


def test_the_trained_loss_holds_the_balance_loss_and_lm_loss_does_not(tmp_path):
    rows = Rows(4)
    losses = {}
    for coefficient in (0.0, 3.0):
        trainer = GQETrainer(model_of(router_aux_loss_coef=coefficient), arguments(tmp_path), train_dataset=rows)
        trainer.train()
        losses[coefficient] = logged(trainer, "loss")[0], logged(trainer, "lm_loss")[0]
    assert losses[0.0][0] == pytest.approx(losses[0.0][1], rel=1e-6)
    assert losses[3.0][1] == pytest.approx(losses[0.0][1], rel=1e-6)
    # two layers, each about 1 where experts are in balance
    assert losses[3.0][0] - losses[3.0][1] == pytest.approx(6.0, abs=1.5)


@pytest.mark.filterwarnings("ignore:the router gets no gradient")
@pytest.mark.parametrize("arm", ["dense", "gqe", "hard", "static"])
def test_eval_loss_is_the_language_model_loss_alone_for_every_kind_of_model(tmp_path, arm):
    rows = Rows(8, lengths=[12] * 8)
    model = model_of(arm, router_aux_loss_coef=5.0)
    trainer = GQETrainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(language_model_loss(model, rows), rel=1e-5)


def test_gqe_is_told_the_real_tokens_of_the_whole_step_and_dense_models_are_not(tmp_path):
    rows = Rows(12, lengths=LENGTHS)
    for arm in ("gqe", "dense"):
        model = model_of(arm)
        inputs = Inputs(model)
        args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
        GQETrainer(model, args, train_dataset=rows).train()
        assert len(inputs.calls) == 6
        if arm == "dense":
            assert not any("num_tokens_in_batch" in call for call in inputs.calls)
            continue
        for step in (inputs.calls[:3], inputs.calls[3:]):
            real = sum(int(call["attention_mask"].sum()) for call in step)
            assert [int(call["num_tokens_in_batch"]) for call in step] == [real] * 3
            assert real < 6 * 12


def test_without_an_attention_mask_all_tokens_of_the_step_count(tmp_path):
    model = model_of()
    inputs = Inputs(model)
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    GQETrainer(model, args, train_dataset=Rows(4)).train()
    assert [int(call["num_tokens_in_batch"]) for call in inputs.calls] == [48, 48]


@pytest.mark.parametrize(("coefficient", "z_coefficient"), [(0.0, 0.0), (2.0, 0.0), (0.0, 2.0)])
def test_micro_batches_of_padded_rows_give_the_update_of_one_batch(tmp_path, coefficient, z_coefficient):
    """All tokens are the same, so every layer's input is the same at every position, and every token selects the same
    experts: f is equal in all micro-batches, whatever they hold, and only the weights of the terms can differ."""
    rows = Rows(8, lengths=[12, 2, 7, 12, 3, 5, 12, 9])
    rows.ids.fill_(7)
    updates = []
    for batch in (8, 2):
        model = model_of(router_aux_loss_coef=coefficient, router_z_loss_coef=z_coefficient)
        before = copy.deepcopy(model.state_dict())
        args = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, optim="sgd",
            learning_rate=1.0,
        )  # fmt: skip
        GQETrainer(model, args, train_dataset=rows).train()
        updates.append({name: value - before[name] for name, value in model.state_dict().items()})
    routers = [name for name in updates[0] if "router" in name]
    assert all(updates[0][name].abs().max() > 1e-7 for name in routers)
    for name, update in updates[0].items():
        torch.testing.assert_close(updates[1][name], update, rtol=1e-4, atol=1e-7, msg=name)


def test_stock_trainer_trains_gqe_too(tmp_path):
    trainer = Trainer(model_of(), arguments(tmp_path, max_steps=2), train_dataset=Rows(8))
    assert trainer.train().training_loss > 0


@pytest.mark.full
def test_the_data_order_depends_on_the_seed_and_not_on_the_arm(tmp_path):
    seen = {}
    for arm, seed in itertools.product(("dense", "gqe", "gqe-m4"), (0, 1)):
        model = model_of(arm, seed)
        inputs = Inputs(model)
        args = training_arguments(TrainSettings(**TINY), seed, tmp_path / f"{arm}{seed}")
        args.eval_strategy = args.save_strategy = "no"
        GQETrainer(model, args, train_dataset=Rows(8)).train()  # six steps of two rows: into the second epoch
        seen[arm, seed] = torch.stack([call["input_ids"] for call in inputs.calls])
        assert seen[arm, seed].shape == (6, 2, 12)
    assert torch.equal(seen["dense", 0], seen["gqe", 0])
    assert torch.equal(seen["dense", 0], seen["gqe-m4", 0])
    assert torch.equal(seen["dense", 1], seen["gqe", 1])
    assert not torch.equal(seen["dense", 0], seen["dense", 1])


ARMS = ("dense", "static", "half", "frozen", "gqe", "hard", "weighted", "gqe-m4", "gqe-expert")


@pytest.mark.filterwarnings("ignore:the router gets no gradient")
def test_arms_begin_with_equal_values_in_all_tensors_of_equal_name_and_shape():
    states = {arm: model_of(arm).state_dict() for arm in ARMS}
    shared = 0
    for a, b in itertools.combinations(ARMS, 2):
        for name in states[a].keys() & states[b].keys():
            if states[a][name].shape == states[b][name].shape:
                assert torch.equal(states[a][name], states[b][name]), (a, b, name)
                shared += 1
    assert shared > 300
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(states["dense"][q], states["gqe"][q])


def test_initial_values_differ_over_seeds_and_names_and_not_with_torchs_generator():
    torch.manual_seed(1)
    a = model_of("gqe", 0).state_dict()
    torch.manual_seed(2)
    again, b = model_of("gqe", 0).state_dict(), model_of("gqe", 1).state_dict()
    matrices = [name for name, value in a.items() if value.dim() >= 2]
    assert any("router" in name for name in matrices)
    for name in matrices:
        assert torch.equal(a[name], again[name])
        assert not torch.equal(a[name], b[name])
        assert float(a[name].std()) == pytest.approx(0.02, rel=0.2)
    k = "model.layers.{}.self_attn.k_proj.weight"
    assert not torch.equal(a[k.format(0)], a[k.format(1)])
    assert not torch.equal(a[k.format(0)], a[k.format(0).replace("k_proj", "v_proj")])


def test_norms_begin_at_one_and_tied_embeddings_stay_tied():
    model = model_of()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.norm.weight, torch.ones(32))


def run(folder, arm="gqe", extra=(), warmup=3, resume=None, **changes):
    """Ten steps, into the second epoch, with a checkpoint and a validation every four."""
    model = model_of(arm)
    torch.manual_seed(len(extra))  # a fresh process has drawn other numbers
    args = arguments(
        folder, output_dir=str(folder), max_steps=10, learning_rate=5e-3, optim="adamw_torch_fused",
        lr_scheduler_type="cosine", gradient_accumulation_steps=2, per_device_train_batch_size=2, eval_steps=4,
        eval_strategy="steps", restore_callback_states_from_checkpoint=True,
        **{"save_strategy": "steps", "save_steps": 4, **changes},
    )  # fmt: skip
    callbacks = [ZClipCallback(z_threshold=0.5, warmup_steps=warmup), TokenProgress("run", 48), *extra]
    trainer = GQETrainer(
        model, args, train_dataset=Rows(14, lengths=[*LENGTHS, 4, 12]), eval_dataset=Rows(4), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def callback(trainer, kind):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, kind))


def steps_timed(trainer):
    progress = callback(trainer, TokenProgress)
    return progress.cold_steps + progress.warm_steps


def curves(trainer):
    keys = ("step", "lm_loss", "eval_loss", "learning_rate", "grad_norm")
    history = (log for log in trainer.state.log_history if "train_loss" not in log)
    return [{key: log[key] for key in keys if key in log} for log in history]


@pytest.mark.parametrize("arm", ["dense", "gqe"])
@pytest.mark.parametrize("warmup", [pytest.param(6, marks=pytest.mark.full), 3], ids=["in ZClip's warm-up", "after it"])
def test_a_run_resumed_from_its_checkpoint_at_step_4_ends_bit_equal_to_one_without_a_break(tmp_path, arm, warmup):
    whole = run(tmp_path / "whole", arm, warmup=warmup)
    with pytest.raises(Killed):
        run(tmp_path / "cut", arm, [KillAfter(5)], warmup)
    resumed = run(tmp_path / "cut", arm, warmup=warmup, resume=tmp_path / "cut" / "checkpoint-4")
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert curves(resumed) == curves(whole)
    assert len(curves(whole)) == 13
    assert callback(resumed, ZClipCallback).state() == callback(whole, ZClipCallback).state()
    assert callback(whole, ZClipCallback).clipped_steps > 0
    assert steps_timed(resumed) == steps_timed(whole) == 10


def test_replicas_of_tensor_parallelism_count_once_in_the_logged_loss(tmp_path, monkeypatch):
    alone = logged(run(tmp_path / "alone"), "lm_loss")
    log, reduce = GQETrainer.log, Accelerator.reduce

    def log_on_two(self, logs, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(GQETrainer, "get_tp_size", lambda self: 2)
            patch.setattr(Accelerator, "reduce", lambda self, tensor, how: 2 * reduce(self, tensor, how))
            log(self, logs, *args, **kwargs)

    monkeypatch.setattr(GQETrainer, "log", log_on_two)
    assert logged(run(tmp_path / "two"), "lm_loss") == pytest.approx(alone)


def test_a_run_stopped_when_its_time_was_up_logs_the_same_means_as_one_without_a_break(tmp_path):
    """With a log every three steps, a stop between two logs must not lose a part of their mean."""
    whole = run(tmp_path / "whole", logging_steps=3)
    stopped = run(
        tmp_path / "cut", extra=[StopWhenAsked(StopRequest(time.monotonic()))], logging_steps=3, save_strategy="no"
    )
    step = stopped.state.global_step
    assert step < 10
    resumed = run(tmp_path / "cut", logging_steps=3, resume=tmp_path / "cut" / f"checkpoint-{step}")
    assert logged(resumed, "lm_loss") == logged(whole, "lm_loss")
    assert len(logged(whole, "lm_loss")) == 3


def test_tokens_of_a_batch_are_those_that_a_two_dimensional_mask_keeps_or_all():
    ids, mask = torch.zeros(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert count_tokens({"input_ids": ids, "attention_mask": mask}) == 8
    assert count_tokens({"input_ids": ids, "attention_mask": mask[:, None, None].expand(2, 1, 5, 5)}) == 10
    assert count_tokens({"labels": torch.zeros(2), "inputs_embeds": torch.zeros(2, 5, 3)}) == 10


@pytest.mark.parametrize(("name", "kind"), [("pp_size", "pipeline"), ("cp_size", "context"), ("sp_size", "context")])
def test_gqe_trainer_refuses_pipeline_and_context_parallelism_by_name(tmp_path, monkeypatch, name, kind):
    model = model_of("gqe")
    if name == "pp_size":
        model.config.distributed_config = SimpleNamespace(pp_size=2)
    else:
        monkeypatch.setattr(GQETrainer, f"get_{name}", lambda _: 2)
    with pytest.raises(ValueError, match=f"{name} is 2; GQETrainer doesn't support {kind} parallelism.* must be 1"):
        GQETrainer(model, arguments(tmp_path), train_dataset=Rows())


def test_a_checkpoint_is_pushed_from_its_place(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda _, folder: pushed.append((folder, Path(folder, "files.json").exists()))
    )
    trainer = GQETrainer(
        model_of("gqe"), arguments(tmp_path, save_strategy="steps", save_steps=1), train_dataset=Rows()
    )
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None, raising=False)
    trainer.train()
    assert pushed == [(str(tmp_path / "run" / "checkpoint-1"), True)]
