"""The commands on two ranks, as torchrun starts them: equal to one process, killed and resumed, stopped, refused."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from query_experts import GQEForCausalLM
from query_experts.cli import main
from query_experts.distributed.layout import copies_of_shards
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from rank_helpers import outcomes, start_ranks
from study_helpers import write_text

SIZE = {
    "device": "cpu", "dtype": "float32", "vocab_size": 300, "seq_len": 16, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "steps": 12,
    "evaluations": 4, "validation_sequences": 5, "global_batch_size": 4, "router_aux_loss_coef": 0.0,
}  # fmt: skip
LAYOUTS = {
    "ddp": {"batch_size": 2},
    "fsdp": {"batch_size": 2, "fsdp_size": 2},
    "tp": {"batch_size": 4, "tp_size": 2},
    "checkpointed": {"batch_size": 1, "fsdp_size": 2, "activation_checkpointing": True},
}
HALF_PRECISION = {"dtype": "bfloat16", "router_z_loss_coef": 0.01}
sharded = pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers below 5.20 doesn't share models of this kind")
resuming = pytest.mark.skipif(
    not SHARDS_BY_GROUP, reason="Transformers below 5.20 can't load an optimizer in several processes on a CPU"
)
SLOW = pytest.mark.full
COPIES = SHARDS_BY_GROUP and copies_of_shards()
SHARED = [
    pytest.param("fsdp", marks=sharded), pytest.param("tp", marks=[sharded, SLOW]),
]  # fmt: skip
PARAMETERS = [pytest.param(name, marks=[sharded] if name != "ddp" else []) for name in LAYOUTS]
EACH_KIND = [  # of which the second one stands for all where time is short
    pytest.param("ddp", marks=SLOW), pytest.param("fsdp", marks=sharded), pytest.param("tp", marks=[sharded, SLOW]),
]  # fmt: skip


def words(command: str, folder: Path, out: str, **changes) -> list[str]:
    settings = SIZE | {"data": folder / "text.txt", "out": folder / out} | changes
    return [command, *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def start(command: list[str]) -> list[subprocess.Popen]:
    return start_ranks(["-m", "query_experts.cli", *command], 2)


def on_two_ranks(command: list[str]) -> list[tuple[int, str, str]]:
    return outcomes(start(command))


def result(folder: Path, out: str) -> dict:
    return json.loads((folder / out / "result.json").read_text())


def curves(folder: Path, out: str) -> tuple:
    held = result(folder, out)
    return held["train_curve"], held["validation_curve"], held["clipped_steps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text and the run of one process."""
    path = tmp_path_factory.mktemp("ranks")
    write_text(path / "text.txt")
    assert main(words("train", path, "one", batch_size=4)) == 0
    return path


@pytest.mark.parametrize("layout", PARAMETERS)
def test_two_ranks_train_as_one_process_and_rank_0_alone_speaks_and_writes(layout, folder):
    first, second = on_two_ranks(words("train", folder, layout, **LAYOUTS[layout]))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Model: " in " ".join(first[1].split())
    assert second[1] == ""
    assert "Traceback" not in second[2]
    assert "100%" not in second[2]
    for mine, whole in zip(curves(folder, layout)[:2], curves(folder, "one")[:2], strict=True):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in whole]
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in whole], abs=2e-5)
    assert result(folder, layout)["train_tokens"] == 12 * 4 * 16
    GQEForCausalLM.from_pretrained(folder / layout / "model")
    assert sorted(path.name for path in (folder / layout).iterdir() if path.name != ".lock") == [
        "cache", "model", "result.json", "settings.json",
    ]  # fmt: skip


@pytest.mark.parametrize("layout", EACH_KIND)
def test_in_bfloat16_ranks_train_as_one_process_with_the_same_micro_batches(layout, folder):
    """Copies and shards multiply the same numbers. Ranks that share a layer round parts of its sums to bfloat16."""
    if not (folder / "half_one").exists():
        assert main(words("train", folder, "half_one", batch_size=2, **HALF_PRECISION)) == 0
    ended = on_two_ranks(words("train", folder, f"half_{layout}", **LAYOUTS[layout], **HALF_PRECISION))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    tolerance = 2e-3 if layout == "tp" else 2e-5
    for mine, whole in zip(curves(folder, f"half_{layout}")[:2], curves(folder, "half_one")[:2], strict=True):
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in whole], abs=tolerance)
    whole = [loss for _, loss in curves(folder, "one")[0]]
    assert [loss for _, loss in curves(folder, "half_one")[0]] != pytest.approx(whole, abs=2e-5)


@SLOW
@pytest.mark.parametrize("layout", EACH_KIND)
def test_compiled_ranks_train_as_one_process(layout, folder):
    command = words("train", folder, f"compiled_{layout}", **LAYOUTS[layout], compile=True)
    ended = outcomes(start(command), timeout=600)
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    for mine, whole in zip(curves(folder, f"compiled_{layout}")[:2], curves(folder, "one")[:2], strict=True):
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in whole], abs=2e-5)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate launch": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


def launch(launcher: str, command: list[str]) -> subprocess.Popen:
    program = Path(sys.executable).with_name("query-experts")
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(program), *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate launch", marks=SLOW)])
def test_the_launchers_themselves_start_and_stop_a_run(launcher, folder):
    """SIGTERM goes to the launcher, as a job's time limit sends it."""
    out = launcher.replace(" ", "_")
    command = words("train", folder, out, **LAYOUTS["ddp"])
    stopped = launch(launcher, [*command, "--steps", "100000", "--evaluations", "5000"])
    wait_for(folder / out / "checkpoints" / "checkpoint-20", [stopped])
    stopped.send_signal(signal.SIGTERM)
    ((status, _, err),) = outcomes([stopped])
    assert status
    assert [*(folder / out / "checkpoints").glob("checkpoint-*")], err
    shutil.rmtree(folder / out)
    ((status, said, err),) = outcomes([launch(launcher, command)])
    assert status == 0, err
    assert said.count("Model: ") == 1
    losses, whole = ([loss for _, loss in curves(folder, name)[0]] for name in (out, "one"))
    assert losses == pytest.approx(whole, abs=2e-5)


@sharded
@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [
        ("fsdp", "float32", 2e-5),
        pytest.param("tp", "float32", 2e-5, marks=SLOW),
        pytest.param("fsdp", "bfloat16", 5e-3, marks=SLOW),
        pytest.param("ddp", "bfloat16", 2e-5, marks=SLOW),
    ],
)
def test_two_ranks_share_student_and_teacher_and_distill_as_one_process(layout, dtype, tolerance, folder):
    """In bfloat16 a shared teacher has its weights in bfloat16; that of one process or of copies in float32."""
    fixtures = Path(__file__).resolve().parents[1] / "fixtures"
    changes = {
        "init": fixtures / "converted", "teacher": fixtures / "dense", "data": fixtures / "text.txt", "seq_len": 16,
        "device": "cpu", "dtype": dtype, "steps": 4, "evaluations": 2, "validation_sequences": 4,
        "global_batch_size": 4, "gradient_accumulation_steps": 1, "router_aux_loss_coef": 0.0,
    }  # fmt: skip

    def command(out: str, **more) -> list[str]:
        given = changes | {"out": folder / out} | more
        return ["distill", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]

    one, out = f"distilled_one_{dtype}", f"distilled_{layout}_{dtype}"
    if not (folder / one).exists():
        assert main(command(one, batch_size=2)) == 0
    ended = on_two_ranks(command(out, **LAYOUTS[layout]))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2]
    losses = [result(folder, out)["teacher_loss"] for out in (out, one)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    for mine, whole in zip(curves(folder, out)[:2], curves(folder, one)[:2], strict=True):
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in whole], abs=tolerance)


def wait_for(path: Path, processes: list[subprocess.Popen], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline and all(p.poll() is None for p in processes):
        time.sleep(0.005)


KILLS = [
    ("ddp", "checkpoint-3", (0, 1)),
    ("fsdp", "checkpoint-6", (1,)),
    ("tp", "writing", (0,)),  # between two ranks' files, or before the name
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


@pytest.mark.parametrize("layout", ["ddp", *SHARED])
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


def damage(file: Path) -> None:
    """At its full size."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BAD_FILES = [
    pytest.param("ddp", "rng_state_1.pth", Path.unlink, marks=resuming),
    pytest.param("fsdp", "optimizer/__1_0.distcp", damage, marks=sharded),
]


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fsdp_size": 3}, "fsdp_size is 3, and there are 2 processes (WORLD_SIZE); it must divide their number"),
        pytest.param(
            {"tp_size": 2, "num_key_value_heads": 1},
            "tp_size is 2; it must divide num_key_value_heads, 1",
            marks=sharded,
            id="groups",
        ),
        ({"global_batch_size": 3}, "global_batch_size is 3; it must be a multiple of batch_size times the processes"),
        ({"data": "nowhere.txt"}, "data holds 'nowhere.txt'"),
        pytest.param(
            {"tp_size": 2, "compile": True, "activation_checkpointing": True},
            "tp_size is 2, with which torch can't compile what activation_checkpointing computes again",
            marks=sharded,
            id="compiled",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_error_is_said_once_with_its_rank_and_ends_all_ranks(changes, said, folder):
    ended = on_two_ranks(words("train", folder, "refused", **LAYOUTS["ddp"] | changes))
    assert all(status for status, _, _ in ended)
    assert ended[0][0] == 2
    assert "query-experts: rank 0: " + said in " ".join(ended[0][2].split())
    assert "query-experts" not in ended[1][2]
    assert "Traceback" not in ended[0][2] + ended[1][2]
    assert not (folder / "refused").exists()


FROM_STEP = """
import sys, time
import query_experts.study.callbacks as callbacks
from query_experts.distributed.ranks import rank
from query_experts_command import main
before = callbacks.TokenProgress.on_step_begin
def on_step_begin(self, args, state, control, **more):
    if rank() in {ranks} and state.global_step == {step}:
        {what}
    before(self, args, state, control, **more)
callbacks.TokenProgress.on_step_begin = on_step_begin
sys.exit(main(sys.argv[1:]))
"""


def with_rank_1(step: int, what: str, command: list[str]) -> list[tuple[int, str, str]]:
    return outcomes(start_ranks(["-c", FROM_STEP.format(ranks=(1,), step=step, what=what), *command], 2), timeout=120)


HANGS = [("ddp", 0), pytest.param("fsdp", 1, marks=sharded), pytest.param("ddp", 1, marks=SLOW)]
HANGS += [pytest.param(*hang, marks=[sharded, SLOW]) for hang in [("fsdp", 0), ("tp", 1), ("tp", 0)]]


@pytest.mark.parametrize(("layout", "hangs"), HANGS)
def test_a_rank_that_hangs_is_named(folder, layout, hangs):
    command = words("train", folder, f"hanging_{layout}_{hangs}", **LAYOUTS[layout], rank_timeout_minutes=0.2)
    what = FROM_STEP.format(ranks=(hangs,), step=5, what="time.sleep(600)")
    processes = start_ranks(["-c", what, *command], 2)
    waits = processes[1 - hangs]
    try:
        _, err = waits.communicate(timeout=180)
    finally:
        for process in processes:
            process.kill()
    outcomes(processes)
    assert waits.returncode
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
    pytest.param("ddp", "last_checkpoint", 0, marks=SLOW),
    pytest.param("ddp", "build_trainer", 1, marks=SLOW),
    pytest.param("fsdp", "save_model", 1, marks=[sharded, SLOW]),
]


@pytest.mark.parametrize(("layout", "place", "hangs"), PLACES)
def test_a_rank_that_hangs_before_or_after_the_steps_is_named(folder, layout, place, hangs):
    command = words("train", folder, f"hanging_at_{place}", **LAYOUTS[layout], rank_timeout_minutes=0.2)
    processes = start_ranks(["-c", HANGING_AT.format(place=place, rank=hangs), *command], 2)
    waits = processes[1 - hangs]
    try:
        _, err = waits.communicate(timeout=180)
    finally:
        for process in processes:
            process.kill()
    outcomes(processes)
    assert waits.returncode
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


def test_rank_0_gives_others_values_that_are_too_large_for_the_store_at_once():
    program = (
        "from query_experts.distributed.ranks import first_rank, join_ranks; join_ranks();"
        "print(len(first_rank(lambda: 'x' * 20_000_000)), first_rank(lambda: 3))"
    )
    ended = outcomes(start_ranks(["-c", program], 2))
    assert [(status, out.split()) for status, out, _ in ended] == [(0, ["20000000", "3"])] * 2, ended[1][2]


def test_an_unforeseen_error_on_one_rank_is_said_once_by_that_rank(folder):
    ended = with_rank_1(5, "raise ArithmeticError('seven')", words("train", folder, "broken", **LAYOUTS["ddp"]))
    assert all(status for status, _, _ in ended)
    assert "query-experts: rank 1: ArithmeticError: seven" in ended[1][2]
    assert "query-experts" not in ended[0][2]


@pytest.mark.parametrize("layout", ["ddp", *SHARED])
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


ARMS = ["dense", "static", "half", "gqe"]


def compared(folder: Path, out: str, **changes) -> list[str]:
    more = {"steps": 2, "evaluations": 1, "prefill_repeats": 1, "prefill_lengths": 8, "seeds": 0}
    return [*words("compare", folder, out, **more | changes), "--arms", *ARMS]


@pytest.mark.parametrize("layout", EACH_KIND)
def test_ranks_compare_arms_as_one_process_does(layout, folder):
    if not (folder / "compared_one").exists():
        assert main(compared(folder, "compared_one", batch_size=4)) == 0
    ended = on_two_ranks(compared(folder, f"compared_{layout}", **LAYOUTS[layout]))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    comparisons = [json.loads((folder / f"compared_{n}" / "comparison.json").read_text()) for n in (layout, "one")]
    mine, whole = ({run["arm"]: run["validation_loss"] for run in comparison["runs"]} for comparison in comparisons)
    assert mine == pytest.approx(whole, abs=2e-5)
    assert [*mine] == ARMS
    assert (folder / f"compared_{layout}" / "report.html").exists()
    assert ended[1][1] == ""


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
