"""Files that other tools read: versions and targets that they name are the repository's, and their form is valid."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from check_jsonschema import main as check_schema

from query_experts import __version__

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CITATION = ROOT / "CITATION.cff"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def versions(name):
    """Package -> version, of a file of constraints."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def values(node, key):
    """Each value of a key, at any depth of a workflow."""
    if isinstance(node, list):
        return [value for item in node for value in values(item, key)]
    if not isinstance(node, dict):
        return []
    return [value for name, item in node.items() for value in [*([item] if name == key else []), *values(item, key)]]


def flat(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize(
    ("schema", "path"),
    [("vendor.citation-file-format", CITATION), *(("vendor.github-workflows", path) for path in WORKFLOWS)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_file_follows_the_schema_of_its_kind(schema, path):
    with pytest.raises(SystemExit) as ended:
        check_schema(["--builtin-schema", schema, "--default-filetype", "yaml", str(path)])
    assert not ended.value.code


def test_the_citation_names_this_version_the_license_and_the_paper_of_the_project():
    cited = read(CITATION)
    assert (cited["version"], cited["license"]) == (__version__, PROJECT["license"])
    assert [paper["url"] for paper in cited["references"]] == [PROJECT["urls"]["Paper"]]


def test_the_hooks_before_a_commit_have_the_versions_of_the_constraints():
    pinned = versions("constraints.txt")
    hooks = {hook["repo"].rsplit("/", 1)[-1]: hook for hook in read(ROOT / ".pre-commit-config.yaml")["repos"]}
    assert set(hooks) == {"ruff-pre-commit", "check-jsonschema", "local"}
    assert hooks["ruff-pre-commit"]["rev"] == f"v{pinned['ruff']}"
    assert hooks["check-jsonschema"]["rev"] == pinned["check-jsonschema"]
    assert [hook["entry"] for hook in hooks["local"]["hooks"]] == [".venv/bin/mypy"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_targets_of_the_makefile_on_the_supported_pythons(path):
    workflow = read(path)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    runs = values(workflow, "run")
    named = {word for run in runs for word in re.findall(r"make ([a-z-]+)", run)}
    named |= {target for matrix in values(workflow, "matrix") for target in matrix.get("target", [])}
    assert named
    assert named <= targets
    supported = {kind.rsplit(" ", 1)[-1] for kind in PROJECT["classifiers"] if " :: Python :: " in kind}
    pythons = {one for value in values(workflow, "python-version") + values(workflow, "python") for one in flat(value)}
    assert pythons - {"${{ matrix.python }}"} == supported


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_its_jobs_end_and_its_actions_are_pinned(path):
    workflow = read(path)
    assert values(workflow, "permissions") == [{"contents": "read"}]
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())
    text = path.read_text(encoding="utf-8")
    pinned = re.findall(r"uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", text, re.MULTILINE)
    assert len(pinned) == text.count("uses: ") > 0


def test_there_are_workflows():
    assert WORKFLOWS
