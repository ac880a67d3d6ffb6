"""dev/ladder.sh, with a program in place of the queue that says when it has saved."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from queue_helpers import LADDER

SCRIPT = Path(__file__).resolve().parents[3] / "dev" / "ladder.sh"
QUEUE = """#!/usr/bin/env bash
trap 'sleep 0.5; echo saved; exit 143' TERM
echo "nice $(nice), by $0: $*"
while [ "$2" = run ]; do sleep 0.05; done
"""
TABLES = """from pathlib import Path
for page in ("README.md", "docs/results.md", "docs/plots/ladder.svg", "docs/plots/ladder.png"):
    Path(page).write_text(str([*Path("results").iterdir()]))
"""
MAKEFILE = f""".venv/.installed-study:
	mkdir -p .venv/bin
	cp queue .venv/bin/query-experts
	printf '#!/bin/sh\\nexec {sys.executable} "$$@"\\n' >.venv/bin/python
	chmod +x .venv/bin/*
	touch $@
"""

pytestmark = pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid, which Linux has")


class Tree:
    """A repository with the script, whose environment holds QUEUE."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "runs" / "ladder"
        (folder / "dev").mkdir()
        shutil.copy(SCRIPT, folder / "dev")
        (folder / "Makefile").write_text(MAKEFILE)
        (folder / "queue").write_text(QUEUE)
        (folder / "benchmarks").mkdir()
        (folder / "benchmarks" / "ladder_tables.py").write_text(TABLES)
        (folder / "docs" / "plots").mkdir(parents=True)
        for plot in ("ladder.svg", "ladder.png", "another.svg"):
            (folder / "docs" / "plots" / plot).write_text("none")
        (folder / "docs" / "results.md").write_text("none")
        (folder / "README.md").write_text("none")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "One")
        self.write_ladder("")

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def write_ladder(self, more: str) -> None:
        (self.folder / "ladder.yaml").write_text(yaml.safe_dump(LADDER) + more)

    def call(self, *words: str, status: int = 0) -> str:
        names = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "A",
                 "GIT_COMMITTER_EMAIL": "a@b", "LADDER": "ladder.yaml"}  # fmt: skip
        done = subprocess.run(
            [self.folder / "dev" / "ladder.sh", *words],
            env=os.environ | names,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *words: str) -> None:
        self.call("start", *words)
        until(lambda: all(self.log(number) for number in self.pids()))

    def log(self, number: int) -> str:
        return (self.out / f"worker-{number}.log").read_text()

    def pids(self) -> dict[int, int]:
        return {int(file.stem.split("-")[1]): int(file.read_text()) for file in self.out.glob("worker-*.pid")}


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    yield tree
    tree.call("stop")


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def state(pid: int) -> str:
    """T for stopped, S or R for at work; empty for none."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout[:1]


def test_a_second_start_adds_workers_which_pause_and_resume_with_the_first(tree):
    tree.start("2", "--data", "my texts")
    tree.start()
    pids = tree.pids()
    assert sorted(pids) == [1, 2, 3]
    assert len({*pids.values()}) == 3
    assert "nice 19, by " in tree.log(1)
    assert f"scaling run {tree.folder}/ladder.yaml --out {tree.out} --data my texts" in tree.log(2)
    tree.call("pause")
    until(lambda: {state(pid) for pid in pids.values()} == {"T"})
    tree.call("resume")
    until(lambda: "T" not in {state(pid) for pid in pids.values()})


@pytest.mark.parametrize("workers", ["-1", "0", "two"])
def test_a_number_of_workers_that_is_none_is_refused(tree, workers):
    assert f"WORKERS is {workers}; it must be a number of workers, 1 or more" in tree.call("start", workers, status=2)
    assert tree.pids() == {}


def test_a_worker_that_ends_at_once_is_told_with_its_reason(tree):
    (tree.folder / "queue").write_text("#!/bin/sh\necho first\necho 'data is missing' >&2\nexit 2\n")
    assert "worker 1 has ended: data is missing" in tree.call("start", status=2)
    (tree.folder / ".venv" / "bin" / "query-experts").write_text("#!/bin/sh\nexit 2\n")
    assert "worker 1 has ended: " in tree.call("start", status=2)


def test_help_says_what_there_is(tree):
    for words, status in ((["--help"], 0), (["-h"], 0), ([], 2), (["dance"], 2)):
        said = tree.call(*words, status=status)
        assert "dev/ladder.sh harvest" in said
        assert said.splitlines()[-1] == "Without a tag in the ladder, the code is that of this working tree."


def test_stop_returns_when_all_have_saved_even_paused_ones(tree):
    tree.start("2")
    tree.call("pause")
    tree.call("stop")
    assert [tree.log(number).count("saved") for number in (1, 2)] == [1, 1]
    assert [*tree.out.glob("*.pid"), *tree.out.glob("stopping-*")] == []


def test_a_number_that_another_program_has_by_now_is_left_alone(tree):
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        tree.out.mkdir(parents=True)
        (tree.out / "worker-1.pid").write_text(f"{stranger.pid}\n")
        tree.call("pause")
        assert state(stranger.pid) == "S"
        assert tree.pids() == {}
        (tree.out / "worker-1.pid").write_text(f"{stranger.pid}\n")
        tree.start()
        assert [*tree.pids()] == [1]
        assert tree.pids()[1] != stranger.pid
        tree.call("stop")
        assert stranger.poll() is None
    finally:
        stranger.send_signal(signal.SIGKILL)
        stranger.wait()


def test_without_a_tag_the_code_is_that_of_the_working_tree(tree):
    assert f"by {tree.folder}/.venv/bin/query-experts: scaling status" in tree.call("status")


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_tag_is_read_as_yaml_and_its_code_kept_apart(tree, quote):
    commit = tree.git("rev-parse", "HEAD").strip()
    tree.write_ladder(f"tag: {quote}one{quote}  # the first\ncommit: {quote}{commit}{quote}  # of main\n")
    assert f"by {tree.out}/code-one/.venv/bin/query-experts: scaling status" in tree.call("status")
    assert "by ./.venv/bin/query-experts: scaling fit" in tree.call("fit")
    tree.write_ladder("tag: two\ncommit: abcdef123\n")
    assert "is 'abcdef123', which this repository lacks" in tree.call("status", status=2)


def test_a_tag_whose_commit_moves_takes_its_code_along_once_no_worker_runs(tree):
    old = tree.git("rev-parse", "HEAD").strip()
    tree.git("commit", "--quiet", "--allow-empty", "--message", "Two")
    new = tree.git("rev-parse", "HEAD").strip()
    code = ["git", "-C", str(tree.out / "code-one"), "rev-parse", "HEAD"]
    tree.write_ladder(f"tag: one\ncommit: {old}\n")
    tree.start()
    tree.write_ladder(f"tag: one\ncommit: {new}\n")
    assert f"commit of {tree.folder}/ladder.yaml is '{new}', and workers run another" in tree.call("start", status=2)
    tree.call("status")
    assert subprocess.check_output(code, text=True).strip() == old
    tree.call("stop")
    tree.start()
    assert subprocess.check_output(code, text=True).strip() == new


def test_a_file_that_is_no_ladder_is_refused_in_a_sentence(tree):
    (tree.folder / "ladder.yaml").write_text("a: [")
    assert "ladder.yaml; it must be a ladder's file" in tree.call("start", status=2)
    (tree.folder / "ladder.yaml").unlink()
    assert "LADDER is ladder.yaml, which doesn't exist; it must be" in tree.call("status", status=2)


def test_harvest_commits_results_once(tree):
    assert "where no run has finished yet" in tree.call("harvest", status=2)
    (tree.folder / "results").mkdir()
    (tree.folder / "results" / "a.json").write_text("{}")
    assert "Results of the ladder" in tree.call("harvest")
    assert tree.call("harvest") == "No new results.\n"
    changed = tree.git("show", "--name-only", "--format=").split()
    plots = ["docs/plots/ladder.png", "docs/plots/ladder.svg"]
    assert changed == ["README.md", *plots, "docs/results.md", "results/a.json"]
    assert tree.git("show", "HEAD:docs/results.md") == "[PosixPath('results/a.json')]"


def test_harvest_refuses_damaged_results_and_those_outside_of_the_repository(tree):
    (tree.folder / "results").mkdir()
    (tree.folder / "results" / "a.json").write_text("{")
    refusing = "#!/bin/sh\necho 'results hold a.json, which is damaged' >&2\nexit 2\n"
    tree.call("status")
    (tree.folder / ".venv" / "bin" / "query-experts").write_text(refusing)
    assert "results hold a.json, which is damaged" in tree.call("harvest", status=2)
    assert tree.git("status", "--porcelain", "results").strip() == "?? results/"
    outside = tree.folder.parent / f"{tree.folder.name}-results"
    outside.mkdir()
    (tree.folder / "ladder.yaml").write_text(yaml.safe_dump(LADDER | {"results": f"../{outside.name}"}))
    assert "to be committed it must be within this repository" in tree.call("harvest", status=2)


def test_harvest_takes_results_alone_and_no_page_with_other_changes(tree):
    (tree.folder / "results").mkdir()
    (tree.folder / "results" / "a.json").write_text("{}")
    (tree.folder / "results" / "b.json.12.part").write_text("{")
    (tree.folder / "README.md").write_text("by hand")
    before = tree.git("rev-parse", "HEAD")
    assert "docs/plots/ladder.svg docs/plots/ladder.png have changes, which must be committed" in tree.call(
        "harvest", status=2
    )
    assert (tree.git("rev-parse", "HEAD"), (tree.folder / "README.md").read_text()) == (before, "by hand")
    tree.git("checkout", "README.md")
    (tree.folder / "docs" / "plots" / "another.svg").write_text("by hand")
    tree.call("harvest")
    assert tree.git("diff", "--name-only").split() == ["docs/plots/another.svg"]
    assert "part" not in tree.git("show", "--name-only", "--format=")
