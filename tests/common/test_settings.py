"""Settings: what each kind of field refuses, where recipes go, and what works without the packages of the extras."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from query_experts.bench.settings import BenchSettings
from query_experts.common.device import check_device, resolve_device
from query_experts.common.errors import SettingError
from query_experts.common.fields import (
    Bounds,
    Count,
    Counts,
    Distinct,
    NotEmpty,
    Seed,
    Settings,
    option,
    required_option,
)
from query_experts.common.settings import parse_settings, read_recipe, validate
from query_experts.convert.settings import ConvertSettings
from query_experts.evaluate.settings import EvaluateSettings, GenerateSettings
from query_experts.model.arms import ModelSize
from query_experts.study.settings import CompareSettings, DistillSettings, TrainSettings
from study_helpers import TINY

SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass
class Example(Settings):
    tasks: list[str] = required_option("tasks", "tasks")
    count: Count = option(3, "count", "model")
    limit: Count | None = option(None, "limit", "model")
    rate: Annotated[float, Bounds(above=0)] = option(0.5, "rate", "training")
    weight: Annotated[float, Bounds(least=0)] = option(0.5, "weight", "training")
    share: Annotated[float, Bounds(least=0, below=1)] = option(0.5, "share", "training")
    seed: Seed = option(0, "seed", "training")
    word: Literal["a", "b", "c"] = option("a", "word", "model")
    maybe: Literal["a", "b"] | None = option(None, "maybe", "model")
    words: Annotated[list[Literal["a", "b"]], Distinct(("a", "b"))] = option(["a"], "words", "model")
    lengths: Counts = option([1, 2], "lengths", "model")
    seeds: Annotated[list[Seed], Distinct()] = option([0], "seeds", "training")
    flag: bool = option(True, "flag", "model")
    text: str = option("", "text", "data")
    out: Annotated[str, NotEmpty("be a folder")] = option("runs", "out", "output")
    router: str | None = option(None, "router", "model", none_is_a_word=True)


def parse(*argv):
    return parse_settings(Example, ["--tasks", "x", *argv], prog="example", about="")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 0}, "count is 0; it must be 1 or more"),
        ({"count": 2.5}, "count is 2.5; it must be a whole number"),
        ({"count": "3"}, "count is '3'; it must be a whole number"),
        ({"count": True}, "count is True; it must be a whole number"),
        ({"count": None}, "count is None; it must be a whole number"),
        ({"limit": 0}, "limit is 0; it must be 1 or more"),
        ({"limit": "many"}, "limit is 'many'; it must be a whole number or none"),
        ({"rate": 0.0}, "rate is 0.0; it must be a number above 0"),
        ({"rate": float("inf")}, "rate is inf; it must be a number above 0"),
        ({"rate": "fast"}, "rate is 'fast'; it must be a number"),
        ({"weight": float("nan")}, "weight is nan; it must be a number, 0 or more"),
        ({"share": 1}, "share is 1; it must be 0 or more and below 1"),
        ({"seed": -1}, "seed holds -1; a seed must be 0 to 4294967295"),
        ({"seed": 2**32}, "seed holds 4294967296; a seed must be 0 to 4294967295"),
        ({"word": "d"}, "word is 'd'; it must be a, b or c"),
        ({"maybe": "d"}, "maybe is 'd'; it must be a, b or none"),
        ({"words": ["a", "d"]}, "words holds 'd'; allowed are a, b"),
        ({"words": []}, "words is empty; it must hold one or more of a, b"),
        ({"words": ["a", "a"]}, "words holds ['a', 'a']; it must hold each once"),
        ({"words": "a"}, "words is 'a'; it must be a list"),
        ({"lengths": [4, 0]}, "lengths holds [4, 0]; it must hold numbers of 1 or more"),
        ({"lengths": [4, "8"]}, "lengths holds '8'; each entry must be a whole number"),
        ({"lengths": [4, 4]}, "lengths holds [4, 4]; it must hold each number once"),
        ({"lengths": []}, "lengths holds []; it must hold one or more, each once"),
        ({"seeds": [0, -1]}, "seeds holds -1; a seed must be 0 to 4294967295"),
        ({"flag": "no"}, "flag is 'no'; it must be True or False"),
        ({"text": 3}, "text is 3; it must be text"),
        ({"out": ""}, "out is empty; it must be a folder"),
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_named_with_what_it_held_and_what_is_allowed(changes, sentence):
    with pytest.raises(SettingError, match=f"^{re.escape(sentence)}$"):
        validate(Example(["x"], **changes))


@pytest.mark.parametrize("name", ["out", "cache_dir"])
def test_a_folder_to_write_to_whose_name_is_not_utf8_is_refused_before_the_work(name):
    with pytest.raises(SettingError, match=rf"{name} is 'r\\udcff', which isn't UTF-8"):
        TrainSettings(**{name: "r\udcff"}).check()


def test_what_fits_is_left_as_it_is():
    settings = Example(["x"], count=1, limit=None, rate=3, seeds=[2**32 - 1], maybe=None)
    before = vars(settings).copy()
    validate(settings)
    assert vars(settings) == before


@pytest.mark.parametrize("kind", [CompareSettings, TrainSettings, BenchSettings])
def test_settings_that_are_built_by_hand_are_checked_as_those_of_the_command(kind):
    with pytest.raises(SettingError, match=r"^num_hidden_layers is 1\.5; it must be a whole number$"):
        kind(num_hidden_layers=1.5).check()
    with pytest.raises(SettingError, match=r"^out is 3; it must be text$"):
        kind(out=3).check()
    with pytest.raises(SettingError, match=r"^device is 'tpu'; it must be auto, cpu, cuda or mps$"):
        kind(device="tpu").check()


@pytest.mark.parametrize("kind", [CompareSettings, TrainSettings, DistillSettings, BenchSettings])
def test_the_sizes_of_every_command_are_those_that_the_arms_declare(kind):
    declared = {f.name: f for f in fields(ModelSize)}
    own = [f for f in fields(kind) if f.name in declared]
    assert len(own) >= 8
    for field in own:
        assert field.type == declared[field.name].type, field.name
        if not field.name.startswith("router"):
            assert field.metadata == declared[field.name].metadata


@pytest.mark.parametrize(
    "settings",
    [
        CompareSettings(), TrainSettings(), DistillSettings(), BenchSettings(), ConvertSettings("a", "b"),
        EvaluateSettings("a", ["b"]), GenerateSettings("a"),
    ],
    ids=lambda settings: type(settings).__name__,
)  # fmt: skip
def test_the_device_is_resolved_when_settings_are_built_and_is_no_field(settings):
    assert settings.device == "auto"
    assert settings.torch_device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "torch_device" not in {f.name for f in fields(settings)}


def test_settings_of_another_machine_can_be_built_and_not_used():
    assert BenchSettings(device="mps").torch_device == resolve_device("mps") == "mps"
    if not torch.backends.mps.is_available():
        with pytest.raises(
            SettingError, match="device is 'mps', which is not there; on this machine it must be auto, cpu"
        ):
            check_device("mps")


# options


def test_options_have_the_types_of_their_fields():
    settings = parse("--lengths", "4", "5", "--rate", "1e-3", "--maybe", "b", "--no_flag", "--limit", "2")
    assert (settings.lengths, settings.rate, settings.maybe, settings.flag) == ([4, 5], 1e-3, "b", False)
    assert settings.limit == 2
    assert parse("--limit", "2", "--limit", "none").limit is None
    assert parse("--maybe=none").maybe is None
    assert parse("--router", "none").router == "none"
    assert parse("--text", "none").text == "none"


def test_an_option_that_is_missing_or_of_another_type_is_refused_with_a_pointer_to_the_help():
    pointer = "; example --help lists what is allowed$"
    with pytest.raises(SettingError, match=f"^the following arguments are required: --tasks{pointer}"):
        parse_settings(Example, [], prog="example", about="")
    with pytest.raises(SettingError, match=f"^argument --limit: invalid int value: 'many'{pointer}"):
        parse("--limit", "many")
    with pytest.raises(SettingError, match=f"^unrecognized arguments: --lim 3{pointer}"):
        parse("--lim", "3")


@pytest.fixture
def of_recipe(tmp_path):
    """The settings of `compare` with a recipe."""

    def settings(text, *argv):
        (tmp_path / "recipe.yaml").write_text(text)
        return parse_settings(
            CompareSettings, ["--recipe", str(tmp_path / "recipe.yaml"), *argv], prog="compare", about="",
            folder="recipes", preset="demo",
        )  # fmt: skip

    return settings


def test_values_of_a_recipe_have_the_types_of_their_options(of_recipe):
    settings = of_recipe("learning_rate: 1e-3\nweight_decay: 1\ndata: one.txt\nseeds: [3]\nmax_bytes: null\nout: 5\n")
    assert (settings.learning_rate, settings.weight_decay) == (1e-3, 1.0)
    assert isinstance(settings.weight_decay, float)
    assert (settings.data, settings.seeds, settings.max_bytes, settings.out) == (["one.txt"], [3], None, "5")
    assert of_recipe("tie_word_embeddings: false\n").tie_word_embeddings is False
    assert of_recipe("tie_word_embeddings: false\n", "--tie_word_embeddings").tie_word_embeddings is True


def test_a_value_of_a_recipe_may_begin_with_a_hyphen(of_recipe):
    settings = of_recipe("out: --folder\ndata: [-one.txt, --two]\n")
    assert (settings.out, settings.data) == ("--folder", ["-one.txt", "--two"])


def test_a_preset_of_a_command_line_is_a_default_that_the_next_does_not_have(of_recipe):
    assert of_recipe("seeds: [7]\n").seeds == [7]
    assert CompareSettings().seeds == [0, 1]
    assert of_recipe("steps: 3\n").seeds == [0, 1, 2]


@pytest.mark.parametrize(
    "content",
    [
        b"steps: 1\nsteps: 2\n", b"steps: " + b"9" * 5000, b"out: 2026-13-01\n", b"steps: [" + b"[" * 1000, b"a: \0",
        "steps: 1\n".encode("utf-16"), b"out: \xe9\n", b"steps: [1",
    ],
    ids=lambda content: str(content[:20]),
)  # fmt: skip
def test_a_recipe_that_is_no_yaml_is_named(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(SettingError, match=r"recipe is .*recipe\.yaml, which can't be read as YAML: "):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfsteps: 1\r\nout: x\r\n")
    assert read_recipe(tmp_path / "recipe.yaml") == {"steps": 1, "out": "x"}


@pytest.mark.parametrize("text", ["steps: {a: 1}\n", "data: {a: 1}\n", "steps: [1]\n"])
def test_a_value_of_a_recipe_that_is_no_value_is_refused(of_recipe, text):
    with pytest.raises(SettingError, match="it must be one value"):
        of_recipe(text)


# without the packages of the extras

BLOCKED = (
    "pydantic",
    "pydantic_core",
    "rich",
    "accelerate",
    "matplotlib",
    "jinja2",
    "scipy",
    "datasets",
    "lm_eval",
    "sklearn",
)  # sklearn needs scipy, and Transformers imports it where it is there
HIDE = """
import importlib.machinery, sys
class WithoutSome(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else super().find_spec(name, path, target)
sys.meta_path = [WithoutSome if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""
USE = """
import torch
import query_experts
import query_experts.bench.correctness
import query_experts.common.timing
from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings
from query_experts.convert import from_dense
from query_experts.data import prepare
from query_experts.evaluate.settings import GenerateSettings
from query_experts.model.arms import ARMS

layer = query_experts.GQEAttention(32, 4, 2, rope_theta=1e4)
layer(torch.randn(1, 5, 32)).sum().backward()
settings = BenchSettings(device="cpu", dtype="float32", hidden_size=32, head_dim=8, num_attention_heads=4,
                         num_key_value_heads=2, lengths=[8], suites=["prefill"])
settings.check()
assert Layer(settings, "gqe", "cpu", 8).prefill(1, 8)().shape == (1, 8, 32)
GenerateSettings("folder").check()
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4)
assert from_dense(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))).num_parameters()
print(sorted(name for name in BLOCKED if name in sys.modules))
"""


@pytest.mark.full
def test_the_library_and_the_benchmark_need_no_package_of_an_extra():
    done = subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {BLOCKED!r}\n{HIDE}\n{USE}"],
        env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.full
def test_the_benchmark_runs_without_pydantic(tmp_path):
    argv = ["bench", "--preset", "tiny", "--suites", "prefill", "--lengths", "8", "--out", str(tmp_path)]
    run = f"from query_experts.cli import main\nsys.exit(main({argv!r}))"
    done = subprocess.run(
        [sys.executable, "-c", f"BLOCKED = 'pydantic', 'pydantic_core'\n{HIDE}\n{run}"],
        env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bench.json").exists()


def test_what_tests_call_tiny_is_allowed():
    CompareSettings(**TINY).check()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["generate", "x", "--seed", "-1"], "seed holds -1; a seed must be 0 to"),
        (["generate", "x", "--max_new_tokens", "0"], "max_new_tokens is 0; it must be 1 or more"),
        (["bench", "--suites", "foo"], "suites holds 'foo'; allowed are"),
        (["bench", "--repeats", "0"], "repeats is 0; it must be 1 or more"),
        (["bench", "--sdpa_backend", "foo"], "sdpa_backend is 'foo'; it must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("pydantic", [True, False], ids=["with pydantic", "without"])
def test_values_are_refused_with_and_without_pydantic(monkeypatch, refused, tmp_path, argv, sentence, pydantic):
    if not pydantic:
        monkeypatch.setitem(sys.modules, "pydantic", None)
    refused([*argv, *(["--out", tmp_path / "out"] if argv[0] == "bench" else [])], sentence)
