"""The commands on two ranks: killed, stopped, hung and damaged, and gone on from there."""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launched_runs import (
    COPIES,
    EACH_KIND,
    FROM_STEP,
    LAYOUTS,
    SLOW,
    curves,
    on_two_ranks,
    result,
    resuming,
    sharded,
    start,
    train_alone,
    wait_for,
    with_rank_1,
    words,
)
from rank_helpers import outcomes, start_ranks
from study_helpers import flip_a_bit


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return train_alone(tmp_path_factory.mktemp("ranks"))


KILLS = [
    ("tp", "writing", (0,)),  # between two ranks' files, or before the name
    pytest.param(("ddp", "checkpoint-3", (0, 1)), marks=SLOW),
    pytest.param(("fsdp", "checkpoint-6", (1,)), marks=SLOW),
    pytest.param(("fsdp", "writing", (0, 1)), marks=SLOW),
    pytest.param(("fsdp", "writing/checkpoint-6/optimizer", (1,)), marks=SLOW),
    pytest.param(("ddp", "writing/checkpoint-9", (1,)), marks=SLOW),
    pytest.param(("tp", "checkpoint-9", (0, 1)), marks=SLOW),
]


@sharded
@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(kill, folder):
    layout, at, ranks = kill
    out = f"killed_{layout}_{at.replace('/', '_')}_{len(ranks)}"
    command = words("train", folder, out, **LAYOUTS[layout])
    processes = start(command)
    wait_for(folder / out / "checkpoints" / at, processes)
    for rank in ranks:
        processes[rank].kill()
    time.sleep(0.2)
    for process in processes:  # torchrun ends the others
        with contextlib.suppress(OSError):
            process.kill()
    outcomes(processes)
    assert not (folder / out / "result.json").exists(), "the run was over before the kill"
    ended = on_two_ranks(command)
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2]
    if not (folder / layout / "result.json").exists():
        on_two_ranks(words("train", folder, layout, **LAYOUTS[layout]))
    assert curves(folder, out) == curves(folder, layout)
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in (out, layout)]
    assert weights[0] == weights[1]


@SLOW
@sharded
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(folder):
    """Eight kills of one rank or both, most of them within the 240 steps and 60 checkpoints."""
    long = {"steps": 240, "evaluations": 60}
    assert [status for status, _, _ in on_two_ranks(words("train", folder, "unkilled", **LAYOUTS["fsdp"] | long))] == [
        0,
        0,
    ]
    command = words("train", folder, "killed", **LAYOUTS["fsdp"] | long)
    moments = random.Random(0)
    for _ in range(8):
        processes = start(command)
        begun = folder / "killed" / "checkpoints" / "writing"
        wait_for(begun, processes)
        time.sleep(moments.uniform(0, 1))
        for process in moments.sample(processes, moments.choice([1, 2])):
            process.kill()
        time.sleep(0.2)
        for process in processes:
            with contextlib.suppress(OSError):
                process.kill()
        outcomes(processes)
        assert not (folder / "killed" / "result.json").exists()
    assert [status for status, _, _ in on_two_ranks(command)] == [0, 0]
    assert curves(folder, "killed") == curves(folder, "unkilled")
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("killed", "unkilled")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("layout", EACH_KIND)
def test_sigterm_on_one_rank_saves_and_ends_both_and_the_same_command_goes_on(layout, folder):
    long = {"steps": 100_000, "evaluations": 1, "log_every": 100_000}  # its first log would come after minutes
    command = words("train", folder, "terminated", **LAYOUTS[layout] | long)
    begun = folder / f"begun_{layout}"
    what = f"open({str(begun)!r}, 'w').close()"
    processes = start_ranks(["-c", FROM_STEP.format(ranks=(1,), step=3, what=what), *command], 2)
    wait_for(begun, processes)
    for _ in range(2):  # a launcher passes on what the rank got already
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(0.02)
    ended = outcomes(processes)
    assert [status for status, _, _ in ended] == [143, 143], ended[0][2] + ended[1][2]
    assert [*(folder / "terminated" / "checkpoints").glob("checkpoint-*")]
    assert "the same command goes on" in " ".join(ended[0][1].split())
    shutil.rmtree(folder / "terminated")


BAD_FILES = [
    pytest.param("ddp", "rng_state_1.pth", Path.unlink, marks=resuming),
    pytest.param("fsdp", "optimizer/__1_0.distcp", flip_a_bit, marks=sharded),
]


@SLOW
@pytest.mark.parametrize(("layout", "file", "spoil"), BAD_FILES)
def test_a_checkpoint_with_a_rank_s_file_bad_is_named_and_the_one_before_is_used(layout, file, spoil, folder):
    out = f"bad_{layout}"
    command = words("train", folder, out, **LAYOUTS[layout], stop_after_minutes=0)
    checkpoints = folder / out / "checkpoints"
    assert [status for status, _, _ in on_two_ranks(command)] == [1, 1]
    (kept,) = [path for path in checkpoints.iterdir() if path.name.startswith("checkpoint-")]
    shutil.copytree(kept, checkpoints / "checkpoint-11")
    spoil(checkpoints / "checkpoint-11" / file)
    ended = on_two_ranks(words("train", folder, out, **LAYOUTS[layout]))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2]
    said = " ".join(ended[0][2].split())
    assert f"checkpoint-11 is damaged or lacks files ({file}), and is deleted" in said
    assert f"gqe seed 0 goes on from {kept}" in said
    losses, whole = ([loss for _, loss in curves(folder, out)[0]] for out in (out, "one"))
    assert losses == pytest.approx(whole, abs=2e-5)


HANGS = [pytest.param("fsdp", 1, marks=sharded), *(pytest.param("ddp", rank, marks=SLOW) for rank in (0, 1))]
HANGS += [pytest.param(*hang, marks=[sharded, SLOW]) for hang in [("fsdp", 0), ("tp", 1), ("tp", 0)]]


def said_by_the_other(processes: list[subprocess.Popen], hangs: int) -> str:
    """What the rank that doesn't hang says on stderr before it ends, which it must, with an error."""
    waits = processes[1 - hangs]
    try:
        _, err = waits.communicate(timeout=180)
    finally:
        for process in processes:
            process.kill()
    outcomes(processes)
    assert waits.returncode
    return err


@pytest.mark.parametrize(("layout", "hangs"), HANGS)
def test_a_rank_that_hangs_is_named(folder, layout, hangs):
    command = words("train", folder, f"hanging_{layout}_{hangs}", **LAYOUTS[layout], rank_timeout_minutes=0.2)
    what = FROM_STEP.format(ranks=(hangs,), step=5, what="time.sleep(600)")
    processes = start_ranks(["-c", what, *command], 2)
    err = said_by_the_other(processes, hangs)
    assert f"rank {hangs} didn't answer within" in " ".join(err.split())


HANGING_AT = """
import sys, time
import query_experts.study.train as train
from query_experts.distributed.ranks import rank
from query_experts_command import main
before = train.{place}
def hang(*words, **more):
    if rank() == {rank}:
        time.sleep(600)
    return before(*words, **more)
train.{place} = hang
sys.exit(main(sys.argv[1:]))
"""
PLACES = [
    ("ddp", "describe", 1),
    ("ddp", "last_checkpoint", 0),
    ("ddp", "build_trainer", 1),
    pytest.param("fsdp", "save_model", 1, marks=sharded),
]


@SLOW
@pytest.mark.parametrize(("layout", "place", "hangs"), PLACES)
def test_a_rank_that_hangs_before_or_after_the_steps_is_named(folder, layout, place, hangs):
    command = words("train", folder, f"hanging_at_{place}", **LAYOUTS[layout], rank_timeout_minutes=0.2)
    processes = start_ranks(["-c", HANGING_AT.format(place=place, rank=hangs), *command], 2)
    err = said_by_the_other(processes, hangs)
    assert f"rank {hangs} didn't answer within" in " ".join(err.split())
    assert "Traceback" not in err.rpartition("query-experts: ")[2]


def test_a_rank_says_for_whom_it_waits(tmp_path):
    program = (
        "import query_experts.distributed.ranks as ranks; ranks.SAID_AFTER = 0.1\n"
        "import threading, os; threading.Timer(3, lambda: os._exit(5)).start(); ranks.join_ranks()"
    )
    first, second = start_ranks(["-c", program], 2)
    second.kill()
    ((status, _, err), _) = outcomes([first, second])
    assert status == 5
    assert "query-experts: rank 0: waiting for 2 processes to meet at localhost:" in err


def test_an_unforeseen_error_on_one_rank_is_said_once_by_that_rank(folder):
    ended = with_rank_1(5, "raise ArithmeticError('seven')", words("train", folder, "broken", **LAYOUTS["ddp"]))
    assert all(status for status, _, _ in ended)
    assert "query-experts: rank 1: ArithmeticError: seven" in ended[1][2]
    assert "query-experts" not in ended[0][2]


@pytest.mark.parametrize("layout", EACH_KIND)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_both(layout, folder):
    what = (
        "import torch; hook = more['model'].lm_head.weight.register_hook("
        "lambda g: (hook.remove(), g * float('nan'))[1])"
    )
    ended = with_rank_1(5, what, words("train", folder, f"skipping_{layout}", **LAYOUTS[layout]))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    held = result(folder, f"skipping_{layout}")
    assert held["skipped_steps"] == 1
    assert held["validation_loss"] is not None


@SLOW
@pytest.mark.parametrize("layout", EACH_KIND)
def test_gradients_that_stay_not_finite_on_one_rank_are_divergence_on_both(layout, folder):
    what = "import torch; more['model'].lm_head.weight.register_hook(lambda g: g * float('nan'))"
    command = words("train", folder, f"diverged_{layout}", **LAYOUTS[layout])
    program = FROM_STEP.format(ranks=(1,), step=2, what=what)
    ended = outcomes(start_ranks(["-c", program, *command], 2), timeout=120)
    assert ended[0][0] == 2
    assert ended[1][0] > 0
    assert "in 6 steps gradients weren't finite and were skipped" in " ".join(ended[0][2].split())
    assert "query-experts" not in ended[1][2]
    assert "TCPStore" not in ended[1][2]
    held = result(folder, f"diverged_{layout}")
    assert held["validation_loss"] is None
    assert held["skipped_steps"] == 6


@SLOW
@sharded
def test_keep_may_change_where_a_run_goes_on(folder):
    command = words("train", folder, "kept", **LAYOUTS["fsdp"], evaluations=12)
    listed = folder / "kept.txt"
    stop = "import os; os._exit(1)"
    write = (
        f"import os; open({str(listed)!r}, 'w').write(' '.join(os.listdir({str(folder / 'kept' / 'checkpoints')!r})))"
    )
    for keep, step, what in (("2", 5, stop), ("5", 10, write)):
        program = FROM_STEP.format(ranks=(0, 1), step=step, what=what)
        outcomes(start_ranks(["-c", program, *command, "--keep", keep], 2))
    assert result(folder, "kept")["train_tokens"] == 12 * 4 * 16
    assert sorted(listed.read_text().split()) == ["checkpoint-10", *(f"checkpoint-{step}" for step in range(6, 10))]


@SLOW
@sharded
@pytest.mark.skipif(not COPIES, reason="Transformers below 5.23 has no copies of models that ranks share")
def test_four_ranks_go_on_from_two_with_two_copies_of_a_shared_model(folder):
    command = words("train", folder, "copies", **LAYOUTS["fsdp"])
    program = FROM_STEP.format(ranks=(0, 1), step=7, what="import os; os._exit(1)")
    outcomes(start_ranks(["-c", program, *command], 2))
    four = [*command, "--batch_size", "1"]
    program = FROM_STEP.format(ranks=(3,), step=10, what="import os; os._exit(1)")
    processes = start_ranks(["-c", program, *four], 4)
    processes[3].wait(120)
    for process in processes:
        process.kill()
    outcomes(processes)
    assert [path.name for path in (folder / "copies" / "checkpoints").glob("checkpoint-9")]
    ended = outcomes(start_ranks(["-m", "query_experts.cli", *four], 4))
    assert [status for status, _, _ in ended] == [0] * 4, ended[0][2]
    assert "goes on from" in ended[0][2]
    for mine, whole in zip(curves(folder, "copies")[:2], curves(folder, "one")[:2], strict=True):
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in whole], abs=2e-5)


@SLOW
@pytest.mark.parametrize("layout", EACH_KIND)
def test_a_disk_that_fills_up_ends_the_ranks_with_a_sentence_and_the_last_checkpoint_stays(layout, folder):
    """The system refuses longer files from the sixth step on, as it refuses all on a full disk."""
    out = f"full_{layout}"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    command = words("train", folder, out, **LAYOUTS[layout])
    ended = outcomes(start_ranks(["-c", FROM_STEP.format(ranks=(0, 1), step=5, what=limit), *command], 2), timeout=120)
    said = " ".join((ended[0][2] + ended[1][2]).split())
    assert [status for status, _, _ in ended] == [2, 2], said
    assert said.count("query-experts: rank ") == 1
    assert "Traceback" not in said
    assert f"{folder / out}" in said
    assert ("no room left" in said) or ("File too large" in said)
    assert [path.name for path in (folder / out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert [status for status, _, _ in on_two_ranks(command)] == [0, 0]
    if not (folder / layout / "result.json").exists():
        on_two_ranks(words("train", folder, layout, **LAYOUTS[layout]))
    assert curves(folder, out) == curves(folder, layout)
