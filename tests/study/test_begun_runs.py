"""What a run says of its room, its batch and its divergence."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from query_experts.common.errors import SettingError
from query_experts.study.compare import divergence
from query_experts.study.single import train
from query_experts.study.train import bytes_in, new_model
from query_experts.training import EvaluatedRows
from study_helpers import quiet, tiny_train


def test_checkpoints_that_are_there_count_as_room(tmp_path, monkeypatch):
    assert not train(tiny_train(tmp_path, stop_after_minutes=0), quiet())
    settings = tiny_train(tmp_path)
    there = bytes_in(tmp_path / "out" / "checkpoints")
    needed = 4 * new_model(settings, "gqe", 0).num_parameters() * (1 + 3 * (settings.keep + 1)) - there
    assert there > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    with pytest.raises(SettingError, match="it needs about"):
        train(settings, quiet())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    assert train(settings, quiet())


def test_accumulation_beside_a_global_batch_is_refused_whoever_sets_that(tmp_path):
    settings = tiny_train(tmp_path, global_batch_size=8, gradient_accumulation_steps=4)
    settings.check()  # a preset may hold both
    settings.given = frozenset({"gradient_accumulation_steps"})
    with pytest.raises(SettingError, match="gradient_accumulation_steps is 4, and global_batch_size sets it"):
        settings.check()


@pytest.mark.parametrize("skipped", [None, 10])
def test_divergence_by_skipped_steps_says_so(tmp_path, skipped):
    run = SimpleNamespace(arm="gqe", seed=0, diverged_at_tokens=640, skipped_steps=skipped)
    said = divergence(tiny_train(tmp_path), run)
    assert "diverged after 640 tokens; it must be lower" in said
    assert ("in 10 steps gradients weren't finite and were skipped" in said) == (skipped is not None)


def test_rows_that_a_loader_drops_do_not_lower_the_loss():
    rows = EvaluatedRows(rows=5, ranks=2, rank=0)
    rows.add(torch.tensor(3.0), rows.next_rows(2).together)
    assert rows.mean() == 3.0
