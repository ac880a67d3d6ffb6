"""A run that is stopped in one layout of ranks goes on in another, and ends as if nothing had happened.

Run as a script, this file is one of two ranks. It trains in each layout that two ranks have, and goes on from every
layout's checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from model_helpers import cross_entropy, random_tokens, tiny_model
from query_experts.distributed import checkpoints
from query_experts.distributed.checkpoints import FILES, damaged_files, put_in_place, writer_of, written_out
from query_experts.distributed.ranks import join_ranks
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from query_experts.study.callbacks import ZClipCallback
from query_experts.training import GQETrainer
from rank_helpers import run_ranks

SIZE = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "active_query_experts": 1, "num_hidden_layers": 1,
    "intermediate_size": 32, "vocab_size": 31, "router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.0, "qk_norm": True,
    "tie_word_embeddings": True,
}  # fmt: skip
LAYOUTS = ["one", "ddp", "fsdp", "tp"]
STEPS, SAVED = 6, 3
ROWS = 4  # of a step


def prepare(layout: str, folder: Path, out: str) -> tuple[Any, TrainingArguments, list[dict[str, Tensor]]]:
    """The model with its initial weights, as the ranks share it, the arguments of a run, and its rows."""
    more: dict[str, Any] = {}
    if layout in ("fsdp", "tp"):
        from transformers.distributed import DistributedConfig

        more["distributed_config"] = DistributedConfig(**{f"{layout}_size": 2})
    model = AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=torch.float64, **more)
    model.loss_function = cross_entropy
    rows = ROWS // 2 if layout in ("ddp", "fsdp") else ROWS
    arguments = TrainingArguments(
        output_dir=str(folder / out), max_steps=STEPS, save_steps=SAVED,
        per_device_train_batch_size=rows // 2, gradient_accumulation_steps=2, optim="adamw_torch", learning_rate=1e-2,
        weight_decay=0.1, lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=0.0, use_cpu=True, logging_steps=1,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=7, save_total_limit=2,
        restore_callback_states_from_checkpoint=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    ids = random_tokens(40, 12, seed=5)
    arguments.per_device_eval_batch_size = rows // 2
    return model, arguments, [{"input_ids": row, "labels": row} for row in ids]


def parameters_of(model: Any) -> dict[str, Tensor]:
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}


def run(layout: str, folder: Path, resumed: Path | None = None) -> dict[str, Tensor]:
    """Trains from the initial checkpoint, or on from another one. Returns all parameters at the end, and the losses."""
    model, arguments, data = prepare(layout, folder, layout if resumed is None else f"{layout}_on")
    zclip = ZClipCallback(warmup_steps=2, z_threshold=0.5)
    trainer = GQETrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[zclip],
    )
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if layout in ("fsdp", "tp"):  # gathers the ranks' parts
        model.save_pretrained(folder / f"{layout}_saved")
    found = parameters_of(model)
    logged = [log["lm_loss"] for log in trainer.state.log_history if "lm_loss" in log]
    return found | {"losses": torch.tensor(logged), "clipped": torch.tensor(clipped(trainer))}


def clipped(trainer: GQETrainer) -> int:
    return next(c.clipped_steps for c in trainer.callback_handler.callbacks if isinstance(c, ZClipCallback))


def best(layout: str, folder: Path) -> dict[str, Tensor]:
    """The parameters after a run that ends with its best model, the one with the greatest loss here."""
    model, arguments, data = prepare(layout, folder, f"{layout}_best")
    arguments.eval_strategy, arguments.eval_steps = "steps", SAVED
    arguments.load_best_model_at_end, arguments.metric_for_best_model = True, "eval_loss"
    arguments.greater_is_better = True
    trainer = GQETrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:5])
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == folder / f"{layout}_best" / f"checkpoint-{SAVED}"
    return parameters_of(model) | {"best": torch.tensor(trainer.state.best_metric)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    join_ranks()
    layouts = [layout for layout in LAYOUTS if layout != "one"]
    for layout in layouts:
        torch.save(best(layout, folder), folder / f"{layout}_best.{dist.get_rank()}.pt")
    for layout in layouts:
        torch.save(run(layout, folder), folder / f"{layout}.{dist.get_rank()}.pt")
    for layout in layouts:
        for before in LAYOUTS:
            ended = run(layout, folder, folder / before / f"checkpoint-{SAVED}")
            torch.save(ended, folder / f"{before}_{layout}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if not SHARDS_BY_GROUP:
        pytest.skip("Transformers below 5.20 can't load an optimizer in several processes on a CPU")
    path = tmp_path_factory.mktemp("checkpoints")
    tiny_model(seed=3, **SIZE).save_pretrained(path / "initial")
    torch.save(run("one", path), path / "one.pt")
    run_ranks(__file__, 2, path)
    return path


def assert_same_run(found: dict[str, Tensor], folder: Path) -> None:
    expected = torch.load(folder / "one.pt")
    assert found.keys() == expected.keys()
    assert expected["clipped"] > 0
    for name, value in expected.items():
        tolerance = 1e-6 if name == "losses" else 1e-9  # the Trainer adds losses up in float32
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
def test_two_ranks_train_as_one_process(layout, rank, folder):
    assert_same_run(torch.load(folder / f"{layout}.{rank}.pt"), folder)


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
def test_two_ranks_go_on_from_the_checkpoint_of_any_layout(layout, before, folder):
    for rank in range(2):
        assert_same_run(torch.load(folder / f"{before}_{layout}.{rank}.pt"), folder)


@pytest.mark.parametrize("before", LAYOUTS)
def test_one_process_goes_on_from_the_checkpoint_of_any_layout(before, folder):
    assert_same_run(run("one", folder, folder / before / f"checkpoint-{SAVED}"), folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_is_loaded_by_from_pretrained_alone(layout, folder):
    ended = torch.load(folder / "one.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / layout / f"checkpoint-{STEPS}", dtype=torch.float64)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), ended[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_the_best_model_is_loaded_on_every_rank(layout, folder, tmp_path):
    """Found among five rows, of which the last batch of two ranks has one."""
    (tmp_path / "initial").symlink_to(folder / "initial")
    expected = best("one", tmp_path)
    for rank in range(2):
        found = torch.load(folder / f"{layout}_best.{rank}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 if name == "best" else 1e-9, msg=name)


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_save_pretrained_of_a_sharded_model_writes_an_ordinary_checkpoint(layout, folder):
    ended = torch.load(folder / "one.pt")
    assert (folder / f"{layout}_saved" / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / f"{layout}_saved", dtype=torch.float64)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), ended[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_lists_every_rank_s_files(layout, folder):
    checkpoint = folder / layout / f"checkpoint-{STEPS}"
    assert damaged_files(checkpoint) == []
    ranks = 1 if layout == "one" else 2
    assert len([*checkpoint.glob("rng_state*.pth")]) == ranks
    assert sorted(path.name for path in (folder / layout).iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_a_checkpoint_with_a_file_less_or_cut_is_known(tmp_path):
    (tmp_path / "writing" / "checkpoint-1" / "optimizer").mkdir(parents=True)
    written, final = tmp_path / "writing" / "checkpoint-1", tmp_path / "checkpoint-1"
    for name in ("rng_state_0.pth", "rng_state_1.pth", "optimizer/part"):
        (written / name).write_bytes(b"1234")
    put_in_place(written, final, written_out(written))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert damaged_files(final) == []
    (final / "rng_state_1.pth").unlink()
    (final / "optimizer" / "part").write_bytes(b"12")
    assert sorted(damaged_files(final)) == ["optimizer/part", "rng_state_1.pth"]


def test_a_file_whose_content_has_changed_is_known_by_its_checksum(tmp_path):
    (tmp_path / "writing").mkdir()
    (tmp_path / "writing" / "part").write_bytes(b"1234")
    put_in_place(tmp_path / "writing", tmp_path / "checkpoint-1", written_out(tmp_path / "writing"))
    final = tmp_path / "checkpoint-1"
    (final / "part").write_bytes(b"1235")
    assert damaged_files(final) == ["part"]
    (final / FILES).write_text('{"sizes": {"part": 4}}')  # of an earlier version
    assert damaged_files(final) == []
    for damage in ("[]", "{}", '{"sizes": {"part": 4}, "sha256": 3}', "{"):
        (final / FILES).write_text(damage)
        with pytest.raises(ValueError, match=r"damaged|Expecting"):
            damaged_files(final)


def test_all_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    written, final, synced = tmp_path / "writing", tmp_path / "checkpoint-1", []
    (written / "optimizer").mkdir(parents=True)
    for name in ("rng_state.pth", "optimizer/part"):
        (written / name).write_bytes(b"1234")
    for kind in ("sync_file", "sync_folder"):
        monkeypatch.setattr(checkpoints, kind, lambda path: synced.append((path, final.exists())))
    put_in_place(written, final, written_out(written))
    before = [written, *(written / name for name in (FILES, "optimizer", "optimizer/part", "rng_state.pth"))]
    assert sorted(synced) == sorted([(tmp_path, True), *((path, False) for path in before)])


def test_each_rank_answers_for_the_files_that_it_wrote(monkeypatch):
    monkeypatch.setattr(checkpoints, "rank_and_number", lambda: (0, 2))
    names = ["rng_state_1.pth", "__1_0.distcp", "shard-00002-model-00001-of-00001.safetensors"]
    assert [writer_of(name) for name in names] == [1, 1, 1]
    names = ["rng_state_0.pth", "__0_0.distcp", "shard-00001-model.safetensors", "scheduler.pt", "rng_state_7.pth"]
    assert [writer_of(name) for name in names] == [0] * 5


def test_a_list_may_be_missing_only_where_one_process_wrote_the_checkpoint(tmp_path):
    assert damaged_files(tmp_path) == []
    (tmp_path / "rng_state_0.pth").touch()
    assert damaged_files(tmp_path) == [FILES]
    (tmp_path / "rng_state_0.pth").unlink()
    (tmp_path / "optimizer").mkdir()
    assert damaged_files(tmp_path) == [FILES]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
