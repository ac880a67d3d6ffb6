"""The launches on the page on several GPUs are understood at their size, and run on two ranks at a small one."""

import re
from pathlib import Path

import pytest

from query_experts import GQEForCausalLM
from query_experts.cli import main
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from rank_helpers import outcomes, start_ranks
from recipe_helpers import ROOT, as_words, check_launch, launched, shrunk

PAGE = ROOT / "docs" / "distributed.md"
LINES = re.findall(r"^    (\S.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
sharded = pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers below 5.20 doesn't share models of this kind")
OF_ONE_NODE = [line for line in LINES if line.startswith("torchrun --nproc_per_node")]


def small(line: str, text: str) -> list[str]:
    """The words of query-experts in a launch, with options that make it one of two processes and of a few steps."""
    words = launched(line)[1]
    options = shrunk(words[words.index("--preset") + 1]) | {"data": text}
    if "--tp_size" in words:
        options |= {"fsdp_size": 1, "tp_size": 2}
    elif "--fsdp_size" in words:
        options |= {"fsdp_size": 2}
    return [*words, *as_words(options)]


@sharded
@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_launch_of_the_page_is_understood_on_as_many_processes_as_it_starts(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = check_launch(line, monkeypatch)
    assert settings.data == ["TOKENS"]
    assert settings.global_batch_size == settings.sequences_per_step


def test_the_page_shows_copies_shards_and_shared_layers():
    given = [{word for word in line.split() if word in ("--fsdp_size", "--tp_size")} for line in OF_ONE_NODE]
    assert given == [set(), {"--fsdp_size"}, {"--fsdp_size", "--tp_size"}]


@sharded
@pytest.mark.parametrize("line", [
    pytest.param(OF_ONE_NODE[1], id="fsdp"), pytest.param(OF_ONE_NODE[2], marks=pytest.mark.full, id="tp"),
])  # fmt: skip
def test_a_launch_of_the_page_takes_its_first_steps_on_two_ranks(line, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = outcomes(start_ranks(["-m", "query_experts.cli", *small(line, text)], 2))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    words = launched(line)[1]
    GQEForCausalLM.from_pretrained(Path(words[words.index("--out") + 1]) / "model")


@pytest.mark.full
def test_two_ranks_go_on_with_the_page_s_run_in_one_process(text, tmp_path, monkeypatch):
    alone, copies = LINES[0], OF_ONE_NODE[0]
    monkeypatch.chdir(tmp_path)
    assert main([*small(alone, text), "--stop_after_minutes", "0"]) == 1
    assert [path.name for path in Path("runs/paper/checkpoints").iterdir()] == ["checkpoint-1"]
    ended = outcomes(start_ranks(["-m", "query_experts.cli", *small(copies, text)], 2))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    assert Path("runs/paper/model/config.json").is_file()
