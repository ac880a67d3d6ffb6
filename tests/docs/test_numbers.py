"""Tables and numbers of the pages are those of the committed result files."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

import page_numbers
import page_tables
from query_experts.study.settings import CompareSettings

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
NOTEBOOK = ROOT / "dev" / "LOG.md"
PAGES = [README, NOTEBOOK, *sorted((ROOT / "docs").glob("*.md"))]
TABLE_SCRIPTS = {  # and their number of tables, at least
    "benchmarks/conversion_tables.py": 5,
    "benchmarks/demo_spread.py": 1,
    "benchmarks/demo_table.py": 1,
    "benchmarks/ladder_tables.py": 9,
    "benchmarks/performance_tables.py": 5,
    "benchmarks/plan_tables.py": 2,
    "benchmarks/predict_kernels.py": 2,
    "benchmarks/serve_tables.py": 5,
}
NUMBERS = {  # page -> what its sentences must tell
    README: [
        "bench-h100-decode-graph.json decode-speed gqe 1 65536",
        "bench-h100-prefill-flash.json speed prefill gqe 4096 16384 262144",
        "serve-cpu.json faster gqe seconds_to_first_token 12288",
    ],
    NOTEBOOK: [
        "compare-demo-xeon.json distance-from compare-demo-epyc.json",
        "demo-kernels-amx.json loss-by-kernels bfloat16 3 DEFAULT",
        "demo-kernels-amx.json loss-by-kernels bfloat16 3 AVX512_CORE_BF16 AVX512_CORE",
        "demo-kernels-amx.json one-loss float32",
        "demo-kernels-amx.json spread-by-kernels bfloat16",
        "demo-kernels.json loss-by-kernels float32 3 as-it-is one-thread avx2",
        "demo-kernels.json training-speed as-it-is float32 bfloat16",
        *(f"compare-demo{name}.json gqe-behind-static" for name in ("-epyc", "-xeon", "-first", "-avx2")),
    ],
    ROOT / "docs" / "converting.md": [
        *(
            f"conversion.json ahead {cases}"
            for cases in (
                "expert-calibrated expert-random",
                "expert-calibrated expert-query_norm",
                "slot-calibrated slot-random",
                "static expert-calibrated",
                "static slot-calibrated",
                "static-k2 expert-calibrated-k2",
                "expert-calibrated-unbalanced expert-calibrated",
                "slot-calibrated-unbalanced slot-calibrated",
                "expert-calibrated expert-calibrated-gradual",
                "expert-calibrated expert-calibrated-undistilled",
                "static-long expert-calibrated-long",
            )
        ),
        "conversion.json below-teacher all-awake",
    ],
    ROOT / "docs" / "serving.md": [
        "serve-agreement-cpu.json tokens",
        "serve-agreement-cpu.json flipped",
        "serve-agreement-cpu.json before-a-flip",
        *(
            f"serve-agreement-cpu.json fixed {field}"
            for field in (
                "difference",
                "difference_replayed",
                "vllm_error_replayed",
                "transformers_error_replayed",
            )
        ),
    ],
}


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def script(name):
    return importlib.import_module(Path(name).stem)


def markers(page):
    """What the page's number markers name, white space made one blank."""
    found = page_numbers.MARKED.findall(page.read_text(encoding="utf-8"))
    return [" ".join(marker.split()) for _, marker, *_ in found]


def test_the_table_of_the_demo_is_of_what_make_compare_runs():
    demo = yaml.safe_load((ROOT / "src" / "query_experts" / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    settings = dataclasses.asdict(CompareSettings()) | result("compare-demo")["settings"]  # newer ones have defaults
    for name, value in dataclasses.asdict(CompareSettings(**demo)).items():
        assert settings[name] == value, name


@pytest.mark.parametrize("name", TABLE_SCRIPTS)
def test_the_tables_of_a_script_are_those_of_the_committed_results(name):
    tables, found = script(name), 0
    for page in PAGES:
        held = page.read_text(encoding="utf-8")
        assert held == tables.filled(held), page.name
        found += held.count(f"<!-- table: {name} ")
    assert found >= TABLE_SCRIPTS[name]


def test_every_table_of_a_page_belongs_to_a_script_that_fills_it():
    for page in PAGES:
        held = page.read_text(encoding="utf-8")
        named = {script for _, script, *_ in page_tables.MARKED.findall(held)}
        assert named <= set(TABLE_SCRIPTS), page.name
        whole = len(page_tables.MARKED.findall(held))
        assert held.count("<!-- table: ") == held.count("<!-- end of table -->") == whole, page.name


def test_a_script_leaves_the_tables_of_others_as_they_are():
    page = "<!-- table: a.py x -->\nold\n<!-- end of table -->\n<!-- table: b.py x -->\nold\n<!-- end of table -->\n"
    assert page_tables.with_tables(page, "b.py", str.upper) == page[: page.index("<!-- table: b.py")] + (
        "<!-- table: b.py x -->\nX\n<!-- end of table -->\n"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_numbers_in_the_sentences_of_a_page_are_those_of_the_committed_results(page):
    held = page.read_text(encoding="utf-8")
    assert held == page_numbers.filled(held)
    assert set(NUMBERS.get(page, ())) <= set(markers(page))
    assert len(re.findall(r"<!--\s+numbers:", held)) == held.count("<!-- end -->") == len(markers(page))


def test_every_function_of_page_numbers_is_used():
    used = {marker.split()[1] for page in PAGES for marker in markers(page)}
    assert used == set(page_numbers.FUNCTIONS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_begins_with_a_number_s_marker(page):
    """Such a line would be a block of HTML, in which Markdown isn't rendered."""
    assert not re.findall(r"^\s*<!--\s*(?:numbers|end -->).*", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_numbers_that_a_page_tells_wrongly_are_found():
    right = "<!-- numbers: compare-demo-avx2.json gqe-behind-static -->0.041 and, by AVX2, 0.093<!-- end -->"
    assert page_numbers.filled(right) == right
    assert page_numbers.filled(right.replace("0.041", "0.141")) == right
    with pytest.raises(ValueError, match="must hold 2 numbers"):
        page_numbers.filled(right.replace("0.041", "some"))
    assert page_numbers.NUMBER.findall("-->1.40 of 65,280 at 16k, bf16, float64, 0.3%, 1,697.") == [
        "1.40", "65,280", "0.3", "1,697",
    ]  # fmt: skip


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
