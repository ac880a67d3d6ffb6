"""The README says what the committed result file says, and what it shows runs."""

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from query_experts.bench import run as bench
from query_experts.cli import COMMANDS, main
from query_experts.study import compare as study
from query_experts.study.settings import CompareSettings
from study_helpers import model_of

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_readme_is_that_of_the_committed_result():
    tables = script("readme_table")
    readme = README.read_text(encoding="utf-8")
    assert readme == tables.with_table(readme, json.loads(tables.RESULT.read_text(encoding="utf-8")))


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def losses_of(name):
    return {(run["arm"], run["seed"]): run["validation_loss"] for run in result(name)["runs"]}


def lost_to_static(losses):
    return [f"{losses['gqe', seed] - losses['static', seed]:.3f}" for seed in (0, 1)]


def test_the_table_in_the_readme_is_of_what_make_compare_runs():
    demo = yaml.safe_load((ROOT / "src" / "query_experts" / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    settings = result("compare-demo")["settings"]
    for name, value in dataclasses.asdict(CompareSettings(**demo)).items():
        assert settings[name] == value, name


def test_what_the_readme_tells_of_an_older_processors_kernels_is_in_its_result():
    here, there = losses_of("compare-demo"), losses_of("compare-demo-avx2")
    away = max(abs(there[run] - loss) for run, loss in here.items())
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert f"end up to {away:.2f} away from this" in readme
    assert f"`gqe` loses to `static` by {' and '.join(lost_to_static(there))}" in readme


def test_what_the_notebook_tells_of_kernels_is_in_their_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "demo-kernels-amx.json").read_text(encoding="utf-8"))
    losses = {(run["instructions"], run["dtype"]): run["validation_loss"] for run in result["runs"]}
    sets = [losses[name, "bfloat16"] for name in ("DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE")]
    (single,) = {loss for (_, dtype), loss in losses.items() if dtype == "float32"}
    notebook = " ".join((ROOT / "dev" / "LOG.md").read_text(encoding="utf-8").split())
    assert f"ends at {sets[0]:.3f}, and at {sets[1]:.3f} and {sets[2]:.3f} where" in notebook
    assert f"all three come to {single}" in notebook
    assert f"by {max(sets) - min(sets):.2f}, more than anything" in notebook


def test_what_the_notebook_tells_of_float32_is_in_its_results():
    runs = {(run["kernels"], run["dtype"]): run for run in result("demo-kernels")["runs"]}
    loss = {key: f"{run['validation_loss']:.3f}" for key, run in runs.items()}
    notebook = " ".join((ROOT / "dev" / "LOG.md").read_text(encoding="utf-8").split())
    here, one, avx2 = (loss[name, "float32"] for name in ("as-it-is", "one-thread", "avx2"))
    assert f"ends at {here} by two threads, at {one} by one, and at {avx2} by AVX2's kernels" in notebook
    speeds = [runs["as-it-is", dtype]["tokens_per_s"] for dtype in ("float32", "bfloat16")]
    assert f"{speeds[0]:,.0f} tokens/s in float32 and {speeds[1]:,.0f} in bf16" in notebook
    for name in ("compare-demo-epyc", "compare-demo-xeon", "compare-demo", "compare-demo-avx2"):
        assert f"by {' and '.join(lost_to_static(losses_of(name)))} " in notebook


def test_the_tables_of_the_page_on_performance_are_those_of_the_committed_results():
    page = PERFORMANCE.read_text(encoding="utf-8")
    assert page == script("performance_tables").filled(page)


def test_the_tables_and_figures_of_the_page_on_converting_are_those_of_the_committed_result():
    tables = script("conversion_tables")
    page = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    assert page == tables.filled(page)
    result = json.loads(tables.RESULT.read_text(encoding="utf-8"))
    paired = tables.paired(result) + "\n" + tables.paired(result, tables.LONG)
    means = [abs(float(text)) for text in re.findall(r"[+\N{MINUS SIGN}](\d\.\d+) \|$", paired, re.MULTILINE)]
    prose = re.sub(r"^\|.*$", "", page.split("## What it costs")[1], flags=re.MULTILINE)
    told = re.findall(r"\b0\.0\d\d\b", prose)
    assert len(told) > 8
    assert not [number for number in told if min(abs(float(number) - mean) for mean in means) > 5.5e-4]


def test_what_the_page_tells_of_learning_rates_is_in_their_results():
    found = {}
    for rate in ("5e-4", "1e-3", "2e-3"):
        held = result(f"conversion-rate-{rate}")
        assert held["settings"]["learning_rate"] == float(rate)
        found[rate] = {run["case"]: run["validation_loss"] for run in held["runs"]}
    for case in ("static", "expert-calibrated", "slot-calibrated"):
        assert min(found, key=lambda rate: found[rate][case]) == "1e-3"
    for rate, loss in found.items():
        assert loss["expert-calibrated"] > loss["static"]
        ahead = loss["slot-calibrated"] - loss["static"]
        assert abs(ahead) < 1e-4 if rate == "5e-4" else ahead > 1e-3


def test_the_python_of_the_page_on_converting_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    rows = torch.randint(300, (10, 16))
    names = {"dense": model_of("dense"), "token_ids": rows, "dataset": [{"input_ids": x, "labels": x} for x in rows]}
    for snippet in snippets:
        exec(snippet.replace("max_steps=1000", "max_steps=2, report_to='none'"), names)
    assert names["trainer"].state.global_step == 2
    assert names["model"].config.active_query_experts == 1


def test_the_tables_of_the_page_on_serving_are_those_of_the_committed_result():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert page == script("serve_tables").filled(page)


def test_the_agreement_that_the_page_on_serving_tells_is_that_of_the_committed_result():
    found = json.loads((ROOT / "benchmarks" / "results" / "serve-agreement-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    told = page.split("<!-- numbers: benchmarks/results/serve-agreement-cpu.json -->")[1].split("<!-- end")[0]
    share = found["flipped"] / found["woken_experts"]
    expected = [str(found["flipped"]), f"{found['woken_experts']:,}", f"{100 * share:.3f}"]
    expected += [f"{found['difference']:.4f}", f"{found['difference_before_a_flip']:.4f}"]
    expected += [str(found["tokens_before_a_flip"]), f"{found['difference_replayed']:.4f}"]
    expected += [f"{found['vllm_error_replayed']:.4f}", f"{found['transformers_error_replayed']:.4f}"]
    assert re.findall(r"\d[\d,.]*\d", told.replace("float64", "")) == expected
    assert f"{found['tokens']:,} tokens" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page):
    links = [part.split(")")[0] for part in page.read_text(encoding="utf-8").split("](")[1:]]
    local = [link.split("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert local
    assert not [link for link in local if not (page.parent / link).exists()]


def test_the_snippets_of_the_readme_run():
    layer, model = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(layer, names)
    names["loss"].backward()
    assert names["layer"].router.weight.grad.any()
    with torch.device("meta"):  # a model of 250M parameters
        exec(model, names)
    assert 2e8 < names["model"].num_parameters() < 3e8


def test_the_commands_of_the_readme_are_understood(monkeypatch):
    asked = []
    for module, name in ((study, "train"), (study, "compare"), (bench, "bench")):
        monkeypatch.setattr(module, name, lambda settings, console: asked.append(settings) or True)
    (block,) = re.findall(r"```\n(query-experts .*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert {argv[0] for argv in commands} == set(COMMANDS)
    for argv in commands:
        if argv[0] in ("train", "compare", "bench"):
            assert main(argv) == 0
            asked[-1].check()
        else:
            assert main(argv) == 2  # understood, but there is no such folder here
