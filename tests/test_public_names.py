"""What users import: names that must not move, and what `import query_experts` registers."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import query_experts

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SOURCE = Path(query_experts.__file__).parent
PUBLIC = [
    "from query_experts import GQEAttention, GQECausalLMOutput, GQEConfig, GQEForCausalLM, GQEModel, Routing",
    "from query_experts import GQEForQuestionAnswering, GQEForSequenceClassification, GQEForTokenClassification",
    "from query_experts import GQEQuestionAnsweringOutput, GQESequenceClassifierOutput, GQETokenClassifierOutput",
    "from query_experts import __version__",
    "from query_experts.convert import from_dense, from_reference",
    "from query_experts.data import prepare",
    "from query_experts.training import GQETrainer, LoggedCallback",
    "from query_experts.telemetry import Telemetry",
    "from query_experts.distillation import DistillationTrainer, TopKSchedule",
    "from query_experts.liger import register",
    "from query_experts.replay import replayed_routing",
    "from query_experts.cli import main",
]
PACKAGES = [
    "common", "ops", "layers", "model", "distributed", "data", "convert", "study", "plan", "bench", "evaluate",
    "serving",
]  # fmt: skip
# a package imports only packages before it in this order, but study, bench and evaluate don't import one another
BELOW = {
    "common": set(),
    "ops": {"common"},
    "layers": {"common", "ops"},
    "model": {"common", "ops", "layers"},
    "distributed": {"common", "model"},
    "data": {"common"},
    "convert": {"common", "ops", "layers", "model", "data"},
    "study": {"common", "ops", "layers", "model", "distributed", "data"},
    "plan": {"common", "model", "distributed", "study"},
    "bench": {"common", "ops", "layers", "model"},
    "evaluate": {"common", "model"},
    "serving": {"common", "ops", "layers", "model"},
}
USED_BY_STUDY = {"training", "distillation", "telemetry"}  # public files that packages may import


@pytest.mark.parametrize("statement", PUBLIC)
def test_public_names_are_where_users_import_them(statement):
    exec(statement, {})


def test_trl_users_find_the_trainer():
    pytest.importorskip("trl")
    exec("from query_experts.sft import GQESFTTrainer", {})


def test_vllm_finds_the_plug_in():
    (entry,) = {entry.value for entry in entry_points(group="vllm.general_plugins", name="query_experts")}
    assert entry == "query_experts.serving:register"


def test_importing_the_package_alone_registers_the_auto_classes():
    code = (
        "import query_experts\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "assert AutoConfig.from_pretrained('model').model_type == 'gqe'\n"
        "assert type(AutoModel.from_pretrained('model')) is query_experts.GQEModel\n"
        "assert type(AutoModelForCausalLM.from_pretrained('model')) is query_experts.GQEForCausalLM\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FIXTURES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imported(path):
    """The rooms and public files of the package that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("query_experts."):
            found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("query_experts.")}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_packages_below_it(package):
    files = sorted((SOURCE / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) - {package} <= BELOW[package] | USED_BY_STUDY, path.relative_to(SOURCE)


def test_every_folder_is_a_package_with_rules():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*PACKAGES, "recipes"}
