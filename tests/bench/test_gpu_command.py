"""The GPU suite without a GPU: its parts are benchmarks that can run, and it needs no package of the extras."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
import gpu_kernels
from query_experts.bench import settings as bench_settings
from query_experts.bench.results import GpuResult, PartOutcome, PytestOutcome, read_bench, read_gpu, write_gpu
from query_experts.bench.run import points_of
from query_experts.bench.settings import SUITES
from query_experts.common import timing
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
    assert [name for name in names if gpu.PARTS[name].settings is None] == list(gpu_kernels.STEPS) == names[:3]
    wanted = names[: names.index("decode") + 1]
    assert gpu.TEST_SECONDS + sum(gpu.PARTS[name].seconds for name in wanted) <= 60 * gpu.MINUTES + 60


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


@pytest.mark.parametrize(("bandwidth", "parts"), [(1.7e12, ["ceilings", "kernels"]), (1.9e12, [*gpu.PARTS][:4])])
def test_nothing_more_is_timed_once_a_kernel_is_far_below_the_memory(tmp_path, monkeypatch, bandwidth, parts):
    numbers = {
        "prepare_4096_bytes_per_s": 1e12,
        "prepare_32768_bytes_per_s": 2e12,
        "combine_32768_bytes_per_s": bandwidth,
    }
    monkeypatch.setattr(gpu, "run_part", lambda *args: PartOutcome(0, None, None, numbers))
    monkeypatch.setattr(gpu, "run_tests", lambda dry: PytestOutcome(0, ["2 passed"]))
    assert list(gpu.run_all([*gpu.PARTS][:4], tmp_path, 9.0, False).parts) == parts


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
