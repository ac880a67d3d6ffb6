"""Several optimizer steps of GQETrainer, on ranks with rows of their own, end as those of one process.

Every run has unevenly padded rows and ZClip. Run as a script, this file is one of the ranks of a layout.
"""

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

from model_helpers import cross_entropy, random_tokens, tiny_llama_config, tiny_model
from query_experts.distributed.layout import copies_of_shards
from query_experts.distributed.ranks import join_ranks
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from query_experts.study.callbacks import ZClipCallback
from query_experts.telemetry import Telemetry
from query_experts.training import GQETrainer
from rank_helpers import run_ranks

SHAPE = {"num_key_value_heads": 4, "num_hidden_layers": 1, "vocab_size": 31, "intermediate_size": 32}
LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
ONE_OF_TWO = {"num_attention_heads": 8, "active_query_experts": 1}
TWO_OF_FOUR = {"num_attention_heads": 16, "active_query_experts": 2, "qk_norm": True}
GQE: dict[str, dict[str, Any]] = {
    "two_of_four": LOSSES | TWO_OF_FOUR,
    "expert_tied": LOSSES | ONE_OF_TWO | {"output_projection": "expert", "tie_word_embeddings": True},
    "weighted_concat": LOSSES | TWO_OF_FOUR | {"variant": "weighted_concat"},
    "no_balance_loss": ONE_OF_TWO | {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1},
    "static": {"num_attention_heads": 8, "active_query_experts": 2, "routing": "none"},
    "lora": LOSSES | TWO_OF_FOUR,
}
LLAMA = {"dense": {"num_attention_heads": 8}, "half": {"num_attention_heads": 4, "intermediate_size": 40}}
CASES = [*GQE, *LLAMA]
# ranks that share a layer, ranks that share a copy of the model, and copies of the model
LAYOUTS = {"ddp": (1, 1, 2), "fsdp": (1, 2, 1), "tp": (2, 1, 1), "fsdp_tp": (2, 2, 1), "two_of_fsdp": (1, 2, 2)}
IN_FOUR = ("two_of_four", "expert_tied")  # four processes share two cores
STEPS, ROWS, LENGTH = 4, 8, 12  # ROWS of a step
ACCUMULATIONS = (1, 2)


def rows() -> list[dict[str, Tensor]]:
    """The rows of all steps, and of the evaluation. Each has padding of its own."""
    ids = random_tokens(STEPS * ROWS, LENGTH, seed=5)
    padding = torch.randint(0, LENGTH - 3, (len(ids), 1), generator=torch.Generator().manual_seed(6))
    mask = (torch.arange(LENGTH) < LENGTH - padding).long()
    labels = ids.masked_fill(mask == 0, -100)
    return [{"input_ids": i, "attention_mask": m, "labels": n} for i, m, n in zip(ids, mask, labels, strict=True)]


def loaded(case: str, layout: str | None, folder: Path) -> Any:
    """A case's model with its initial weights, as the ranks of a layout share it."""
    more: dict[str, Any] = {}
    tp, fsdp, copies = LAYOUTS[layout] if layout else (1, 1, 1)
    if tp * fsdp > 1:
        from transformers.distributed import DistributedConfig

        of_shards = {"dp_replicate_size": copies} if copies > 1 else {}
        more["distributed_config"] = DistributedConfig(tp_size=tp, fsdp_size=fsdp, **of_shards)
    model = AutoModelForCausalLM.from_pretrained(folder / case, dtype=torch.float64, **more)
    model.loss_function = cross_entropy
    if case == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        targets = ["q_proj", "v_proj", "o_proj", "q_shared"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
    return model


def run(case: str, layout: str | None, accumulation: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Trains, and returns all parameters at the end, and what was logged but speed and memory."""
    model = loaded(case, layout, folder)
    _, fsdp, copies = LAYOUTS[layout] if layout else (1, 1, 1)
    here = ROWS // (fsdp * copies) // accumulation
    arguments = TrainingArguments(
        output_dir=str(folder / "runs"), max_steps=STEPS, per_device_train_batch_size=here,
        per_device_eval_batch_size=here, gradient_accumulation_steps=accumulation, optim="adamw_torch",
        learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=0.0,
        use_cpu=True, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=7,
        dataloader_pin_memory=False, logging_nan_inf_filter=False,
    )  # fmt: skip
    zclip = ZClipCallback(z_threshold=0.5)
    zclip.mean, zclip.variance = 1.0, 0.25  # so that it clips from the first step on
    trainer = GQETrainer(
        model=model, args=arguments, train_dataset=rows(), eval_dataset=rows()[:5],
        callbacks=[zclip, Telemetry(detailed=True)],
    )  # fmt: skip
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    ended = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}
    logs = [log for log in trainer.state.log_history if "lm_loss" in log]
    assert len(logs) == STEPS
    logged = {
        f"{name} after step {log['step']}": value
        for log in logs
        for name, value in log.items()
        if name in ("lm_loss", "aux_loss", "z_loss") or name.startswith(("grad_norm", "moe/"))
    }
    return {"parameters": ended, "logged": logged | {"evaluated": evaluated, "clipped": zclip.clipped_steps}}


def cases_of(layout: str) -> list[str]:
    """LoRA is for ranks that each have a whole model."""
    if math.prod(LAYOUTS[layout]) == 4:
        return list(IN_FOUR)
    return [case for case in CASES if case != "lora" or (layout == "ddp" and find_spec("peft"))]


def main(folder: Path, layout: str) -> None:
    torch.set_num_threads(1)
    join_ranks()
    for case in cases_of(layout):
        for accumulation in ACCUMULATIONS:
            ended = run(case, layout, accumulation, folder)
            torch.save(ended, folder / f"{case}.{layout}.{dist.get_rank()}.{accumulation}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder with the initial weights of all cases."""
    path = tmp_path_factory.mktemp("steps")
    for case, more in GQE.items():
        tiny_model(seed=3, **SHAPE | more).save_pretrained(path / case)
    for case, more in LLAMA.items():
        torch.manual_seed(3)
        LlamaForCausalLM(tiny_llama_config(**SHAPE | more)).double().save_pretrained(path / case)
    return path


def of_one_process(case: str, accumulation: int, folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / f"{case}.one.{accumulation}.pt"
    if not file.exists():
        torch.save(run(case, None, accumulation, folder), file)
    return torch.load(file)


def of_ranks(case: str, layout: str, accumulation: int, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """What each rank got; the first call for a layout runs all its cases."""
    ranks = math.prod(LAYOUTS[layout])
    if not (folder / f"{cases_of(layout)[-1]}.{layout}.{ranks - 1}.{ACCUMULATIONS[-1]}.pt").exists():
        run_ranks(__file__, ranks, folder, layout)
    return [torch.load(folder / f"{case}.{layout}.{rank}.{accumulation}.pt") for rank in range(ranks)]


def assert_same_run(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    assert expected["logged"]["clipped"] > 0
    assert found["parameters"].keys() == expected["parameters"].keys()
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: n + m)
    # the Trainer adds losses up in float32, as telemetry its metrics
    assert found["logged"] == pytest.approx(expected["logged"], rel=2e-6, abs=2e-6)


def parameter(layout: str, case: str) -> Any:
    skips = [pytest.mark.skipif(layout != "ddp" and not SHARDS_BY_GROUP, reason="needs Transformers 5.20")]
    if layout == "tp":  # fsdp_tp shares layers too
        skips.append(pytest.mark.full)
    if layout == "two_of_fsdp":
        old = not (SHARDS_BY_GROUP and copies_of_shards())
        skips += [pytest.mark.full, pytest.mark.skipif(old, reason="needs Transformers 5.23")]
    return pytest.param(layout, case, marks=skips, id=f"{layout}-{case}")


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize(
    ("layout", "case"), [parameter(layout, case) for layout in LAYOUTS for case in cases_of(layout)]
)
def test_ranks_with_rows_of_their_own_train_as_one_process(layout, case, accumulation, folder):
    expected = of_one_process(case, accumulation, folder)
    for found in of_ranks(case, layout, accumulation, folder):
        assert_same_run(found, expected)


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp", marks=parameter("fsdp", "dense").marks)])
def test_without_a_balance_loss_the_number_of_micro_batches_changes_nothing(layout, folder):
    expected = of_one_process("no_balance_loss", 1, folder)
    for found in of_ranks("no_balance_loss", layout, 2, folder):
        for name, value in expected["parameters"].items():
            torch.testing.assert_close(found["parameters"][name], value, rtol=0, atol=1e-9, msg=name)


def test_the_logs_hold_what_is_compared(folder):
    """Tests the tests above: the router's losses, norms and metrics are in the logs, and count."""
    logged = of_one_process("two_of_four", 1, folder)["logged"]
    names = {name.partition(" after")[0] for name in logged}
    assert {"lm_loss", "aux_loss", "z_loss", "grad_norm", "evaluated", "clipped"} <= names
    assert "moe/layer_0/group_3/load_expert_0" in names


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
