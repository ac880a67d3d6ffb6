"""The console command: what it does end to end, and that what can't be used ends in one line and exit status 2."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from query_experts.cli import COMMANDS, main
from query_experts.common.settings import presets
from query_experts.study import compare as study
from query_experts.study import distill, single
from query_experts.study.callbacks import TokenProgress
from query_experts.training import GQETrainer
from study_helpers import options, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """The folder of a gqe run that `train` has finished."""
    out = tmp_path_factory.mktemp("run") / "gqe"
    assert main(options("train", out, text)) == 0
    return out


@pytest.fixture(scope="module")
def compared(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("compared") / "study"
    argv = options("compare", out, text, arms=["dense", "gqe"], seeds=[0, 1], prefill_lengths=[8], prefill_repeats=1)
    assert main(argv) == 0
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, ["num_attention_heads", "5", "num_key_value_heads", "2"]),
        ({"num_attention_heads": 3, "hidden_size": 33, "arm": "dense"}, ["num_attention_heads", "3"]),
        ({"num_attention_heads": 5, "arm": "static"}, ["num_attention_heads", "5"]),
        ({"active_query_experts": 0}, ["active_query_experts is 0"]),
        ({"active_query_experts": 3}, ["active_query_experts", "3", "1 to 2"]),
        ({"active_query_experts": 3, "arm": "static"}, ["active_query_experts", "3"]),
        ({"active_query_experts": 3, "arm": "half"}, ["active_query_experts", "3"]),
        ({"head_dim": 7}, ["head_dim", "7", "even"]),
        ({"head_dim": 7, "arm": "dense"}, ["head_dim", "7", "even"]),
        ({"hidden_size": 30, "arm": "dense"}, ["hidden", "30"]),
        ({"arm": "sparse"}, ["arm", "'sparse'", "gqe-m4"]),
        ({"steps": 0}, ["steps is 0; it must be 1 or more"]),
        ({"vocab_size": 100}, ["vocab_size", "100", "257"]),
        ({"seq_len": 1}, ["seq_len", "1"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**32}, ["seed", str(2**32)]),
        ({"learning_rate": 0}, ["learning_rate is 0"]),
        ({"learning_rate": "nan"}, ["learning_rate is nan"]),
        ({"learning_rate": "inf"}, ["learning_rate is inf"]),
        ({"weight_decay": "nan"}, ["weight_decay is nan"]),
        ({"router_aux_loss_coef": "nan"}, ["router_aux_loss_coef is nan"]),
        ({"router_z_loss_coef": -1}, ["router_z_loss_coef is -1"]),
        ({"warmup_fraction": 0.6, "decay_fraction": 0.6}, ["warmup_fraction + decay_fraction is 1.2"]),
        ({"dtype": "float16"}, ["dtype is 'float16'", "bfloat16"]),
        ({"device": "tpu"}, ["device is 'tpu'", "cuda"]),
        ({"max_bytes": 0}, ["max_bytes", "0"]),
        ({"tokenizer": "no/such/tokenizer"}, ["tokenizer", "no/such/tokenizer"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_used_is_named_with_what_it_held(tmp_path, text, refused, changes, words):
    refused(options("train", tmp_path / "out", text, **changes), *words)
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_learning_rate_with_which_the_loss_diverges_is_named_with_what_it_held(tmp_path, text, refused):
    refused(options("train", tmp_path / "out", text, learning_rate=1e30), "learning_rate is 1e+30", "diverged")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ["dense", "sparse"]}, ["arm is ", "'sparse'", "gqe-m4"]),
        ({"arms": ["gqe", "gqe"]}, ["arms", "['gqe', 'gqe']", "once"]),
        ({"seeds": [0, 0]}, ["seeds", "[0, 0]", "once"]),
        ({"seeds": [-1]}, ["seeds", "-1"]),
        ({"prefill_lengths": [0]}, ["prefill_lengths", "[0]"]),
        ({"num_attention_heads": 5}, ["num_attention_heads", "5"]),
    ],
)
def test_compare_names_what_it_cannot_use(tmp_path, text, refused, changes, words):
    refused(options("compare", tmp_path / "out", text, **changes), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_named_with_those_that_are(tmp_path, text, run, refused):
    words = ["device is 'cuda'", "not there", "auto, cpu"]
    refused(options("train", tmp_path / "out", text, device="cuda"), *words)
    refused(["generate", run / "model", "--device", "cuda"], *words)


def test_data_that_cannot_be_used_is_named(tmp_path, refused):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"text \xff\xfe" * 99)
    (tmp_path / "short.txt").write_text("a few words\n")
    (tmp_path / "folder").mkdir()

    def refuse(name, *words):
        refused(options("train", tmp_path / "out", tmp_path / name), "data", *words)

    refuse("missing.txt", "missing.txt", "doesn't exist")
    refuse("empty.txt", "empty.txt", "empty file")
    refuse("binary.txt", "binary.txt", "not UTF-8", "byte 5")
    refuse("folder", "folder")
    refuse("short.txt", "seq_len", "16", "tokens")


def test_a_tokenizer_with_more_tokens_than_the_vocabulary_is_refused(tmp_path, text, run, refused):
    argv = options("train", tmp_path / "out", text, tokenizer=run / "model", vocab_size=280)
    refused(argv, "tokenizer has 300 tokens", "vocab_size", "280")


@pytest.mark.parametrize("command", ["train", "compare"])
def test_what_is_refused_before_anything_was_read_leaves_nothing(tmp_path, text, refused, command):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xfd" * 100)
    empty, new, cache = (tmp_path / name for name in ("empty", "new", "cache"))
    empty.mkdir()
    for data, tokenizer in ((binary, None), (tmp_path / "no.txt", None), (text, tmp_path)):
        for out in (empty, new / "run"):
            refused(options(command, out, data, tokenizer=tokenizer, cache_dir=cache / "of" / "tokens"))
            refused(options(command, out, data, tokenizer=tokenizer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.txt", "empty"]
    assert not [*empty.iterdir()]


def test_tokens_that_were_read_are_kept_for_the_next_call(tmp_path, text, refused):
    refused(options("train", tmp_path / "run", text, batch_size=100_000), "batch_size * gradient_accumulation_steps")
    assert [*(tmp_path / "run" / "cache").glob("*/meta.json")]
    assert main(options("train", tmp_path / "run", text)) == 0


def test_a_recipe_that_cannot_be_used_is_named(tmp_path, text, refused):
    recipe = tmp_path / "recipe.yaml"
    argv = ["train", "--out", tmp_path / "out", "--data", text, "--recipe", recipe]
    refused(argv, "recipe", "recipe.yaml", "doesn't exist")
    for content, *words in (
        ("stepz: 3\n", "'stepz'", "steps"),
        ("1: 3\n", "sets 1"),
        ("steps: [1\n", "can't be read as YAML"),
        ("just words\n", "must hold lines"),
        ("", "must hold lines"),
        ("steps: null\n", "steps"),
        ("out: null\n", "out"),
    ):
        recipe.write_text(content)
        refused(argv, "recipe", *words)
    recipe.write_bytes(b"\xff\xfe\x00")
    refused(argv, "recipe", "can't be read as YAML")
    refused([*argv[:-1], tmp_path], "recipe", "can't be read as YAML")
    recipe.write_text("seeds: []\n")
    refused(["compare", *argv[1:]], "seeds", "[]")


def test_an_unknown_preset_or_command_is_refused_with_what_there_is(tmp_path, refused):
    refused(["train", "--preset", "huge"], "preset is 'huge'", "demo", "gpu", "small")
    refused(["trian"], "command is 'trian'", "compare, train, convert, distill, generate, evaluate, bench, report")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["train", "--steps", "many"], "--steps"),
        (["train", "--learning_rate", "fast"], "--learning_rate"),
        (["compare", "--seeds", "0", "one"], "--seeds"),
        (["train", "--tie_word_embeddings", "maybe"], "--tie_word_embeddings"),
        (["train", "--stepz", "3"], "--stepz"),
        (["train", "--steps", "3", "4"], "4"),
        (["generate", "folder", "--max_new_tokens", "x"], "--max_new_tokens"),
        (["generate"], "checkpoint"),
        (["report"], "folder"),
    ],
)
def test_options_that_cannot_be_parsed_are_refused_in_one_sentence(refused, argv, named):
    refused(argv, named, f"query-experts {argv[0]} --help lists what is allowed")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("steps: [3, 4]\n", ["steps to [3, 4]", "one value"]),
        ("steps: many\n", ["--steps", "many"]),
        ("seeds: [0, one]\n", ["--seeds", "one"]),
        ("steps: null\n", ["steps to null"]),
        ("steps: []\n", ["steps to []", "one value"]),
        ("out: []\n", ["out to []", "one value"]),
    ],
)
def test_a_value_in_a_recipe_that_cannot_be_used_is_refused_naming_the_recipe(tmp_path, refused, lines, words):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(lines)
    refused(["compare", "--recipe", recipe], str(recipe), *words)


def test_none_on_the_command_line_lifts_a_limit_of_the_preset(settings_of):
    assert settings_of("compare").max_bytes == 12_000_000
    assert settings_of("compare", "--max_bytes", "none").max_bytes is None
    assert settings_of("train", "--preset", "gpu", "--max-bytes", "none").max_bytes is None
    assert settings_of("train", "--max_bytes=none").max_bytes is None
    assert settings_of("train", "--max_bytes", "5", "--max_bytes", "none").max_bytes is None  # the last word
    assert settings_of("train", "--max_bytes", "none", "--max_bytes", "5").max_bytes == 5
    assert settings_of("train", "--max_bytes=none", "--out=-folder").out == "-folder"
    assert settings_of("train", "--data", "none").data == ["none"]  # a file may have that name


def test_a_stray_word_is_refused_wherever_it_stands(refused):
    refused(["compare", "--max_bytes", "5", "stray", "--max_bytes", "6"], "stray")
    refused(["compare", "--max_bytes", "none", "stray"], "stray")


def test_an_error_of_the_system_without_words_is_named_by_its_kind(monkeypatch, refused):
    def fail(settings, console):
        raise TimeoutError

    monkeypatch.setattr(study, "compare", fail)
    refused(["compare"], "TimeoutError")


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"query-experts {version('query-experts')}\n"


def test_comparisons_and_single_runs_go_to_folders_of_their_own(settings_of):
    assert settings_of("compare").out == "runs/demo"
    assert settings_of("compare", "--preset", "small").out == "runs/small"
    assert settings_of("train", "--preset", "small").out == "runs/train"
    assert settings_of("compare", "--out", "elsewhere").out == "elsewhere"


@pytest.mark.parametrize(
    "error",
    [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: 9")],
)
def test_memory_that_does_not_suffice_ends_in_a_sentence(monkeypatch, refused, error):
    def exhausted(settings, console):
        raise error

    monkeypatch.setattr(study, "compare", exhausted)
    refused(["compare"], "memory doesn't suffice", "model, batch and length", "must be smaller")


def test_ctrl_c_ends_in_a_sentence(monkeypatch, capsys):
    def interrupted(settings, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "compare", interrupted)
    assert main(["compare"]) == 130
    assert capsys.readouterr().err.strip() == (
        "query-experts: stopped; the same command goes on from the last checkpoint, if there is one"
    )


@pytest.mark.parametrize("out", ["file/below", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, text, refused, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    refused(options("train", out, text), f"out is {out}", "must be a folder that can be written to")


def test_names_that_are_empty_are_not_taken_for_this_folder(tmp_path, monkeypatch, refused, text):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(Path(text).read_text())
    refused(["report", ""], "folder is empty; it must be a compared folder")
    refused(["compare", "--recipe", ""], "recipe is .")
    refused(options("train", "run", ""), "data holds ''")
    refused(options("train", "run", text, tokenizer=""), "tokenizer is ''")
    assert os.listdir() == ["text.txt"]


def test_report_says_where_no_run_has_finished_yet(tmp_path, refused):
    (tmp_path / "comparison.json").write_text('{"runs": []}')
    refused(["report", tmp_path], f"folder is {tmp_path}", "no run has finished yet")


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '{"runs": [{"arm": "dense", "seed": 0}]}', '{"runs": [{}]}', '{"runs": [3]}', "{"]
)
def test_report_refuses_what_is_no_comparison(tmp_path, refused, content):
    (tmp_path / "comparison.json").write_text(content)
    refused(["report", tmp_path], f"folder is {tmp_path}", "comparison.json")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"query-experts {command}" in capsys.readouterr().out


def test_without_a_command_the_commands_are_listed(capsys):
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert main([]) == 2


def test_the_console_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="query-experts")
    assert script.load() is main


@pytest.mark.full
def test_as_a_process_a_refusal_is_one_line_without_a_traceback(tmp_path, text):
    argv = options("train", tmp_path / "out", text, arm="sparse")
    done = subprocess.run([sys.executable, "-m", "query_experts.cli", *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"query-experts: arm is 'sparse'; [^\n]*\n", done.stderr)
    assert done.stdout == ""


# recipes and presets


@pytest.fixture
def settings_of(monkeypatch):
    """The settings that a command would have run with."""

    def parse(*argv):
        held = []
        for module, name in ((single, "train"), (study, "compare"), (distill, "distill")):
            monkeypatch.setattr(module, name, lambda settings, console: held.append(settings) or True)
        assert main([str(word) for word in argv]) == 0
        return held[0]

    return parse


def test_the_recipe_is_over_the_preset_and_the_command_line_over_both(tmp_path, settings_of):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 7\nbatch_size: 3\narms: [gqe]\nmax_bytes: null\ntie_word_embeddings: false\n")
    held = settings_of("compare", "--preset", "small", "--recipe", recipe, "--batch_size", "5")
    assert (held.steps, held.batch_size, held.arms, held.hidden_size) == (7, 5, ["gqe"], 256)
    assert held.max_bytes is None
    assert held.tie_word_embeddings is False
    assert settings_of("compare", "--recipe", recipe, "--max_bytes", "9").max_bytes == 9
    train = settings_of("train", "--recipe", recipe)  # what only compare knows is left aside
    assert (train.steps, train.arm) == (7, "gqe")


@pytest.mark.parametrize("preset", sorted(presets("recipes")))
def test_every_preset_can_be_used(settings_of, preset):
    settings_of("compare", "--preset", preset).check()
    settings_of("distill", "--preset", preset, "--init", "a/checkpoint", "--teacher", "another").check()
    if preset != "distill":
        settings_of("train", "--preset", preset).check()


# what the commands do


def test_train_then_generate_prints_text_that_goes_on_from_the_prompt(run, capsys):
    assert {path.name for path in (run / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    argv = ["generate", str(run / "model"), "--prompt", "def token", "--max-new-tokens", "12", "--device", "cpu"]

    def text_of(*more):
        capsys.readouterr()
        assert main([*argv, *more]) == 0
        return capsys.readouterr().out

    greedy = text_of("--temperature", "0")
    assert greedy.startswith("def token")
    assert len(greedy.strip()) > len("def token")
    assert text_of("--temperature", "0", "--seed", "1") == greedy
    assert text_of("--seed", "1") == text_of("--seed", "1")
    assert text_of("--seed", "1") != text_of("--seed", "2")


def test_a_checkpoint_without_a_tokenizer_is_refused(run, tmp_path, refused):
    checkpoint = shutil.copytree(run / "model", tmp_path / "checkpoint-2", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(["generate", checkpoint], "checkpoint", checkpoint.name)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: (model / "config.json").unlink(),
        lambda model: (model / "config.json").write_text("{"),
        lambda model: (model / "config.json").write_text("{}"),
        lambda model: change_config(model, model_type="no-such-model"),
        lambda model: change_config(model, variant="dense"),
        lambda model: change_config(model, active_query_experts=9),
        lambda model: change_config(model, hidden_size=64),
        lambda model: (model / "model.safetensors").unlink(),
        lambda model: (model / "model.safetensors").write_bytes(b""),
        lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:999]),
        lambda model: (model / "tokenizer.json").unlink(),
        lambda model: (model / "tokenizer.json").write_text("{"),
    ],
    ids=[
        "no config", "config cut short", "empty config", "unknown model", "unknown variant", "k > M", "other shapes",
        "no weights", "empty weights", "weights cut short", "no tokenizer", "tokenizer cut short",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(run, tmp_path, refused, damage):
    model = shutil.copytree(run / "model", tmp_path / "model")
    damage(model)
    refused(["generate", model], "checkpoint is", str(model))


def test_generate_refuses_a_dense_checkpoint_a_missing_folder_and_values_out_of_range(compared, run, tmp_path, refused):
    dense = compared / "runs" / "dense-seed0" / "model"
    refused(["generate", dense], "checkpoint", "model_type is 'llama'", "'gqe'")
    refused(["generate", tmp_path / "missing"], "checkpoint", "missing", "which doesn't exist")
    for option, value, word in (
        ("--max-new-tokens", "0", "max_new_tokens is 0"),
        ("--temperature", "-1", "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--temperature", "1e-45", "temperature"),
        ("--seed", "-1", "seed"),
        ("--device", "tpu", "device is 'tpu'"),
    ):
        refused(["generate", run / "model", option, value], word)


def test_an_output_folder_of_another_run_is_refused(run, compared, text, tmp_path, refused):
    refused(options("train", run, text, steps=3), "out is", "steps was 2, now 3")
    refused(options("train", run, text, seed=1), "out is", "arm and seed")
    made_by = "which holds what {} has made (arm and seed was {}, now {}); use another folder"
    one, several = "['gqe', 0]", "'several'"
    refused(options("compare", run, text, steps=3), made_by.format("train", one, several))
    refused(options("train", compared, text, steps=3), made_by.format("compare", several, one))
    refused(options("train", tmp_path, write_text(tmp_path / "thesis.txt")), "out is", "other files")
    refused(options("train", tmp_path / "thesis.txt", text), "out is", "a file")


def test_a_command_stopped_by_the_clock_ends_with_status_1_and_goes_on(tmp_path, text, run, capsys):
    argv = options("train", tmp_path / "out", text, stop_after_minutes=0)
    assert main(argv) == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert main(argv) == 0
    a, b = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "out", run))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_report_makes_the_page_again_from_the_numbers(compared, tmp_path, capsys):
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(compared / "comparison.json", folder)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == (compared / "report.html").read_bytes()
    assert "gqe" in capsys.readouterr().out


def test_report_refuses_a_folder_without_a_comparison(tmp_path, run, refused):
    refused(["report", tmp_path], "folder is", "comparison.json")
    refused(["report", run], "folder is", "comparison.json")
    for content in ("{", "[]", "{}"):
        (tmp_path / "comparison.json").write_text(content)
        refused(["report", tmp_path], "folder is", "comparison.json")


# a full disk

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6016 vs 5908"),
    RuntimeError("basic_ios::clear: iostream error"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_disk_that_fills_up_while_a_checkpoint_is_saved_ends_in_one_line(tmp_path, text, monkeypatch, refused, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(GQETrainer, "save_model", fail)
    refused(options("train", tmp_path / "out", text), "out", "no room")


def test_another_error_while_a_checkpoint_is_saved_is_no_full_disk(tmp_path, text, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed")

    monkeypatch.setattr(GQETrainer, "save_model", fail)
    with pytest.raises(RuntimeError, match="StreamReader"):
        main([str(word) for word in options("train", tmp_path / "out", text)])


def test_too_little_disk_for_the_run_is_told_before_training(tmp_path, text, monkeypatch, refused):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=700_000))
    refused(options("train", tmp_path / "out", text), "out is", "MB free; it needs about")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# config.json, model.safetensors, optimizer.pt, rng_state.pth; then the finished model's own files
@pytest.mark.parametrize("room", [0, 40_000, 150_000, 360_000, 384_000, 400_000])
def test_a_really_full_disk_ends_in_one_line_and_with_room_again_the_run_goes_on(
    small_disk, tmp_path, text, run, monkeypatch, refused, room
):
    argv = [
        str(word) for word in options("train", small_disk / "out", text, evaluations=1, cache_dir=tmp_path / "cache")
    ]
    original = TokenProgress.on_step_end

    def fill(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 2:
            ballast = shutil.disk_usage(small_disk).free - room
            (small_disk / "ballast").write_bytes(b"\0" * ballast)

    with monkeypatch.context() as patch:
        patch.setattr(TokenProgress, "on_step_end", fill)
        refused(argv, "out", "no room")
    (small_disk / "ballast").unlink()
    assert main(argv) == 0
    a, b = (load_file(out / "model" / "model.safetensors") for out in (small_disk / "out", run))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_demo_trains_in_float32_and_the_other_presets_in_what_the_hardware_has(settings_of):
    assert settings_of("compare").dtype == settings_of("train").dtype == "float32"
    for preset in ("small", "gpu"):
        assert settings_of("compare", "--preset", preset).dtype == "auto"
    assert settings_of("distill", "--init", "a").dtype == "auto"
    assert settings_of("compare", "--dtype", "bfloat16").dtype == "bfloat16"
