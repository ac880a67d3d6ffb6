"""Fixtures that tests of several commands share.

Without a GPU, Triton's kernels run in its interpreter, which has to be asked for before anything imports Triton.
"""

import os
import re

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

BAR = re.compile(r"\d+%\||\[\d\d:\d\d(<|,)")  # a line of a progress bar


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from study_helpers import write_text  # not in every environment that these fixtures are read in

    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture
def refused(capsys):
    """Runs a command; its one line on stderr, after exit status 2."""

    from query_experts.cli import main

    def check(argv, *words):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        lines = [line for line in re.split(r"[\r\n]+", error) if line.strip() and not BAR.search(line)]
        assert len(lines) == 1, lines
        assert lines[0].startswith("query-experts: ")
        for word in words:
            assert word in lines[0]
        return lines[0]

    return check
