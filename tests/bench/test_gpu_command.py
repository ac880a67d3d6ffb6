"""The GPU suite without a GPU: its parts are benchmarks that can run, and it needs no package of the extras."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
from query_experts.bench import settings as bench_settings
from query_experts.bench.results import read_bench, read_gpu
from query_experts.bench.run import points_of
from query_experts.bench.settings import SUITES

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
    suites = set()
    for part in gpu.PARTS.values():
        for settings in (part, gpu.dry(part)):
            settings.check()
            assert list(points_of(settings))
        suites |= set(part.suites)
    assert suites == set(SUITES)


@pytest.mark.full
def test_it_runs_with_torch_transformers_triton_and_pytest_only(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)  # in child processes too
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": "-p no:hypothesispytest"}
    absent = f"import importlib.util; assert not any(map(importlib.util.find_spec, {ABSENT}))"
    subprocess.run([sys.executable, "-c", absent], env=environment, check=True)
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "out"), "--dry", "--parts", "parts", "wide"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_gpu(tmp_path / "out" / "gpu.json")
    assert result.dry
    assert result.tests.status == 0
    assert list(result.parts) == ["parts", "wide"]
    for name, part in result.parts.items():
        assert part.bench == read_bench(tmp_path / "out" / name / "bench.json")
        assert len(part.bench.points) == 2
        assert all(check.passed for check in part.bench.checks)
