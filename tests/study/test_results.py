"""The result files: what is written, what older files lack, and what is refused."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from query_experts.cli import main
from query_experts.common.environment import Environment
from query_experts.common.errors import SettingError
from query_experts.model.kernel_choice import KernelChoice
from query_experts.study import report
from query_experts.study.ladder.settings import Ladder
from query_experts.study.results import (
    Comparison,
    ParameterCounts,
    Passage,
    Piece,
    PrefillTimes,
    RoutingLoad,
    RunResult,
    first_fault,
    parse_comparison,
    read_comparison,
    read_result,
    write_comparison,
    write_result,
)

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("compare-demo*.json"))
OLDER = ROOT / "tests" / "fixtures" / "comparison_dd60e2b.json"
HERE = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "query_experts": "0.1.0", "commit": "0bfe3dd",
        "device": "cpu", "hardware": "a CPU", "dtype": "float32", "date": "2026-11-23"}  # fmt: skip
PIECE = Piece(first_step=0, **HERE, instructions="AVX2", kernels=KernelChoice("auto", "torch"))
RUN = RunResult(
    arm="gqe", seed=0, parameters=ParameterCounts(9, 8, 7), active_attention_heads=3, dense_attention_heads=4,
    intermediate_size=48, flops_per_token=5.0, kv_bytes_per_token=256, tokens_per_s=10.5, train_seconds=2.0,
    train_tokens=192, pieces=[PIECE], clipped_steps=0, validation_loss=4.5,
    train_curve=[(96, 5.0), (192, 4.6)], validation_curve=[(192, 4.5)],
    routing=RoutingLoad([[[0.5, 0.5]]], [[0.9]], 0, 0.01), passage=Passage(["a"], [[[1]]]),
)  # fmt: skip
JSON = (
    '{"arm":"gqe","seed":0,"parameters":{"total":9,"active":8,"embedding":7},"active_attention_heads":3,'
    '"dense_attention_heads":4,"intermediate_size":48,"flops_per_token":5.0,"kv_bytes_per_token":256,'
    '"tokens_per_s":10.5,"train_seconds":2.0,"train_tokens":192,"diverged_at_tokens":null,"pieces":[{"first_step":0,'
    '"python":"3.11.7","torch":"2.13.0","transformers":"5.23.0","query_experts":"0.1.0","commit":"0bfe3dd",'
    '"device":"cpu","hardware":"a CPU","dtype":"float32","date":"2026-11-23","instructions":"AVX2",'
    '"kernels":{"asked":"auto","chosen":"torch"}}],"clipped_steps":0,"validation_loss":4.5,'
    '"train_curve":[[96,5.0],[192,4.6]],"validation_curve":[[192,4.5]],'
    '"routing":{"load":[[[0.5,0.5]]],"entropy":[[0.9]],"dead":0,"dead_below":0.01},'
    '"passage":{"tokens":["a"],"experts":[[[1]]]}}\n'
)


def test_a_result_is_written_with_its_keys_in_order_and_read_back(tmp_path):
    file = tmp_path / "result.json"
    write_result(file, RUN)
    assert file.read_text() == JSON
    assert read_result(file) == RUN


def test_the_loss_of_a_teacher_is_written_only_where_there_is_one(tmp_path):
    file, taught = tmp_path / "result.json", dataclasses.replace(RUN, teacher_loss=4.25)
    write_result(file, taught)
    assert file.read_text() == JSON[:-2] + ',"teacher_loss":4.25}\n'
    assert read_result(file) == taught


def test_a_comparison_has_its_parts_in_order(tmp_path):
    prefill = PrefillTimes([8], 2, "float32", {"gqe": 1.5}, {"gqe": [[0.5, 0.25]]})
    comparison = Comparison(environment=Environment(**HERE), runs=[RUN], prefill=prefill)
    write_comparison(tmp_path / "comparison.json", comparison)
    written = (tmp_path / "comparison.json").read_text()
    assert list(json.loads(written)) == ["settings", "data", "environment", "runs", "prefill"]
    assert f'"runs":[{JSON[:-1]}],' in written
    times = '"lengths":[8],"repeats":2,"dtype":"float32","limit":{"gqe":1.5},"seconds":{"gqe":[[0.5,0.25]]}'
    assert f'"prefill":{{{times}}}' in written
    assert read_comparison(tmp_path) == comparison


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_a_committed_comparison_is_read_and_written_as_it_was(file, tmp_path):
    """But for the keys that the file lacks, which are written with their defaults."""
    write_comparison(tmp_path / "comparison.json", parse_comparison(file.read_text(encoding="utf-8")))
    before, after = json.loads(file.read_text()), json.loads((tmp_path / "comparison.json").read_text())
    added = {
        "commit": None,
        "skipped_files": {},
        "validation": [],
        "validation_files": [],
        "compile": False,
        "instructions": None,
        "initializer_range": 0.02,
        "kernels": "auto",
        "report_to": [],
        "telemetry": "brief",
        "log_every": None,
        "fsdp_size": None,
        "tp_size": 1,
        "activation_checkpointing": False,
        "rank_timeout_minutes": 30.0,
        "global_batch_size": None,
        "keep": 2,
        "peak_flops": None,
    }
    in_a_piece = {"kernels": None}

    def check(old, new):
        if isinstance(old, dict):
            defaults = added | (in_a_piece if "first_step" in old else {})
            assert {name: new[name] for name in new.keys() - old.keys()}.items() <= defaults.items()
            assert [name for name in new if name in old] == list(old)
            for name, value in old.items():
                check(value, new[name])
        elif isinstance(old, list):
            assert len(old) == len(new)
            for pair in zip(old, new, strict=True):
                check(*pair)
        else:
            assert (type(old), old) == (type(new), new)

    assert len(COMMITTED) == 5
    check(before, after)


def test_unknown_keys_of_newer_files_are_ignored(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(json.loads(JSON) | {"new": 1}))
    assert read_result(tmp_path / "result.json") == RUN


@pytest.mark.parametrize(
    "change",
    [{"parameters": 3}, {"seed": "one"}, {"train_curve": [[1]]}, {"validation_loss": "low"}, {"routing": []}],
    ids=str,
)
def test_a_result_with_a_value_of_another_type_is_refused(tmp_path, change):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(json.loads(JSON) | change))
    with pytest.raises(
        SettingError, match=r"result\.json is no run's result \(.+\); delete it, and that run is trained"
    ):
        read_result(file)


NO_COMPARISONS = {
    "half": "{", "list": "[]", "empty": "{}", "no run": '{"runs": [{}]}', "no list": '{"runs": {}}',
    "no times": '{"runs": [], "prefill": 3}', "result": JSON,
    "other arm": f'{{"runs": [{JSON.replace("gqe", "other")}]}}',
}  # fmt: skip


@pytest.mark.parametrize("content", NO_COMPARISONS.values(), ids=NO_COMPARISONS.keys())
def test_a_file_that_is_no_comparison_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(SettingError, match=r"it must hold comparison\.json as compare wrote it"):
        read_comparison(tmp_path)


def test_a_comparison_that_is_there_and_cannot_be_read_is_no_foreign_file(tmp_path):
    (tmp_path / "comparison.json").mkdir()
    with pytest.raises(IsADirectoryError):
        read_comparison(tmp_path)


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError, AttributeError])
def test_a_fault_in_the_reports_own_code_is_not_blamed_on_the_folder(tmp_path, monkeypatch, error):
    def faulty(*_):
        raise error("of the code")

    write_comparison(tmp_path / "comparison.json", Comparison(runs=[RUN]))
    monkeypatch.setattr(report, "page_of", faulty)
    with pytest.raises(error, match="of the code"):
        main(["report", str(tmp_path)])


LOOK_UPS = {  # allowed in a file; a larger number needs a reason
    "beside.py": 2,  # an environment variable of tqdm
    "branches.py": 3,  # the log of the Trainer
    "callbacks.py": 2,  # what the Trainer passes to a callback
    "measure.py": 6,  # sequences of a data set, the log of the Trainer, and the output of a model
    "prefill.py": 1,  # an arm, by its name
    "gaps.py": 1,  # a setting that older results lack
    "results.py": 2,  # a teacher's loss that isn't there; settings that older results lack
    "conversion.py": 1,  # sequences of a data set
    "conversion_tables.py": 2,  # a case by its name, and a setting that few cases have
}
OTHERS = {"distill.py", "settings.py", "workspace.py"}  # settings, which are checked elsewhere
SCRIPTS = ("demo_table", "page_tables", "conversion", "conversion_tables", "demo_kernels")


def look_ups(file):
    """Subscripts and calls of `get` with a constant string."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        key = None
        if isinstance(node, ast.Subscript):
            key = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = node.args[0] if node.args else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.append(f"{file.name}:{node.lineno}: {key.value}")
    return found


def test_results_are_read_by_attribute_and_not_by_string():
    study = [file for file in (ROOT / "src" / "query_experts" / "study").rglob("*.py") if file.name not in OTHERS]
    for file in [*study, *(ROOT / "benchmarks" / f"{name}.py" for name in SCRIPTS)]:
        assert len(look_ups(file)) <= LOOK_UPS.get(file.name, 0), look_ups(file)


def test_a_comparison_of_an_older_version_is_reported(tmp_path):
    (tmp_path / "comparison.json").write_bytes(OLDER.read_bytes())
    assert main(["report", str(tmp_path)]) == 0
    assert read_comparison(tmp_path).data.validation_fraction is None


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("settings", "arms"), ["dense", "zz"], "zz"),
        (("runs", 0, "train_curve"), [[32, float("nan")]], "runs.0.train_curve.0.1"),
        (("runs", 0, "train_tokens"), "many", "runs.0.train_tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_comparison_with_an_unusable_value_is_refused_with_the_place_of_it(tmp_path, refused, place, value, fault):
    comparison = json.loads(COMMITTED[0].read_text(encoding="utf-8"))
    *path, last = place
    inner = comparison
    for key in path:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    refused(["report", tmp_path], "folder is", "it must hold comparison.json as compare wrote it", fault)


def test_a_run_that_diverged_long_after_the_others_ended_is_drawn(tmp_path):
    comparison = parse_comparison(COMMITTED[0].read_text(encoding="utf-8"))
    first, *rest = comparison.runs
    late = dataclasses.replace(first, diverged_at_tokens=10**9, validation_loss=None, train_curve=[(10**9, 5.0)])
    report.write_report(dataclasses.replace(comparison, runs=[late, *rest]), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"validation": []}, "validation holds []; it must hold one or more, each once"),
        ({"validation": ["a", "a"]}, "validation holds ['a', 'a']; it must hold each once"),
        ({"threads": 0}, "threads is 0; it must be 1 or more"),
        ({"tokens_per_parameter": 0}, "tokens_per_parameter is 0; it must be a number above 0"),
        ({"budgets": [0.5, 2]}, "budgets.1 is 2; it must be a number above 0 and at most 1"),
        ({"plan": [{"rungs": ["a"], "arms": [], "seeds": 1}]}, "plan.0.arms holds []; it must hold one or more, each"),
        ({"threads": "x"}, "threads is 'x'; it must be a whole number"),
    ],
)
def test_the_first_fault_of_a_file_is_a_sentence(changes, sentence):
    whole = {"results": "r", "data": ["a"], "validation": ["b"], "tokens_per_parameter": 20, "budgets": [1],
             "settings": {}, "rungs": {}, "plan": []}  # fmt: skip
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Ladder).validate_python(whole | changes)
    assert first_fault(caught.value).startswith(sentence)
