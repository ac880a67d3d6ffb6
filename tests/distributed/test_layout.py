"""How the processes of a launch share a model, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from query_experts.common.errors import SettingError
from query_experts.distributed import layout, ranks
from query_experts.study.distill import load_start, load_teacher
from query_experts.study.settings import CompareSettings, DistillSettings
from query_experts.study.train import training_arguments
from query_experts.study.workspace import fingerprint, own_folder, refuse_change
from query_experts.training import EvaluatedRows
from study_helpers import tiny_train


def launched(monkeypatch, processes: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is 0, and WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''; it must be a whole number, 1 or more"),
        (LAUNCHED | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be a whole number, 1 or more"),
        (LAUNCHED | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number, 1 or more"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'; it must be a whole number, 0 or more"),
        (LAUNCHED | {"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'; it must be a whole number, 0 or more"),
        (LAUNCHED | {"RANK": "-1"}, "RANK is '-1'; it must be a whole number, 0 or more"),
        (LAUNCHED | {"RANK": "2"}, "RANK is 2; it must be less than WORLD_SIZE, 2"),
        (LAUNCHED | {"WORLD_SIZE": "1"}, "RANK is 1; it must be less than WORLD_SIZE, 1"),
    ],
    ids=str,
)
def test_a_launch_that_no_launcher_made_is_refused_with_what_is_wrong(monkeypatch, refused, given, said):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    refused(["train"], said)


def test_a_command_for_one_process_refuses_a_world_size_that_is_no_number(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "two")
    refused(["scaling", "run", "ladder.yaml"], "WORLD_SIZE is 'two'; it must be a whole number, 1 or more")


def test_a_rank_without_a_launch_is_the_first_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert ranks.is_first()


def test_processes_share_the_groups_of_the_checkpoints_that_distill_is_given(monkeypatch):
    """Not those that a new model would have, which are 4."""
    fixtures = Path(__file__).resolve().parents[1] / "fixtures"
    monkeypatch.setattr(layout, "SHARDS_BY_GROUP", True)
    launched(monkeypatch, 3)
    settings = DistillSettings(init=str(fixtures / "converted"), device="cpu", tp_size=3)
    settings.check()
    with pytest.raises(SettingError, match="tp_size is 3; it must divide init's num_key_value_heads, 2"):
        load_start(settings)
    with pytest.raises(SettingError, match="tp_size is 3; it must divide teacher's num_key_value_heads, 2"):
        load_teacher(str(fixtures / "dense"), settings)


@pytest.mark.parametrize(
    ("variable", "said"), [("ACCELERATE_USE_FSDP", "FSDP by Accelerate"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_accelerate_s_own_ways_of_sharing_are_refused_by_name(monkeypatch, variable, said):
    launched(monkeypatch, 2)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(SettingError, match=f"{variable} is true, which asks for {said}"):
        layout.check_layout_of_ranks(None, 1)


def test_copies_of_a_shared_model_are_refused_where_transformers_has_none(monkeypatch):
    launched(monkeypatch, 4)
    monkeypatch.setattr(layout, "SHARDS_BY_GROUP", True)
    monkeypatch.setattr(layout, "copies_of_shards", lambda: False)
    layout.check_layout_of_ranks(2, 2)
    with pytest.raises(SettingError, match="fsdp_size x tp_size must be the number of processes, 4"):
        layout.check_layout_of_ranks(2, 1)


def test_sharing_is_refused_where_transformers_cannot(monkeypatch):
    launched(monkeypatch, 2)
    monkeypatch.setattr(layout, "SHARDS_BY_GROUP", False)
    layout.check_layout_of_ranks(None, 1)
    with pytest.raises(SettingError, match=r"fsdp_size and tp_size need 5\.20 or newer"):
        layout.check_layout_of_ranks(2, 1)


def test_a_model_is_not_shared_on_another_device_than_transformers_places_it_on(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    layout.check_device_of_shards("cuda")
    with pytest.raises(SettingError, match="device is 'cpu', and processes share a model on 'cuda' here"):
        layout.check_device_of_shards("cpu")


def test_the_dtype_of_a_run_is_its_own_whatever_accelerate_launch_was_told(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    assert training_arguments(tiny_train(tmp_path), 0, tmp_path).mixed_precision == "no"


def test_a_global_batch_replaces_the_accumulation_of_a_preset_but_not_one_that_was_given(monkeypatch):
    settings = DistillSettings(gradient_accumulation_steps=4, global_batch_size=8, batch_size=2)
    settings.given = frozenset({"global_batch_size"})
    settings.check_batch()
    assert (settings.micro_batches, settings.sequences_per_step) == (4, 8)
    launched(monkeypatch, 4)
    assert (settings.micro_batches, settings.sequences_per_step) == (1, 8)
    settings.given = frozenset({"global_batch_size", "gradient_accumulation_steps"})
    with pytest.raises(SettingError, match="gradient_accumulation_steps is 4, and global_batch_size sets it"):
        settings.check_batch()


def test_a_folder_with_a_global_batch_takes_any_number_of_processes_and_one_without_does_not(monkeypatch, tmp_path):
    whole, plain = tiny_train(tmp_path, global_batch_size=4), tiny_train(tmp_path)
    before = [fingerprint(settings) for settings in (whole, plain)]
    launched(monkeypatch, 2)
    refuse_change(before[0], fingerprint(whole), tmp_path)
    with pytest.raises(
        SettingError, match="processes with data of their own were 1, now 2, which only global_batch_size would allow"
    ):
        refuse_change(before[1], fingerprint(plain), tmp_path)
    with pytest.raises(SettingError, match=r"\(global_batch_size was 4, now None\)"):
        refuse_change(before[0], fingerprint(plain), tmp_path)


def test_a_run_takes_the_folder_that_its_plan_was_written_to(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with own_folder(tmp_path) as out:
        assert out == tmp_path
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SettingError, match="holds other files"), own_folder(tmp_path):
        pass


@pytest.mark.parametrize("option", ["cp_size", "sp_size", "pp_size", "ep_size"])
def test_parallelism_that_there_is_not_is_refused_by_name(option, refused):
    refused(["compare", f"--{option}", "2"], option, "parallelism, which there isn't")
    assert option in CompareSettings.refused


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_row_of_an_evaluation_counts_once_whatever_fills_the_last_batch(rows, ranks):
    batch_size = 2
    seen = [EvaluatedRows(rows, ranks, rank) for rank in range(ranks)]
    batches = -(-rows // (batch_size * ranks))
    for number in range(batches):
        parts = [each.next_rows(batch_size) for each in seen]
        assert sum(part.here for part in parts) == parts[0].together
        assert parts[0].together == min(batch_size * ranks, rows - number * batch_size * ranks)
