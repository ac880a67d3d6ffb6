"""`query-experts plan`: its numbers, its tables, and what it refuses."""

import dataclasses
import json

import pytest
import torch

import plan_tables
from query_experts.cli import main
from query_experts.model.arms import arm_config
from query_experts.plan import numbers, run
from query_experts.plan.gpus import GPUS, USABLE
from query_experts.plan.lengths import LENGTHS, WORTHWHILE, predict
from query_experts.plan.memory import PARTS, Memory
from query_experts.plan.numbers import GIB, make_plan
from query_experts.plan.report import arm_rows, header, notes, speed_rows
from query_experts.plan.settings import PlanSettings

PAPER = {  # the run of the paper's section 4
    "vocab_size": 32_000, "seq_len": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False,
    "steps": 28_610, "batch_size": 16, "global_batch_size": 512,
}  # fmt: skip
TINY = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}


@pytest.fixture
def known_memory(monkeypatch):
    """Half of an H100 for weights, and a gigabyte for a sequence, a quarter of it with checkpointing."""

    def track(config, step, batch):
        base = {"forward": dict.fromkeys(PARTS, 0.0) | {"weights": 40.0 * GIB}}
        each = {share: {"forward": dict.fromkeys(PARTS, 0.0) | {"activations": share * GIB}} for share in (1, 0.25)}
        return {False: Memory(base, each[1]), True: Memory(base, each[0.25])}

    monkeypatch.setattr(numbers, "track", track)


@pytest.fixture
def planned(known_memory):
    def make(**settings):
        settings = PlanSettings(**PAPER | settings)
        settings.check()
        return settings, make_plan(settings)

    return make


def cells(rows, name):
    (found,) = (row[1:] for row in rows if row[0].strip() == name)
    return found


# numbers


def test_the_paper_s_run_takes_4e19_flop_and_29_hours_of_an_h100_at_two_fifths_of_its_peak(planned):
    settings, plan = planned(arms=["gqe"], price=2.5)
    (gqe,) = plan.arms
    assert plan.tokens == pytest.approx(30e9, rel=0.001)
    assert gqe.parameters == pytest.approx(250e6, rel=0.01)
    assert gqe.active_parameters < gqe.parameters
    assert gqe.run_flops == pytest.approx(4.1e19, rel=0.01)
    assert gqe.tokens_per_s == pytest.approx(0.4 * 989e12 / gqe.flops_per_token)
    assert gqe.hours * settings.gpus == pytest.approx(29, rel=0.02)
    assert gqe.cost == pytest.approx(2.5 * 8 * gqe.hours)
    assert "assumes an MFU of 40%" in notes(settings, plan)


def test_measured_speed_takes_the_place_of_the_assumed_and_gives_the_mfu(planned):
    settings, plan = planned(arms=["dense", "gqe"], tokens_per_s=[100_000.0, 200_000.0])
    dense, gqe = plan.arms
    assert [dense.tokens_per_s, gqe.tokens_per_s] == [100_000, 200_000]
    assert gqe.mfu == pytest.approx(200_000 * gqe.flops_per_token / 989e12)
    assert dense.hours == pytest.approx(plan.tokens / 800_000 / 3600)
    rows = arm_rows(settings, plan)
    assert cells(rows, "tokens/s of one GPU, measured") == ["100,000", "200,000"]
    assert "assumes" not in notes(settings, plan)


def test_no_speed_is_assumed_for_float32(planned):
    settings, plan = planned(dtype="float32", price=1.0)
    assert all(arm.tokens_per_s is arm.mfu is arm.hours is arm.cost is None for arm in plan.arms)
    assert "No speed is assumed for float32" in notes(settings, plan)


def test_the_table_says_what_fits(planned):
    room = USABLE * GPUS["h100"].memory
    rows = {}
    for batch, fits in ((16, "yes"), (32, "with checkpointing"), (256, "no")):
        settings, plan = planned(batch_size=batch, gpus=2)
        rows = arm_rows(settings, plan)
        assert cells(rows, f"fits into {room:.1f} GiB") == [fits] * 3
    assert cells(rows, "largest micro-batch that fits") == ["31"] * 3
    assert cells(rows, "with checkpointing") == ["124"] * 3
    settings, plan = planned(gpu_memory=40.0)
    assert cells(arm_rows(settings, plan), "largest micro-batch that fits") == ["none fits"] * 3


def test_the_gpus_and_their_layout_make_the_step(planned):
    settings, plan = planned(gpus=64, fsdp_size=8, gpu="b200", global_batch_size=1024)
    assert (plan.sequences_per_step, settings.micro_batches) == (1024, 1)
    said = header(settings, plan)
    assert said.startswith("64 \N{MULTIPLICATION SIGN} b200, 178.3 GiB and 2250 TFLOP/s each")
    assert "sharded over 8, in 8 copies" in said
    settings, _ = planned(gpus=8, gpu="mine", gpu_memory=12.0, gpu_tflops=50.0)
    assert settings.machine.tflops == 50


def test_without_fsdp_size_each_gpu_has_a_copy_as_in_train(planned):
    settings, plan = planned(gpus=8)
    assert settings.step().fsdp_size == 1
    assert "; a whole model on each." in header(settings, plan)


def test_speed_is_predicted_by_flops_and_pays_from_the_length_that_the_page_of_performance_tells(planned):
    size = PlanSettings(**PAPER).model_size()
    found = {s.kind: s for s in predict("gqe", arm_config("gqe", size), arm_config("dense", size))}
    assert found["prefill"].pays_from == 4096
    assert found["prefill"].by_length[LENGTHS.index(131_072)] == pytest.approx(1.68, abs=0.01)
    assert max(found["decoding"].by_length) < WORTHWHILE
    assert found["decoding"].pays_from is None
    assert all(speed < 16 / 9 for speed in found["training"].by_length)
    _, plan = planned(arms=["dense", "gqe"])
    assert [row[0] for row in speed_rows(plan)[1:]] == ["training", "prefill", "decoding"]
    assert speed_rows(plan)[-1][-1] == "never"


# the command


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a plan that the command has made, from a recipe with arms of its own."""
    folder = tmp_path_factory.mktemp("plan")
    recipe = folder / "mine.yaml"
    recipe.write_text("\n".join(f"{name}: {value}" for name, value in TINY.items()) + "\narms: [half]\nsteps: 7\n")
    argv = ["plan", str(recipe), "--arms", "dense", "gqe", "--gpus", "2", "--dtype", "auto", "--out", str(folder)]
    assert main(argv) == 0
    return folder


def test_the_command_writes_the_numbers_and_a_plot(out):
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert [arm["arm"] for arm in plan["arms"]] == ["dense", "gqe"]
    assert plan["tokens"] == 7 * 4 * 2 * 256  # steps, the demo's batch, GPUs, the demo's length
    assert plan["settings"]["hidden_size"] == 32
    assert all(arm["memory"]["activations"] > 0 for arm in plan["arms"])
    assert {path.name for path in out.glob("plan.*")} == {"plan.json", "plan.svg", "plan.png"}


def test_arms_of_a_preset_are_passed_over(known_memory, tmp_path):
    assert main(["plan", "gpu", "--out", str(tmp_path)]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert [arm["arm"] for arm in plan["arms"]] == ["dense", "static", "gqe"]


def test_a_command_of_train_is_understood(known_memory, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("arm: half\nseed: 5\n")
    for words, arms in (["--arm", "gqe-m4", "--seed", "3"], ["gqe-m4"]), ([], ["dense", "static", "gqe"]):
        argv = ["--preset", "demo", "--recipe", str(recipe), "--data", "texts", "--out", str(tmp_path / "out"), *words]
        assert main(["plan", *argv]) == 0
        plan = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
        assert [arm["arm"] for arm in plan["arms"]] == arms


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_an_out_that_cannot_be_written_is_refused_before_memory_is_tracked(refused, tmp_path, monkeypatch, name):
    monkeypatch.setattr(run, "make_plan", lambda settings: pytest.fail("tracked"))
    (tmp_path / "file").write_text("mine")
    refused(["plan", "demo", "--out", tmp_path / name], f"out is {tmp_path / name}", "; it must be a folder")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["huge"], "preset is 'huge'; it must be one of 1b, 7b, demo"),
        (["missing.yaml"], "recipe is missing.yaml, which doesn't exist"),
        (["demo", "--preset", "gpu"], "preset is 'demo', and --preset is set too; one of them must be left out"),
        (["my.yaml", "--recipe=other.yaml"], "recipe is 'my.yaml', and --recipe is set too"),
        (["distill"], "preset is 'distill', which plan doesn't take"),
        (["demo", "--gpus", "0"], "gpus is 0; it must be 1 or more"),
        (["demo", "--gpu", "abacus"], "gpu is 'abacus'; it must be one of a100-40gb, a100"),
        (["demo", "--gpu", "mine", "--gpu_memory", "9"], "gpu is 'mine'"),
        (["demo", "--gpu_memory", "0"], "gpu_memory is 0.0; it must be a number above 0"),
        (["demo", "--price", "-1"], "price is -1.0; it must be a number, 0 or more"),
        (["demo", "--mfu", "40"], "mfu is 40.0; it must be a number above 0 and at most 1"),
        (["demo", "--fsdp_size", "3"], "fsdp_size is 3; it must divide gpus, which is 8"),
        (["demo", "--tp_size", "2"], "tp_size is 2"),
        (["demo", "--pp_size", "2"], "pp_size asks for pipeline parallelism"),
        (["demo", "--global_batch_size", "9"], "global_batch_size is 9; it must be a multiple of batch_size"),
        (["demo", "--tokens_per_s", "3"], "tokens_per_s holds 1 number; it must hold one for each arm"),
        (["demo", "--arms", "sparse"], "arm is 'sparse'"),
        (["demo", "--arm", "sparse"], "arm is 'sparse'"),
        (["demo", "--arm", "gqe", "--arms", "dense", "gqe"], "arm is 'gqe', and arms is set too"),
        (["demo", "--seed", "-1"], "seed holds -1"),
        (["demo", "--num_key_value_heads", "3"], "num_key_value_heads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(refused, words, sentence):
    refused(["plan", *words], sentence)


def test_a_launch_on_several_processes_is_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(["plan", "demo"], "WORLD_SIZE is 2; plan works in one process")


def test_a_plan_doesn_t_need_what_the_run_needs(known_memory, tmp_path):
    argv = ["plan", "demo", "--device", "cuda", "--kernels", "triton", "--compile", "true", "--out", str(tmp_path)]
    assert torch.cuda.is_available() or main(argv) == 0


# the page's plan


def as_committed(plan):
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def test_the_committed_plan_is_what_this_code_computes_but_for_the_memory(known_memory):
    committed, now = (as_committed(plan) for plan in (plan_tables.read_plan(), make_plan(plan_tables.settings())))
    of_memory = {"memory", "memory_checkpointed", "largest_batch", "largest_batch_checkpointed"}
    for plan in (committed, now):
        for arm in plan["arms"]:
            for name in of_memory:
                del arm[name]
    assert now == committed


@pytest.mark.full
def test_the_memory_of_the_committed_plan_is_what_this_code_tracks():
    assert as_committed(make_plan(plan_tables.settings())) == as_committed(plan_tables.read_plan())
