"""Heads in the Trainer, in PEFT and in TRL: training, accumulation, resuming, adapters, rewards."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
)

from model_helpers import random_tokens, tiny_config, word_tokenizer
from query_experts.training import GQETrainer
from study_helpers import arguments, logged

AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
}
each_head = pytest.mark.parametrize("kind", AUTO)


def head_of(kind, **changes):
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=1, pad_token_id=0, **changes)
    config.classifier_dropout = 0.0
    return AUTO[kind].from_config(config)


class Answers(Dataset):
    """8 rows of 6 tokens, padded to several lengths, whose first token tells the answer."""

    def __init__(self, kind):
        self.kind = kind
        self.mask = (torch.arange(6) < torch.tensor([6, 3, 4, 6, 5, 2, 6, 6])[:, None]).long()
        self.ids = random_tokens(8, 6).clamp(min=1) * self.mask

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids, mask = self.ids[i], self.mask[i]
        match self.kind:
            case "sequence":
                given = {"labels": ids[0] % 2}
            case "token":
                given = {"labels": (ids % 2).masked_fill(mask == 0, -100)}
            case "question":
                given = {"start_positions": ids[0] % 2, "end_positions": mask.sum() - 1}
        return {"input_ids": ids, "attention_mask": mask, **given}


def trained(tmp_path, kind, trainer_class, accumulation=1):
    """One step, with a router of zeros: then a layer's balance loss is k = 2 however the batch is split."""
    model = head_of(kind, router_aux_loss_coef=3.0)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.router.weight)
    args = arguments(
        tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer = trainer_class(model, args, train_dataset=Answers(kind), eval_dataset=Answers(kind))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "trainer_class"), [*((kind, GQETrainer) for kind in AUTO), ("sequence", Trainer), ("question", Trainer)]
)
def test_accumulation_leaves_the_losses_as_they_are(tmp_path, kind, trainer_class):
    whole, parts = (trained(tmp_path, kind, trainer_class, accumulation) for accumulation in (1, 4))
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    if trainer_class is GQETrainer:
        assert logged(parts, "task_loss") == pytest.approx(logged(whole, "task_loss"), rel=1e-4)
        assert logged(parts, "loss")[0] - logged(parts, "task_loss")[0] == pytest.approx(3.0 * 2, rel=1e-4)
        assert not logged(parts, "lm_loss")


@each_head
@torch.no_grad()
def test_the_trainer_evaluates_the_task_s_loss(tmp_path, kind):
    data = Answers(kind)
    trainer = GQETrainer(head_of(kind, router_aux_loss_coef=3.0), arguments(tmp_path), eval_dataset=data)
    halves = [torch.utils.data.default_collate([data[i] for i in range(n, n + 4)]) for n in (0, 4)]
    expected = sum(float(trainer.model.eval()(**half).task_loss) for half in halves) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


class Wrapped(torch.nn.Module):
    """A head within a module that has only its forward and its configuration."""

    def __init__(self, head):
        super().__init__()
        self.head, self.config = head, head.config

    def forward(self, input_ids, attention_mask, labels, **kwargs):
        return self.head(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def test_a_wrapped_head_trains_and_its_loss_is_logged_as_the_task_s(tmp_path):
    data = Answers("sequence")
    losses = []
    for wrap in (lambda head: head, Wrapped):
        model = wrap(head_of("sequence", router_aux_loss_coef=3.0))
        trainer = GQETrainer(model, arguments(tmp_path), train_dataset=data)
        trainer.train()
        losses.append(logged(trainer, "task_loss"))
    assert losses[0] == losses[1] != []


def test_a_head_s_predictions_are_its_logits_alone(tmp_path):
    model = head_of("sequence", output_router_logits=True)
    trainer = Trainer(model, arguments(tmp_path, prediction_loss_only=False))
    assert trainer.predict(Answers("sequence")).predictions.shape == (8, 2)


def test_a_head_resumes_from_its_checkpoint(tmp_path):
    def trainer(steps):
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1, logging_steps=1)
        return GQETrainer(head_of("sequence"), args, train_dataset=Answers("sequence"))

    whole = trainer(2)
    whole.train()
    again = trainer(2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert logged(again, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    ids = Answers("sequence").ids
    torch.testing.assert_close(loaded(ids).logits, again.model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("kind", "task"), [("sequence", "SEQ_CLS"), ("token", "TOKEN_CLS"), ("question", "QUESTION_ANS")]
)
def test_lora_trains_and_saves_the_head_too(tmp_path, kind, task):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["router"], task_type=task)
    model = peft.get_peft_model(head_of(kind), lora)
    args = arguments(tmp_path, max_steps=2, learning_rate=0.1, per_device_train_batch_size=8)
    trainer = GQETrainer(model, args, train_dataset=Answers(kind))
    trainer.train()
    assert logged(trainer, "task_loss")
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(head_of(kind), tmp_path / "adapter").eval()
    ids, mask = Answers(kind).ids, Answers(kind).mask
    logits = [model.eval()(ids, attention_mask=mask)[0], loaded(ids, attention_mask=mask)[0]]
    torch.testing.assert_close(logits[1], logits[0])
    with loaded.disable_adapter():
        assert (loaded(ids, attention_mask=mask)[0] - logits[0]).abs().max() > 1e-3


def test_trl_s_reward_trainer_trains_a_head_with_one_label(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = [{"chosen": f"w{i} w3 w4", "rejected": f"w{i} w5"} for i in range(8)]
    settings = trl.RewardConfig(
        str(tmp_path), max_steps=3, learning_rate=0.05, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=head_of("sequence", num_labels=1),
        args=settings,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=word_tokenizer(eos_token="<eos>"),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
