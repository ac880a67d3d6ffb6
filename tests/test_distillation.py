"""Distillation: the terms of the loss, micro-batches, teachers, documents in a row, and how k falls."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import default_data_collator

from query_experts.convert import from_dense
from query_experts.distillation import DistillationTrainer, TopKSchedule, divergence, teacher_inputs
from query_experts.study.compare import open_corpus
from query_experts.study.settings import DistillSettings
from query_experts.study.train import StartingPoint, stop_after, train_arm
from study_helpers import LENGTHS, TINY, Rows, arguments, logged, model_of, quiet, write_text


def test_the_divergence_is_that_of_the_predicted_tokens_alone():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, 5, 6, -100, -100]])
    total, count = 0.0, 0
    for b in range(2):
        for t in range(4):
            if labels[b, t + 1] != -100:
                p, q = teacher[b, t].softmax(-1), student[b, t].softmax(-1)
                total, count = total + float((p * (p / q).log()).sum()), count + 1
    assert float(divergence(student, teacher, labels, None)) == pytest.approx(total / count, rel=1e-5)
    assert float(divergence(student, teacher, labels, 20)) == pytest.approx(total / 20, rel=1e-5)
    assert float(divergence(student, student, labels, None)) == pytest.approx(0, abs=1e-6)


def trainer_of(tmp_path, teacher, model, weight, **changes):
    rows = Rows(8, lengths=LENGTHS[:8])
    return DistillationTrainer(
        model=model, args=arguments(tmp_path, **changes), train_dataset=rows, eval_dataset=rows,
        teacher=teacher, weight=weight,
    )  # fmt: skip


def stepped(tmp_path, weight, balance=0.01, **changes):
    """Teacher, and trainer after one SGD step from a conversion, on eight rows of different lengths."""
    teacher = model_of("dense").eval()
    student = from_dense(teacher, 1)
    student.config.router_aux_loss_coef = balance
    options = {"learning_rate": 1.0, "optim": "sgd", "data_seed": 0, "seed": 0} | changes
    trainer = trainer_of(tmp_path, teacher, student, weight, **options)
    trainer.train()
    return teacher, trainer


def test_a_steps_gradient_is_of_both_losses_by_their_weights_and_of_the_routers(tmp_path):
    teacher, trainer = stepped(tmp_path, 0.7, per_device_train_batch_size=8)
    expected = from_dense(teacher, 1).train()
    batch = default_data_collator([trainer.train_dataset[i] for i in range(8)])
    outputs = expected(**batch, output_router_logits=True)
    predicted = batch["labels"][:, 1:].ne(-100)
    with torch.no_grad():
        target = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][predicted]
    kl = F.kl_div(
        outputs.logits[:, :-1][predicted].log_softmax(-1),
        target.log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    (0.3 * outputs.lm_loss + 0.7 * kl + expected.config.router_aux_loss_coef * outputs.aux_loss).backward()
    for (name, trained), start in zip(trainer.model.named_parameters(), expected.parameters(), strict=True):
        if start.grad is not None:
            torch.testing.assert_close(trained.data, start.data - start.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_in_micro_batches_is_that_of_the_whole_batch(tmp_path):
    """Without the balance loss, which covers only the micro-batches so far."""
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = stepped(tmp_path / "a", 0.7, balance=0.0, per_device_train_batch_size=8)[1].model
    cut = stepped(tmp_path / "b", 0.7, balance=0.0, **small)[1].model
    for (name, one), other in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=name)


def test_the_teacher_stays_as_it_is_and_validation_is_the_language_model_loss(tmp_path):
    teacher = model_of("dense")
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_of(tmp_path, teacher, from_dense(teacher), 1.0, max_steps=2)
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training
    loss = trainer.evaluate()["eval_loss"]
    trainer.weight = 0.0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss)
    assert len(logged(trainer, "lm_loss")) == 2


def test_a_converted_model_learns_its_teacher(tmp_path):
    """With all experts active the divergence is zero at first; with one it isn't, and falls."""
    teacher = model_of("dense").eval()
    student = from_dense(teacher, 1)
    batch = default_data_collator([*Rows(8, lengths=LENGTHS[:8])])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def distance():
        return float(divergence(student.eval()(**inputs).logits, teacher(**inputs).logits, batch["labels"], None))

    before = distance()
    trainer_of(tmp_path, teacher, student, 1.0, max_steps=40, learning_rate=3e-3).train()
    assert distance() < 0.8 * before


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    teacher = model_of("dense")
    with pytest.raises(ValueError, match=r"weight is 1.5; it must be 0 to 1"):
        trainer_of(tmp_path, teacher, from_dense(teacher), 1.5)
    other = copy.deepcopy(teacher)
    other.config.vocab_size = 301
    with pytest.raises(ValueError, match="teacher has a vocabulary of 301; it must be the model's, 300"):
        trainer_of(tmp_path, other, from_dense(teacher), 0.5)
    with pytest.raises(TypeError, match="teacher is None; it must be a causal language model"):
        trainer_of(tmp_path, None, from_dense(teacher), 0.5)


@pytest.mark.parametrize("fraction", [1, 2, -0.1, float("nan"), "a", None])
def test_a_schedule_of_no_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction is .*; it must be a number, 0 or more and below 1"):
        TopKSchedule(1, fraction)


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_schedule_to_a_k_that_the_model_cannot_have_is_refused_before_the_first_step(tmp_path, top_k):
    teacher = model_of("dense")
    trainer = trainer_of(tmp_path, teacher, from_dense(teacher), 0.5, max_steps=4)
    trainer.add_callback(TopKSchedule(top_k, 0.5))
    with pytest.raises(ValueError, match=f"top_k is {top_k}; it must be 1 to 2, the experts in a group"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_k_falls_one_by_one_and_reaches_its_end_in_time():
    schedule = TopKSchedule(1, 0.5)
    assert [schedule.at(step, 12, 4) for step in range(12)] == [4, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1]
    assert [TopKSchedule(2, 0.0).at(step, 3, 4) for step in range(3)] == [2, 2, 2]
    for steps in (1, 2, 7, 100):
        for fraction in (0.0, 0.1, 0.9, 0.99):
            falling = [TopKSchedule(1, fraction).at(step, steps, 8) for step in range(steps)]
            assert falling[-1] == 1
            assert falling == sorted(falling, reverse=True)
            assert len(set(falling)) == 8 or steps < 10 or fraction == 0.0
    assert [TopKSchedule(1, 0.9).at(step, 100, 10) for step in (9, 10, 79, 80, 89, 90)] == [10, 9, 3, 2, 2, 1]


@pytest.mark.full
def test_a_run_that_is_resumed_validates_as_one_that_was_not(tmp_path):
    """k falls during the run; a checkpoint in between must not be validated at another k."""
    teacher = model_of("dense").eval()
    model_of("dense").save_pretrained(tmp_path / "dense")
    text = write_text(tmp_path / "text.txt")
    whole, pieces = (
        DistillSettings(data=[text], init="in memory", **TINY | {"out": str(tmp_path / out), "evaluations": 6})
        for out in ("whole", "pieces")
    )
    corpus = open_corpus(whole, tmp_path, quiet())
    results = []
    for settings in (whole, pieces):
        calls = 0
        while True:
            start = StartingPoint(from_dense(teacher, 1), teacher, 0.5, 0.9)
            stop = stop_after(0 if settings is pieces else None)
            calls += 1
            if result := train_arm(settings, "converted", 0, corpus, Path(settings.out), stop, start):
                break
        results.append(result)
        assert (calls > 2) == (settings is pieces)
    for one, other in zip(*(result.validation_curve for result in results), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_without_its_share_of_the_loss_the_teacher_rests(tmp_path):
    teacher = model_of("dense")
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("asked"))
    trainer_of(tmp_path, teacher, from_dense(teacher), 0.0).train()


def test_the_teacher_runs_under_the_students_autocast(tmp_path):
    teacher, seen = model_of("dense"), []
    teacher.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    trainer_of(tmp_path, teacher, from_dense(teacher), 0.5, bf16=True).train()
    assert seen == [torch.bfloat16]


def test_a_teacher_that_is_quantised_stays_where_it_is(tmp_path):
    teacher, student = model_of("dense"), from_dense(model_of("dense"))
    teacher.is_quantized = True
    teacher.to = lambda *_: pytest.fail("moved")
    trainer_of(tmp_path, teacher, student, 0.5)
    elsewhere = copy.copy(teacher)
    elsewhere.parameters = lambda: iter([torch.empty(1, device="meta")])
    with pytest.raises(ValueError, match="teacher is quantised and on meta; it must be loaded onto cpu"):
        trainer_of(tmp_path, elsewhere, student, 0.5)


def test_a_teacher_that_is_spread_over_several_devices_stays_where_it_is(tmp_path):
    moved = []
    for devices in ({"model": 0, "lm_head": 1}, {"model": "cpu", "lm_head": "cpu"}, {}, None):
        teacher = model_of("dense")
        teacher.hf_device_map = devices
        teacher.to = lambda device, devices=devices: moved.append(devices)
        trainer_of(tmp_path, teacher, from_dense(model_of("dense")), 0.5)
    assert moved == [{"model": "cpu", "lm_head": "cpu"}, {}, None]


@torch.no_grad()
def test_the_teacher_keeps_documents_of_a_row_apart_as_the_student_does():
    teacher = model_of("dense").eval()
    student = from_dense(teacher)
    ids = torch.randint(300, (2, 12))
    positions = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    packed = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    outputs = [
        model(**given, use_cache=False).logits
        for model, given in ((student, packed), (teacher, teacher_inputs(packed, separates_documents=True)))
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert (teacher(**packed, use_cache=False).logits - outputs[0]).abs().max() > 1e-3  # as without teacher_inputs
    padded = packed | {"attention_mask": (torch.arange(12) < torch.tensor([[10], [12]])).long()}
    outputs = [
        model(**given, use_cache=False).logits[padded["attention_mask"] != 0]
        for model, given in ((student, padded), (teacher, teacher_inputs(padded, separates_documents=True)))
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    hidden = packed | {"attention_mask": (torch.arange(12) >= 2).long().expand(2, -1)}
    with pytest.raises(ValueError, match="attention_mask hides tokens before others and position_ids restart"):
        teacher_inputs(hidden, separates_documents=True)
    first = {name: tensor[:1] for name, tensor in packed.items()}
    for holes in ([4, 5], [4], [5]):  # within the row: at the end of a document, or at the beginning of the next
        mask = torch.ones(1, 12).long().index_fill(1, torch.tensor(holes), 0)
        with pytest.raises(ValueError, match="attention_mask hides tokens before others"):
            teacher_inputs(first | {"attention_mask": mask}, separates_documents=True)
    one = hidden | {"position_ids": torch.arange(12)[None]}
    assert teacher_inputs(one, separates_documents=True) == one
    assert teacher_inputs(hidden, separates_documents=False) == hidden  # a stock student attends as its teacher does


@torch.no_grad()
def test_rows_that_are_padded_on_the_left_are_seen_by_the_teacher_as_they_are():
    """Positions that don't increase, at the padding, are no boundary between documents."""
    teacher = model_of("dense").eval()
    student = from_dense(teacher)
    mask = (torch.arange(12) >= torch.tensor([[0], [4], [7]])).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert positions.diff().ne(1).any()
    padded = {"input_ids": torch.randint(300, (3, 12)), "position_ids": positions, "attention_mask": mask}
    seen = teacher_inputs(padded, separates_documents=True)
    assert seen == padded
    outputs = [
        model(**given, use_cache=False).logits[mask == 1] for model, given in ((student, padded), (teacher, seen))
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_the_schedule_sets_the_models_k(tmp_path):
    teacher = model_of("dense")
    model = from_dense(teacher, 1)
    trainer = trainer_of(tmp_path, teacher, model, 0.5, max_steps=4)
    trainer.add_callback(TopKSchedule(1, 0.5))
    seen = []
    original = model.forward

    def watched(*args, **kwargs):
        seen.append((model.config.active_query_experts, model.model.layers[1].self_attn.top_k))
        return original(*args, **kwargs)

    model.forward = watched
    trainer.train()
    assert seen == [(2, 2), (2, 2), (1, 1), (1, 1)]
