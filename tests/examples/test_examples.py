"""The scripts and the notebook of examples/ run, and show what their page says."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest

from query_experts import GQEForCausalLM
from study_helpers import write_text

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "routing.ipynb"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def shown(monkeypatch, capsys):
    """Runs a script in this process; what it printed."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses_of(printed):
    lines = [line.removeprefix("held-out loss, ").rsplit(": ", 1) for line in printed.splitlines() if "loss, " in line]
    return {name: float(loss) for name, loss in lines}


def test_the_layer_trains_in_a_plain_loop_and_every_load_is_printed(shown, text):
    lines = shown("train_layer.py", "--text", text, "--steps", 2).splitlines()
    assert lines[0].startswith("step 2: loss ")
    assert lines[1].startswith("held-out loss: ")
    loads = [line.partition("group: ")[2].split(" | ") for line in lines[2:]]
    assert [len(layer) for layer in loads] == [4] * 4
    for group in sum(loads, []):
        assert sum(int(share.rstrip("%")) for share in group.split()) in (99, 100, 101)


@pytest.mark.parametrize("script", ["train_layer.py", "convert_and_distill.py"])
def test_a_text_that_is_too_short_is_refused_in_one_sentence(shown, script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        shown(script, "--text", write_text(tmp_path / "text.txt", lines=2))
    assert "--text holds" in capsys.readouterr().err.splitlines()[-1]


def test_a_dense_llama_is_made_converted_and_distilled(shown, text, tmp_path):
    printed = shown("convert_and_distill.py", "--text", text, "--steps", 6, "--out", tmp_path)
    losses = losses_of(printed)
    assert list(losses) == ["dense", "all experts active", "k = 1, before training", "k = 1, after training"]
    assert losses["all experts active"] == losses["dense"]
    assert losses["k = 1, after training"] != losses["k = 1, before training"]
    assert GQEForCausalLM.from_pretrained(tmp_path).config.active_query_experts == 1
    assert last_cells(f'CHECKPOINT = "{tmp_path}"')["layers"] == 2


def last_cells(first_line):
    """Runs the notebook's code, with its first line replaced. -> its names; what each cell shows under its number."""
    names = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if number == 0:
            source = "\n".join([first_line, "STEPS = 1"])
        tree = ast.parse(source)
        *before, last = tree.body
        exec(compile(ast.Module(before, []), f"cell {number}", "exec"), names)
        shows = isinstance(last, ast.Expr)
        names[number] = eval(ast.unparse(last), names) if shows else exec(ast.unparse(last), names)
    return names
