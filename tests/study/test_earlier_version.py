"""Folders that commit b544ad3 wrote, before modules and names changed, resume, report and load (tests/fixtures).

Losses are compared with a tolerance, as processors differ in their kernels: between two of them these runs differ by
less than 1e-4, while one optimizer step moves the loss by more than 1e-2.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from query_experts import GQEForCausalLM
from query_experts.cli import main

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TOLERANCE = {"rtol": 0, "atol": 1e-3}
SIZES = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
RUN = {
    "device": "cpu", "dtype": "float32", "seq_len": 16, "steps": 8, "batch_size": 2, "evaluations": 4,
    "validation_sequences": 4,
}  # fmt: skip


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the fixtures, as the working directory: their paths are relative."""
    folder = tmp_path / "kept"
    shutil.copytree(FIXTURES, folder)
    monkeypatch.chdir(folder)
    return folder


def options(**values):
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]


def expect_the_same_run(result, expected):
    """Everything of the earlier version's result, but for speed, machine and the last bits of losses."""
    assert list(result) == [*expected, "bits_per_byte", "routing_curve"]
    for name in ("train_curve", "validation_curve"):
        torch.testing.assert_close(torch.tensor(result[name]), torch.tensor(expected[name]), **TOLERANCE)
    for name in ("validation_loss", "teacher_loss"):
        assert result.get(name) == pytest.approx(expected.get(name), abs=TOLERANCE["atol"])
    same = ("arm", "seed", "parameters", "active_attention_heads", "dense_attention_heads", "intermediate_size",
            "flops_per_token", "kv_bytes_per_token", "train_tokens", "diverged_at_tokens", "clipped_steps")  # fmt: skip
    assert {name: result[name] for name in same} == {name: expected[name] for name in same}
    assert result["passage"]["tokens"] == expected["passage"]["tokens"]
    assert result["pieces"][0] == {**expected["pieces"][0], "instructions": None, "kernels": None}, (
        "the piece that the earlier version trained"
    )


def test_a_half_finished_run_goes_on(kept):
    argv = ["train", *options(out="train_half_finished", data="text.txt", arm="gqe", **SIZES, **RUN)]
    assert main(argv) == 0
    result = json.loads((kept / "train_half_finished" / "result.json").read_text())
    expect_the_same_run(result, json.loads((kept / "train_finished.json").read_text()))
    assert [piece["first_step"] for piece in result["pieces"]] == [0, 4]


def test_a_value_that_is_given_is_not_taken_from_the_first_demo(kept, refused):
    argv = ["train", *options(out="train_half_finished", data="text.txt", arm="gqe", **SIZES, **RUN)]
    refused([*argv, "--learning_rate", "3e-3"], "learning_rate was 0.002, now 0.003")


def test_a_half_finished_run_with_other_settings_is_refused(kept, refused):
    argv = ["train", *options(out="train_half_finished", data="text.txt", arm="gqe", **SIZES, **RUN | {"steps": 9})]
    refused(argv, "steps was 8, now 9")


def test_a_finished_comparison_is_reported_as_it_was(kept, capsys):
    assert main(["report", "compare_finished"]) == 0
    said = capsys.readouterr().out
    runs = json.loads((kept / "compare_finished" / "comparison.json").read_text())["runs"]
    assert len(runs) == 6
    for run in runs:
        assert f"{run['validation_loss']:.4f}" in said
    assert (kept / "compare_finished" / "report.html").stat().st_size > 10_000


def test_a_finished_comparison_is_not_trained_again(kept, monkeypatch):
    before = {path: path.read_bytes() for path in kept.glob("compare_finished/runs/*/result.json")}
    argv = ["compare", *options(out="compare_finished", data="text.txt", arms="dense static gqe", seeds="0 1"),
            *options(prefill_lengths="8 16", prefill_repeats=2, **SIZES, **RUN)]  # fmt: skip
    assert main(argv) == 0
    assert len(before) == 6
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("shim", [False, True], ids=["by the installed package", "by its own shim"])
def test_a_saved_model_loads_and_computes_the_same(kept, shim):
    expected = json.loads((kept / "model_logits.json").read_text())
    ids, logits = torch.tensor(expected["input_ids"]), torch.tensor(expected["logits"])
    if not shim:
        model = GQEForCausalLM.from_pretrained(kept / "model", dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
        return
    code = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert 'query_experts' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained('model', dtype=torch.float32, trust_remote_code=True).eval()\n"
        "held = json.load(open('model_logits.json'))\n"
        "with torch.no_grad():\n"
        "    logits = model(torch.tensor(held['input_ids'])).logits\n"
        "torch.testing.assert_close(logits, torch.tensor(held['logits']), rtol=0, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
