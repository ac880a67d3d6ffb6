"""The GPU suite without a GPU: its parts are benchmarks that can run, and it needs no package of the extras."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

import gpu
import gpu_kernels
from query_experts.bench import correctness
from query_experts.bench import settings as bench_settings
from query_experts.bench.results import GpuResult, PartOutcome, PytestOutcome, read_bench, read_gpu, write_gpu
from query_experts.bench.run import points_of
from query_experts.bench.settings import SUITES
from query_experts.common import timing
from query_experts.common.errors import SettingError
from query_experts.model import kernel_choice

ROOT = Path(__file__).parents[2]
ABSENT = [
    "pydantic", "rich", "accelerate", "matplotlib", "jinja2", "scipy", "datasets", "lm_eval", "peft", "trl",
    "hypothesis", "sklearn",  # which needs scipy, and which Transformers imports where it is there
]  # fmt: skip
BLOCKER = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_unless_absent(cls, name, *rest):
    return None if name.partition(".")[0] in {ABSENT} else find_spec(name, *rest)
PathFinder.find_spec = classmethod(find_unless_absent)
"""


def test_every_part_of_the_gpu_command_asks_for_what_bench_takes(monkeypatch):
    monkeypatch.setattr(bench_settings, "check_device", lambda device: None)  # as on a machine with a GPU
    monkeypatch.setattr(kernel_choice, "no_triton_on", lambda device: None)
    suites = set()
    for part in gpu.PARTS.values():
        if part.settings is not None:
            for settings in (part.settings, gpu.dry(part.settings)):
                settings.check()
                assert list(points_of(settings))
            suites |= set(part.settings.suites)
    assert suites == set(SUITES)


def test_the_gpu_command_has_its_most_wanted_steps_within_its_minutes():
    names = list(gpu.PARTS)
    assert [name for name in names if gpu.PARTS[name].settings is None] == list(gpu_kernels.STEPS)
    assert names[: len(gpu.REQUIRED)] == list(gpu.REQUIRED)
    assert gpu.TEST_SECONDS + sum(gpu.PARTS[name].seconds for name in gpu.REQUIRED) <= 60 * gpu.MINUTES - 30


@pytest.mark.parametrize("name", gpu_kernels.STEPS)
def test_a_step_that_times_no_layer_gives_numbers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    gpu.measure_part(name, tmp_path, True)
    numbers = json.loads((tmp_path / name / "numbers.json").read_text())
    assert len(numbers) >= 4
    assert all(value > 0 for value in numbers.values())


def test_a_step_s_numbers_are_in_its_outcome_and_a_failure_keeps_them(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "numbers.json").write_text('{"prepare_24_bytes_per_s":1.5}')
    monkeypatch.setattr(gpu, "run", lambda *args: (1, "no such kernel"))
    outcome = gpu.run_part("kernels", tmp_path, 9.0, True)
    assert outcome == PartOutcome(1, None, "no such kernel", {"prepare_24_bytes_per_s": 1.5})
    write_gpu(tmp_path / "gpu.json", GpuResult(True, PytestOutcome(0, []), {"kernels": outcome}))
    assert read_gpu(tmp_path / "gpu.json").parts["kernels"] == outcome


def suite(**changes) -> GpuResult:
    """A green one, but for the changes: parts by name, the tests, or dry."""
    numbers = {
        "ceilings": {"copy_bytes_per_s": 4e12},
        "kernels": {f"{name}_{n}_bytes_per_s": 2e12 for name in ("prepare", "combine") for n in (4096, 32768)},
    }
    bench = read_bench(ROOT / "benchmarks" / "results" / "bench-h100-train.json")
    parts = {name: PartOutcome(0, None if name in numbers else bench, None, numbers.get(name)) for name in gpu.REQUIRED}
    green = GpuResult(False, PytestOutcome(0, ["2 passed"]), parts)
    return replace(green, **{"parts": parts | changes.pop("parts", {}), **changes})


def test_a_suite_is_green_where_all_that_is_required_passed_and_is_fast_enough():
    assert gpu.is_green(suite())
    out_of_time = replace(suite().parts["train"], status=None)
    assert not gpu.is_green(suite(parts={"decode": out_of_time}))
    assert gpu.is_green(suite(parts={"train-cudnn": out_of_time}))
    bench = out_of_time.bench
    wrong = replace(bench, checks=[*bench.checks, replace(bench.checks[0], passed=False)])
    assert not gpu.is_green(suite(parts={"train-cudnn": replace(out_of_time, bench=wrong)}))
    slow = PartOutcome(0, None, None, suite().parts["kernels"].numbers | {"combine_32768_bytes_per_s": 1.7e12})
    for change in (
        {"dry": True}, {"tests": PytestOutcome(None, [])}, {"tests": PytestOutcome(1, [])},
        {"parts": {"kernels": slow}}, {"parts": {"kernels": PartOutcome(0, None, None, {"prepare_4096_x": 9e12})}},
        {"parts": {"ceilings": PartOutcome(0, None, None, {"launch_s": 1e-6})}},
        {"parts": {"train": PartOutcome(None, None)}}, {"parts": {"train-cudnn": PartOutcome(2, None, "wrong")}},
    ):  # fmt: skip
        assert not gpu.is_green(suite(**change)), change
    for name in gpu.REQUIRED:
        without = suite()
        del without.parts[name]
        assert not gpu.is_green(without), name


def test_a_part_is_not_begun_where_too_little_time_is_left(tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(gpu, "run_part", lambda name, *_: begun.append(name) or PartOutcome(0, None, None, {"a": 1.0}))
    monkeypatch.setattr(gpu, "run_tests", lambda dry: PytestOutcome(0, ["2 passed"]))
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(clock)))
    result = gpu.run_all([*gpu.PARTS][:4], tmp_path, 1.5, False)
    assert begun == [*result.parts] == [*gpu.PARTS][:2]
    assert "No time was left for prefill-graph train; --no_tests --parts takes them." in capsys.readouterr().out


def test_a_test_that_fails_is_named_and_tests_that_run_out_of_time_leave_their_words(monkeypatch, tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("import time\ndef test_one(): pass\ndef test_two(): assert 1 == 2\ndef test_three(): time.sleep(9)")
    monkeypatch.setattr(gpu, "TESTS", [str(test)])
    monkeypatch.setattr(gpu, "TEST_SECONDS", 5.0)
    outcome = gpu.run_tests(True)
    assert outcome.status is None
    assert outcome.last[-1] == "out of time"
    assert any("test_two FAILED" in line for line in outcome.last)
    test.write_text(test.read_text().replace("sleep(9)", "sleep(0)"))
    outcome = gpu.run_tests(True)
    assert outcome.status == 1
    assert any(line.startswith("E ") and "1 == 2" in line for line in outcome.last)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_part_with_a_wrong_arm_is_timed_and_then_fails(monkeypatch, tmp_path, wrong):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    if wrong:
        monkeypatch.setattr(correctness, "ALLOWED", 0.0)
        monkeypatch.setattr(correctness, "LEAST", 0)
    with pytest.raises(SettingError, match=r"arms holds .*, which is wrong in") if wrong else nullcontext():
        gpu.measure_part("train-torch", tmp_path, True)
    assert read_bench(tmp_path / "train-torch" / "bench.json").points


@pytest.mark.full
def test_it_runs_with_torch_transformers_triton_and_pytest_only(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)  # in child processes too
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": "-p no:hypothesispytest"}
    absent = f"import importlib.util; assert not any(map(importlib.util.find_spec, {ABSENT}))"
    subprocess.run([sys.executable, "-c", absent], env=environment, check=True)
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--out",
        str(tmp_path / "out"),
        "--dry",
        "--parts",
        "kernels",
        "parts",
        "train",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_gpu(tmp_path / "out" / "gpu.json")
    assert result.dry
    assert result.tests.status == 0
    assert list(result.parts) == ["kernels", "parts", "train"]
    assert result.parts.pop("kernels").numbers
    for name, part in result.parts.items():
        assert part.bench == read_bench(tmp_path / "out" / name / "bench.json")
        assert len(part.bench.points) == 1
        assert all(check.passed for check in part.bench.checks)
