"""Validation files in `train`, `compare` and `distill`: losses on each, bits per byte, and folders that go on."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from query_experts.cli import main
from query_experts.common.errors import SettingError
from query_experts.data import ValidationPart, prepare
from query_experts.study import measure
from query_experts.study.compare import compare, open_corpus
from query_experts.study.measure import bits_per_byte, losses_by_part, validation_split
from query_experts.study.results import PartLoss, read_comparison, read_result
from query_experts.study.single import train
from study_helpers import model_of, options, quiet, said, tiny_compare, tiny_train, write_text

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Two validation files of unequal length."""
    return [write_text(tmp_path / "valid" / f"{name}.txt", lines, lines) for name, lines in (("a", 30), ("b", 7))]


def weighted_mean(losses: list[PartLoss]) -> float:
    return sum(part.loss * part.predicted_tokens for part in losses) / sum(part.predicted_tokens for part in losses)


def test_the_loss_on_each_file_and_bits_per_byte_are_in_the_result(tmp_path, files):
    settings = tiny_train(tmp_path, validation=files, validation_sequences=None)
    console = quiet()
    assert train(settings, console)
    corpus = open_corpus(settings, tmp_path / "out", quiet())
    parts = {part.name: part for part in corpus.validation_parts}
    said_files = ", ".join(f"{name} {part.tokens:,}" for name, part in parts.items())
    assert f"held out (validation files: {said_files})" in " ".join(said(console).split())
    result = read_result(tmp_path / "out" / "result.json")
    assert [loss.name for loss in result.validation_parts] == ["a", "b"]
    for loss in result.validation_parts:
        part = parts[loss.name]
        assert loss.predicted_tokens == part.sequences * 15
        assert loss.bits_per_byte == pytest.approx(loss.loss * part.tokens / part.text_bytes / math.log(2))
    assert result.validation_loss == pytest.approx(weighted_mean(result.validation_parts), abs=1e-5)
    assert abs(result.validation_parts[0].loss - result.validation_parts[1].loss) > 1e-4
    facts = corpus.facts
    share = facts.validation_tokens / facts.validation_bytes
    assert result.bits_per_byte == pytest.approx(result.validation_loss * share / math.log(2))


def test_the_load_is_that_on_every_file(tmp_path, files, monkeypatch):
    seen = []
    real = measure.routing_load
    monkeypatch.setattr(measure, "routing_load", lambda model, split: seen.extend(split.indices) or real(model, split))
    settings = tiny_train(tmp_path, validation=files, validation_sequences=None, steps=2)
    assert train(settings, quiet())
    a, b = open_corpus(settings, tmp_path / "out", quiet()).validation_parts
    assert len(seen) == measure.ROUTING_SEQUENCES < a.sequences
    assert a.sequences / b.sequences == pytest.approx(
        sum(i < a.sequences for i in seen) / sum(i >= a.sequences for i in seen), rel=0.5
    )


def test_without_validation_files_a_result_has_bits_per_byte_and_no_parts(tmp_path):
    settings = tiny_train(tmp_path)
    assert train(settings, quiet())
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "validation_parts" not in written
    facts = open_corpus(settings, tmp_path / "out", quiet()).facts
    expected = written["validation_loss"] * facts.validation_tokens / facts.validation_bytes / math.log(2)
    assert written["bits_per_byte"] == pytest.approx(expected)
    assert losses_by_part(None, open_corpus(settings, tmp_path / "out", quiet()), settings) == []


def test_bits_per_byte_are_what_a_model_that_knows_nothing_has_by_hand(tmp_path):
    """A vocabulary of bytes: 99 bytes and the end of text are 100 tokens, of 9 bits each in a vocabulary of 512."""
    write_text(tmp_path / "train.txt")
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name, size in zip(names, (99, 24), strict=True):
        Path(name).write_text("x" * size)
    corpus = prepare(
        [str(tmp_path / "train.txt")], cache_dir=tmp_path, seq_len=10, vocab_size=257, validation=names, progress=False
    )
    config = LlamaConfig(vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    settings = tiny_train(tmp_path, seq_len=10, validation_sequences=None, batch_size=3)
    a, b = losses_by_part(model, corpus, settings)
    assert (a.name, a.predicted_tokens, b.name, b.predicted_tokens) == ("a", 90, "b", 18)
    assert [a.loss, b.loss] == pytest.approx([9 * math.log(2)] * 2, rel=1e-6)
    assert a.bits_per_byte == pytest.approx(9 * 100 / 99, rel=1e-6)
    assert b.bits_per_byte == pytest.approx(9 * 25 / 24, rel=1e-6)
    assert bits_per_byte(math.log(256), tokens=3, text_bytes=2) == pytest.approx(12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_over_the_files_is_the_loss_over_all_whatever_the_batches(tmp_path, files, dtype):
    settings = tiny_train(tmp_path, validation=files, validation_sequences=9, batch_size=4, dtype=dtype)
    corpus, model = open_corpus(settings, tmp_path / "out", quiet()), model_of("gqe")
    seen = []
    model.register_forward_hook(lambda model, inputs, outputs: seen.append(outputs.logits.dtype))
    losses = losses_by_part(model, corpus, settings)
    assert len(seen) == sum(math.ceil(loss.predicted_tokens / 15 / 4) for loss in losses)
    assert {*seen} == {getattr(torch, dtype)}
    split = validation_split(settings, corpus)
    assert sum(loss.predicted_tokens for loss in losses) == len(split) * 15
    whole = measure.loss_of(model, split, settings)
    assert weighted_mean(losses) == pytest.approx(whole, rel=1e-6 if dtype == "float32" else 1e-2)


def chosen(sizes: list[int], asked: int | None) -> list[int]:
    """The positions of the sequences that validation takes, with parts of these sizes."""
    parts = [ValidationPart(str(i), sum(sizes[:i]), size, 99, 99) for i, size in enumerate(sizes)]
    corpus = SimpleNamespace(validation=range(sum(sizes)), validation_parts=parts)
    return validation_split(SimpleNamespace(validation_sequences=asked), corpus).indices


def test_validation_sequences_are_spread_evenly_with_at_least_one_of_each_file():
    assert chosen([50, 50], 4) == [0, 25, 50, 75]
    assert chosen([90, 3, 7], 2) == [0, 50, 90, 93]
    assert chosen([1, 1, 98], 2) == [0, 1, 50]
    assert chosen([3, 4], None) == chosen([3, 4], 7) == chosen([3, 4], 99) == [*range(7)]


def test_none_takes_all_sequences_of_a_split_by_hash_too(tmp_path):
    settings = tiny_train(tmp_path, validation_sequences=None, steps=2)
    console = quiet()
    corpus = open_corpus(settings, tmp_path / "out", console)
    assert len(validation_split(settings, corpus)) == len(corpus.validation)
    assert "validation_sequences" not in said(console)


def test_a_comparison_holds_the_files_and_its_page_names_them(tmp_path, files):
    assert compare(tiny_compare(tmp_path, validation=[str(tmp_path / "valid")], arms=["gqe"]), quiet())
    comparison = read_comparison(tmp_path / "out")
    assert comparison.settings.validation == [str(tmp_path / "valid")]
    assert [(file.name, file.documents) for file in comparison.data.validation_files] == [("a", 1), ("b", 1)]
    assert sum(file.tokens for file in comparison.data.validation_files) == comparison.data.validation_tokens
    assert [loss.name for loss in comparison.runs[0].validation_parts] == ["a", "b"]
    page = re.sub(r"<[^>]+>", " ", (tmp_path / "out" / "report.html").read_text())
    assert re.search(r"validation files\s+name: a, documents: 1, tokens: [\d,]+, bytes: [\d,]+, name: b, ", page)


@pytest.mark.full
def test_a_run_goes_on_with_its_files_and_with_the_folder_of_tokens_instead(tmp_path, files):
    settings = {"validation": files, "validation_sequences": None}
    assert train(tiny_train(tmp_path, out=str(tmp_path / "whole"), **settings), quiet())
    assert not train(tiny_train(tmp_path, stop_after_minutes=0, **settings), quiet())
    (made,) = (tmp_path / "out" / "cache").iterdir()
    folder = shutil.move(made, tmp_path / "carried")
    shutil.rmtree(tmp_path / "valid")
    tokens = {"data": [str(folder)], "validation_sequences": None}
    while not train(tiny_train(tmp_path, stop_after_minutes=0, **tokens), quiet()):
        pass
    whole, parts = (read_result(tmp_path / name / "result.json") for name in ("whole", "out"))
    assert parts.validation_parts == whole.validation_parts
    assert parts.bits_per_byte == whole.bits_per_byte


def test_other_validation_files_are_refused_where_there_are_results(tmp_path, files):
    assert train(tiny_train(tmp_path, validation=files, steps=2), quiet())
    with pytest.raises(SettingError, match=r"data or validation holds other text, whose tokens' hash was [0-9a-f]{12}"):
        train(tiny_train(tmp_path, validation=files[:1], steps=2), quiet())
    with pytest.raises(SettingError, match="data or validation holds other text"):
        train(tiny_train(tmp_path, steps=2), quiet())
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert "validation" not in settings


def test_a_run_that_diverges_has_no_losses_on_files(tmp_path, files):
    with pytest.raises(SettingError, match="diverged after"):
        train(tiny_train(tmp_path, validation=files, learning_rate=1e30), quiet())
    result = read_result(tmp_path / "out" / "result.json")
    assert result.diverged
    assert result.bits_per_byte is result.validation_parts is None


def test_the_command_takes_files_and_none_for_all_sequences(tmp_path, files, refused):
    text = write_text(tmp_path / "text.txt")
    changes = {"validation": files, "validation_sequences": "none"}
    assert main(options("train", tmp_path / "out", text, **changes)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [part["name"] for part in result["validation_parts"]] == ["a", "b"]
    assert [*result["validation_parts"][0]] == ["name", "loss", "bits_per_byte", "predicted_tokens"]
    refused(options("train", tmp_path / "new", text, validation=[text]), "shares 1 document with data")


def test_distill_measures_the_files_with_the_tokenizer_of_its_model(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path / "fixtures")
    write_text(Path("a.txt"), 20, 3)
    argv = ["distill", "--init", "converted", "--teacher", "dense", "--data", "text.txt", "--validation", "a.txt",
            "--device", "cpu", "--dtype", "float32", "--seq_len", "16", "--steps", "2", "--batch_size", "2",
            "--evaluations", "1", "--validation_sequences", "none", "--out", "new"]  # fmt: skip
    assert main(argv) == 0
    result = read_result(Path("new/result.json"))
    (part,) = result.validation_parts
    assert part.loss == pytest.approx(result.validation_loss, abs=1e-5)
    assert part.bits_per_byte == pytest.approx(result.bits_per_byte, abs=1e-4)
