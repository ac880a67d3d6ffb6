"""examples/serve.py: starts a server, asks it once, and stops it."""

import runpy
import sys
from pathlib import Path

from serving_helpers import byte_tokenizer, save_checkpoint, sure_cases
from test_server import SMALL, STEPS

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve.py"
PROMPTS = ["def ", "import os\n", "The router selects ", "class Layer:", "0123456789"]


def test_the_example_prints_the_answer_of_a_server_that_it_stops(tmp_path, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    model = save_checkpoint(tmp_path, active_query_experts=1)
    case = sure_cases(model, [tokenizer(prompt).input_ids for prompt in PROMPTS], STEPS)[0]
    prompt, expected = tokenizer.decode(case.prompt), tokenizer.decode(case.continuation)
    argv = ["--prompt", prompt, "--max-tokens", STEPS, *SMALL, "--enforce-eager", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (SCRIPT, tmp_path, *argv)])
    names = runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{prompt}{expected}\n")
    assert not names["answers"](names["url"])
