"""The commands on two ranks, as torchrun starts them: equal to one process, and refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launched_runs import (
    EACH_KIND,
    FROM_STEP,
    LAYOUTS,
    PARAMETERS,
    SLOW,
    curves,
    on_two_ranks,
    result,
    sharded,
    start,
    train_alone,
    wait_for,
    words,
)
from query_experts import GQEForCausalLM
from query_experts.cli import main
from rank_helpers import outcomes, start_ranks

HALF_PRECISION = {"dtype": "bfloat16", "router_z_loss_coef": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return train_alone(tmp_path_factory.mktemp("ranks"))


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


RECORDS_DTYPES = """
        kind = next(type(module) for module in more["model"].modules() if hasattr(module, "combine"))
        combine = kind.combine
        def recorded(self, routed, shared, routing):
            with open({file!r}, "a") as file:
                file.write(f"{{rank()}} {{routing.logits.dtype}} {{routed.dtype}}\\n")
            return combine(self, routed, shared, routing)
        kind.combine = recorded"""


@pytest.mark.parametrize("layout", EACH_KIND)
def test_in_bfloat16_ranks_train_as_one_process_with_the_same_micro_batches(layout, folder):
    """Copies and shards multiply the same numbers. Ranks that share a layer round parts of its sums to bfloat16.

    Routers stay in float32 on every rank.
    """
    if not (folder / "half_one").exists():
        assert main(words("train", folder, "half_one", batch_size=2, **HALF_PRECISION)) == 0
    dtypes = folder / f"dtypes_{layout}"
    command = words("train", folder, f"half_{layout}", **LAYOUTS[layout], **HALF_PRECISION)
    program = FROM_STEP.format(ranks=(0, 1), step=2, what=RECORDS_DTYPES.format(file=str(dtypes)))
    ended = outcomes(start_ranks(["-c", program, *command], 2))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    assert {*dtypes.read_text().splitlines()} == {f"{rank} torch.float32 torch.bfloat16" for rank in (0, 1)}
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
        pytest.param(
            {"global_batch_size": 3},
            "global_batch_size is 3; it must be a multiple of batch_size times the processes",
            marks=SLOW,
            id="batch",
        ),
        ({"data": "nowhere.txt"}, "data holds 'nowhere.txt'"),
        pytest.param(
            {"tp_size": 2, "compile": True, "activation_checkpointing": True},
            "tp_size is 2, with which torch can't compile what activation_checkpointing computes again",
            marks=[sharded, SLOW],
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


def test_rank_0_gives_others_values_that_are_too_large_for_the_store_at_once():
    program = (
        "from query_experts.distributed.ranks import first_rank, join_ranks; join_ranks();"
        "print(len(first_rank(lambda: 'x' * 20_000_000)), first_rank(lambda: 3))"
    )
    ended = outcomes(start_ranks(["-c", program], 2))
    assert [(status, out.split()) for status, out, _ in ended] == [(0, ["20000000", "3"])] * 2, ended[1][2]


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
