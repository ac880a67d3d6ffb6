"""What `train` and `compare` log and to whom: TensorBoard, W&B offline, options that bind no folder, and refusals."""

import importlib.util
import json

import pytest

from query_experts.study import train as run_module
from query_experts.study.compare import compare
from query_experts.study.single import train
from query_experts.study.train import training_arguments
from query_experts.study.workspace import fingerprint
from study_helpers import options, quiet, tiny_compare, tiny_train

ONE_LAYER = {"num_hidden_layers": 1, "steps": 4, "evaluations": 2}


def needs(name):
    """Skips without a logger's package, which belongs to the extra `watch`."""
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} isn't installed (pip install query-experts[watch])"
    )


@needs("tensorboard")
def test_tensorboard_finds_each_run_of_a_comparison_in_its_own_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert compare(tiny_compare(tmp_path, report_to=["tensorboard"], **ONE_LAYER), quiet())
    for run in ("dense-seed0", "gqe-seed0"):
        events = EventAccumulator(str(tmp_path / "out" / "runs" / run / "tensorboard"))
        events.Reload()
        tags = {*events.Tags()["scalars"]}
        assert {"train/lm_loss", "train/tps", "train/mem", "train/grad_norm_clipped", "eval/loss"} <= tags
        assert ("train/moe/router_entropy_mean" in tags) == ("train/aux_loss" in tags) == (run == "gqe-seed0")
        assert [event.step for event in events.Scalars("train/lm_loss")] == [1, 2, 3, 4]


@needs("wandb")
def test_wandb_keeps_a_run_offline_for_each_run_of_a_comparison(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    assert compare(tiny_compare(tmp_path, report_to=["wandb"], **ONE_LAYER), quiet())
    kept = [path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(kept) == 2
    assert sorted(b"train/moe/router_entropy_mean" in run for run in kept) == [False, True]
    assert all(b"train/lm_loss" in run for run in kept)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(
    command, tmp_path, text, refused, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    argv = options(command, tmp_path / "out", text, report_to=["wandb"])
    refused(argv, "report_to holds 'wandb', which isn't installed: pip install query-experts[watch], or leave it out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_logger_is_refused_by_name(tmp_path, text, refused):
    argv = options("train", tmp_path / "out", text, report_to=["comet"])
    refused(argv, "report_to holds 'comet'; allowed are tensorboard, wandb")


def test_what_is_watched_binds_no_folder(tmp_path):
    plain = fingerprint(tiny_train(tmp_path))
    watched = tiny_train(tmp_path, report_to=["wandb"], telemetry="detailed", log_every=2, peak_flops=1e12)
    assert fingerprint(watched) == plain


def test_a_run_goes_on_with_other_telemetry_and_ends_with_the_same_losses(tmp_path):
    assert train(tiny_train(tmp_path, out=str(tmp_path / "whole"), **ONE_LAYER), quiet())
    assert not train(tiny_train(tmp_path, telemetry="none", stop_after_minutes=0, **ONE_LAYER), quiet())
    assert train(tiny_train(tmp_path, telemetry="detailed", **ONE_LAYER), quiet())
    whole, resumed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "out"))
    for name in ("train_curve", "validation_curve", "validation_loss"):
        assert resumed[name] == whole[name]
    assert resumed["routing_curve"] == whole["routing_curve"][1:]  # the first step was logged without telemetry


@pytest.mark.parametrize(
    ("log_every", "evaluations", "logged"),
    [(None, 5, 2), (1, 5, 1), (7, 5, 5), (20, 5, 20), (1000, 5, 20), (50, 1, 50)],
)
def test_logs_come_as_often_as_asked_or_oftener_so_that_checkpoints_fall_on_them(
    log_every, evaluations, logged, tmp_path
):
    settings = tiny_train(tmp_path, steps=100, log_every=log_every, evaluations=evaluations)
    assert training_arguments(settings, 0, tmp_path).logging_steps == logged


def test_no_telemetry_leaves_out_its_callback(tmp_path):
    assert run_module.telemetry(tiny_train(tmp_path, telemetry="none")) == []
    (callback,) = run_module.telemetry(tiny_train(tmp_path, telemetry="detailed", peak_flops=2.0))
    assert (callback.detailed, callback.peak_flops) == (True, 2.0)
