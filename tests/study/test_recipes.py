"""The large presets are what their headers say, follow the rules that they name, and take their first steps."""

import dataclasses
import json
import re

import pytest
import torch

from query_experts.cli import main
from query_experts.common.device import peak_flops
from query_experts.model import costs
from query_experts.model.arms import arm_config, build
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from query_experts.study.ladder.settings import Run, read_ladder
from query_experts.study.settings import CompareSettings
from recipe_helpers import LARGE, ROOT, as_words, check_launch, header, settings_of, shrunk

ARM = re.compile(r"([\w-]+) ([\d.]+)M(?:, ([\d.]+)M active)?[;.]")
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}
SECONDS = {"h": 3600, "s": 1}
PAPER_PARAMETERS, PAPER_TOKENS = 184e6, 512 * 2048  # without embeddings; of a step
RATE = {"1b": 2.9e-4, "7b": 1.5e-4}


def parameters(preset: str, arm: str) -> dict[str, int]:
    with torch.device("meta"):
        return costs.parameters(build(arm_config(arm, settings_of(preset).model_size())))


def named_parameters(preset: str) -> dict[str, tuple[str, str]]:
    """Arm -> its millions of parameters, and of active ones, as the header writes them."""
    listed = header(preset).partition("Parameters: ")[2].partition(" Tokens: ")[0]
    return {arm: (total, active) for arm, total, active in ARM.findall(listed)}


def number(preset: str, pattern: str) -> tuple[float, float]:
    """A number with its unit in a header, and the half of its last digit."""
    value, unit = re.search(pattern, header(preset)).groups()
    digits = len(value.partition(".")[2])
    return float(value) * UNITS[unit], 0.5 * 10**-digits * UNITS[unit]


@pytest.mark.parametrize("preset", LARGE)
def test_the_header_of_a_preset_tells_the_parameters_of_each_arm(preset):
    named = named_parameters(preset)
    assert {*settings_of(preset, CompareSettings).arms, "gqe-m4"} == {*named}
    for arm, (total, active) in named.items():
        digits = len(total.partition(".")[2])
        counts = {name: f"{count / 1e6:.{digits}f}" for name, count in parameters(preset, arm).items()}
        assert (total, active or total) == (counts["total"], counts["active"]), arm


@pytest.mark.parametrize("preset", LARGE)
def test_the_header_of_a_preset_tells_its_tokens(preset):
    settings = settings_of(preset)
    step = (settings.global_batch_size or settings.sequences_per_step) * settings.seq_len
    for pattern, tokens in ((r"Tokens: ([\d.]+)([MB]),", settings.steps * step), (r", ([\d.]+)([kM]) a step", step)):
        told, half = number(preset, pattern)
        assert tokens == pytest.approx(told, abs=half)


@pytest.mark.parametrize("preset", LARGE)
def test_the_header_of_a_preset_tells_the_time_at_the_mfu_that_it_assumes(preset):
    settings = settings_of(preset)
    step = (settings.global_batch_size or settings.sequences_per_step) * settings.seq_len
    share, gpus, times = re.search(r"MFU of (\d+)%.*? on (\d+) H100: (.*?)\.(?: |$)", header(preset)).groups()
    told = re.findall(r"(\w+) ([\d.]+) ([hs])", header(preset).partition("H100: ")[2].partition(" Launch")[0])
    assert [arm for arm, _, _ in told] == ["dense", "gqe"], times
    for arm, value, unit in told:
        flops = 3 * costs.flops_per_token(arm_config(arm, settings.model_size()), settings.seq_len)
        speed = float(share) / 100 * peak_flops("H100") * int(gpus)
        taken = settings.steps * step * flops / speed / SECONDS[unit]
        digits = len(value.partition(".")[2])
        assert f"{taken:.{digits}f}" == value


@pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers below 5.20 doesn't share models of this kind")
@pytest.mark.parametrize("preset", LARGE)
def test_the_header_of_a_preset_launches_it(preset, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = check_launch(header(preset).partition("Launch: ")[2].replace("--compile", ""), monkeypatch)
    assert settings.hidden_size == settings_of(preset).hidden_size
    assert settings.global_batch_size in (None, settings.sequences_per_step)


def test_the_paper_s_run_has_the_paper_s_hyperparameters():
    settings = settings_of("paper-250m")
    tokens = 512 * 2048 * settings.steps
    assert (settings.learning_rate, settings.min_learning_rate_ratio) == (5e-4, 1e-5 / 5e-4)
    assert settings.warmup_fraction * tokens == pytest.approx(3e9, rel=1e-3)
    assert tokens == pytest.approx(30e9, rel=1e-3)
    assert settings.router_aux_loss_coef == 0.01
    assert (settings.weight_decay, settings.seq_len, settings.active_query_experts) == (0.1, 2048, 1)


@pytest.mark.parametrize("preset", ["1b", "7b"])
def test_the_larger_presets_follow_the_rule_of_their_header(preset):
    settings = settings_of(preset)
    counts = parameters(preset, "gqe")
    size = (counts["total"] - counts["embedding"]) / PAPER_PARAMETERS
    assert settings.learning_rate == float(f"{5e-4 * size ** (-1 / 3):.1e}")
    assert settings.global_batch_size * settings.seq_len == pytest.approx(PAPER_TOKENS * size ** (2 / 3), rel=0.03)
    assert settings.initializer_range == float(f"{0.02 * (768 / settings.hidden_size) ** 0.5:.2g}")
    assert settings.intermediate_size == 2.75 * settings.hidden_size
    assert settings.num_attention_heads == 2 * settings.num_key_value_heads == settings.hidden_size // 64
    tokens = settings.steps * settings.global_batch_size * settings.seq_len
    assert all(tokens >= 20e6 * float(total) for total, _ in named_parameters(preset).values())


@pytest.mark.parametrize("rung", ["d256", "d384", "d512"])
def test_a_preset_of_the_ladder_is_its_rung(rung):
    ladder = read_ladder(ROOT / "benchmarks" / "ladder" / "gpu.yaml")
    settings = settings_of(f"ladder-{rung}", CompareSettings)
    whole = ladder.branch_settings(ladder.run_settings(Run(rung, "gqe", 0)), 1.0)
    beside = {"machine", "processes", "watching"}  # these groups change no result
    names = {f.name for f in dataclasses.fields(whole) if f.metadata["group"] not in beside}
    for name in names - {"out", "data", "validation", "evaluations"}:
        assert getattr(settings, name) == getattr(whole, name), name
    (entry,) = (entry for entry in ladder.plan if rung in entry.rungs)
    assert (settings.arms, settings.seeds) == (entry.arms, [*range(entry.seeds)])


@pytest.mark.parametrize("preset", [preset for preset in LARGE if preset != "paper-250m"])
def test_a_shrunk_preset_takes_its_first_steps(preset, text, tmp_path):
    assert main(["train", "--preset", preset, "--data", text, "--out", str(tmp_path), *as_words(shrunk(preset))]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is settings_of(preset).tie_word_embeddings
    assert json.loads((tmp_path / "result.json").read_text())["train_tokens"] > 0


def test_every_arm_of_the_shrunk_paper_s_run_takes_its_first_steps(text, tmp_path):
    more = ["--seeds", "0", "--prefill_lengths", "8", "--prefill_repeats", "1"]
    words = ["--data", text, "--out", str(tmp_path), *as_words(shrunk("paper-250m")), *more]
    assert main(["compare", "--preset", "paper-250m", *words]) == 0
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert {run["arm"] for run in runs} == {*settings_of("paper-250m", CompareSettings).arms}
