"""The scripts and the notebook of examples/ run, and show what their page says. (serve.py: tests/vllm_plugin.)"""

import ast
import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from query_experts import GQEForCausalLM
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from rank_helpers import outcomes, start_ranks
from recipe_helpers import check_launch
from study_helpers import write_text

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "routing.ipynb"
ONE_LINE = re.compile(r"^CHECKPOINT = None", re.MULTILINE)


def printed_by(name, *argv):
    """Runs a script in this process. -> what it printed."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *map(str, argv)]), contextlib.redirect_stdout(out):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return out.getvalue()


def cells(kind):
    return [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
        if kind == cell["cell_type"]
    ]


def run_notebook(checkpoint):
    """Runs the notebook's code with a checkpoint, or with one step of training. -> its names."""
    names = {}
    for code in cells("code"):
        code = ONE_LINE.sub(f"CHECKPOINT = {checkpoint and str(checkpoint)!r}", code).replace(
            "STEPS = 150", "STEPS = 1"
        )
        *before, last = ast.parse(code).body
        exec(compile(ast.Module(before, []), str(NOTEBOOK), "exec"), names)
        if isinstance(last, ast.Expr):
            names["shown"] = eval(ast.unparse(last), names)
            if hasattr(names["shown"], "_repr_html_"):
                names["page"] = names["shown"]._repr_html_()
        else:
            exec(ast.unparse(last), names)
    return names


@pytest.fixture(scope="module")
def distilled(text, tmp_path_factory):
    """What convert_and_distill.py prints, and the folder that it writes."""
    folder = tmp_path_factory.mktemp("example")
    return printed_by("convert_and_distill.py", "--text", text, "--steps", 2, "--out", folder), folder


def test_the_layer_trains_in_a_plain_loop_and_every_load_is_printed(text):
    lines = printed_by("train_layer.py", "--text", text, "--steps", 2).splitlines()
    assert lines[0].startswith("step 2: loss ")
    assert lines[1].startswith("held-out loss: ")
    loads = [line.partition("group: ")[2].split(" | ") for line in lines[2:]]
    assert [len(layer) for layer in loads] == [4] * 4
    for group in itertools.chain(*loads):
        assert sum(int(share.rstrip("%")) for share in group.split()) in (99, 100, 101)


@pytest.mark.parametrize("script", ["train_layer.py", "convert_and_distill.py"])
def test_a_text_that_is_too_short_is_refused_in_one_sentence(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        printed_by(script, "--text", write_text(tmp_path / "text.txt", lines=2))
    assert "--text holds" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", ["train_layer.py", "convert_and_distill.py"])
@pytest.mark.parametrize(
    ("name", "steps", "words"),
    [
        ("absent.txt", 2, "absent.txt, which can't be read: "),
        (".", 2, "can't be read: "),
        ("x.txt", 0, "--steps is 0;"),
    ],
)
def test_an_unreadable_text_and_no_step_are_refused_in_one_sentence(script, name, steps, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        printed_by(script, "--text", tmp_path / name, "--steps", steps)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_text_that_is_not_utf_8_is_refused_where_it_is_read_as_text(tmp_path, capsys):
    (tmp_path / "x.txt").write_bytes(b"caf\xe9" * 9999)
    with pytest.raises(SystemExit, match="2"):
        printed_by("convert_and_distill.py", "--text", tmp_path / "x.txt")
    assert "x.txt, which can't be read: 'utf-8' codec" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("top_k", [0, -1, 3])
def test_a_wrong_top_k_is_refused_before_anything_is_trained(text, top_k, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"), mock.patch("query_experts.training.GQETrainer.train") as train:
        printed_by("convert_and_distill.py", "--text", text, "--steps", 2, "--top-k", top_k, "--out", tmp_path)
    assert f"top_k is {top_k}; it must be" in capsys.readouterr().err.splitlines()[-1]
    assert not train.called


def test_how_much_of_a_text_is_read_is_printed(distilled, text):
    held = len(Path(text).read_text(encoding="utf-8"))
    assert distilled[0].startswith(f"reads {min(held, 2 * 8 * 8 * 64):,} of {held:,} characters of text\n")


def test_a_dense_llama_is_made_converted_and_distilled(distilled):
    printed, folder = distilled
    found = [line.removeprefix("held-out loss, ").rsplit(": ", 1) for line in printed.splitlines() if "loss, " in line]
    losses = {name: float(loss) for name, loss in found}
    assert list(losses) == ["dense", "all experts active", "k = 1, before training", "k = 1, after training"]
    assert losses["all experts active"] == losses["dense"]
    assert losses["k = 1, after training"] != losses["k = 1, before training"]
    assert GQEForCausalLM.from_pretrained(folder).config.active_query_experts == 1


def test_the_notebook_shows_the_routing_of_a_tiny_model_that_it_trains():
    names = run_notebook(None)
    assert names["load"].sum(-1).allclose(names["load"].new_tensor(1.0))
    assert 0 < names["entropy"].min() <= names["entropy"].max() <= 1 + 1e-6
    assert names["page"].count("<h4>") == names["groups"] == 2
    assert names["page"].count("<span") == 2 * (names["length"] + names["experts"])


def test_one_changed_line_shows_the_routing_of_a_checkpoint(distilled):
    names = run_notebook(distilled[1])
    assert names["load"].shape == (2, 4, 2)
    assert names["page"].count("<h4>") == 4


def test_the_notebook_holds_no_outputs_and_says_so():
    held = json.loads(NOTEBOOK.read_text("utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in held["cells"])
    assert "No outputs are stored" in cells("markdown")[0]
    assert held["metadata"]["kernelspec"]["name"] == "python3"
    assert len(ONE_LINE.findall(cells("code")[0])) == 1


@pytest.mark.full
def test_jupyter_runs_the_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: pip install query-experts[full]")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace("STEPS = 150", "STEPS = 2")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = {kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
    assert {"text/html", "image/png"} <= kinds


STAND_INS = {  # of Slurm's commands; srun waits for its status or for SIGTERM
    "srun": 'echo "$*" > srun; trap "exit 7" TERM; echo $$ > pid; until [ -e end ]; do sleep 0.05; done; exit $(<end)',
    "scancel": 'echo "$*" >> asked; kill -TERM $(cat pid)',
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$*" >> asked; fi',
    "query-experts": "",
}


@pytest.fixture
def slurm_job(tmp_path):
    """Starts the job in a folder where stand-ins for Slurm's commands write what they are asked."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "70001", "SLURM_NNODES": "8", "SLURM_JOB_NODELIST": "node[1-8]", "SLURM_GPUS_ON_NODE": "8",
           "SLURM_CPUS_PER_TASK": "64"}  # fmt: skip
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start(*words):
        return subprocess.Popen(["bash", str(EXAMPLES / "slurm.sh"), *words], cwd=tmp_path, env=environment)

    return start


@pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers below 5.20 doesn't share models of this kind")
def test_the_slurm_job_starts_torchrun_on_its_nodes_and_ends_as_the_run_does(slurm_job, tmp_path, monkeypatch):
    (tmp_path / "end").write_text("2")
    assert slurm_job("--preset", "7b", "--data", "TOKENS", "--fsdp_size", "8").wait(timeout=20) == 2
    assert not (tmp_path / "asked").exists()
    started = (tmp_path / "srun").read_text().replace(f"{tmp_path}/", "")
    assert "--rdzv_endpoint node1:20001 " in started
    own = "--cpus-per-task 64 "
    assert started.startswith(own)
    settings = check_launch(started.removeprefix(own), monkeypatch)
    assert (settings.hidden_size, settings.fsdp_size, settings.data) == (4096, 8, ["TOKENS"])


def test_the_slurm_job_stops_the_run_before_its_end_and_is_requeued(slurm_job, tmp_path):
    job = slurm_job("--preset", "7b")
    deadline = time.monotonic() + 20
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 7
    assert (tmp_path / "asked").read_text().splitlines() == ["--signal=TERM 70001", "requeue 70001"]


@pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers below 5.20 doesn't share models of this kind")
def test_the_script_with_a_shared_model_trains_and_goes_on(tmp_path):
    command = [str(EXAMPLES / "sharded.py"), str(tmp_path)]
    ended = outcomes(start_ranks(command, 2))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2]
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8")
    ended = outcomes(start_ranks(command, 2))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == whole
    GQEForCausalLM.from_pretrained(tmp_path / "model")
