"""`distill` and `train`: each in folders of its own kind, those of earlier versions included."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from query_experts.cli import main
from query_experts.common.errors import SettingError
from query_experts.study import train as train_module
from query_experts.study.settings import DistillSettings, TrainSettings
from query_experts.study.workspace import fingerprint, refuse_change

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RUN = ["--data", "text.txt", "--device", "cpu", "--dtype", "float32", "--seq_len", "16", "--steps", "8"]
RUN += ["--batch_size", "2", "--evaluations", "4", "--validation_sequences", "4"]
SIZE = ["--vocab_size", "300", "--hidden_size", "16", "--intermediate_size", "24", "--num_hidden_layers", "2"]
SIZE += ["--num_attention_heads", "4", "--num_key_value_heads", "2", "--head_dim", "8"]
FIRST_DEMO = ["--learning_rate", "2e-3", "--initializer_range", "0.02"]
OLD = "train_init_half_finished"  # by `train --preset distill --init converted`
DISTILL = ["distill", "--init", "converted", "--teacher", "dense", "--gradient_accumulation_steps", "2"]
DISTILL += ["--sparsify_fraction", "0.75", *RUN]
TRAIN = ["train", "--arm", "gqe", *SIZE, *RUN]
TIMES = {"tokens_per_s", "train_seconds", "pieces"}


@pytest.fixture
def fixtures(tmp_path, monkeypatch):
    """A copy of the fixtures, in which commands run."""
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path / "fixtures")
    return tmp_path / "fixtures"


@pytest.fixture
def resumed(monkeypatch):
    """The names of the checkpoints that training goes on from."""
    names = []
    original = train_module.GQETrainer.train

    def spy(self, resume_from_checkpoint=None):
        names.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return original(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(train_module.GQETrainer, "train", spy)
    return names


@pytest.mark.parametrize(
    ("argv", "folder", "finished"),
    [(DISTILL, OLD, "train_init_finished.json"), (TRAIN, "train_half_finished", "train_finished.json")],
    ids=["distill", "train"],
)
def test_a_folder_of_an_earlier_version_goes_on_and_ends_as_it_did_there(fixtures, resumed, argv, folder, finished):
    settings = (fixtures / folder / "settings.json").read_bytes()
    assert main([*argv, "--out", folder]) == 0
    assert resumed == ["checkpoint-4"]
    assert (fixtures / folder / "settings.json").read_bytes() == settings
    before = json.loads((fixtures / finished).read_text())
    now = json.loads((fixtures / folder / "result.json").read_text())
    assert [*now] == [*before, "bits_per_byte", "routing_curve"]
    for name in before.keys() - TIMES - {"routing", "passage"}:
        if name.endswith("_curve"):
            torch.testing.assert_close(torch.tensor(now[name]), torch.tensor(before[name]), rtol=0, atol=1e-4)
        else:
            assert now[name] == pytest.approx(before[name], abs=1e-4), name


def test_a_new_folder_has_the_settings_that_an_earlier_version_wrote_in_their_order(fixtures):
    for argv, old in ((DISTILL, OLD), ([*TRAIN, *FIRST_DEMO], "train_half_finished")):
        assert main([*argv, "--out", "new", "--stop_after_minutes", "0"]) == 1
        new, before = (json.loads((fixtures / name / "settings.json").read_text()) for name in ("new", old))
        added = {"compile": False, "initializer_range": 0.02}  # newer than the fixtures
        assert [*new.items()] == [(name, (before | added)[name]) for name in new]
        assert [name for name in new if name not in added] == [*before]
        shutil.rmtree("new")


def test_a_changed_setting_and_the_other_command_are_refused_in_a_folder_of_an_earlier_version(fixtures, refused):
    at = DISTILL.index("0.75")
    refused([*DISTILL[:at], "0.5", *DISTILL[at + 1 :], "--out", OLD], "sparsify_fraction was 0.75, now 0.5")
    made_by_distill = "what distill has made (init was 'converted', now None; teacher was 'dense', now None)"
    refused([*TRAIN, "--out", OLD], made_by_distill)
    made_by_train = "what train has made (init was None, now 'converted'; teacher was None, now 'dense')"
    refused([*DISTILL, "--out", "train_half_finished"], made_by_train)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--init", "converted"], "init is 'converted', which train doesn't take"),
        (["--init=converted", "--preset", "demo"], "init is 'converted', which train doesn't take"),
        (["--teacher", "dense"], "teacher is 'dense', which train doesn't take"),
        (["--sparsify-fraction", "0.5"], "sparsify_fraction is 0.5, which train doesn't take"),
        (["--distillation", "0.5"], "distillation is 0.5, which train doesn't take"),
        (["--preset", "distill"], "preset is 'distill', which train doesn't take"),
        (["--preset", "distill", "--init", "converted"], "preset is 'distill', which train doesn't take"),
        (["--recipe", "mine.yaml"], "init is 'converted', which train doesn't take"),
    ],
)
def test_train_names_distill_for_what_was_its_own(tmp_path, monkeypatch, refused, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("init: converted\nsteps: 3\n")
    sentence = refused(["train", *argv], words)
    assert sentence.endswith("query-experts distill trains a converted checkpoint, with the same options")


def test_a_recipe_that_leaves_distillation_as_it_is_is_one_for_train(tmp_path, refused):
    (tmp_path / "mine.yaml").write_text("init: null\nteacher: null\nsparsify_fraction: 0.0\nsteps: 0\n")
    refused(["train", "--recipe", tmp_path / "mine.yaml"], "steps is 0; it must be 1 or more")


def test_distill_refuses_an_arm(refused, tmp_path):
    refused(["distill", "--init", "converted", "--arm", "static"], "arm is 'static', and init brings its own")
    (tmp_path / "mine.yaml").write_text("arm: static\n")
    refused(["distill", "--recipe", tmp_path / "mine.yaml"], "arm is 'static', and init brings its own")


def test_a_setting_that_a_folder_lacks_counts_as_its_default():
    now = fingerprint(TrainSettings(device="cpu", dtype="float32"))
    for name in ("weight_decay", "tie_word_embeddings", "sparsify_fraction", "init", "max_bytes"):
        kept = {key: value for key, value in now.items() if key != name}
        refuse_change(kept, now, Path("out"))
        with pytest.raises(SettingError, match=f"{name} was .*, now 'another'"):
            refuse_change(kept, now | {name: "another"}, Path("out"))


def test_a_setting_that_no_version_has_any_more_is_compared_all_the_same():
    now = fingerprint(DistillSettings(device="cpu", dtype="float32"))
    refuse_change(now | {"gone": None}, now, Path("out"))
    with pytest.raises(SettingError, match="gone was 3, now None"):
        refuse_change(now | {"gone": 3}, now, Path("out"))
