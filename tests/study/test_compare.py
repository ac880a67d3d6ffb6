"""The main job end to end on a tiny corpus: its results, resuming after a stop or a kill, and what it refuses."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerState, TrainingArguments

from model_helpers import tiny_model
from query_experts import GQEForCausalLM
from query_experts.common import environment as environment_module
from query_experts.common.errors import SettingError
from query_experts.distributed.checkpoints import FILES
from query_experts.model import costs
from query_experts.study import callbacks as callbacks_module
from query_experts.study import compare as compare_module
from query_experts.study import measure
from query_experts.study import prefill as prefill_module
from query_experts.study import single as single_module
from query_experts.study import train as run_module
from query_experts.study.callbacks import Pieces, TokenProgress
from query_experts.study.compare import compare
from query_experts.study.report.rows import missing_parts
from query_experts.study.results import read_comparison
from query_experts.study.settings import CompareSettings, TrainSettings
from query_experts.study.single import train
from query_experts.study.workspace import FREE_TO_CHANGE, fingerprint
from study_helpers import SIZE, flip_a_bit, quiet, said, tiny_compare, tiny_train, write_text

RUN_KEYS = {
    "arm", "seed", "parameters", "active_attention_heads", "dense_attention_heads", "intermediate_size",
    "flops_per_token", "kv_bytes_per_token", "tokens_per_s", "train_seconds", "train_tokens", "clipped_steps",
    "validation_loss", "train_curve", "validation_curve", "routing", "passage", "diverged_at_tokens", "pieces",
    "bits_per_byte",
}  # fmt: skip
TIMES = {"tokens_per_s", "train_seconds", "pieces"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished comparison of dense and gqe, one seed: never written to, tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    console = quiet()
    assert compare(tiny_compare(folder), console)
    (folder / "console.txt").write_text(said(console))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "study")


@pytest.fixture
def trained(monkeypatch):
    """The runs whose Trainer was called, by folder name."""
    names = []
    original = run_module.GQETrainer.train

    def spy(self, *args, **kwargs):
        names.append(re.search(r"([^/\\]+)[/\\]checkpoints", self.args.output_dir).group(1))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(run_module.GQETrainer, "train", spy)
    return names


@pytest.fixture
def begun(monkeypatch):
    """How many steps lay behind each training step that was begun."""
    steps = []
    original = TokenProgress.on_step_begin

    def spy(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(TokenProgress, "on_step_begin", spy)
    return steps


def comparison_of(folder):
    return json.loads((folder / "out" / "comparison.json").read_text(encoding="utf-8"))


def result_of(folder, name):
    result = json.loads((folder / "out" / "runs" / name / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in TIMES}


def weights_of(folder, name):
    return load_file(folder / "out" / "runs" / name / "model" / "model.safetensors")


def assert_equal_runs(a, b, name):
    assert result_of(a, name) == result_of(b, name)
    left, right = weights_of(a, name), weights_of(b, name)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_comparison_holds_settings_data_environment_runs_and_prefill(finished):
    comparison = comparison_of(finished)
    assert set(comparison) == {"settings", "data", "environment", "runs", "prefill"}
    settings = comparison["settings"]
    assert settings["arms"] == ["dense", "gqe"]
    assert CompareSettings(**settings) == tiny_compare(finished)
    data = comparison["data"]
    assert data["epochs"] == pytest.approx(6 * 2 / (data["train_tokens"] // 16 // 2 * 2), abs=1e-3)
    assert len(data["data_hash"]) == 64
    environment = comparison["environment"]
    assert environment.keys() >= {"python", "torch", "transformers", "device", "hardware", "dtype", "date"}
    assert (environment["device"], environment["dtype"]) == ("cpu", "float32")
    assert [(run["arm"], run["seed"]) for run in comparison["runs"]] == [("dense", 0), ("gqe", 0)]


def test_a_run_holds_its_costs_curves_in_tokens_and_for_routed_arms_the_routing(finished):
    dense, gqe = comparison_of(finished)["runs"]
    for run in (dense, gqe):
        assert set(run) == RUN_KEYS | ({"routing_curve"} if run is gqe else set())
        assert run["train_tokens"] == 6 * 32
        assert [tokens for tokens, _ in run["train_curve"]] == [32, 64, 96, 128, 160, 192]
        assert [tokens for tokens, _ in run["validation_curve"]] == [96, 192]
        assert run["validation_loss"] == run["validation_curve"][-1][1]
        assert 4 < run["validation_loss"] < math.log(300) + 0.1
        assert run["train_curve"][0][1] == pytest.approx(math.log(300), abs=0.1)
        assert run["dense_attention_heads"] == 4
        assert run["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # float32
        assert run["clipped_steps"] == 0
        assert run["tokens_per_s"] > 0
    assert (dense["active_attention_heads"], gqe["active_attention_heads"]) == (4, 3)
    assert dense["routing"] is None
    assert [point["tokens"] for point in gqe["routing_curve"]] == [32, 64, 96, 128, 160, 192]
    assert all(0.9 < point["entropy"] <= 1 and point["dead"] == 0 for point in gqe["routing_curve"])
    assert dense["passage"] is None
    load = torch.tensor(gqe["routing"]["load"])
    assert load.shape == (2, 2, 2)  # layers, groups, experts
    torch.testing.assert_close(load.sum(-1), torch.ones(2, 2), rtol=0, atol=1e-3)
    assert gqe["routing"].keys() == {"load", "entropy", "dead", "dead_below"}
    assert all(0 <= share <= 1.0001 for layer in gqe["routing"]["entropy"] for share in layer)
    experts = torch.tensor(gqe["passage"]["experts"])
    assert experts.shape == (2, len(gqe["passage"]["tokens"]), 2)


def test_the_saved_models_load_with_auto_classes_and_have_the_loss_and_costs_that_were_reported(finished):
    for run, kind in zip(comparison_of(finished)["runs"], (LlamaForCausalLM, GQEForCausalLM), strict=True):
        model = AutoModelForCausalLM.from_pretrained(finished / "out" / "runs" / f"{run['arm']}-seed0" / "model")
        assert type(model) is kind
        assert costs.parameters(model) == run["parameters"]
        assert costs.flops_per_token(model.config, 16) == run["flops_per_token"]
        assert (finished / "out" / "runs" / f"{run['arm']}-seed0" / "model" / "tokenizer.json").exists()


def test_prefill_holds_seconds_of_every_repeat_and_the_limits_of_attention(finished):
    prefill = comparison_of(finished)["prefill"]
    assert set(prefill) == {"lengths", "repeats", "dtype", "limit", "seconds"}
    assert (prefill["lengths"], prefill["repeats"], prefill["dtype"]) == ([8, 16], 2, "float32")
    assert prefill["limit"] == {"dense": 1.0, "gqe": 4 / 3}
    for arm in ("dense", "gqe"):
        assert [len(repeats) for repeats in prefill["seconds"][arm]] == [2, 2]
        assert all(seconds > 0 for repeats in prefill["seconds"][arm] for seconds in repeats)


def test_the_page_is_written_and_the_console_says_where_and_what_was_found(finished):
    assert "<html" in (finished / "out" / "report.html").read_text(encoding="utf-8")
    console = (finished / "console.txt").read_text()
    assert "held out" in " ".join(console.split())  # where the line wraps depends on the length of the path
    assert "gqe" in console
    assert "report.html" in console.replace("\n", "")


def test_a_second_call_trains_nothing_again_and_keeps_the_results(folder, finished, trained):
    result = folder / "out" / "runs" / "gqe-seed0" / "result.json"
    stamp = result.stat().st_mtime_ns
    assert compare(tiny_compare(folder), quiet())
    assert trained == []
    assert result.stat().st_mtime_ns == stamp
    assert comparison_of(folder)["runs"] == comparison_of(finished)["runs"]


def test_adding_a_seed_and_an_arm_trains_only_what_is_new(folder, trained):
    stamp = (folder / "out" / "runs" / "gqe-seed0" / "result.json").stat().st_mtime_ns
    assert compare(tiny_compare(folder, seeds=[0, 1]), quiet())
    assert trained == ["dense-seed1", "gqe-seed1"]
    assert compare(tiny_compare(folder, seeds=[1, 0], arms=["dense", "gqe", "static"]), quiet())
    assert trained == ["dense-seed1", "gqe-seed1", "static-seed1", "static-seed0"]
    assert (folder / "out" / "runs" / "gqe-seed0" / "result.json").stat().st_mtime_ns == stamp
    runs = {(run["arm"], run["seed"]): run for run in comparison_of(folder)["runs"]}
    assert len(runs) == 6
    assert runs["gqe", 0]["validation_loss"] != runs["gqe", 1]["validation_loss"]
    assert runs["static", 0]["routing"] is None


def test_an_arm_trained_alone_ends_as_it_does_in_company(finished, tmp_path):
    shutil.copy(finished / "text.txt", tmp_path)
    assert train(tiny_train(tmp_path), quiet())
    alone = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {k: v for k, v in alone.items() if k not in TIMES} == result_of(finished, "gqe-seed0")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 8}, "steps was 6, now 8"),
        ({"learning_rate": 0.01}, "learning_rate was 0.002, now 0.01"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings was True, now False"),
        ({"dtype": "bfloat16", "seq_len": 8}, "dtype was 'float32', now 'bfloat16'; seq_len was 16, now 8"),
    ],
)
def test_a_changed_setting_is_refused_naming_it_with_both_values(folder, trained, changes, told):
    with pytest.raises(SettingError, match=re.escape(told)):
        compare(tiny_compare(folder, **changes), quiet())
    assert trained == []


def test_a_changed_setting_is_refused_where_there_are_only_checkpoints(tmp_path):
    assert not train(tiny_train(tmp_path, stop_after_minutes=0), quiet())
    assert (tmp_path / "out" / "checkpoints").exists()
    with pytest.raises(SettingError, match="steps was 6, now 8"):
        train(tiny_train(tmp_path, steps=8), quiet())


def test_a_stop_waits_for_a_log_only_so_long_and_the_run_ends_the_same(finished, tmp_path, monkeypatch):
    shutil.copy(finished / "text.txt", tmp_path)
    seldom = {"evaluations": 1, "log_every": 6}
    assert train(tiny_train(tmp_path, **seldom), quiet())
    whole = json.loads((tmp_path / "out" / "result.json").read_text())
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(callbacks_module, "WAITS_FOR_LOG", 0)
    assert not train(tiny_train(tmp_path, stop_after_minutes=0, **seldom), quiet())
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-1"]
    monkeypatch.undo()
    assert train(tiny_train(tmp_path, **seldom), quiet())
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [tokens for tokens, _ in whole["train_curve"]] == [whole["train_tokens"]]
    assert [tokens for tokens, _ in result["train_curve"]] == [whole["train_tokens"] // 6, whole["train_tokens"]]


def test_what_a_kill_after_the_result_leaves_is_removed(finished, tmp_path):
    shutil.copytree(finished / "out" / "runs" / "gqe-seed0", tmp_path / "run")
    for name in ("checkpoints/checkpoint-1", "initial"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert run_module.finished(tmp_path / "run") is not None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model", "result.json"]


def test_room_is_asked_for_a_tied_head_twice_where_ranks_share_a_model():
    """4 bytes of a weight and 8 of its moments in each checkpoint, one more than are kept; and the model."""
    model = tiny_model(tie_word_embeddings=True)
    weights, head = model.num_parameters(), model.config.vocab_size * model.config.hidden_size
    rooms = [run_module.room_of(SimpleNamespace(is_sharded=shared, keep=2), model) for shared in (False, True)]
    assert rooms == [4 * weights * (1 + 3 * 3), 4 * (weights * (1 + 3 * 3) + head * (1 + 3))]


def test_initial_weights_are_written_once(tmp_path):
    settings = tiny_train(tmp_path)
    run_module.write_initial(settings, "gqe", 0, tmp_path / "initial")
    stamp = (tmp_path / "initial" / "model.safetensors").stat().st_mtime_ns
    run_module.write_initial(settings, "gqe", 0, tmp_path / "initial")
    assert (tmp_path / "initial" / "model.safetensors").stat().st_mtime_ns == stamp
    assert not (tmp_path / "initial.writing").exists()


def test_a_model_is_on_the_disk_before_its_result_and_checkpoints_go_after_it(tmp_path, monkeypatch):
    done = []
    for name in ("sync_files", "write_result", "remove_parts"):
        before = getattr(run_module, name)
        spy = lambda *words, n=name, work=before: (done.append((n, str(words[0].name))), work(*words))[1]  # noqa: E731
        monkeypatch.setattr(run_module, name, spy)
    assert train(tiny_train(tmp_path), quiet())
    assert done == [("sync_files", "model"), ("write_result", "result.json"), ("remove_parts", "out")]


@pytest.mark.parametrize("damage", [Path.unlink, flip_a_bit], ids=["lost", "damaged"])
@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"])
def test_a_checkpoint_with_a_bad_file_is_not_gone_on_from_and_it_is_said(tmp_path, capsys, lost, damage):
    assert not train(tiny_train(tmp_path, stop_after_minutes=0), quiet())
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert run_module.last_checkpoint(checkpoint.parent) == checkpoint
    damage(checkpoint / lost)
    capsys.readouterr()
    assert run_module.last_checkpoint(checkpoint.parent) is None
    assert f"{checkpoint} is damaged or lacks files ({lost}), and is deleted" in capsys.readouterr().err
    assert not checkpoint.exists()


def test_a_checkpoint_that_cannot_be_read_just_now_is_kept(tmp_path, monkeypatch):
    assert not train(tiny_train(tmp_path, stop_after_minutes=0), quiet())
    folder = tmp_path / "out" / "checkpoints"
    (checkpoint,) = folder.iterdir()
    (folder / "checkpoint-best").mkdir()
    assert run_module.last_checkpoint(folder) == checkpoint

    def busy(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    for name in ("safe_open", "zipfile.is_zipfile"):
        with monkeypatch.context() as patch:
            patch.setattr(f"query_experts.study.train.{name}", busy)
            with pytest.raises(OSError, match="Too many open files"):
                run_module.last_checkpoint(folder)
    (checkpoint / FILES).unlink()  # as earlier versions wrote none
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "model-00001-of-00001.safetensors")  # as the Trainer cuts large ones
    assert run_module.last_checkpoint(folder) == checkpoint


def test_changed_data_is_refused(folder):
    with (folder / "text.txt").open("a") as text:
        text.write("one more line\n")
    with pytest.raises(
        SettingError,
        match=r"data or validation holds other text, whose tokens' hash was [0-9a-f]{12}, now [0-9a-f]{12}",
    ):
        compare(tiny_compare(folder), quiet())


def test_every_setting_but_those_of_place_and_number_is_kept_from_changing(folder):
    held = json.loads((folder / "out" / "settings.json").read_text())
    compared, trained = ({f.name for f in fields(kind)} for kind in (CompareSettings, TrainSettings))
    assert compared - held.keys() == FREE_TO_CHANGE & compared - {"device"}
    assert trained - fingerprint(tiny_train(folder)).keys() == FREE_TO_CHANGE & trained - {"device"}
    assert held["device"] == "cpu"


def test_a_folder_of_one_trained_arm_is_no_folder_of_a_comparison_and_none_of_another_seed(tmp_path):
    assert train(tiny_train(tmp_path, steps=1), quiet())
    with pytest.raises(SettingError, match=r"arm and seed was \['gqe', 0\], now 'several'"):
        compare(tiny_compare(tmp_path, steps=1), quiet())
    with pytest.raises(SettingError, match=r"arm and seed was \['gqe', 0\], now \['gqe', 1\]"):
        train(tiny_train(tmp_path, steps=1, seed=1), quiet())


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(SettingError, match="holds other files"):
        compare(tiny_compare(tmp_path), quiet())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(SettingError, match="is a file; it must be a folder"):
        compare(tiny_compare(tmp_path, out=str(tmp_path / "out" / "thesis.tex")), quiet())


@pytest.mark.full
def test_stopping_when_the_time_is_up_and_going_on_ends_as_without_a_stop(finished, tmp_path):
    shutil.copy(finished / "text.txt", tmp_path)
    calls = 1
    while True:
        console = quiet()
        if compare(tiny_compare(tmp_path, arms=["gqe"], stop_after_minutes=0), console):
            break
        assert "Stopped after 0 minutes; the same command goes on." in said(console)
        held = comparison_of(tmp_path)  # a report of what there is so far
        assert len(held["runs"]) == (calls > 5)
        assert [len(repeats) for repeats in (held["prefill"] or {"seconds": {"gqe": []}})["seconds"]["gqe"]] == (
            [2, 0] if calls > 5 else []
        )
        assert (tmp_path / "out" / "report.html").exists()
        calls += 1
        assert calls < 20
    assert calls == 7  # a step a call, then a length of prefill
    assert_equal_runs(tmp_path, finished, "gqe-seed0")


class Killed(BaseException):
    """No error that any handler would catch."""


@pytest.mark.parametrize(
    ("step", "left"), [pytest.param(2, 6, marks=pytest.mark.full), (4, 3), pytest.param(6, 3, marks=pytest.mark.full)]
)
def test_a_run_killed_in_mid_training_goes_on_and_ends_as_without_the_kill(
    finished, tmp_path, monkeypatch, begun, step, left
):
    """With checkpoints at steps 3 and 6; in steps 2, 4 and 6 before that step is saved."""
    shutil.copy(finished / "text.txt", tmp_path)
    original = TokenProgress.on_step_end

    def kill(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TokenProgress, "on_step_end", kill)
        with pytest.raises(Killed):
            compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    begun.clear()
    assert compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    assert begun == list(range(6 - left, 6))
    assert_equal_runs(tmp_path, finished, "gqe-seed0")


def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(finished, tmp_path, monkeypatch, begun):
    shutil.copy(finished / "text.txt", tmp_path)

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "describe", kill)
        with pytest.raises(Killed):
            compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    begun.clear()
    assert compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    assert begun == []
    assert_equal_runs(tmp_path, finished, "gqe-seed0")
    times = json.loads((tmp_path / "out" / "runs" / "gqe-seed0" / "result.json").read_text())
    assert times["tokens_per_s"] > 0


@pytest.mark.parametrize("written", [None, b"", b'{"epoch": 1'], ids=["no state", "empty state", "half a state"])
def test_a_run_killed_while_it_saved_goes_on_from_the_checkpoint_before(
    finished, tmp_path, monkeypatch, begun, written
):
    shutil.copy(finished / "text.txt", tmp_path)
    original = TrainerState.save_to_json

    def kill(self, path):
        if self.global_step == 6:
            if written is not None:
                with open(path, "wb") as file:
                    file.write(written)
            raise Killed
        original(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", kill)
        with pytest.raises(Killed):
            compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    checkpoints = tmp_path / "out" / "runs" / "gqe-seed0" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-3", "writing"}
    begun.clear()
    assert compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    assert begun == [3, 4, 5]
    assert_equal_runs(tmp_path, finished, "gqe-seed0")
    assert not checkpoints.exists()  # of no use to a finished run


@pytest.mark.full
def test_a_long_run_killed_between_two_logs_logs_the_same_means(tmp_path, monkeypatch):
    """From 100 steps on there is not a log for each step, and a checkpoint may fall between two."""
    changes = {"steps": 100, "evaluations": 4, "num_hidden_layers": 1, "validation_sequences": 1}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert train(tiny_train(tmp_path / "whole", **changes), quiet())
    with monkeypatch.context() as patch:

        def kill(self, args, state, control, **kwargs):
            if state.global_step == 26:
                raise Killed

        patch.setattr(TokenProgress, "on_step_end", kill)
        with pytest.raises(Killed):
            train(tiny_train(tmp_path / "killed", **changes), quiet())
    assert train(tiny_train(tmp_path / "killed", **changes), quiet())
    whole, killed = (json.loads((tmp_path / name / "out" / "result.json").read_text()) for name in ("whole", "killed"))
    assert killed["train_curve"] == whole["train_curve"]
    assert killed["validation_curve"] == whole["validation_curve"]
    assert killed["clipped_steps"] == whole["clipped_steps"]


def test_evaluations_that_do_not_divide_the_steps_still_end_with_one_of_the_last_step(tmp_path):
    assert train(tiny_train(tmp_path, steps=5, evaluations=2), quiet())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [tokens // 32 for tokens, _ in result["validation_curve"]] == [2, 4, 5]


def test_a_run_that_diverges_is_kept_as_such_and_ends_in_a_sentence(tmp_path, trained):
    settings = tiny_train(tmp_path, learning_rate=1e30)
    for _ in range(2):  # the same command again says the same and trains nothing
        with pytest.raises(SettingError, match=r"learning_rate is 1e\+30, with which arm gqe, seed 0, diverged after"):
            train(settings, quiet())
    assert len(trained) == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result) == RUN_KEYS - {"bits_per_byte"} | {"skipped_steps", "routing_curve"}
    assert result["validation_loss"] is None
    assert 0 < result["diverged_at_tokens"] < 6 * 32  # not trained to the end
    assert all(math.isfinite(loss) for curve in ("train_curve", "validation_curve") for _, loss in result[curve])
    assert not (tmp_path / "out" / "model").exists()


def test_a_comparison_goes_on_without_an_arm_that_diverged_and_says_so(tmp_path, monkeypatch):
    original = run_module.training_arguments

    def reckless(settings, seed, folder):
        arguments = original(settings, seed, folder)
        if "gqe-seed0" in str(folder) or "static" in str(folder):
            arguments.learning_rate = 1e30
        return arguments

    monkeypatch.setattr(run_module, "training_arguments", reckless)
    console = quiet()
    assert compare(tiny_compare(tmp_path, arms=["dense", "static", "gqe"], seeds=[0, 1]), console)
    runs = {(run["arm"], run["seed"]): run for run in comparison_of(tmp_path)["runs"]}
    assert {key for key, run in runs.items() if run["diverged_at_tokens"] is not None} == {
        ("static", 0), ("static", 1), ("gqe", 0)
    }  # fmt: skip
    assert comparison_of(tmp_path)["prefill"]["seconds"].keys() == {"dense", "gqe"}  # gqe by its other seed
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (" ".join(said(console).split()), page):
        assert "static diverged with seeds 0 and 1" in text
        assert "gqe diverged with seed 0" in text


@pytest.mark.full
def test_prefill_is_measured_once_for_each_length_and_anew_for_other_models(folder, finished, monkeypatch):
    timed = []
    original = prefill_module.time_prefill

    def spy(models, length, *rest):
        timed.append((sorted(models), length))
        return original(models, length, *rest)

    monkeypatch.setattr(prefill_module, "time_prefill", spy)
    monkeypatch.setattr(prefill_module, "disturbed", lambda repeats: False)
    assert compare(tiny_compare(folder), quiet())
    assert timed == []
    assert comparison_of(folder)["prefill"] == comparison_of(finished)["prefill"]
    assert compare(tiny_compare(folder, prefill_lengths=[8, 16, 4]), quiet())
    assert timed == [(["dense", "gqe"], 4)]
    assert compare(tiny_compare(folder, arms=["dense", "gqe", "static"]), quiet())
    assert timed[1:] == [(["dense", "gqe", "static"], length) for length in (8, 16)]
    monkeypatch.setattr(prefill_module, "disturbed", lambda repeats: True)
    assert compare(tiny_compare(folder), quiet())
    assert timed[3:] == timed[1:3]


def test_a_kept_prefill_counts_on_the_same_machine_with_as_many_repeats_on_any_day(finished, monkeypatch):
    out, here = finished / "out", prefill_module.environment

    def kept(place, **changes):
        monkeypatch.setattr(prefill_module, "environment", lambda *args: dataclasses.replace(here(*args), **place))
        settings = tiny_compare(finished, **changes)
        return prefill_module.read_prefill(settings, compare_module.model_folders(out), out / "prefill.json")

    assert kept({}) == kept({"date": "2001-01-01"}) == read_comparison(out).prefill
    assert kept({"hardware": "another machine"}) is None
    assert kept({"torch": "1.0"}) is None
    assert kept({}, prefill_repeats=3) is None


def test_arms_take_turns_in_being_timed_first_after_a_turn_that_does_not_count(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(prefill_module, "prefill_seconds", lambda model, prompt: order.append(model) or len(order))
    bar = SimpleNamespace(update=lambda: None)
    models = dict(zip("abc", "abc", strict=True))
    seconds = prefill_module.time_prefill(models, 8, tiny_compare(tmp_path, prefill_repeats=3), bar)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert seconds == {"a": [6, 8, 10], "b": [4, 9, 11], "c": [5, 7, 12]}


def test_a_run_that_goes_on_where_it_was_notes_no_further_piece(monkeypatch):
    pieces = Pieces("cpu", "float32")
    for step, machine, release in ((0, "a", "1"), (2, "a", "1"), (4, "b", "1"), (5, "b", "2"), (7, "a", "1")):
        monkeypatch.setattr(environment_module, "cpu_name", lambda machine=machine: machine)
        monkeypatch.setattr(environment_module, "version", lambda name, release=release: release)
        pieces.on_train_begin(None, TrainerState(global_step=step), None, model=torch.nn.Identity())
    noted = [(piece["first_step"], piece["hardware"][0], piece["torch"]) for piece in pieces.pieces]
    assert noted == [(0, "a", "1"), (4, "b", "1"), (5, "b", "2"), (7, "a", "1")]


def test_a_run_notes_where_each_of_its_pieces_was_trained(finished, tmp_path, monkeypatch):
    shutil.copy(finished / "text.txt", tmp_path)
    (whole,) = json.loads((finished / "out" / "runs" / "gqe-seed0" / "result.json").read_text())["pieces"]
    assert whole["first_step"] == 0
    assert whole["hardware"]
    assert not compare(tiny_compare(tmp_path, arms=["gqe"], stop_after_minutes=0), quiet())
    monkeypatch.setattr(environment_module, "cpu_name", lambda: "another machine")
    assert compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    first, second = comparison_of(tmp_path)["runs"][0]["pieces"]
    assert first == whole
    assert second["first_step"] == 1
    assert second["hardware"].startswith("another machine")


def test_of_several_visible_gpus_one_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    assert run_module.training_arguments(tiny_train(tmp_path), 0, tmp_path)._n_gpu == 1


def test_gqe_trainer_refuses_several_gpus_in_one_process(tmp_path):
    arguments = run_module.training_arguments(tiny_train(tmp_path), 0, tmp_path)
    arguments._n_gpu = 4
    with pytest.raises(ValueError, match=r"4 GPUs are visible to one process; .* launch one process a GPU"):
        run_module.GQETrainer(
            model=run_module.build(run_module.arm_config("gqe", SIZE)), args=arguments, eval_dataset=[0]
        )


def test_a_stopped_call_keeps_the_prefill_of_the_report(folder, finished):
    before = comparison_of(folder)["prefill"]
    assert not compare(tiny_compare(folder, seeds=[0, 1], stop_after_minutes=0), quiet())
    assert comparison_of(folder)["prefill"] == before


@pytest.mark.full
def test_a_stopped_call_reports_what_was_timed_and_names_what_was_not(folder, finished):
    before = comparison_of(folder)["prefill"]["seconds"]
    assert not compare(tiny_compare(folder, seeds=[0, 1], prefill_lengths=[8, 16, 24], stop_after_minutes=0), quiet())
    held = comparison_of(folder)["prefill"]["seconds"]
    assert held == {arm: [*seconds, []] for arm, seconds in before.items()}
    assert "Prefill of dense and gqe was not timed at 24 tokens." in missing_parts(read_comparison(folder / "out"))
    assert compare(tiny_compare(folder, arms=["static"], prefill_lengths=[8]), quiet())
    held = comparison_of(folder)["prefill"]
    assert (held["lengths"], held["seconds"].keys()) == ([8], {"dense", "static", "gqe"})
    assert not compare(tiny_compare(folder, seeds=[0, 1], stop_after_minutes=0), quiet())
    held = comparison_of(folder)["prefill"]["seconds"]
    assert held["gqe"][1] == before["gqe"][1]
    assert held["static"][1] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_of_an_arm_ends_the_comparison_after_it(tmp_path, begun, monkeypatch, number):
    original = TokenProgress.on_step_begin

    def kill(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TokenProgress, "on_step_begin", kill)
    console = quiet()
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background job is started with Ctrl-C ignored
    try:
        with pytest.raises(SystemExit) as ended:
            compare(tiny_compare(tmp_path), console)
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert "Stopped; the same command goes on." in said(console)
    assert begun == [*range(6)]
    assert [run["arm"] for run in comparison_of(tmp_path)["runs"]] == ["dense"]


def test_the_clock_of_a_run_starts_before_its_data_is_read(tmp_path, monkeypatch):
    order = []
    for name in ("stop_after", "open_corpus"):
        original = getattr(single_module, name)
        monkeypatch.setattr(single_module, name, lambda *args, n=name, f=original: order.append(n) or f(*args))
    console = quiet()
    assert not train(tiny_train(tmp_path, stop_after_minutes=0), console)
    assert order == ["stop_after", "open_corpus"]
    assert "Stopped after 0 minutes" in said(console)


def test_damaged_files_of_a_run_are_named_with_what_to_do(folder):
    weights = folder / "out" / "runs" / "gqe-seed0" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(SettingError, match=r"gqe-seed0/model, which can't be loaded .* delete the folder"):
        compare(tiny_compare(folder, prefill_lengths=[4]), quiet())
    weights.write_bytes(whole)
    result = folder / "out" / "runs" / "gqe-seed0" / "result.json"
    result.write_text("{}")
    with pytest.raises(SettingError, match=r"gqe-seed0/result.json is no run's result \(.+\); delete it"):
        compare(tiny_compare(folder), quiet())


def test_files_of_other_kinds_are_counted_and_said(tmp_path):
    write_text(tmp_path / "texts" / "a.txt")
    for name in ("b.rst", "c.rst", "LICENSE", ".hidden"):
        (tmp_path / "texts" / name).write_text("x")
    console = quiet()
    compare_module.open_corpus(tiny_train(tmp_path, data=[str(tmp_path / "texts")]), tmp_path / "out", console)
    assert "3 files of other kinds in the folders skipped (2 .rst, 1 LICENSE)" in said(console)
    assert "1 document, " in said(console)


@pytest.mark.full
def test_prefill_of_other_models_is_measured_anew_though_their_folders_have_the_same_names(folder, monkeypatch):
    before = comparison_of(folder)["prefill"]["seconds"]
    shutil.rmtree(folder / "out" / "runs")
    assert compare(tiny_compare(folder, num_hidden_layers=1), quiet())
    assert comparison_of(folder)["prefill"]["seconds"] != before


def test_the_report_holds_all_that_the_folder_holds(folder, trained):
    assert compare(tiny_compare(folder, arms=["static"], seeds=[1]), quiet())
    assert trained == ["static-seed1"]
    comparison = comparison_of(folder)
    assert [(run["arm"], run["seed"]) for run in comparison["runs"]] == [("dense", 0), ("gqe", 0), ("static", 1)]
    assert (comparison["settings"]["arms"], comparison["settings"]["seeds"]) == (["static", "dense", "gqe"], [1, 0])
    assert comparison["prefill"]["seconds"].keys() == {"dense", "gqe", "static"}


def test_a_refused_setting_does_not_bind_a_folder_in_which_nothing_was_trained(tmp_path):
    with pytest.raises(SettingError, match=r"batch_size .* is 4000; it must be at most"):
        compare(tiny_compare(tmp_path, batch_size=4000), quiet())
    assert compare(tiny_compare(tmp_path, arms=["dense"]), quiet())


def test_a_changed_setting_is_refused_before_any_data_is_read(folder, monkeypatch):
    monkeypatch.setattr(compare_module, "prepare", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(SettingError, match="vocab_size was 300, now 310"):
        compare(tiny_compare(folder, vocab_size=310), quiet())


@pytest.mark.parametrize("name", ["settings.json", "runs/gqe-seed0/result.json"])
@pytest.mark.parametrize("content", ["", '{"arm": "gq', "[]"], ids=["empty", "half", "other"])
def test_a_damaged_file_of_a_run_is_named(folder, name, content):
    (folder / "out" / name).write_text(content)
    remedy = "use another" if name == "settings.json" else "delete it"
    with pytest.raises(SettingError, match=f"out holds .*{name.rpartition('/')[2]}, which is damaged .* {remedy}"):
        compare(tiny_compare(folder), quiet())
    if name != "settings.json":  # the remedy helps
        (folder / "out" / name).unlink()
        assert compare(tiny_compare(folder), quiet())


def test_a_trained_model_that_is_missing_is_named(folder):
    shutil.rmtree(folder / "out" / "runs" / "gqe-seed0" / "model")
    with pytest.raises(SettingError, match="gqe-seed0/model of arm gqe is missing; delete"):
        compare(tiny_compare(folder), quiet())


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        *(pytest.param(each, marks=pytest.mark.full) for each in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
    ],
)
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(finished, tmp_path, monkeypatch, begun, name):
    shutil.copy(finished / "text.txt", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "describe", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    checkpoint = tmp_path / "out" / "runs" / "gqe-seed0" / "checkpoints" / "checkpoint-6"
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[: len(whole) // 2])
    begun.clear()
    assert compare(tiny_compare(tmp_path, arms=["gqe"]), quiet())
    assert begun == [3, 4, 5]
    assert_equal_runs(tmp_path, finished, "gqe-seed0")


def test_validation_is_spread_over_the_held_out_text(tmp_path):
    corpus = SimpleNamespace(validation=range(100), validation_parts=[])
    assert list(run_module.validation_split(tiny_train(tmp_path, validation_sequences=4), corpus)) == [0, 25, 50, 75]
    assert list(run_module.validation_split(tiny_train(tmp_path, validation_sequences=500), corpus)) == list(range(100))


def test_the_data_facts_say_what_validation_was_made_with(finished):
    data = comparison_of(finished)["data"]
    assert (data["validation_sequences_used"], data["validation_tokens_used"]) == (4, 64)


def test_a_character_of_several_tokens_is_shown_once_and_whole():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    class Words:
        def decode(self, ids):
            return " ".join("abc"[i] for i in ids)

    text = "a\u00e9\u4e2d\U0001f600b"
    shown = measure.readable_tokens(Bytes(), list(text.encode()))
    assert shown == ["a", "", "\u00e9", "", "", "\u4e2d", "", "", "", "\U0001f600", "b"]
    assert measure.readable_tokens(Bytes(), [0xE4, 0xB8]) == ["", ""]  # cut off
    assert measure.readable_tokens(Bytes(), [0xFF] * 9)[3::4] == ["\ufffd" * 4] * 2  # no character at all
    assert measure.readable_tokens(Words(), [0, 1, 2]) == ["a", " b", " c"]  # spaces between tokens stay


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    assert train(tiny_train(tmp_path, dtype="bfloat16", steps=2), quiet())
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.full
def test_the_page_is_there_as_soon_as_a_run_is_finished(tmp_path, monkeypatch):
    held = []
    original = compare_module.train_arm

    def watched(*args):
        numbers = tmp_path / "out" / "comparison.json"
        held.append(len(json.loads(numbers.read_text())["runs"]) if numbers.exists() else None)
        return original(*args)

    monkeypatch.setattr(compare_module, "train_arm", watched)
    assert compare(tiny_compare(tmp_path), quiet())
    assert held == [None, 1]


def test_fewer_validation_sequences_than_asked_for_are_told(tmp_path):
    console = quiet()
    assert train(tiny_train(tmp_path, validation_sequences=10**6, steps=2), console)
    held = "validation_sequences is 1,000,000; data holds out "
    assert held in said(console)
    console = quiet()
    assert train(tiny_train(tmp_path, steps=2, out=str(tmp_path / "other")), console)
    assert "validation_sequences" not in said(console)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"avx2": True, "avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"neon": True}, "float32"),
    ],
)
def test_dtype_auto_is_bfloat16_where_the_processor_multiplies_in_it(tmp_path, monkeypatch, there, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    automatic = tiny_train(tmp_path, dtype="auto", device="cpu")
    automatic.check()
    assert automatic.autocast_dtype() == fingerprint(automatic)["dtype"] == chosen
    for dtype in ("bfloat16", "float32"):
        assert tiny_train(tmp_path, dtype=dtype).autocast_dtype() == dtype


def test_dtype_auto_on_a_gpu_is_bfloat16_where_the_gpu_does_not_emulate_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, own=native: including_emulation or own
        )
        assert tiny_train(tmp_path, dtype="auto", device="auto").autocast_dtype() == (
            "bfloat16" if native else "float32"
        )


def test_a_run_by_dtype_auto_is_not_gone_on_with_in_another_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not train(tiny_train(tmp_path, dtype="auto", device="cpu", stop_after_minutes=0), quiet())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(SettingError, match="dtype was 'bfloat16', now 'float32'"):
        train(tiny_train(tmp_path, dtype="auto", device="cpu"), quiet())


def test_settings_default_to_the_demo_preset():
    assert CompareSettings().out == "runs/demo"
    assert TrainSettings().arm == "gqe"
    CompareSettings().check()


def test_a_folder_in_which_another_process_is_at_work_is_refused(finished):
    with (
        compare_module.own_folder(finished / "out"),
        pytest.raises(SettingError, match="another process is at work; wait for it, or use another folder"),
    ):
        compare(tiny_compare(finished), quiet())


def test_a_result_names_the_commit_of_a_checkout_and_none_elsewhere(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(environment_module, "PACKAGE", tmp_path)
    assert environment_module.commit() is None
    git("init")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-m", "another project, in which the package was installed")
    (tmp_path / "py.typed").write_text("")
    assert environment_module.commit() is None
    git("add", "py.typed")
    git("commit", "-m", "this one")
    head = environment_module.commit()
    assert re.fullmatch(r"[0-9a-f]{7,}", head)
    (tmp_path / "py.typed").write_text("changed")
    assert environment_module.commit() == head + "+"


def test_a_process_keeps_the_commit_that_it_began_with(monkeypatch):
    found = iter(["1234567", "7654321+"])
    monkeypatch.setattr(environment_module, "commit", lambda: next(found))
    environment_module.loaded_commit.cache_clear()
    try:
        assert [environment_module.environment("cpu", "float32").commit for _ in range(2)] == ["1234567"] * 2
    finally:
        environment_module.loaded_commit.cache_clear()
