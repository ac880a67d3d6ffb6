"""Training on a folder of tokens: its own tokenizer and limits count, and settings that ask for others are refused."""

import json
import shutil
from pathlib import Path

import pytest

from query_experts.cli import main
from study_helpers import options, write_text

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A folder of tokens whose tokenizer was trained on its text, 20,000 bytes of it."""
    folder = tmp_path_factory.mktemp("tokens")
    text = write_text(folder / "text.txt")
    argv = ["data", "prepare", text, "--vocab_size", "300", "--max_bytes", "20000", "--out", str(folder / "T")]
    assert main([*argv, "--workers", "1"]) == 0
    return folder / "T"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tokenizer": FIXTURES / "dense"},
            "data is a folder of tokens that another tokenizer made, 'trained'; it must be text",
        ),
        ({"max_bytes": 10_000}, "max_bytes is 10000, but data is a folder of tokens, made with 20000"),
        ({"text_field": "body"}, "text_field is 'body', but data is a folder of tokens, made with 'text'"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_settings_that_ask_for_other_tokens_are_refused(tmp_path, tokens, refused, command, changes, words):
    refused(options(command, tmp_path / "out", tokens, **changes), words)
    assert not (tmp_path / "out").exists()


def test_settings_that_the_tokens_were_made_with_are_taken(tmp_path, tokens):
    own = {"tokenizer": tokens / "tokenizer", "max_bytes": 20_000, "text_field": "text"}
    assert main(options("train", tmp_path / "out", tokens, **own)) == 0
    assert main(options("train", tmp_path / "all", tokens, max_bytes="none")) == 0
    losses = [json.loads((tmp_path / name / "result.json").read_text())["validation_loss"] for name in ("out", "all")]
    assert losses[0] == losses[1]


def test_a_run_that_has_begun_goes_on_whatever_its_settings_say_of_the_same_tokens(tmp_path, tokens, capsys):
    """Earlier versions trained with settings that the tokens weren't made with, and text may give way to its tokens."""
    text = write_text(tmp_path / "text.txt")
    begun = options("train", tmp_path / "out", text, steps=4, max_bytes=20_001, stop_after_minutes=0)
    assert main(begun) == 1
    (made,) = (tmp_path / "out" / "cache").glob("corpus-*")
    meta = json.loads((made / "meta.json").read_text())
    meta["info"]["max_bytes"] = None
    (made / "meta.json").write_text(json.dumps(meta))
    made.rename(tmp_path / "T")
    goes_on = options("train", tmp_path / "out", tmp_path / "T", steps=4, max_bytes=20_001)
    assert main(goes_on) == 0
    assert main(options("train", tmp_path / "new", tmp_path / "T", max_bytes=20_001)) == 2
    assert "but data is a folder of tokens, made with all of the text; it must be left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine", "trained"])
def test_a_tokenizer_is_compared_and_not_its_name(tmp_path, tokens, monkeypatch, refused, name):
    made, other = tmp_path / "made", tmp_path / "other"
    shutil.copytree(tokens / "tokenizer", made / name)
    shutil.copytree(FIXTURES / "dense", other / name)
    text = write_text(tmp_path / "text.txt")
    monkeypatch.chdir(made)
    assert main(["data", "prepare", text, "--tokenizer", name, "--out", str(tmp_path / "T"), "--workers", "1"]) == 0
    monkeypatch.chdir(other)
    refused(options("train", tmp_path / "out", tmp_path / "T", tokenizer=name), "that another tokenizer made")
    monkeypatch.chdir(made)
    assert main(options("train", tmp_path / "out", tmp_path / "T", tokenizer=name)) == 0


def test_distill_refuses_tokens_of_another_tokenizer(tmp_path, tokens, refused):
    argv = ["distill", "--init", FIXTURES / "converted", "--teacher", FIXTURES / "dense", "--data", tokens]
    argv += ["--seq_len", 16, "--steps", 2, "--batch_size", 2, "--device", "cpu", "--out", tmp_path / "out"]
    refused(argv, f"init is {FIXTURES / 'converted'}, but data is a folder of tokens that another tokenizer made")
    text = write_text(tmp_path / "text.txt")
    made = ["data", "prepare", text, "--tokenizer", str(FIXTURES / "converted"), "--out", str(tmp_path / "T")]
    assert main([*made, "--workers", "1"]) == 0
    argv[argv.index(tokens)] = tmp_path / "T"
    assert main([str(word) for word in argv]) == 0
    refused([*argv[:-1], tmp_path / "other", "--max_bytes", "7"], "max_bytes is 7, but data is a folder of tokens")


def test_a_folder_of_tokens_stands_alone(tmp_path, tokens, refused):
    text = write_text(tmp_path / "text.txt")
    alone = f"data holds '{tokens}', which is a folder of tokens; it must be the only entry"
    for entries in ([tokens, text], [text, tokens], [tokens, tokens]):
        refused(options("train", tmp_path / "out", entries), alone)
    held_out = f"validation holds '{tokens}', which is a folder of tokens already; it must be text"
    refused(options("train", tmp_path / "out", text, validation=tokens), held_out)
    argv = ["convert", FIXTURES / "dense", tmp_path / "gqe", "--top_k", "1", "--calibrate", tokens]
    refused(argv, f"'{tokens}', which is a folder of tokens already; it must be text")
