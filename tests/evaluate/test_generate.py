"""`generate` follows what the checkpoint says of generation and tokenizing, or names what it doesn't use."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, TextStreamer

from query_experts.cli import main
from query_experts.evaluate import generate as generation
from query_experts.evaluate.generate import prompt_ids
from query_experts.layers.attention import GQEAttention
from query_experts.ops import kernels

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "model"
LENGTH = 6


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a GQE checkpoint whose JSON files can be changed."""
    folder = shutil.copytree(MODEL, tmp_path / "model")

    def change(name, **fields):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | fields), encoding="utf-8")
        return folder

    return change


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def streamed(monkeypatch):
    """Runs the command; the ids that it printed: those of the prompt, then those that were generated."""

    class Recorder(TextStreamer):
        def put(self, value):
            ids.append(value.flatten().tolist())

    def run(folder, *options, prompt="def "):
        ids.clear()
        argv = ["generate", str(folder), "--prompt", prompt, "--max_new_tokens", str(LENGTH), "--device", "cpu"]
        assert main([*argv, *(options or ("--temperature", "0"))]) == 0
        return ids[0], [token for value in ids[1:] for token in value]

    ids = []
    monkeypatch.setattr(generation, "TextStreamer", Recorder)
    return run


@pytest.mark.parametrize(
    ("file", "as_named"),
    [
        ("generation_config.json", lambda end: [299, end]),
        ("generation_config.json", lambda end: [end, 299]),
        ("generation_config.json", lambda end: end),
        ("config.json", lambda end: [299, end]),
    ],
    ids=["second of two", "first of two", "only one", "in config.json"],
)
def test_a_text_ends_at_every_eos_token_of_the_checkpoint(checkpoint, streamed, file, as_named):
    _, whole = streamed(MODEL)
    assert len(whole) == LENGTH
    _, ended = streamed(checkpoint(file, eos_token_id=as_named(whole[0])))
    assert ended == whole[:1]


def test_a_text_ends_at_the_tokenizers_eos_token_too(checkpoint, streamed, tokenizer):
    _, whole = streamed(MODEL)
    checkpoint("tokenizer_config.json", eos_token=tokenizer.convert_ids_to_tokens(whole[0]))
    assert streamed(checkpoint("generation_config.json", eos_token_id=[299]))[1] == whole[:1]


def test_the_checkpoints_limits_of_what_may_come_are_followed(checkpoint, streamed, tokenizer, capsys):
    _, whole = streamed(MODEL)
    assert streamed(checkpoint("generation_config.json", top_k=1), "--temperature", "9")[1] == whole
    assert whole[0] not in streamed(checkpoint("generation_config.json", suppress_tokens=[whole[0]]))[1]
    folder = checkpoint("generation_config.json", suppress_tokens=None, stop_strings=[tokenizer.decode(whole[:1])])
    assert streamed(folder)[1] == whole[:1]
    assert "doesn't use" not in capsys.readouterr().err


def test_what_the_command_does_not_use_is_named(checkpoint, streamed, capsys):
    folder = checkpoint("generation_config.json", num_beams=4, constraints=[1], max_length=1, do_sample=True)
    assert len(streamed(folder)[1]) == LENGTH
    error = capsys.readouterr().err
    assert "generation_config.json sets constraints, num_beams, which this command doesn't use" in error


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eos_token_id": "x"}, "whose eos_token_id is 'x'; it must be an id or a list of ids"),
        ({"eos_token_id": [1, 2.5]}, "whose eos_token_id is [1, 2.5]; it must be"),
        ({"eos_token_id": True}, "whose eos_token_id is True; it must be"),
        ({"eos_token_id": -1}, "whose eos_token_id is -1; it must be"),
        (
            {"eos_token_id": [0, 300]},
            "whose eos_token_id is [0, 300]; it must be an id or a list of ids, from 0 to 299",
        ),
        ({"suppress_tokens": [1, 300]}, "in suppress_tokens: it is [1, 300]; it must hold ids from 0 to 299"),
        ({"begin_suppress_tokens": [-1]}, "in begin_suppress_tokens: it is [-1]; it must"),
        ({"forced_eos_token_id": 300}, "in forced_eos_token_id: it is 300; it must"),
        ({"min_new_tokens": -1}, "in min_new_tokens: it is -1; it must be a number of tokens, 0 or more"),
        ({"min_length": True}, "in min_length: it is True; it must be"),
        ({"top_p": -1}, "generation_config.json holds what can't be used in top_p: "),
        ({"suppress_tokens": ["a"]}, "generation_config.json holds what can't be used in suppress_tokens: "),
        ({"bad_words_ids": 3}, "generation_config.json holds what can't be used in bad_words_ids: "),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(checkpoint, refused, fields, words):
    folder = checkpoint("generation_config.json", **fields)
    refused(["generate", folder, "--device", "cpu", "--max_new_tokens", 2], f"checkpoint is {folder}", words)


@pytest.mark.parametrize(
    "fields", [{"top_p": -1}, {"bad_words_ids": [[300]]}, {"forced_eos_token_id": "x"}, {"repetition_penalty": "a"}],
    ids=str,
)  # fmt: skip
def test_nothing_is_printed_before_a_refusal(checkpoint, capsys, fields):
    folder = checkpoint("generation_config.json", **fields)
    assert main(["generate", str(folder), "--device", "cpu", "--max_new_tokens", "2"]) == 2
    assert capsys.readouterr().out == ""


def test_a_penalty_on_length_is_refused_where_no_token_ends_a_text(checkpoint, refused):
    checkpoint("tokenizer_config.json", eos_token=None)
    checkpoint("config.json", eos_token_id=None)
    folder = checkpoint("generation_config.json", eos_token_id=None, exponential_decay_length_penalty=[1, 2.0])
    argv = ["generate", folder, "--device", "cpu", "--max_new_tokens", 2]
    refused(argv, "in exponential_decay_length_penalty: it needs an eos token")


@pytest.mark.parametrize("fields", [{"min_new_tokens": 3}, {"min_length": 4}, {"min_new_tokens": 3, "min_length": 1}])
def test_the_checkpoints_fewest_tokens_come(checkpoint, streamed, capsys, fields):
    prompt, whole = streamed(MODEL)
    fields = {name: value + (len(prompt) - 1 if name == "min_length" else 0) for name, value in fields.items()}
    folder = checkpoint("generation_config.json", eos_token_id=whole[0])
    assert streamed(folder)[1] == whole[:1]
    capsys.readouterr()
    assert len(streamed(checkpoint("generation_config.json", **fields))[1]) >= 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("field", ["min_new_tokens", "min_length"])
def test_more_tokens_than_the_command_makes_are_noted(checkpoint, streamed, capsys, field):
    assert len(streamed(checkpoint("generation_config.json", **{field: 900}))[1]) == LENGTH
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("query-experts: ")] == lines
    assert f"new tokens or more; the text ends after {LENGTH} (max_new_tokens)" in lines[-1]


@pytest.mark.parametrize(
    "content", [b'{"eos_token_id": [1', b"\xff", b"[" * 100_000, b"[1]"], ids=lambda text: str(text[:9])
)
def test_generation_settings_that_are_damaged_are_refused(checkpoint, refused, content):
    folder = checkpoint("config.json")
    (folder / "generation_config.json").write_bytes(content)
    refused(["generate", folder], f"checkpoint is {folder}, whose generation_config.json ")


# what the tokenizer makes of the prompt


@pytest.mark.parametrize("prompt", ["", "\N{SOFT HYPHEN}"])
def test_a_prompt_that_is_no_token_begins_with_the_bos_token(checkpoint, streamed, prompt):
    normalizer = {"type": "Replace", "pattern": {"String": "\N{SOFT HYPHEN}"}, "content": ""}
    assert streamed(checkpoint("tokenizer.json", normalizer=normalizer), prompt=prompt)[0] == [0]


@pytest.mark.parametrize("prompt", ["", "\N{SOFT HYPHEN}"])
def test_a_prompt_that_is_no_token_is_refused_without_a_bos_token(checkpoint, refused, prompt):
    checkpoint("tokenizer_config.json", bos_token=None)
    normalizer = {"type": "Replace", "pattern": {"String": "\N{SOFT HYPHEN}"}, "content": ""}
    folder = checkpoint("tokenizer.json", normalizer=normalizer)
    refused(["generate", folder, "--prompt", prompt], f"prompt is {prompt!r}, of which", "no bos_token")
    assert prompt_ids("", AutoTokenizer.from_pretrained(folder), 7) == [7]


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_goes_on_though_it_would_end_it(tokenizer):
    changed = AutoTokenizer.from_pretrained(MODEL)
    changed.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = tokenizer("def x").input_ids
    assert changed("DEF X").input_ids == [0, *plain, 0]
    assert prompt_ids("DEF X", changed, None) == [0, *plain]
    assert prompt_ids("", changed, None) == [0]


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_text_is_computed_by_the_kernels_that_were_asked_for(checkpoint, streamed, monkeypatch, name):
    kinds, original = set(), GQEAttention.route_and_attend

    def spy(self, *args, **kwargs):
        kinds.add(self.kernels)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GQEAttention, "route_and_attend", spy)
    streamed(checkpoint("config.json"), "--temperature", "0", "--kernels", name)
    assert kinds == {name}


def test_kernels_that_cannot_run_are_refused(checkpoint, refused, monkeypatch):
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    argv = ["generate", checkpoint("config.json"), "--device", "cpu", "--kernels", "triton"]
    refused(argv, "kernels is 'triton', which needs an NVIDIA GPU, where the device is cpu; it must be torch or auto")
