"""The built wheel holds the whole package and works in an environment without the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from query_experts import __version__
from query_experts.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")

USE = """
import sys
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import torch

import query_experts
from query_experts import GQEConfig, GQEForCausalLM

installed, environment = Path(query_experts.__file__).resolve(), Path(sys.prefix).resolve()
assert environment in installed.parents, installed
assert version("query-experts") == query_experts.__version__
assert (files("query_experts") / "py.typed").is_file()
assert (files("query_experts") / "recipes" / "demo.yaml").is_file()
assert [e.value for e in entry_points(group="vllm.general_plugins", name="query_experts")]
config = GQEConfig(
    vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, active_query_experts=1,
)
out = GQEForCausalLM(config)(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))
assert out.logits.shape == (1, 3, 11) and out.loss.isfinite()
print("used", installed)
"""


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built by the setuptools that is here from a copy of the sources: building leaves folders."""
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip(f"setuptools is {setuptools}; building offline needs 77 or newer here")
    copied, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(path, copied / name, ignore=ignore) if path.is_dir() else shutil.copy(path, copied / name)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", built, copied, cwd=built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment that holds the wheel, and finds what it needs among the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # a path in a .pth file: the .pth files there, an editable install's among them, aren't read
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    return folder


def test_the_wheel_holds_each_file_of_the_package_and_no_other(wheel):
    source = ROOT / "src"
    package = {p.relative_to(source).as_posix() for p in source.glob("query_experts*/**/*") if p.is_file()}
    held = set(zipfile.ZipFile(wheel).namelist())
    information = f"query_experts-{__version__}.dist-info/"
    package = {name for name in package if "__pycache__" not in name and ".egg-info/" not in name}
    assert {name for name in held if not name.startswith(information)} == package
    assert information + "licenses/LICENSE" in held


@pytest.mark.full
def test_the_installed_wheel_is_what_is_imported_and_it_works(environment, tmp_path):
    said = run(environment / "bin" / "python", "-c", USE, cwd=tmp_path)
    assert str(ROOT) not in said


def test_the_installed_command_runs_outside_the_checkout(environment, tmp_path):
    command = environment / "bin" / "query-experts"
    helped = run(command, "--help", cwd=tmp_path)
    assert all(name in helped for name in COMMANDS)
    assert __version__ in run(command, "--version", cwd=tmp_path)
    for name in COMMANDS:
        assert f"query-experts {name}: {COMMANDS[name]}" in run(command, name, "--help", cwd=tmp_path)
