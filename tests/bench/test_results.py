"""Result files: every committed bench.json is read as it was written, foreign files are refused."""

import ast
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest

import query_experts.bench
import serve_results
import sparse_projection
from query_experts.bench.json_reader import parse
from query_experts.bench.results import (
    GpuResult,
    PartOutcome,
    PartsResult,
    PointResult,
    PytestOutcome,
    read_bench,
    read_gpu,
    write_bench,
    write_gpu,
)
from query_experts.common.errors import SettingError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMMITTED = sorted(RESULTS.glob("bench-*.json"))
NEW_FIELDS = {"settings": ["cuda_graph", "train_batch_size"], "environment": ["commit"]}  # that older files lack


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_result_is_read_and_written_with_the_same_keys_in_the_same_order(path, tmp_path):
    committed = json.loads(path.read_text())
    result = read_bench(path)
    assert all(isinstance(point, PartsResult if point.suite == "parts" else PointResult) for point in result.points)
    write_bench(tmp_path / "bench.json", result)
    written = json.loads((tmp_path / "bench.json").read_text())
    for part, names in NEW_FIELDS.items():
        for name in names:
            if name not in committed[part]:
                del written[part][name]
    if "fused_decode" in committed["settings"]:
        meant = {False: "torch", True: "triton"}
        settings = [("kernels", meant[v]) if k == "fused_decode" else (k, v) for k, v in committed["settings"].items()]
        committed["settings"] = dict(settings)
        assert written.pop("kernels") is None
    assert json.dumps(written) == json.dumps(committed)


@pytest.mark.parametrize(
    "path", [path for path in RESULTS.glob("*.json") if path not in COMMITTED], ids=lambda p: p.stem
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(path):
    with pytest.raises(
        SettingError, match=r"^result is .*\.json, which isn't a bench.json: .* is no field of (Bench|Point)Result$"
    ):
        read_bench(path)


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (["settings", "attn_implementation"], 5, "settings.attn_implementation is 5; it must be str"),
        (["settings", "lengths", 0], "2k", r'settings.lengths\[0\] is "2k"; it must be int'),
        (["settings", "fused_decode"], 1, "settings.fused_decode is 1; it must be bool"),
        (["settings", "colour"], "red", "settings.colour is no field of BenchSettings"),
        (["environment", "torch"], None, "environment.torch is null; it must be str"),
        (["checks"], {}, r"checks is {}; it must be list"),
        (["checks", 0, "passed"], "yes", r'checks\[0\].passed is "yes"; it must be bool'),
        (["points", 0, "length"], 2.5, r"points\[0\].length is 2.5; it must be int"),
        (["points", 0, "batch"], True, r"points\[0\].batch is true; it must be int"),
        (["points", 0, "seconds", "gqe", 0], "fast", r'points\[0\].seconds.gqe\[0\] is "fast"; it must be float'),
        (["points", 0, "seconds", "gqe"], [0.1], "prefill 2048 must hold as many seconds of each call, one or more"),
        (["points", 0, "peak_bytes"], {"dense": 1}, "prefill 2048 must hold seconds, peak_bytes and predicted of"),
    ],
)  # fmt: skip
def test_a_damaged_result_is_refused_with_what_does_not_fit(keys, value, sentence, tmp_path):
    damaged = json.loads((RESULTS / "bench-cpu.json").read_text())
    *parents, last = keys
    inner = damaged
    for key in parents:
        inner = inner[key]
    inner[last] = value
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(damaged))
    with pytest.raises(SettingError, match=f"which isn't a bench.json: {sentence}"):
        read_bench(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"settings": {}}'])
def test_a_file_without_a_result_is_refused(text, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(SettingError, match=r"which isn't a bench\.json"):
        read_bench(path)


def test_a_missing_field_is_named(tmp_path):
    result = json.loads((RESULTS / "bench-cpu.json").read_text())
    del result["points"][0]["seconds"]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    with pytest.raises(SettingError, match=r"points\[0\].seconds is missing$"):
        read_bench(path)


def test_a_gpu_result_is_read_as_it_was_written(tmp_path):
    bench = read_bench(RESULTS / "bench-h100-parts.json")
    parts = {"parts": PartOutcome(0, bench), "wide": PartOutcome(1, None, "error"), "chunk": PartOutcome(None, None)}
    result = GpuResult(False, PytestOutcome(0, ["2 passed"]), parts)
    write_gpu(tmp_path / "gpu.json", result)
    assert read_gpu(tmp_path / "gpu.json") == result
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written) == ["dry", "tests", "parts"]
    assert [list(part) for part in written["parts"].values()] == [
        ["status", "bench"], ["status", "bench", "last"], ["status", "bench"],
    ]  # fmt: skip
    assert written["parts"]["parts"]["bench"] == asdict(bench)


@pytest.mark.parametrize("module", [serve_results, sparse_projection], ids=lambda module: module.__name__)
def test_the_result_of_a_script_is_read_as_it_was_written(module):
    committed = json.loads(module.RESULT.read_text())
    read = module.read_serve if module is serve_results else module.read_sparse_projection
    written = json.loads(json.dumps(asdict(read())))
    del written["environment"]["commit"]  # that older files lack
    written.get("size", {}).pop("initializer_range", None)
    assert json.dumps(written) == json.dumps(committed)


def test_ratios_of_servers_are_those_of_the_committed_result():
    result = serve_results.read_serve()
    assert serve_results.ratios_to_dense(result.arms) == result.against_dense


def test_speedup_is_the_ratio_of_each_repeat():
    (point,) = [p for p in read_bench(RESULTS / "bench-cpu-wide.json").speed_points("prefill") if p.length == 2048]
    seconds = {"dense": [2.0, 3.0, 8.0], "static": [1.0, 1.0, 1.0], "gqe": [1.0, 2.0, 2.0]}
    assert replace(point, seconds=seconds).speedup("gqe") == (2.0, 1.5, 4.0)


def test_a_value_that_a_type_does_not_list_is_refused():
    with pytest.raises(ValueError, match=r"^cache is 5; it must be one of static, dynamic$"):
        parse(Literal["static", "dynamic"], 5, ".cache")


@pytest.mark.parametrize(
    ("kind", "value"), [(float, 1), (int | None, None), (dict[str, int], {"a": 1}), (list[str], [])]
)
def test_a_value_of_its_type_is_read_unchanged(kind, value):
    assert parse(kind, value, "") == value


def test_bench_looks_nothing_up_by_a_string_outside_of_the_results():
    folder = Path(query_experts.bench.__file__).parent
    found = []
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.name != "results.py" and is_string_lookup(node):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def is_string_lookup(node):
    """`x["name"]` or `x.get("name")`; the types Literal["name"] and the variables of os.environ are none."""
    match node:
        case ast.Subscript(value=ast.Name(id="Literal")):
            return False
        case ast.Subscript(value=ast.Attribute(attr="environ")):
            return False
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"))):
            return False
        case ast.Subscript(slice=ast.Constant(value=str())):
            return True
        case ast.Call(func=ast.Attribute(attr="get" | "pop" | "setdefault"), args=[ast.Constant(value=str()), *_]):
            return True
    return False


def test_a_lookup_by_a_string_is_found():
    source = 'x["a"]; x["a"] = 1; x.get("a"); x.pop("a", None); y: Literal["a"]; x[0]; x[name]; f("a"); os.environ["a"]'
    assert sum(is_string_lookup(node) for node in ast.walk(ast.parse(source))) == 4
