"""`query-experts convert`; the two commands that make a dense checkpoint sparse; checkpoints that are refused."""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from query_experts.cli import main
from query_experts.common import checkpoints
from query_experts.common.checkpoints import require_checkpoint
from query_experts.common.errors import SettingError
from query_experts.convert import convert_model, from_dense
from query_experts.convert import folder as folder_module
from query_experts.convert import source as source_module
from query_experts.convert.folder import convert_folder
from query_experts.convert.settings import ConvertSettings
from query_experts.convert.source import CheckpointFolder
from query_experts.data import tokenizing, windows
from query_experts.data.windows import windows_of
from query_experts.evaluate.harness import load_model
from query_experts.study import distill
from query_experts.study.distill import load_start, load_teacher, with_model_sizes
from study_helpers import options


@pytest.fixture(scope="module")
def dense(tmp_path_factory, text):
    """A dense checkpoint that `train` made, with the files that people keep next to one."""
    out = tmp_path_factory.mktemp("dense") / "run"
    assert main(options("train", out, text, arm="dense", num_attention_heads=8)) == 0
    (out / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (out / "model" / "LICENSE").write_text("free")
    (out / "model" / "README.md").write_text("a dense model's card")
    return out / "model"


# the model's sizes that `options` sets, left out: with init they come from its checkpoint
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WITHOUT_SIZES = dict.fromkeys([*SIZES, "num_key_value_heads", "head_dim"])


def sharded(dense, folder, size="20KB"):
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(folder, max_shard_size=size)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder):
    ids = torch.arange(40).view(2, 20)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def test_a_checkpoint_of_one_file_or_several_converts_exactly(tmp_path, dense, capsys):
    assert main(["convert", str(dense), str(tmp_path / "one")]) == 0
    assert "Checkpoint: " in capsys.readouterr().out
    many = sharded(dense, tmp_path / "shards")
    assert len([*many.glob("*.safetensors")]) > 3
    assert main(["convert", str(many), str(tmp_path / "many")]) == 0
    for converted in ("one", "many"):
        torch.testing.assert_close(logits(tmp_path / converted), logits(dense), rtol=0, atol=1e-5)
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


def test_tokenizer_template_and_licence_come_along_and_the_card_does_not(tmp_path, dense):
    assert main(["convert", str(dense), str(tmp_path / "gqe")]) == 0
    there = {path.name for path in dense.iterdir()}
    more = shutil.copytree(dense, tmp_path / "more")
    for name in ("model.onnx", "pytorch_model.bin.index.json", "training_args.bin"):
        (more / name).write_text("{}")
    assert main(["convert", str(more), str(tmp_path / "again")]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (tmp_path / "gqe").iterdir()
    }
    here = {path.name for path in (tmp_path / "gqe").iterdir()}
    assert there - here == {"README.md", "model.safetensors"}
    assert (tmp_path / "gqe" / "chat_template.jinja").read_text() == "{{ messages }}"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (dense, tmp_path / "gqe"))
    assert after["architectures"] == ["GQEForCausalLM"]
    assert after["rope_parameters"] == before["rope_parameters"]
    assert after["dtype"] == before["dtype"]


COME_ALONG = (
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "spiece.model", "qwen.tiktoken", "tokenization_own.py", "chat_template.json", "generation_config.json", "LICENSE",
    "LICENSE.txt", "LICENCE.md", "License", "Llama-License.txt", "COPYING", "NOTICE", "NOTICE.txt", "bpe.codes",
    "tekken.json", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
STAY_BEHIND = (
    "README.md", "pytorch_model.bin", "training_args.bin", "trainer_state.json", "optimizer.pt", "adapter_model.bin",
    "quantize_config.json", "preprocessor_config.json", "model.gguf", "model.onnx", "tf_model.h5", "modeling_other.py",
    ".gitattributes", "original/tokenizer.model", "tokenizer_files/tokenizer.model",
)  # fmt: skip


@pytest.fixture(scope="module")
def converted_with_all_sidecar_files(tmp_path_factory, dense):
    folder = tmp_path_factory.mktemp("beside")
    shutil.copytree(dense, folder / "dense")
    for name in (*COME_ALONG, *STAY_BEHIND):
        (folder / "dense" / name).parent.mkdir(exist_ok=True)
        (folder / "dense" / name).write_text(json.dumps({"file": name}))
    assert main(["convert", str(folder / "dense"), str(folder / "gqe")]) == 0
    return folder / "gqe"


@pytest.mark.parametrize("name", COME_ALONG)
def test_what_tokenizer_template_and_licence_are_made_of_comes_along(converted_with_all_sidecar_files, name):
    assert (converted_with_all_sidecar_files / name).read_text() == json.dumps({"file": name})


@pytest.mark.parametrize("name", STAY_BEHIND)
def test_what_belongs_to_the_dense_model_alone_stays_behind(converted_with_all_sidecar_files, name):
    assert not (converted_with_all_sidecar_files / name).exists()


def test_of_the_hub_no_weights_in_other_forms_are_fetched(tmp_path, dense, monkeypatch):
    expected = [path.name for path in dense.iterdir()]
    others = ["pytorch_model.bin", "old/pytorch_model.bin", "model.pt", "model.pth", "model.gguf", "tf_model.h5"]
    others += ["flax_model.msgpack", "model.onnx_data", "onnx/config.json", "original/x", "consolidated.safetensors"]
    fetched = []

    def snapshot_download(name, **options):
        assert name == "someone/model"
        fetched.extend(filter_repo_objects(expected + others, **options))
        return str(dense)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "missing_on_hub", lambda name: None)
    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    assert main(["convert", "someone/model", "gqe"]) == 0
    assert fetched == expected
    torch.testing.assert_close(logits(tmp_path / "gqe"), logits(dense), rtol=0, atol=1e-5)


def test_what_the_hub_does_not_hand_out_is_refused(tmp_path, monkeypatch, refused):
    def snapshot_download(*args, **options):
        raise OSError("gated")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "missing_on_hub", lambda name: None)
    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    refused(["convert", "someone/model", "gqe"], "someone/model, which can't be loaded from the hub (OSError: gated)")


def test_a_folder_is_converted_as_the_loaded_model_is(tmp_path, dense, text):
    argv = ["--top-k", "1", "--calibrate", text, "--calibration_tokens", "320", "--calibration_length", "16"]
    assert main(["convert", str(dense), str(tmp_path / "gqe"), *argv, "--seed", "3"]) == 0
    record = json.loads((tmp_path / "gqe" / "conversion.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(dense)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read()).input_ids[:320]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    converted, report = convert_model(model, 1, calibration=torch.tensor(ids).view(20, 16), seed=3)
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "gqe", dtype=torch.float32)
    assert folder.config.active_query_experts == 1
    for (name, of_folder), of_model in zip(folder.named_parameters(), converted.parameters(), strict=True):
        assert torch.equal(of_folder, of_model), name
    assert list(record) == ["settings", "fits", "tokens", "dense_loss", "gqe_loss", "kl"]
    assert record["kl"] == pytest.approx(report.kl)
    assert list(record["fits"][0]) == ["kept", "fixed", "best"]
    assert record["fits"][0]["kept"] == pytest.approx(report.fits[0].kept)
    assert record["tokens"] == 4 * 15
    assert record["settings"]["checkpoint"] == "model"  # only names, as others will read it
    assert record["settings"]["out"] == "gqe"
    assert record["settings"]["calibrate"] == ["text.txt"]


@pytest.mark.parametrize("argv", [[], ["--top_k", "1", "--output_projection", "slot", "--router", "query_norm"]])
def test_every_tensor_that_is_written_has_the_checkpoints_dtype(tmp_path, dense, text, argv):
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "half")
    calibrated = ["--calibrate", text, "--calibration_tokens", "320", "--calibration_length", "16"] if argv else []
    assert main(["convert", str(tmp_path / "half"), str(tmp_path / "gqe"), *argv, *calibrated]) == 0
    tensors = {name: t for path in (tmp_path / "gqe").glob("*.safetensors") for name, t in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "gqe" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()


def test_frequencies_that_old_checkpoints_hold_are_passed_over(tmp_path, dense, text):
    copy = shutil.copytree(dense, tmp_path / "old")
    old = {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.ones(4) for number in range(2)}
    save_file(load_file(copy / "model.safetensors") | old, copy / "model.safetensors", metadata={"format": "pt"})
    calibrated = ["--calibrate", text, "--calibration_tokens", "320", "--calibration_length", "16"]
    for name, argv in {"plain": [], "calibrated": calibrated}.items():
        assert main(["convert", str(copy), str(tmp_path / name), *argv]) == 0
        torch.testing.assert_close(logits(tmp_path / name), logits(dense), rtol=0, atol=1e-5)


def test_documents_to_calibrate_on_are_joined_by_the_end_of_text_and_by_nothing_else(tmp_path, dense):
    """Even if the tokenizer begins each text with a token; and no more is read than was asked for."""
    folder = shutil.copytree(dense, tmp_path / "begins")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = ("!", tokenizer.convert_tokens_to_ids("!"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[first])
    tokenizer.save_pretrained(folder)
    documents = ["def head", "for token in group", "return key"] * 9
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": document}) + "\n" for document in documents))
    plain = [tokenizer(document, add_special_tokens=False).input_ids for document in documents]
    joined = [token for ids in plain for token in [*ids, tokenizer.eos_token_id]]
    asked = ConvertSettings(
        str(folder), "out", 1, "expert", None, [str(tmp_path / "lines.jsonl")], 83, 8, "body", 0, "cpu"
    )
    assert folder_module.read_calibration_text(asked, folder, 16).flatten().tolist() == joined[:80]


def test_a_tied_output_embedding_that_was_stored_all_the_same_is_left_out(tmp_path, dense):
    copy = shutil.copytree(dense, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    assert "lm_head.weight" not in tensors
    stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", str(copy), str(tmp_path / "gqe")]) == 0
    torch.testing.assert_close(logits(tmp_path / "gqe"), logits(dense), rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_is_stored_of_tied_embeddings_is_loaded_as_transformers_does(tmp_path, dense):
    """An output embedding that differs from the input embedding stays; one stored without the other is both."""
    tensors = load_file(dense / "model.safetensors")
    embeddings = tensors.pop("model.embed_tokens.weight")
    other = {"model.embed_tokens.weight": embeddings, "lm_head.weight": torch.randn_like(embeddings)}
    for name, stored in {"other": other, "head": {"lm_head.weight": embeddings}}.items():
        copy = shutil.copytree(dense, tmp_path / name)
        save_file(tensors | stored, copy / "model.safetensors", metadata={"format": "pt"})
        assert main(["convert", str(copy), str(tmp_path / f"{name}-gqe")]) == 0
        torch.testing.assert_close(logits(tmp_path / f"{name}-gqe"), logits(copy), rtol=0, atol=1e-5)
        assert json.loads((tmp_path / f"{name}-gqe" / "config.json").read_text())["tie_word_embeddings"] == (
            name == "head"
        )


def test_one_file_beside_an_index_is_what_is_read_as_transformers_does(tmp_path, dense):
    both = sharded(dense, tmp_path / "both")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 2
    save_file(tensors, both / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", str(both), str(tmp_path / "gqe")]) == 0
    torch.testing.assert_close(logits(tmp_path / "gqe"), logits(both), rtol=0, atol=1e-5)
    assert (logits(both) - logits(dense)).abs().max() > 1e-3


@pytest.mark.parametrize("calibrated", [False, True])
def test_one_layer_is_in_memory_at_a_time(tmp_path, dense, text, monkeypatch, calibrated):
    read: list[list] = []
    layer = CheckpointFolder.layer

    def watched(self, number):
        gc.collect()
        assert not [storages for storages in read if any(storage() is not None for storage in storages)]
        tensors = layer(self, number)
        read.append([weakref.ref(tensor.untyped_storage()) for tensor in tensors.values()])  # views share it
        return tensors

    monkeypatch.setattr(CheckpointFolder, "layer", watched)
    argv = ["--calibrate", text, "--calibration_tokens", "320", "--calibration_length", "16"] if calibrated else []
    assert main(["convert", str(dense), str(tmp_path / "gqe"), *argv]) == 0
    assert len(read) == 2
    files = sorted((tmp_path / "gqe").glob("*.safetensors"))
    assert [len({name.split(".")[2] for name in load_file(f) if "layers" in name}) for f in files] == [0, 1, 1]


def test_long_text_is_tokenised_as_far_as_it_is_needed_with_the_tokens_of_the_whole(dense, text, monkeypatch):
    given = []

    def recorded(document):
        for window in windows_of(document):
            given.append(window)
            yield window

    monkeypatch.setattr(windows, "_WINDOW_CHARACTERS", 1000)
    monkeypatch.setattr(windows, "_OVERLAP", 500)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(tokenizing, "windows_of", recorded)
    asked = ConvertSettings(str(dense), "out", 1, "expert", None, [text], 640, 16, "text", 0, "cpu")
    found = folder_module.read_calibration_text(asked, dense, 16)
    with open(text, encoding="utf-8") as file:
        whole = file.read()
    assert found.shape == (40, 16)
    assert found.flatten().tolist() == AutoTokenizer.from_pretrained(dense)(whole).input_ids[:640]
    assert 1 < len(given) < len(whole) / 2000


@pytest.mark.parametrize("out", [".", "missing/..", "link", "empty", "new/folder"])
def test_out_may_be_any_folder_that_is_empty_or_new(tmp_path, dense, monkeypatch, out):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if out == "link":
        (tmp_path / "target").mkdir()
        (here / "link").symlink_to(tmp_path / "target")
    elif out == "empty":
        (here / "empty").mkdir()
    assert main(["convert", str(dense), out]) == 0
    assert Path.cwd() == here
    where = {".": here, "missing/..": here, "link": tmp_path / "target"}.get(out, here / out)
    torch.testing.assert_close(logits(where), logits(dense), rtol=0, atol=1e-5)
    assert not [*tmp_path.rglob("*.part")]


def test_too_little_room_is_told_before_anything_is_written(tmp_path, dense, monkeypatch, refused):
    """Space for the dense weights isn't enough, because routers and shared heads are added."""
    usage = shutil.disk_usage(tmp_path)
    size = (dense / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size))
    with monkeypatch.context() as within:
        within.setattr(folder_module, "save_file", lambda *args, **kwargs: pytest.fail("written"))
        refused(["convert", dense, tmp_path / "gqe"], f"out is {tmp_path / 'gqe'}, whose disk has", "MB free; it needs")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2 * size))
    assert main(["convert", str(dense), str(tmp_path / "gqe")]) == 0


def test_a_folder_that_is_filled_meanwhile_stays_as_it_was_filled(tmp_path, dense, monkeypatch, refused):
    out = tmp_path / "out"
    out.mkdir()
    copy = folder_module.copy_sidecar_files

    def and_fill(folder, building):
        copy(folder, building)
        (out / "notes.txt").write_text("of another process")

    monkeypatch.setattr(folder_module, "copy_sidecar_files", and_fill)
    refused(["convert", dense, out], "out is", "which was filled meanwhile; it must be a new or empty folder")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_in_a_folder_that_is_there_config_json_comes_last(tmp_path, dense, monkeypatch):
    """Without config.json the rest is no checkpoint, so none looks whole too early; all files stay on out's disk."""
    out, rename, names = tmp_path / "out", Path.rename, []
    out.mkdir()

    def watched(path, target):
        assert path.parent.parent == out
        names.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    assert main(["convert", str(dense), str(out)]) == 0
    assert names[-1] == "config.json"
    assert {path.name for path in out.iterdir()} == set(names)


def test_a_disk_that_is_full_while_weights_are_written_is_told_in_one_line(tmp_path, dense, monkeypatch, refused):
    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder_module, "save_file", fail)
    refused(["convert", dense, tmp_path / "gqe"], "out has no room left on its disk")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("out", ["gqe", "new/gqe"])
def test_when_it_is_ended_nothing_is_left(tmp_path, dense, monkeypatch, capsys, out, number):
    monkeypatch.setattr(folder_module, "save_file", lambda *args, **kwargs: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.SIG_DFL)  # nohup starts a program with SIGHUP ignored
    try:
        assert main(["convert", str(dense), str(tmp_path / out)]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err.splitlines()[-1] == "query-experts: stopped"
    assert not [*tmp_path.iterdir()]


@pytest.mark.full
@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path, dense, refused, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    code = "import os, sys; from query_experts.convert import folder; from query_experts.cli import main\n"
    code += "folder.save_file = lambda *args, **kwargs: os.kill(os.getpid(), 9); main(sys.argv[1:])"
    killed = subprocess.run([sys.executable, "-c", code, "convert", str(dense), str(out)], capture_output=True)
    assert killed.returncode == -9
    place = out if there else tmp_path
    lock, left = sorted(place.iterdir(), key=lambda path: path.suffix)
    assert (lock.name, left.suffix) == (".out.lock", ".part")
    with FileLock(lock):
        refused(["convert", dense, out], f"another conversion is at work ({lock} is held)")
        assert left.is_dir()
    assert main(["convert", str(dense), str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("there", [True, False])
def test_two_conversions_to_one_folder_keep_apart(tmp_path, dense, monkeypatch, refused, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    save, tried = folder_module.save_file, []

    def meanwhile(*args, **kwargs):
        if not tried:
            tried.append(True)
            refused(["convert", dense, out], "to which another conversion is at work")
        save(*args, **kwargs)

    monkeypatch.setattr(folder_module, "save_file", meanwhile)
    assert main(["convert", str(dense), str(out)]) == 0
    assert tried
    assert torch.equal(logits(out), logits(dense))
    assert not [*tmp_path.rglob(".out*")]


def test_what_is_removed_is_of_this_out_alone(tmp_path, dense):
    of_this_out, of_another = (tmp_path / f".m-[3].{id_}.part" for id_ in ("0123abcd", "1.0123abcd"))
    of_a_third = tmp_path / ".m-3.0123abcd.part"
    for folder in (of_this_out, of_another, of_a_third):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    with FileLock(tmp_path / ".m-[3].1.lock"):
        assert main(["convert", str(dense), str(tmp_path / "m-[3]")]) == 0
    assert (of_this_out.exists(), of_another.exists(), of_a_third.exists()) == (False, True, True)


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("adapter_config.json", {}, "which holds adapter_config.json, an adapter that Transformers adds"),
        (None, {"transformers_weights": "other.safetensors"}, "whose transformers_weights is 'other.safetensors'"),
    ],
)
def test_weights_that_transformers_would_take_elsewhere_are_refused(tmp_path, dense, refused, file, settings, words):
    copy = copy_with(dense, tmp_path / "copy", settings)
    if file is not None:
        (copy / file).write_text("{}")
    refused(["convert", copy, tmp_path / "out"], f"checkpoint is {copy}, {words}")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_version_of_tokenizers_is_spoken_of(tmp_path, dense, text, refused, capsys):
    """tokenizers raises Exception itself."""
    newer = shutil.copytree(dense, tmp_path / "newer")
    tokenizer = json.loads((newer / "tokenizer.json").read_text())
    (newer / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "NewKind"}}))
    assert main(["convert", str(newer), str(tmp_path / "gqe"), "--top_k", "1"]) == 0
    assert "can't be loaded here (" in " ".join(capsys.readouterr().out.split())
    refused(["convert", newer, tmp_path / "out", "--calibrate", text], "whose tokenizer isn't there, damaged, slow")
    refused(["generate", tmp_path / "gqe"], "whose tokenizer can't be loaded")
    refused(["evaluate", newer, "--tasks", "piqa"], "whose tokenizer can't be loaded")


def test_what_is_in_the_way_is_named(tmp_path, dense, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("")
    refused(["convert", dense, tmp_path / "out"], "out, which holds .hidden; it must be a new or empty folder")


def test_an_empty_folder_is_empty_again_when_it_is_ended_at_the_last(tmp_path, dense, monkeypatch):
    rename, moved = Path.rename, []

    def ended(path, target):
        if path.name == "config.json":
            raise KeyboardInterrupt
        moved.append(target)
        return rename(path, target)

    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "additional_chat_templates").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "rename", ended)
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "out")]) == 130
    assert len(moved) > 3
    assert not [*(tmp_path / "out").iterdir()]


def test_a_tokenizer_that_is_not_there_or_cannot_be_loaded_is_spoken_of(tmp_path, dense, capsys):
    bare = shutil.copytree(dense, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert main(["convert", str(bare), str(tmp_path / "one")]) == 0
    assert "Note: the checkpoint has no tokenizer, and so the GQE checkpoint has none." in capsys.readouterr().out
    (bare / "tokenizer.json").write_text("{}")
    assert main(["convert", str(bare), str(tmp_path / "two")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "Note: the tokenizer was copied as it is, and can't be loaded here (" in output
    assert main(["convert", str(dense), str(tmp_path / "three")]) == 0
    assert "Note" not in capsys.readouterr().out


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "HfApi", lambda: pytest.fail("asked"))
    for name in ("./gpe", "some/other/folder", tmp_path / "gpe"):
        refused(["convert", name, "out"], f"checkpoint is {name}, which doesn't exist")
    (tmp_path / "link").symlink_to("nowhere")
    refused(["convert", "link", "out"], "checkpoint is link, which is a link to nothing")
    for load in (load_teacher, lambda name: load_model(name, "float32")):
        with pytest.raises(SettingError, match=r"is ./gpe, which doesn't exist"):
            load("./gpe")


class Hub:
    """Replaces the hub's client: a hub that has these models, or raises an error."""

    def __init__(self, holds=(), error=None):
        self.holds, self.error, self.asked = holds, error, 0

    def repo_exists(self, name, repo_type):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return (repo_type, name) in self.holds


def test_a_name_is_asked_of_the_hub_once_and_without_waiting(tmp_path, dense, text, monkeypatch, refused):
    hub = Hub()
    monkeypatch.setattr(checkpoints, "HfApi", lambda: hub)
    with pytest.raises(SettingError, match="teacher is some/model, which is no folder here, and the hub has no model"):
        load_teacher("some/model")
    for name in ("model", "some/model"):
        which = f"checkpoint is {name}, which is no folder here, and"
        hub.error, hub.asked = None, 0
        refused(["convert", name, tmp_path / "out"], which, "the hub has no model of that name")
        hub.error = ConnectionError("no network")
        refused(["convert", name, tmp_path / "out"], which, "the hub can't be asked (ConnectionError: no network)")
        refused(["evaluate", name, "--tasks", "piqa"], which, "the hub can't be asked")
        assert hub.asked == 3
    hub.error, hub.asked = None, 0
    tokenizer = {"tokenizer": "some/model", "vocab_size": 300}
    refused(options("train", tmp_path / "run", text, **tokenizer), "tokenizer is 'some/model', which is no folder")
    refused(options("train", tmp_path / "run", "some/texts"), "data holds 'some/texts'", "no dataset of that name")
    assert hub.asked == 2
    refused(["convert", "not a name!", tmp_path / "out"], "the hub has no such names")
    hub.holds = [("model", "some/model")]
    require_checkpoint("some/model", "checkpoint")
    hub.error = OfflineModeIsEnabled("offline")
    require_checkpoint("some/model", "checkpoint")
    assert not [*tmp_path.iterdir()]


def test_convert_refuses_what_it_cannot_use(tmp_path, dense, text, refused):
    out = tmp_path / "out"
    refused(["convert", tmp_path / "nowhere", out], "checkpoint is", "nowhere")
    refused(["convert", dense, ""], "out is empty; it must be a new or empty folder")
    refused(["convert", dense, dense / "config.json"], "which is a file; it must be a new or empty folder")
    refused(["convert", tmp_path, out], "which holds no config.json; it must be a model's folder")
    refused(["convert", dense, out, "--calibrate", ""], "query-experts: calibrate holds ''; an entry is a file")
    for settings, words in {
        ("hidden_act", "nonsense"): "hidden_act is 'nonsense'; it must be an activation",
        ("rope_parameters", "weird"): "rope_type is 'weird'; it must be default or one of",
    }.items():
        name, value = settings
        value = {"rope_type": value, "rope_theta": 1e4} if name == "rope_parameters" else value
        wrong = copy_with(dense, tmp_path / name, {name: value})
        refused(["convert", wrong, out], words)
    few_or_file = tmp_path / "file"
    few_or_file.write_text("")
    unknown = copy_with(dense, tmp_path / "unknown", {"model_type": "nonesuch"})
    refused(["convert", unknown, out], "whose config.json holds model_type 'nonesuch'", "that Transformers")
    made = tmp_path / "gqe"
    assert main(["convert", str(dense), str(made)]) == 0
    refused(["convert", made, out], f"checkpoint is {made}, whose model_type is 'gqe'; it must be one of llama,")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xfd" * 100)
    refused(["convert", dense, out, "--calibrate", binary], "query-experts: calibrate holds", "not UTF-8")
    bare = shutil.copytree(dense, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    refused(["convert", bare, out, "--calibrate", text], f"checkpoint is {bare}, whose tokenizer isn't there")
    refused(["convert", dense, out, "--top_k", 5], "top_k is 5; it must be 1 to 4")
    refused(["convert", dense, out, "--calibration_tokens", 5], "calibration_tokens is 5", "calibrate must be given")
    refused(["convert", dense, out, "--calibration_length", 5], "calibration_length is 5", "calibrate must be given")
    refused(["convert", dense, out, "--text_field", "body"], "text_field is 'body'", "calibrate must be given")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused(["convert", dense, tmp_path / "circle"], f"out is {tmp_path / 'circle'}, which can't be read")
    refused(["convert", dense, few_or_file / "sub"], f"out is {few_or_file / 'sub'}, where {few_or_file} is a file; it")
    refused(["convert", dense, out, "--output_projection", "slot"], "calibrate must be given")
    refused(["convert", dense, out, "--router", "calibrated"], "router is 'calibrated'")
    refused(["convert", dense, out, "--router", "best"], "router is 'best'; it must be one of")
    refused(["convert", dense, out, "--calibrate", text, "--calibration_length", 1], "calibration_length is 1")
    refused(
        ["convert", dense, out, "--calibrate", text, "--calibration_length", 17], "calibration_length is 17; it must be"
    )
    refused(["convert", dense, out, "--calibrate", text, "--calibration_tokens", 9], "calibration_tokens is 9")
    few = tmp_path / "few.txt"
    few.write_text("few words")
    refused(["convert", dense, out, "--calibrate", few], "calibrate holds", "it must hold 80 or more")
    refused(["convert", dense, out, "--calibrate", tmp_path / "none.txt"], "query-experts: calibrate holds", "none.txt")
    refused(["convert", dense, dense], "out is", "it must be a new or empty folder")
    refused(["convert", dense, out, "--seed", -1], "seed holds -1")
    refused(["convert", dense, out, "--device", "tpu"], "device is 'tpu'")
    refused(["convert", dense], "the following arguments are required: out")
    assert not out.exists()
    assert not [*tmp_path.glob(".*part")]


def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(tmp_path, dense, text, refused):
    def copy():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(dense, tmp_path / "copy")

    out, weights = tmp_path / "out", tmp_path / "copy" / "model.safetensors"
    copy()
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(["convert", tmp_path / "copy", out], "model.safetensors", "damaged")
    copy()
    weights.unlink()
    refused(["convert", tmp_path / "copy", out], "holds no model.safetensors")
    copy()
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(["convert", tmp_path / "copy", out], "no tensor model.layers.1.mlp.up_proj.weight")
    copy()
    save_file(load_file(weights) | {"model.layers.0.self_attn.sinks": torch.zeros(8)}, weights)
    refused(["convert", tmp_path / "copy", out], "self_attn.sinks, for which GQE has no place")
    copy()
    config = json.loads((dense / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 8}))
    refused(["convert", tmp_path / "copy", out], "nothing to route")
    for count in (0, 3):
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_key_value_heads": count}))
        refused(["convert", tmp_path / "copy", out], f"num_key_value_heads {count}; the former must be a multiple")
    for content, words in {"{": "is damaged", "\xff": "is damaged", "[]": "holds no JSON object"}.items():
        (tmp_path / "copy" / "config.json").write_text(content, encoding="latin-1")
        refused(["convert", tmp_path / "copy", out], f"copy, whose config.json {words}")
    calibrated = ["--calibrate", text, "--calibration_tokens", 320, "--calibration_length", 16]
    copy()
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(["convert", tmp_path / "copy", out, *calibrated], "no tensor model.layers.0.input_layernorm.weight")
    copy()
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"intermediate_size": 49}))
    refused(
        ["convert", tmp_path / "copy", out, *calibrated], "tensors model.layers.0.* aren't those of its config.json"
    )
    refused(["convert", tmp_path / "copy", out], "mlp.gate_proj.weight has shape", "by config.json it must have shape")
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    refused(["convert", tmp_path / "copy", out], "config.json holds what can't be used: TypeError: Field 'num_hidden")
    for name in ("tokenizer.json", "generation_config.json"):
        copy()
        (tmp_path / "copy" / name).write_text("{")
        refused(["convert", tmp_path / "copy", out], f"checkpoint holds {tmp_path / 'copy' / name}, which is damaged")
    sharded(dense, tmp_path / "shards")
    next((tmp_path / "shards").glob("*-00002-of-*")).unlink()
    refused(["convert", tmp_path / "shards", out], "which holds no model-00002-of-")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    for content in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        refused(["convert", tmp_path / "shards", out], "shards, whose model.safetensors.index.json is damaged")
    assert not out.exists()
    assert not [*tmp_path.glob(".*part")]


@pytest.mark.parametrize("number", [2, 10])
def test_layers_beyond_those_of_the_configuration_are_refused(tmp_path, dense, refused, number):
    more = shutil.copytree(dense, tmp_path / "more")
    name = f"model.layers.{number}.mlp.up_proj.weight"
    tensors = load_file(more / "model.safetensors")
    save_file(tensors | {name: torch.zeros(48, 32)}, more / "model.safetensors", metadata={"format": "pt"})
    refused(["convert", more, tmp_path / "out"], f"has a tensor {name}, and its num_hidden_layers is 2")
    fewer = copy_with(dense, tmp_path / "fewer", {"num_hidden_layers": 1, "layer_types": None})
    refused(["convert", fewer, tmp_path / "out"], "a tensor model.layers.1.", "num_hidden_layers is 1; both must agree")
    assert not (tmp_path / "out").exists()


def test_an_output_embedding_that_is_neither_there_nor_tied_is_refused(tmp_path, dense, refused):
    bare = copy_with(dense, tmp_path / "bare", {"tie_word_embeddings": False})
    refused(["convert", bare, tmp_path / "out"], "no tensor lm_head.weight; by its config.json it must have it")
    assert not (tmp_path / "out").exists()


def test_a_device_without_float64_is_refused_for_the_fit(tmp_path, dense, text):
    asked = ConvertSettings(str(dense), str(tmp_path / "out"), 1, "expert", None, [text], 320, 16, "text", 0, "mps")
    with pytest.raises(SettingError, match="device is 'mps'"):
        convert_folder(asked)


def test_two_commands_make_a_dense_checkpoint_sparse(tmp_path, dense, text, capsys):
    argv = ["--top_k", "1", "--calibrate", text, "--calibration_tokens", "320", "--calibration_length", "16"]
    assert main(["convert", str(dense), str(tmp_path / "gqe"), *argv]) == 0
    config = json.loads((tmp_path / "gqe" / "config.json").read_text())
    (tmp_path / "gqe" / "config.json").write_text(json.dumps(config | {"router_z_loss_coef": 0.25}))
    argv = ["distill", "--init", tmp_path / "gqe", "--teacher", dense, "--data", text]
    argv += ["--out", tmp_path / "run", "--device", "cpu", "--dtype", "float32", "--seq_len", 16, "--steps", 6]
    argv += ["--batch_size", 2, "--gradient_accumulation_steps", 1, "--evaluations", 2, "--sparsify_fraction", 0.5]
    argv += ["--router_aux_loss_coef", 0]
    assert main([str(word) for word in argv]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(r"validation loss [\d.]+ \([\d.]+ at the start; the teacher's is [\d.]+\) after ", output)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["arm"] == "converted"
    assert [tokens for tokens, _ in result["validation_curve"]] == [0, 96, 192]
    assert result["teacher_loss"] > 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.model_type == "gqe"
    assert trained.config.active_query_experts == 1
    assert trained.config.router_aux_loss_coef == 0  # as the option says; the other is that of init
    assert trained.config.router_z_loss_coef == 0.25
    assert main(["generate", str(tmp_path / "run" / "model"), "--prompt", "a", "--max_new_tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("given", "aux", "z"),
    [
        ([], 0.5, 0.25),
        (["--router_aux_loss_coef", "0.01"], 0.01, 0.25),
        (["--router-z-loss-coef=0.0"], 0.5, 0.0),
        (["--recipe", "recipe.yaml"], 0.01, 0.25),
        (["--recipe", "recipe.yaml", "--router_z_loss_coef", "0.125"], 0.01, 0.125),
    ],
)
def test_weights_of_the_routers_losses_are_inits_own_unless_the_user_gives_them_be_it_the_default(
    tmp_path, dense, monkeypatch, given, aux, z
):
    """A value in a preset isn't one that the user gives."""
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(dense), "gqe"]) == 0
    copy_with(tmp_path / "gqe", tmp_path / "init", {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25})
    (tmp_path / "recipe.yaml").write_text("router_aux_loss_coef: 0.01\n")
    (tmp_path / "preset.yaml").write_text("router_aux_loss_coef: 0.01\nrouter_z_loss_coef: 0.0\nseq_len: 16\n")
    monkeypatch.setattr("query_experts.common.settings.presets", lambda folder: {"distill": tmp_path / "preset.yaml"})
    parsed = []
    monkeypatch.setattr(distill, "distill", lambda settings, console: parsed.append(settings) or True)
    assert main(["distill", "--init", "init", *given]) == 0
    config = load_start(parsed[0]).model.config
    assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (aux, z)
    sized = with_model_sizes(parsed[0], config)
    assert (sized.router_aux_loss_coef, sized.router_z_loss_coef) == (aux, z)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "x"}, "init is empty; it must be a GQE checkpoint's folder"),
        ({"sparsify_fraction": 0.5}, "init is empty; it must be a GQE checkpoint's folder"),
        ({"init": "nowhere"}, "init is nowhere"),
        ({"init": ""}, "init is empty"),
        ({"init": "GQE", "teacher": None}, "teacher is empty; it must be the dense model's checkpoint, or none"),
        ({"init": "TWO", "active_query_experts": 1}, "active_query_experts is 1, and init brings its own"),
        ({"init": "GQE", "distillation": 0.5}, "distillation is 0.5, which needs teacher"),
        ({"init": "GQE", "arm": "static"}, "arm is 'static', and init brings its own"),
        ({"init": "GQE", "hidden_size": 64}, "hidden_size is 64, and init brings its own"),
        ({"init": "GQE", "tokenizer": "DENSE"}, "tokenizer is"),
        ({"init": "GQE", "seq_len": 32}, "seq_len is 32; it must be at most init's max_position_embeddings, 16"),
        ({"init": "NAN"}, "q_proj.weight holds numbers that aren't finite"),
        ({"init": "GQE", "teacher": "NAN"}, "q_proj.weight holds numbers that aren't finite"),
        ({"init": "GQE", "teacher": "OTHER"}, "whose tokenizer isn't that of init"),
        ({"init": "GQE", "teacher": "no/where/there"}, "teacher is no/where/there, which doesn't exist"),
        ({"init": "GQE", "distillation": 2.0}, "distillation is 2.0; it must be 0 to 1"),
        ({"init": "GQE", "sparsify_fraction": 1.0}, "sparsify_fraction is 1.0; it must be 0 or more and below 1"),
        ({"init": "DENSE"}, "whose model_type is 'llama'; it must be 'gqe'"),
        ({"init": "GQE", "teacher": "SHORT"}, "seq_len is 16; it must be at most teacher's max_position_embeddings, 8"),
    ],
)
def test_training_on_names_what_it_cannot_use(tmp_path, dense, text, refused, changes, words):
    folders = {name: tmp_path / name for name in ("GQE", "TWO", "NAN", "OTHER")} | {"DENSE": dense}
    assert main(["convert", str(dense), str(folders["GQE"]), "--top_k", "1"]) == 0
    assert main(["convert", str(dense), str(folders["TWO"]), "--top_k", "2"]) == 0
    folders["SHORT"] = copy_with(dense, tmp_path / "SHORT", {"max_position_embeddings": 8})
    copy_with_nan(folders["GQE"] if changes.get("init") == "NAN" else dense, folders["NAN"])
    shutil.copytree(dense, folders["OTHER"])
    tokenizer = folders["OTHER"] / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    tokenizer.write_text(json.dumps(content))
    changes = {k: folders.get(v, v) for k, v in changes.items()}
    refused(options("distill", tmp_path / "run", text, **WITHOUT_SIZES | {"teacher": "none"} | changes), words)


def copy_with(checkpoint, folder, config=None, without=None):
    """A copy of a checkpoint with other fields in config.json, or without the tensors whose names end in `without`."""
    shutil.copytree(checkpoint, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | (config or {})))
    if without is not None:
        for path in folder.glob("*.safetensors"):
            kept = {name: t for name, t in load_file(path).items() if not name.endswith(without)}
            save_file(kept, path, metadata={"format": "pt"})
    return folder


DAMAGE = {
    "dtype": ({"config": {"dtype": 3}}, "whose config.json holds dtype 3; it must be a dtype of torch"),
    "float": ({"config": {"torch_dtype": "float99"}}, "holds torch_dtype 'float99'; it must be a dtype of torch"),
    "lacks": ({"without": "layers.1.self_attn.k_proj.weight"}, "lacks 1 weights", "layers.1.self_attn.k_proj.weight"),
    "layers": ({"config": {"num_hidden_layers": 3, "layer_types": None}}, "lacks", "model.layers.2."),
    "shape": ({"config": {"intermediate_size": 49}}, "has shape", "by config.json it must have"),
    "act": ({"config": {"hidden_act": "nonsense"}}, "can't be loaded: KeyError: 'nonsense'"),
    "type": ({"config": {"model_type": "nonesuch"}}, "whose config.json holds model_type 'nonesuch'; it must be one"),
    "width": ({"config": {"hidden_size": "wide"}}, "can't be used: TypeError: Field 'hidden_size' expected int"),
    "heads": ({"config": {"num_key_value_heads": 0}}, "can't be"),
    "gptq": ({"config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, "can't be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_alike_by_every_command_that_loads_one(
    tmp_path, dense, text, refused, damage, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    how, *words = DAMAGE[damage]
    assert main(["convert", str(dense), "whole", "--top_k", "1"]) == 0
    copy_with(tmp_path / "whole", tmp_path / "gqe", **how)
    copy_with(dense, tmp_path / "dense", **how)
    refused(["generate", "gqe"], "checkpoint is gqe", *words)
    refused(options("distill", "run", text, **WITHOUT_SIZES, init="gqe", teacher="none"), "init is gqe", *words)
    refused(options("distill", "run", text, **WITHOUT_SIZES, init="whole", teacher="dense"), "teacher is dense", *words)
    refused(["evaluate", "gqe", "--tasks", "piqa"], "checkpoint is gqe", *words)


def test_a_checkpoint_that_holds_more_than_its_configuration_is_refused(tmp_path, dense, text, refused):
    from_qwen = from_dense(qwen3())
    from_qwen.save_pretrained(tmp_path / "normed")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "normed")
    copy_with(tmp_path / "normed", tmp_path / "gqe", {"qk_norm": False})
    copy_with(dense, tmp_path / "dense", {"num_hidden_layers": 1, "layer_types": None})
    refused(
        ["generate", tmp_path / "gqe"], "which holds model.layers.0.self_attn.k_norm.weight; by config.json it must"
    )
    refused(["evaluate", tmp_path / "dense", "--tasks", "piqa"], "which holds model.layers.1.input_layernorm.weight")


def qwen3():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 300}
    return Qwen3ForCausalLM(Qwen3Config(**size, num_attention_heads=8, num_key_value_heads=2))


def test_no_code_of_a_checkpoint_is_run(tmp_path, dense, text, refused, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert main(["convert", str(dense), str(tmp_path / "gqe"), "--top_k", "1"]) == 0
    ran = tmp_path / "ran"
    for name, source in (("foreign", dense), ("foreign-gqe", tmp_path / "gqe")):
        folder = shutil.copytree(source, tmp_path / name)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
        fields = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "tokenizer_class": "Mine"}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    own = shutil.copytree(dense, tmp_path / "own")
    (own / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    fields = json.loads((own / "config.json").read_text()) | {"model_type": "mine"}
    fields["auto_map"] = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}
    (own / "config.json").write_text(json.dumps(fields))
    foreign, gqe = tmp_path / "foreign", tmp_path / "foreign-gqe"
    refused(["generate", gqe], "whose tokenizer can't be loaded")
    refused(["evaluate", foreign, "--tasks", "piqa"], "whose tokenizer can't be loaded")
    refused(["evaluate", own, "--tasks", "piqa"], "config.json holds model_type 'mine'")
    start = options("distill", tmp_path / "run", text, **WITHOUT_SIZES, init=tmp_path / "gqe", teacher=foreign)
    refused(start, "teacher is", "whose tokenizer can't be loaded")
    refused(options("train", tmp_path / "run", text, tokenizer=foreign), "tokenizer is")
    assert main(["convert", str(foreign), str(tmp_path / "out")]) == 0
    assert not ran.exists()


def test_values_that_no_model_can_have_are_refused(tmp_path, dense, refused):
    out = tmp_path / "out"
    for name, value in {
        "vocab_size": -1, "pad_token_id": 10**6, "max_position_embeddings": 0, "head_dim": 0, "hidden_size": 0,
        "attention_dropout": 1.0,
    }.items():  # fmt: skip
        wrong = copy_with(dense, tmp_path / name, {name: value})
        refused(["convert", wrong, out], f"checkpoint is {wrong}, whose ", f"{name} is {value}; it must be")
    for number, theta in enumerate((0, -1.0, "x", None)):
        turned = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        wrong = copy_with(dense, tmp_path / f"theta{number}", turned)
        refused(["convert", wrong, out], f"{wrong}, whose rope_theta is {theta!r}; it must be a number, 1 or more")
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    for number, (rope, words) in enumerate(
        [
            (longrope, "short_factor has 3 numbers; it must have "),
            (longrope | {"long_factor": None}, "long_factor is None; it must be a list of numbers above 0"),
            ({"rope_type": "linear", "factor": "2"}, "factor is '2'; it must be a number above 0"),
            ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}, "beta_fast is 'x'; it must be a number above 0"),
        ]
    ):
        for field in ("rope_parameters", "rope_scaling"):  # of today and of older checkpoints
            fields = {"rope_parameters": None} | {field: rope | {"rope_theta": 1e4}}
            wrong = copy_with(dense, tmp_path / f"{field}{number}", fields)
            refused(["convert", wrong, out], f"{wrong}, whose {words}")
    refused(["evaluate", tmp_path / "pad_token_id", "--tasks", "piqa"], "which can't be loaded")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        cast = shutil.copytree(dense, tmp_path / str(dtype))
        tensors = load_file(cast / "model.safetensors")
        tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].to(dtype)
        save_file(tensors, cast / "model.safetensors", metadata={"format": "pt"})
        words = f"layers.0.self_attn.q_proj.weight is of {str(dtype).removeprefix('torch.')}; it must be of float16"
        refused(["convert", cast, out], words)
    outside = sharded(dense, tmp_path / "outside")
    index = outside / "model.safetensors.index.json"
    shutil.copy(dense / "model.safetensors", tmp_path / "elsewhere.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    refused(["convert", outside, out], "outside, whose model.safetensors.index.json is damaged")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": str(tmp_path / "elsewhere.safetensors")}}))
    refused(["convert", outside, out], "outside, whose model.safetensors.index.json is damaged")
    (outside / "below").mkdir()
    shutil.copy(dense / "model.safetensors", outside / "below" / "weights.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "below/weights.safetensors"}}))
    assert main(["convert", str(outside), str(tmp_path / "below")]) == 0
    old = copy_with(dense, tmp_path / "old", {"pad_token_id": -1})
    assert main(["convert", str(old), str(tmp_path / "of-old")]) == 0
    torch.testing.assert_close(logits(tmp_path / "of-old"), logits(dense), rtol=0, atol=1e-5)
    for content in ("[1]", "[" * 100_000):
        listed = copy_with(dense, tmp_path / f"listed{len(content)}")
        (listed / "generation_config.json").write_text(content)
        refused(["convert", listed, out], "generation_config.json, which is damaged")
    empty = shutil.copytree(dense, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    (empty / "pytorch_model.bin").write_bytes(b"")
    refused(["evaluate", empty, "--tasks", "piqa"], f"checkpoint is {empty}, which can't be loaded")
    refused(["convert", "", out], "checkpoint is empty")
    refused(["convert", dense / "config.json", out], "config.json, which is a file; it must be a model's folder")


def test_generate_streams_whatever_generation_config_json_asks_for_and_takes_text_alone(
    tmp_path, dense, refused, capsys
):
    asks = {"num_beams": 4, "stop_strings": ["a"], "constraints": [1]}
    gqe = tmp_path / "gqe"
    assert main(["convert", str(dense), str(gqe), "--top_k", "1"]) == 0
    (gqe / "generation_config.json").write_text(json.dumps(asks))
    capsys.readouterr()
    assert main(["generate", str(gqe), "--prompt", "def", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("def")
    assert main(["generate", str(gqe), "--prompt", "def", "--max_new_tokens", "16"]) == 0
    assert "the model was made for 16 (max_position_embeddings)" in capsys.readouterr().err
    assert main(["generate", str(gqe), "--prompt", "def", "--max_new_tokens", "15"]) == 0
    assert "max_position_embeddings" not in capsys.readouterr().err
    refused(["generate", gqe, "--prompt", "a\udcff"], "prompt is 'a\\udcff', which isn't UTF-8")
    tokenizer = AutoTokenizer.from_pretrained(gqe)
    tokenizer.add_tokens([f"new{n}" for n in range(300)])
    tokenizer.save_pretrained(gqe)
    refused(["generate", gqe], "whose tokenizer has", "tokens and whose model")


def copy_with_nan(checkpoint, folder):
    """A copy of a checkpoint with one NaN in a query projection."""
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("layers.0.self_attn.q_proj.weight"):
                tensors[name][0, 0] = math.nan
        save_file(tensors, path, metadata={"format": "pt"})


def test_weights_that_are_not_finite_are_refused_everywhere(tmp_path, dense, text, refused, monkeypatch):
    assert main(["convert", str(dense), str(tmp_path / "gqe"), "--top_k", "1"]) == 0
    copy_with_nan(dense, tmp_path / "dense")
    copy_with_nan(tmp_path / "gqe", tmp_path / "nan")
    calibrated = ["--calibrate", text, "--calibration_tokens", 320, "--calibration_length", 16]
    for flags in ([], calibrated):
        refused(
            ["convert", tmp_path / "dense", tmp_path / "out", *flags], "layers.0.self_attn.q_proj.weight holds numbers"
        )
    refused(["generate", tmp_path / "nan"], "checkpoint is", "q_proj.weight holds numbers that aren't finite")
    monkeypatch.setattr(checkpoints, "VALUES_AT_ONCE", 7)  # whichever part it is in
    assert checkpoints.is_finite(torch.zeros(3, 5))
    assert not any(checkpoints.is_finite(torch.zeros(15).index_fill(0, torch.tensor(n), math.inf)) for n in range(15))
    assert not (tmp_path / "out").exists()


def test_a_frozen_router_that_is_not_finite_is_refused(tmp_path, dense, refused):
    gqe = tmp_path / "gqe"
    assert main(["convert", str(dense), str(gqe), "--top_k", "1"]) == 0
    frozen = copy_with(gqe, tmp_path / "frozen", {"routing": "frozen"})
    path = next(p for p in frozen.glob("*.safetensors") if any("router" in name for name in load_file(p)))
    tensors = load_file(path)
    name = next(name for name in tensors if "router" in name)
    save_file(tensors | {name: tensors[name] * math.nan}, path, metadata={"format": "pt"})
    refused(["generate", frozen], f"checkpoint is {frozen}, whose {name} holds numbers that aren't finite")


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPTNeoXForCausalLM])
def test_layers_that_any_models_configuration_does_not_have_are_refused(tmp_path, kind):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    kind(kind.config_class(num_hidden_layers=4, **sizes)).save_pretrained(tmp_path / "model")
    assert load_teacher(str(tmp_path / "model")).num_parameters()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    count = next(name for name in ("n_layer", "num_hidden_layers") if name in config)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {count: 2}))
    with pytest.raises(SettingError, match=r"which holds \S*\.2\.\S*; by config.json it must not be there"):
        load_teacher(str(tmp_path / "model"))


def test_what_an_error_says_is_cut_but_not_to_nothing():
    assert checkpoints.reason(ValueError("x" * 400)) == "x" * 300 + " ..."
    assert checkpoints.reason(ValueError("a\n  b")) == "a b"


@pytest.mark.full
def test_as_a_process_a_refusal_is_one_line(tmp_path):
    argv = [sys.executable, "-m", "query_experts.cli", "convert", str(tmp_path / "no"), str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("query-experts: checkpoint is ")
    assert done.stderr.count("\n") == 1
