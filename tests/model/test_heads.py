"""Classification and question answering: loaded from a language model, with the router's losses in their loss."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from model_helpers import EXACT, balance_by_hand, random_tokens, tiny_config, tiny_model
from query_experts import GQEForQuestionAnswering, GQEForSequenceClassification, GQEForTokenClassification

HEADS = {
    "sequence": (AutoModelForSequenceClassification, GQEForSequenceClassification),
    "token": (AutoModelForTokenClassification, GQEForTokenClassification),
    "question": (AutoModelForQuestionAnswering, GQEForQuestionAnswering),
}
each_head = pytest.mark.parametrize("kind", HEADS)
IDS = random_tokens(4, 9).clamp(min=1)
MASK = (torch.arange(9) < torch.tensor([5, 9, 7, 9])[:, None]).long()
COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}


def head_of(kind, **changes):
    """A float64 model in eval mode with three classes, and one layer."""
    torch.manual_seed(0)
    config = tiny_config(**({"num_hidden_layers": 1, "pad_token_id": 0, "num_labels": 3} | COEFFICIENTS | changes))
    return HEADS[kind][0].from_config(config).double().eval()


def answers(kind):
    if kind == "question":
        return {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([4, 8, 6, 7])}
    classes = IDS % 3
    return {"labels": classes[:, 0] if kind == "sequence" else classes.masked_fill(MASK == 0, -100)}


def task_loss(kind, output, given):
    """Cross-entropy of the logits, by its definition."""
    if kind == "question":
        pairs = [
            (output.start_logits, given["start_positions"]),
            (output.end_logits, given["end_positions"]),
        ]
        return sum(F.cross_entropy(*pair) for pair in pairs) / 2
    return F.cross_entropy(output.logits.flatten(0, -2), given["labels"].flatten())


def rows(given, chosen):
    return {name: values[chosen] for name, values in given.items()}


@each_head
def test_a_language_model_s_checkpoint_lacks_only_the_head(kind, tmp_path):
    model = tiny_model(num_hidden_layers=1, pad_token_id=0)
    model.save_pretrained(tmp_path)
    auto, own = HEADS[kind]
    head, loading = auto.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(head) is own
    assert {name.split(".")[0] for name in loading["missing_keys"]} <= {"score", "qa_outputs"}
    assert not loading["mismatched_keys"]
    hidden = model.model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(head.model(IDS, attention_mask=MASK).last_hidden_state, hidden, **EXACT)


@each_head
@pytest.mark.parametrize("asked", [True, False])
def test_the_loss_is_the_task_s_and_the_weighted_router_losses_of_the_real_tokens(kind, asked):
    head, given = head_of(kind), answers(kind)
    output = head(IDS, attention_mask=MASK, output_router_logits=asked, **given)
    torch.testing.assert_close(output.task_loss, task_loss(kind, output, given), rtol=1e-6, atol=0, check_dtype=False)
    logits = head.model(IDS, attention_mask=MASK, output_router_logits=True).router_logits
    real = [layer[MASK.flatten().bool()] for layer in logits]
    balance = balance_by_hand(real, real, 2, 2)
    z_loss = sum(layer.unflatten(-1, (2, 4)).logsumexp(-1).square().mean() for layer in real)
    expected = output.task_loss + 0.5 * balance + 0.25 * z_loss
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0, check_dtype=False)
    assert (output.aux_loss is not None) == (output.router_logits is not None) == asked
    if asked:
        torch.testing.assert_close(output.aux_loss, balance, **EXACT)
        torch.testing.assert_close(output.router_logits, logits, **EXACT)


@each_head
@torch.no_grad()
def test_without_labels_or_without_a_router_there_is_no_router_loss(kind):
    output = head_of(kind)(IDS, attention_mask=MASK)
    assert not {"loss", "task_loss", "aux_loss", "router_logits"} & set(output)
    output = head_of(kind, routing="none", active_query_experts=4)(IDS, output_router_logits=True, **answers(kind))
    assert output.loss == output.task_loss
    assert not {"aux_loss", "router_logits"} & set(output)


@each_head
def test_micro_batches_add_up_to_the_step_s_loss(kind):
    """As in the language model: task and router weighted by their shares, f counted over the step so far."""
    head, given = head_of(kind), answers(kind)
    counted = next(iter(given.values()))
    step = {"num_items_in_batch": counted.ne(-100).sum(), "num_tokens_in_batch": MASK.sum()}
    whole = head(IDS, attention_mask=MASK, output_router_logits=True, **given)
    head.train()
    parts = [slice(0, 1), slice(1, 4)]
    total, router_logits = 0.0, []
    for part in parts:
        output = head(IDS[part], attention_mask=MASK[part], output_router_logits=True, **rows(given, part), **step)
        router_logits.append([layer[MASK[part].flatten().bool()] for layer in output.router_logits])
        share = MASK[part].sum() / MASK.sum()
        z_loss = sum(x.unflatten(-1, (2, 4)).logsumexp(-1).square().mean() for x in router_logits[-1])
        expected = output.task_loss + share * (0.5 * output.aux_loss + 0.25 * z_loss)
        torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0, check_dtype=False)
        total = total + head.eval()(IDS[part], attention_mask=MASK[part], **rows(given, part), **step).task_loss
        head.train()
    torch.testing.assert_close(total, whole.task_loss, rtol=1e-6, atol=0)
    so_far = [torch.cat(layers) for layers in zip(*router_logits, strict=True)]
    torch.testing.assert_close(output.aux_loss, balance_by_hand(so_far, router_logits[1], 2, 2), **EXACT)


@pytest.mark.parametrize("labels", [torch.linspace(-1, 1, 4), IDS[:, :3] % 2.0], ids=["a number", "several classes"])
def test_regression_and_several_classes_are_weighted_by_their_share_too(labels):
    head = head_of("sequence", num_labels=1 if labels.ndim == 1 else 3)
    whole = head(IDS, labels=labels.double()).task_loss
    items = labels.numel()
    parts = [
        head(IDS[i : i + 2], labels=labels[i : i + 2].double(), num_items_in_batch=items).task_loss for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_regression_s_label_of_minus_100_is_a_number():
    head = head_of("sequence", num_labels=1, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    labels = torch.tensor([-100.0, 0.0, 0.0, 0.0]).double()
    halves = [head(IDS[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=4).task_loss for i in (0, 2)]
    torch.testing.assert_close(sum(halves), head(IDS, labels=labels).task_loss, rtol=1e-6, atol=0)


@each_head
@torch.no_grad()
def test_one_row_of_an_attention_mask_holds_for_all(kind):
    head, given = head_of(kind), answers(kind)
    ones = torch.ones(4, 9).long()
    each, one = (head(IDS, attention_mask=mask, output_router_logits=True, **given) for mask in (ones, ones[:1]))
    torch.testing.assert_close((one.loss, one.aux_loss), (each.loss, each.aux_loss), **EXACT)


@each_head
def test_a_call_without_ids_and_embeddings_says_so(kind):
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
        head_of(kind)(attention_mask=MASK, **answers(kind))


@pytest.mark.parametrize("items", [0, torch.tensor(0), 7], ids=["no label in the step", "in a tensor", "others have"])
def test_a_micro_batch_without_labelled_tokens_adds_nothing_of_the_task(items):
    head = head_of("token", router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    output = head(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=items)
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


@each_head
def test_a_tuple_holds_what_the_output_does(kind):
    head, given = head_of(kind), answers(kind)
    output = head(IDS, attention_mask=MASK, **given)
    tensors = [value for value in head(IDS, attention_mask=MASK, return_dict=False, **given) if torch.is_tensor(value)]
    torch.testing.assert_close(tensors, [value for value in output.values() if torch.is_tensor(value)], **EXACT)


def test_a_head_takes_another_k():
    head = head_of("sequence", output_projection="expert")
    head.set_top_k(1)
    assert head.config.active_query_experts == head.model.layers[0].self_attn.top_k == 1
