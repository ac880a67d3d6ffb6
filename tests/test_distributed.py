"""Two processes over gloo, each with its own rows, train as one process does with all rows.

Run as a script, this file is one of the two processes: it runs every case and saves its gradients.
"""

import os
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from model_helpers import (
    EXACT,
    assert_same_tensors,
    checkpoint_activations,
    random_tokens,
    tiny_llama_config,
    tiny_model,
)
from query_experts import GQEForCausalLM
from query_experts.distillation import DistillationTrainer
from query_experts.model.routing_metrics import probe, routed_layers
from query_experts.study.callbacks import StopRequest, StopWhenAsked
from query_experts.telemetry import Telemetry
from query_experts.training import GQETrainer

WORLD = 2
MICRO_BATCHES = 2
ROWS = 2  # of one rank in one micro-batch
SETTING = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "seed": 3}

# how the processes train, and which counts of the step the model gets
CASES = {
    "ddp_with_the_step_s_labels": ("ddp", ["num_items_in_batch"]),
    "ddp_with_uneven_padding": ("ddp", ["num_items_in_batch", "num_tokens_in_batch"]),
    "ddp_told_nothing": ("ddp", []),
    "ddp_checkpointed": ("checkpointed", ["num_items_in_batch", "num_tokens_in_batch"]),
    "fsdp_with_uneven_padding": ("fsdp", ["num_items_in_batch", "num_tokens_in_batch"]),
    "ddp_by_triton": ("ddp", ["num_items_in_batch", "num_tokens_in_batch"]),
    "fsdp_by_triton": ("fsdp", ["num_items_in_batch", "num_tokens_in_batch"]),
}


def batch(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of a step: tokens, mask and labels [micro-batch, rank, row, T]; each row has its own padding."""
    rows = MICRO_BATCHES * WORLD * ROWS
    ids = random_tokens(rows, 12, seed=5)
    mask = torch.ones_like(ids)
    if "num_tokens_in_batch" in CASES[case][1]:
        mask = (torch.arange(12) < 12 - torch.tensor([0, 1, 7, 9, 2, 0, 8, 5])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return tuple(t.view(MICRO_BATCHES, WORLD, ROWS, 12) for t in (ids, mask, labels))


def counts_of(case: str) -> dict[str, Tensor]:
    """The counts of the step that the model gets, by their argument's name."""
    _, mask, labels = batch(case)
    counts = {"num_items_in_batch": labels[..., 1:].ne(-100).sum(), "num_tokens_in_batch": mask.sum()}
    return {name: counts[name] for name in CASES[case][1]}


def train_alone(case: str) -> dict[str, Tensor]:
    """The gradients of a step in one process that gets every rank's rows."""
    model = tiny_model(**SETTING).train()
    for ids, mask, labels in zip(*batch(case), strict=True):
        out = model(
            ids.flatten(0, 1), attention_mask=mask.flatten(0, 1), labels=labels.flatten(0, 1), **counts_of(case)
        )
        out.loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def train_as_rank(case: str, rank: int) -> dict[str, Tensor]:
    """The same in one of two processes, with the factor by which the Trainer undoes the average over ranks."""
    model = tiny_model(**SETTING).train()
    if case.endswith("triton"):
        model.set_kernels("triton")
    how, counts = CASES[case]
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model, FSDPModule)
        assert isinstance(model.model.layers[0], FSDPModule)
    elif how == "checkpointed":
        checkpoint_activations(model)
    wrapped = model if how == "fsdp" else DistributedDataParallel(model)
    for ids, mask, labels in zip(*(t[:, rank] for t in batch(case)), strict=True):
        out = wrapped(input_ids=ids, attention_mask=mask, labels=labels, **counts_of(case))
        (out.loss * (WORLD if counts else 1)).backward()
    whole = (lambda t: t.full_tensor()) if how == "fsdp" else (lambda t: t)
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def tiny_static(seed: int) -> GQEForCausalLM:
    return tiny_model(seed=seed, routing="none", active_query_experts=4)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_llama_config()).double()


LOSSES = ("lm_loss", "aux_loss", "z_loss", "kd_loss")


def tiny_lora(seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "q_shared"], init_lora_weights=False)
    return get_peft_model(tiny_model(seed=seed), adapted).double()


TRAINED = {
    "gqe_trainer_on_gqe": tiny_model,
    "gqe_trainer_on_static": tiny_static,
    "gqe_trainer_on_dense": tiny_llama,
    "gqe_trainer_on_gqe_rank_by_rank": tiny_model,  # each rank counts its own tokens; the counts are equal
    "gqe_trainer_on_dense_rank_by_rank": tiny_llama,
    "gqe_trainer_on_lora": tiny_lora,
    "distilled_gqe": tiny_model,
    "distilled_dense": tiny_llama,
    "distilled_dense_rank_by_rank": tiny_llama,
}


def train_by_trainer(case: str, rows: int, folder: Path) -> dict[str, Tensor]:
    """Parameters after two steps of GQETrainer over 8 rows, `rows` on each rank, and what it logs but speed and memory.

    The rows are unevenly padded, unless each rank counts its own tokens: then the loss is the mean of the ranks' means.
    """
    by_rank = case.endswith("rank_by_rank")
    ids, mask, labels = (t.flatten(0, 2) for t in batch("ddp_told_nothing" if by_rank else "ddp_with_uneven_padding"))
    data = [{"input_ids": i, "attention_mask": m, "labels": n} for i, m, n in zip(ids, mask, labels, strict=True)]
    model = TRAINED[case](seed=3)
    arguments = TrainingArguments(
        output_dir=str(folder / case), max_steps=2, per_device_train_batch_size=rows, per_device_eval_batch_size=rows,
        optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, average_tokens_across_devices=not by_rank,
    )  # fmt: skip
    options: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": data, "eval_dataset": data}
    options["callbacks"] = [Telemetry(detailed=True)]
    if case.startswith("distilled"):
        trainer = DistillationTrainer(**options, teacher=tiny_llama(seed=4), weight=0.7)
    else:
        trainer = GQETrainer(**options)
    trainer.train()
    *_, last = (log for log in trainer.state.log_history if "lm_loss" in log)
    logged = {name: value for name, value in last.items() if name in LOSSES or name.startswith("moe/")}
    logged["eval_loss"] = trainer.evaluate()["eval_loss"]
    logged["eval_loss of rows that one rank holds"] = trainer.evaluate(data[:3])["eval_loss"]
    return {name: p.detach() for name, p in model.named_parameters()} | {
        f"logged {name}": torch.tensor(value, dtype=torch.float64) for name, value in logged.items()
    }


def entropies(shard: bool) -> Tensor:
    """Router entropy by layer and group, of a whole model or of one that FSDP2 shards."""
    model = tiny_model(**SETTING)
    layers = routed_layers(model)
    if shard:
        mesh = init_device_mesh("cpu", (WORLD,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    return probe(model, layers, {"input_ids": random_tokens(2, 12, seed=5)}).entropy


def tokens_in_window(rank: int, own: bool) -> Tensor:
    """How many tokens the balance loss's f covers after a step. own: whether each rank counts only its own labels."""
    model = tiny_model(**SETTING).train()
    ids, mask, labels = (t[:, rank] for t in batch("ddp_told_nothing"))
    total = labels[..., 1:].numel() * (1 if own else WORLD)
    for micro in zip(ids, mask, labels, strict=True):
        model(micro[0], attention_mask=micro[1], labels=micro[2], num_items_in_batch=torch.tensor(total))
    return model.balance_window.so_far[1]


def steps_until_stopped(rank: int, folder: Path) -> Tensor:
    """The last step of a run of five steps in which only the last rank is asked to stop."""
    request = StopRequest()

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if rank == WORLD - 1 and state.global_step == 1:
                request.signal = 2

    ids = random_tokens(40, 12, seed=5)
    arguments = TrainingArguments(
        output_dir=str(folder / "stopped"), max_steps=5, per_device_train_batch_size=2, use_cpu=True, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, max_grad_norm=0.0, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GQETrainer(
        model=tiny_model(seed=3), args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[Ask(), StopWhenAsked(request)],
    )  # fmt: skip
    trainer.train()
    return torch.tensor(trainer.state.global_step)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # the Trainer needs these even if the process group exists already
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    for case in CASES if find_spec("triton") else [name for name in CASES if not name.endswith("triton")]:
        torch.save(train_as_rank(case, rank), folder / f"{case}.{rank}.pt")
    for case in TRAINED if find_spec("peft") else [name for name in TRAINED if not name.endswith("lora")]:
        torch.save(train_by_trainer(case, 4, folder), folder / f"{case}.{rank}.pt")
    facts = {"stopped": steps_until_stopped(rank, folder), "entropies": entropies(shard=True)}
    facts |= {name: tokens_in_window(rank, name == "own") for name in ("own", "all")}
    torch.save(facts, folder / f"facts.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder with the gradients of both processes."""
    path = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return path


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("case", CASES)
def test_two_processes_get_the_gradients_of_one(case, rank, folder):
    if case.endswith("triton"):
        pytest.importorskip("triton")
    expected = train_alone(case)
    assert_same_tensors(torch.load(folder / f"{case}.{rank}.pt"), expected, **EXACT)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("case", TRAINED)
def test_gqe_trainer_on_two_processes_trains_and_evaluates_as_on_one(case, rank, folder, tmp_path):
    if case.endswith("lora"):
        pytest.importorskip("peft")
    expected = train_by_trainer(case, 8, tmp_path)
    actual = torch.load(folder / f"{case}.{rank}.pt")
    logged = [{name: run.pop(name) for name in [*run] if name.startswith("logged")} for run in (actual, expected)]
    assert_same_tensors(actual, expected, **EXACT)
    assert_same_tensors(*logged, rtol=0, atol=2e-6)  # float32 means
    assert ("logged moe/layer_0/group_0/load_expert_0" in logged[0]) == ("logged aux_loss" in logged[0])
    assert ("logged moe/routing_churn_max" in logged[0]) == case.endswith(("gqe", "gqe_rank_by_rank", "lora"))


@pytest.mark.parametrize("rank", range(WORLD))
def test_routers_of_a_sharded_model_are_measured_as_those_of_a_whole_one(rank, folder):
    torch.testing.assert_close(torch.load(folder / f"facts.{rank}.pt")["entropies"], entropies(shard=False), **EXACT)


@pytest.mark.parametrize("rank", range(WORLD))
def test_both_processes_stop_where_one_is_asked_to(rank, folder):
    assert torch.load(folder / f"facts.{rank}.pt")["stopped"] == 2
    assert (folder / "stopped" / "checkpoint-2").exists()


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("counted", ["own", "all"])
def test_the_balance_loss_spans_a_step_whether_its_labels_are_counted_over_ranks_or_by_each(rank, counted, folder):
    assert torch.load(folder / f"facts.{rank}.pt")[counted] == MICRO_BATCHES * WORLD * ROWS * 12


def test_a_rank_s_own_balance_loss_would_give_other_gradients():
    """Tests the tests above: f of only one rank's rows gives other gradients."""
    case = "ddp_with_uneven_padding"
    whole = train_alone(case)
    summed: dict[str, Tensor] = {}
    for rank in range(WORLD):
        model = tiny_model(**SETTING).train()
        for ids, mask, labels in zip(*(t[:, rank] for t in batch(case)), strict=True):
            model(ids, attention_mask=mask, labels=labels, **counts_of(case)).loss.backward()
        for name, p in model.named_parameters():
            summed[name] = summed.get(name, 0) + p.grad
    name = "model.layers.0.self_attn.router.weight"
    assert (summed[name] - whole[name]).abs().max() > 1e-6


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
