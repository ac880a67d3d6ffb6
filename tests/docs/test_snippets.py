"""The Python and the commands that the pages show work as they stand there. (docs/integrations.md: test_page.py.)"""

import base64
import contextlib
import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from query_experts.cli import COMMANDS, main
from study_helpers import model_of, write_text

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_of(page):
    return [code for kind, code in FENCED.findall(page.read_text(encoding="utf-8")) if kind == "python"]


def commands_of(page):
    """Lines of code blocks, fenced and indented, without what follows a #."""
    page = page.read_text(encoding="utf-8")
    fenced = [line for kind, code in FENCED.findall(page) if kind != "python" for line in code.splitlines()]
    indented = re.findall(r"^    (.+)$", FENCED.sub("", page), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in [*fenced, *indented]]


def for_training():
    for number in range(60):
        write_text(Path("my-texts", f"{number}.txt"), seed=number)
    return {}


def for_converting():
    rows = torch.randint(300, (10, 16))
    return {"dense": model_of("dense"), "token_ids": rows, "dataset": [{"input_ids": x, "labels": x} for x in rows]}


def for_serving():
    model = model_of("gqe")
    experts = torch.stack([model.config.active_query_experts * torch.tensor([1, 2])] * 2).expand(9, 2, 2)
    file = io.BytesIO()
    np.save(file, experts.numpy())
    choice = SimpleNamespace(routed_experts=base64.b64encode(file.getvalue()).decode())
    return {"reply": SimpleNamespace(choices=[choice]), "model": model, "tokens": torch.randint(300, (1, 10))}


SETUPS = {"training.md": for_training, "converting.md": for_converting, "serving.md": for_serving}
CHECKS = {  # page -> what must hold of its names afterwards
    "quickstart.md": lambda names: names["loss"].isfinite(),
    "layer.md": lambda names: names["layer"].num_kv_heads == 4 and names["layer"].top_k == 1,
    "model.md": lambda names: names["text"].shape == (2, 12) and Path("checkpoint", "config.json").is_file(),
    "training.md": lambda names: names["trainer"].state.global_step == 2,
    "converting.md": lambda names: (
        names["trainer"].state.global_step == 2 and names["model"].config.active_query_experts == 1
    ),
    "serving.md": lambda names: names["logits"].shape == (1, 9, 300),
}
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9_-]*)")
OF_OTHERS = {  # options of vLLM, of launchers, and of scripts in benchmarks/
    "distributed.md": {
        "multi_gpu",
        "nnodes",
        "nproc_per_node",
        "num_processes",
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
    },
    "serving.md": {"model", "max_model_len", "enable_return_routed_experts", "hf_overrides"},
    "benchmarks.md": {"cases", "result", "teacher"},
}
WORK = {  # of commands that would begin at once
    "compare": "study.compare.compare",
    "train": "study.single.train",
    "distill": "study.distill.distill",
    "bench": "bench.run.bench",
    "data": "data.command.prepare_tokens",
    "plan": "plan.run.plan",
    "scaling": "study.ladder.worker.run_queue",
}
ACTIONS = [
    f"study.ladder.{work}" for work in ("status.print_status", "read.print_laws", "read.report", "tokens.write_tokens")
]
WITH_PYTHON = [page for page in DOCS if python_of(page) and page.name != "integrations.md"]


def test_every_page_that_shows_python_is_checked():
    assert {page.name for page in WITH_PYTHON} == set(CHECKS)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = SETUPS.get(page.name, dict)()
    for snippet in python_of(page):
        exec(snippet.replace("max_steps=1000", "max_steps=2, report_to='none', use_cpu=True"), names)
    assert CHECKS[page.name](names)


def test_the_snippets_of_the_readme_run():
    layer, model = python_of(README)
    names = {}
    exec(layer, names)
    names["loss"].backward()
    assert names["layer"].router.weight.grad.any()
    with torch.device("meta"):  # a model of 250M parameters
        exec(model, names)
    assert 2e8 < names["model"].num_parameters() < 3e8


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_the_commands_of_a_page_are_understood(page, monkeypatch, capsys, tmp_path):
    asked = []
    for work in (*WORK.values(), *ACTIONS):
        monkeypatch.setattr(f"query_experts.{work}", lambda settings, console: asked.append(settings) or True)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # pages name recipes; runs/ may hold what they name
    monkeypatch.chdir(tmp_path)
    for words in commands_of(page):
        if words[:1] != ["query-experts"]:
            continue
        # DENSE, TEXT and the like are the reader's
        argv = [str(tmp_path / word) if word.isupper() and len(word) > 2 else word for word in words[1:]]
        status, error = main(argv), capsys.readouterr().err
        if argv[0] in WORK:
            assert status == 0, (argv, error)
            asked.pop().check()
        else:  # understood, but there is no such folder here
            assert status == 2, argv
            assert error.startswith("query-experts: "), argv
            assert not re.search(r"--help|command is", error), error
            assert any(word in error for word in argv[1:] if "/" in word), error
    assert not asked


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=lambda page: page.name)
def test_the_targets_and_scripts_of_a_page_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = {words[words.index("make") + 1] for words in commands_of(page) if "make" in words}
    assert named | set(re.findall(r"`make ([\w-]+)", text)) <= targets
    scripts = {words[1] for words in commands_of(page) if words[:1] == ["python"] and words[1] != "-m"}
    assert not [script for script in scripts if not (ROOT / script).is_file()]


@pytest.fixture(scope="module")
def known_options():
    """Every command's options, as its help names them."""
    options = {"help"}
    for command in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([command, "--help"])
        options |= set(OPTION.findall(printed.getvalue()))
    assert len(options) > 50
    return {option.replace("-", "_") for option in options}


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_the_options_that_a_page_names_exist(page, known_options):
    named = {option.replace("-", "_") for option in OPTION.findall(page.read_text(encoding="utf-8"))}
    assert named - known_options <= OF_OTHERS.get(page.name, set())


def test_the_readme_lists_every_command_and_its_page():
    listed = re.findall(
        r"^\| `query-experts (\w+)` \|.*\]\((docs/\w+\.md)\) \|$", README.read_text("utf-8"), re.MULTILINE
    )
    assert {command for command, _ in listed} == set(COMMANDS)
    for command, page in listed:
        assert f"query-experts {command} " in (ROOT / page).read_text(encoding="utf-8"), page
