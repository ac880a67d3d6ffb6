"""The router losses of the global batch: the same whatever way a step is cut into micro-batches."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from model_helpers import (
    EXACT,
    VOCABULARY,
    assert_same_tensors,
    balance_by_hand,
    gradients,
    random_tokens,
    tiny_model,
)
from query_experts.layers.balance import BalanceWindow, balance_loss, routing_statistics
from query_experts.layers.router import CPU_ROWS, Router, select_top_k
from query_experts.training import GQETrainer

COEFFICIENT = 0.5  # large, so that a fault in the balance term shows beside the language-model term


def counted(labels: Tensor) -> Tensor:
    """As the Trainer counts the labels of a step."""
    return labels[:, 1:].ne(-100).sum()


def real_logits(out, mask: Tensor | None = None) -> list[Tensor]:
    if mask is None:
        return [t.detach() for t in out.router_logits]
    return [t.detach()[mask.flatten().bool()] for t in out.router_logits]


# ---------------------------------------------------------------------------------------------------------------------
# The formulas
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "experts", "top_k"), [(1, 4, 1), (2, 3, 2), (4, 2, 2), (3, 1, 1)])
def test_the_balance_loss_is_the_one_counted_by_hand(groups, experts, top_k):
    logits = [torch.randn(17, groups * experts, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
    sums = routing_statistics(tuple(logits), groups, top_k, None)
    loss = balance_loss(sums.selected / sums.tokens, sums.prob_sum / sums.tokens)
    torch.testing.assert_close(loss, balance_by_hand(logits, logits, groups, top_k), **EXACT)
    assert sums.tokens == 17
    torch.testing.assert_close(sums.selected.sum(-1), torch.full((3, groups), 17.0 * top_k).double(), **EXACT)


def test_the_z_sum_is_the_squared_logsumexp_averaged_over_groups():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    expected = 0.0
    for token in (0, 1, 3, 4):
        for group in (logits[token, :3], logits[token, 3:]):
            expected += group.exp().sum().log() ** 2 / 2
    torch.testing.assert_close(routing_statistics((logits,), 2, 1, mask).z_sum[0], expected, **EXACT)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_uniform_probabilities_give_k_a_layer_whatever_is_selected(top_k):
    """M * sum_m f_m / M = sum_m f_m = k."""
    model = tiny_model(active_query_experts=top_k)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.router.weight)
    out = model(random_tokens(2, 7), output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, torch.tensor(2.0 * top_k).double(), **EXACT)


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[0.25, 0.25, 0.25, 0.25], [-0.1, 0.4, -0.1, 0.4], [0.3, 0.1, 0.3, 0.3]])
    assert select_top_k(logits, 1).tolist() == [[0], [1], [0]]
    assert select_top_k(logits, 3).tolist() == [[0, 1, 2], [1, 3, 0], [0, 2, 3]]


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_logits_that_are_not_finite_select_experts_that_exist(top_k):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan] * 4, [0, nan, 1, nan], [-inf] * 4, [inf, -inf, inf, nan]])
    selected = select_top_k(logits, top_k)
    in_order = selected.sort(-1).values
    assert 0 <= int(in_order.min()) <= int(in_order.max()) < 4
    assert (in_order.diff(dim=-1) > 0).all()


def test_a_collapsed_router_costs_m_a_layer():
    model = tiny_model(active_query_experts=1)
    logits = torch.zeros(10, 8).double()
    logits[:, ::4] = 100.0
    sums = routing_statistics((logits, logits), 2, 1, None)
    loss = balance_loss(sums.selected / sums.tokens, sums.prob_sum / sums.tokens)
    torch.testing.assert_close(loss, torch.tensor(2.0 * 4).double(), **EXACT)
    assert model(random_tokens(2, 9), output_router_logits=True).aux_loss < 8


# ---------------------------------------------------------------------------------------------------------------------
# A step cut into micro-batches
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fixed_fraction(model, ids: Tensor, mask: Tensor, monkeypatch):
    """Holds f at that of the whole batch, which the micro-batches before the last can't know."""
    with torch.no_grad():
        out = model.eval()(ids, attention_mask=mask, output_router_logits=True)
    sums = routing_statistics(tuple(real_logits(out)), 2, 2, mask)
    with monkeypatch.context() as patch:
        patch.setattr(BalanceWindow, "add", lambda self, *_: (sums.selected, sums.tokens))
        yield
    model.train()


def step_gradients(ids: Tensor, mask: Tensor, labels: Tensor, rows: int, **counts) -> dict[str, Tensor]:
    model = tiny_model(router_aux_loss_coef=COEFFICIENT, router_z_loss_coef=0.1).train()
    for i in range(0, len(ids), rows):
        part = slice(i, i + rows)
        model(ids[part], attention_mask=mask[part], labels=labels[part], **counts).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_identical_rows_give_the_same_gradients_however_they_are_cut(rows):
    """Then f is the same in every micro-batch. One pass over 8 rows is what Llama would do."""
    ids = random_tokens(1, 12).repeat(8, 1)
    mask = torch.ones_like(ids)
    whole = step_gradients(ids, mask, ids, 8, num_items_in_batch=counted(ids))
    assert_same_tensors(step_gradients(ids, mask, ids, rows, num_items_in_batch=counted(ids)), whole)
    assert_same_tensors(step_gradients(ids, mask, ids, 8), whole)


def uneven() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 15, 14, ... real tokens; labels only in the first few, so that their shares differ from the tokens'."""
    ids = random_tokens(8, 15)
    lengths = 15 - torch.arange(8)[:, None]
    mask = (torch.arange(15) < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    for b in range(8):
        labels[b, : 1 + (5 * b) % 7] = -100
    return ids, mask, labels


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_uneven_rows_give_the_same_gradients_where_the_step_s_tokens_are_counted(rows, monkeypatch):
    ids, mask, labels = uneven()
    counts = {"num_items_in_batch": counted(labels), "num_tokens_in_batch": mask.sum()}
    with fixed_fraction(tiny_model(), ids, mask, monkeypatch):
        whole = step_gradients(ids, mask, labels, 8, **counts)
        assert_same_tensors(step_gradients(ids, mask, labels, rows, **counts), whole)
        assert_same_tensors(step_gradients(ids, mask, labels, 8), whole)
        # what the test would miss if it could not tell: by labels alone the shares differ here
        by_labels = step_gradients(ids, mask, labels, rows, num_items_in_batch=counts["num_items_in_batch"])
    name = "model.layers.0.self_attn.router.weight"
    assert (by_labels[name] - whole[name]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_counts_may_be_numbers_or_tensors(kind):
    ids, mask, labels = uneven()
    plain = step_gradients(ids, mask, labels, 4, num_items_in_batch=50, num_tokens_in_batch=80)
    counts = {"num_items_in_batch": kind(50), "num_tokens_in_batch": kind(80)}
    assert_same_tensors(step_gradients(ids, mask, labels, 4, **counts), plain)


def test_shifted_labels_count_as_they_are():
    model = tiny_model(router_aux_loss_coef=COEFFICIENT)
    ids = random_tokens(2, 9)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    expected = model(ids, labels=ids, num_items_in_batch=20).loss
    torch.testing.assert_close(
        model(ids, labels=ids, shift_labels=shifted, num_items_in_batch=20).loss, expected, **EXACT
    )


# ---------------------------------------------------------------------------------------------------------------------
# f over the micro-batches of a step
# ---------------------------------------------------------------------------------------------------------------------


class Steps:
    """Runs micro-batches of 12 tokens in training and knows what each one's f was counted over."""

    def __init__(self):
        self.model = tiny_model().train()
        self.seed = 0

    def micro_batch(self, window: list[list[Tensor]], **counts) -> list[list[Tensor]]:
        """Asserts that f of this micro-batch spans those in `window` and itself; returns the window with it."""
        self.seed += 1
        ids = random_tokens(1, 12, self.seed)
        out = self.model(ids, labels=ids, output_router_logits=True, **counts)
        here = real_logits(out)
        window = [*window, here]
        spanned = [torch.cat(layers) for layers in zip(*window, strict=True)]
        torch.testing.assert_close(out.aux_loss, balance_by_hand(spanned, here, 2, 2), **EXACT)
        return window


COUNTS = pytest.mark.parametrize("count", ["num_items_in_batch", "num_tokens_in_batch"])


def step_total(count: str, micro_batches: int) -> dict[str, int]:
    return {count: micro_batches * (11 if count == "num_items_in_batch" else 12)}


@COUNTS
def test_f_spans_a_step_s_micro_batches_so_far_and_starts_anew_at_the_next_step(count):
    steps = Steps()
    for size in (3, 3, 2, 4, 1, 1, 2):  # steps of equal and of different totals
        window = []
        for _ in range(size):
            window = steps.micro_batch(window, **step_total(count, size))


@COUNTS
def test_a_step_after_an_aborted_one_of_another_size_starts_anew(count):
    steps = Steps()
    steps.micro_batch(steps.micro_batch([], **step_total(count, 4)), **step_total(count, 4))
    window = steps.micro_batch([], **step_total(count, 2))
    steps.micro_batch(window, **step_total(count, 2))


@COUNTS
def test_an_optimizers_step_begins_a_new_one_whatever_the_last_one_held(count):
    """After one that was cut short, and after one that wasn't."""
    steps = Steps()
    optimizer = torch.optim.SGD(steps.model.parameters(), lr=0.0)
    for size in (2, 4, 4, 3):  # of the 4 that each step's total speaks of
        window = []
        for _ in range(size):
            window = steps.micro_batch(window, **step_total(count, 4))
        optimizer.step()


def test_a_copy_of_a_model_begins_with_an_empty_window_that_optimizers_empty_too():
    steps = Steps()
    steps.micro_batch([], num_items_in_batch=33)
    assert pickle.loads(pickle.dumps(steps.model.balance_window, protocol=0)).so_far is None
    steps.model = copy.deepcopy(steps.model)
    steps.micro_batch([], num_items_in_batch=33)
    torch.optim.SGD(steps.model.parameters(), lr=0.0).step()
    assert steps.model.balance_window.so_far is None


def test_without_a_count_each_pass_stands_alone():
    steps = Steps()
    for _ in range(3):
        steps.micro_batch([])


def test_passes_without_a_count_or_in_evaluation_leave_the_step_alone():
    steps = Steps()
    window = steps.micro_batch([], num_items_in_batch=33)
    steps.micro_batch([])
    steps.model.eval()
    steps.micro_batch([], num_items_in_batch=33)
    steps.micro_batch([], num_items_in_batch=11)
    steps.model.train()
    window = steps.micro_batch(window, num_items_in_batch=33)
    steps.micro_batch(window, num_items_in_batch=33)


def test_the_window_holds_no_graph():
    steps = Steps()
    steps.micro_batch([], num_items_in_batch=33)
    assert not any(t.requires_grad for t in steps.model.balance_window.so_far)


def test_the_window_belongs_to_one_model():
    steps, other = Steps(), Steps()
    steps.micro_batch([], num_items_in_batch=33)
    other.micro_batch([], num_items_in_batch=33)


# ---------------------------------------------------------------------------------------------------------------------
# Transformers' Trainer
# ---------------------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, **columns: Tensor):
        self.columns = columns

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


def train_one_step(trainer_class, directory, rows: int, data: Rows, steps: int = 1, **setting) -> dict[str, Tensor]:
    """Parameters after one step (or more) of plain SGD over 8 rows, `rows` at a time."""
    model = tiny_model(router_aux_loss_coef=COEFFICIENT, **setting)
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=8 // rows,
        max_steps=steps,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=1,
        data_seed=1,
        dataloader_pin_memory=False,
    )
    trainer_class(model=model, args=arguments, train_dataset=data).train()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("trainer", [Trainer, GQETrainer])
@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.full), 2])
def test_the_trainer_gives_the_same_parameters_with_and_without_accumulation(trainer, rows, steps, tmp_path):
    ids = random_tokens(1, 12).repeat(8 * steps, 1)
    data = Rows(input_ids=ids, labels=ids)
    whole = train_one_step(trainer, tmp_path, 8, data, steps)
    assert_same_tensors(train_one_step(trainer, tmp_path, rows, data, steps), whole)


@pytest.mark.parametrize("trainer", [Trainer, GQETrainer])
def test_in_training_f_spans_each_step_even_where_a_first_micro_batch_has_no_labels(trainer, tmp_path, monkeypatch):
    spans = []
    add = BalanceWindow.add

    def spy(self, *counts):
        selected, tokens = add(self, *counts)
        spans.append(int(tokens) // 12)
        return selected, tokens

    monkeypatch.setattr(BalanceWindow, "add", spy)
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
    ids = random_tokens(16, 12)
    labels = ids.clone()
    labels[[0, 1, 8, 9]] = -100  # the first micro-batch of each of the two steps
    train_one_step(trainer, tmp_path, 2, Rows(input_ids=ids, labels=labels), steps=2)
    assert spans == [2, 4, 6, 8] * 2  # rows of 12 tokens


def test_the_balance_gradient_does_not_grow_with_accumulation(tmp_path):
    """In this variant nothing but the balance loss reaches the router."""
    ids = random_tokens(1, 12).repeat(8, 1)
    data = Rows(input_ids=ids, labels=ids)
    name = "model.layers.0.self_attn.router.weight"
    start = dict(tiny_model(variant="hard_concat").named_parameters())[name]
    whole, cut = (train_one_step(Trainer, tmp_path, rows, data, variant="hard_concat")[name] for rows in (8, 1))
    assert (whole - start).abs().max() > 1e-5
    torch.testing.assert_close(cut, whole, **EXACT)


def test_the_gqe_trainer_counts_tokens_where_labels_and_padding_are_uneven(tmp_path, monkeypatch):
    ids, mask, labels = uneven()
    data = Rows(input_ids=ids, attention_mask=mask, labels=labels)
    with fixed_fraction(tiny_model(), ids, mask, monkeypatch):
        whole = train_one_step(GQETrainer, tmp_path, 8, data)
        cut = train_one_step(GQETrainer, tmp_path, 2, data)
    assert_same_tensors(cut, whole)


def test_evaluation_gives_the_loss_of_one_pass(tmp_path):
    ids, mask, labels = uneven()
    model = tiny_model(router_aux_loss_coef=COEFFICIENT)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = Rows(input_ids=ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels)
    stock = Trainer(model=model, args=arguments, eval_dataset=data).evaluate()
    assert stock["eval_loss"] == pytest.approx(out.loss.item(), abs=1e-6)
    ours = GQETrainer(model=model, args=arguments, eval_dataset=data).evaluate()
    assert ours["eval_loss"] == pytest.approx(out.lm_loss.item(), abs=1e-6)


def test_predictions_are_the_logits_alone(tmp_path):
    """Metrics of the stock Trainer get one array, as they do with Llama."""
    ids = random_tokens(4, 6)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    seen = []
    trainer = Trainer(
        model=tiny_model(),
        args=arguments,
        eval_dataset=Rows(input_ids=ids, labels=ids),
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )
    trainer.evaluate()
    assert getattr(seen[0], "shape", None) == (4, 6, VOCABULARY)


def test_router_logits_of_many_bf16_tokens_are_those_of_a_float32_product():
    """On a CPU they are made piece by piece."""
    torch.manual_seed(0)
    router, x = Router(24, 8).bfloat16(), torch.randn(3, CPU_ROWS + 7, 24, dtype=torch.bfloat16, requires_grad=True)
    logits = router(x)
    plain = (x.float() @ router.weight.float().T).flatten(0, 1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-6)
    cotangent = torch.randn_like(logits)
    ours, expected = (torch.autograd.grad(y, [x, router.weight], cotangent) for y in (logits, plain))
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=2**-8)  # bf16 gradients of order 0.1
    torch.testing.assert_close(ours[1], expected[1], rtol=2**-6, atol=0.1)  # and of order 40
