"""The tracked memory of a training step is what torch's allocator records in real runs on several ranks.

Run as a script, this file is one of the ranks.
"""

import json
import sys
from bisect import bisect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from query_experts.common.errors import SettingError
from query_experts.model.arms import arm_config, build
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP
from query_experts.plan.memory import SHALLOW, Memory, extended, fake_processes, track, track_shallow
from query_experts.plan.settings import PlanSettings
from rank_helpers import run_ranks

BATCH, STEPS = 8, 6
SIZE = {
    "vocab_size": 512, "seq_len": 64, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "batch_size": BATCH, "dtype": "bfloat16",
}  # fmt: skip
SHARDED = {"fsdp_size": 2, "gradient_accumulation_steps": 2}
DEEP = {"num_hidden_layers": 8, "batch_size": 1}  # a shard of the gradients is then more than a tenth
CASES = {  # by ranks: arm, and settings of its run
    2: {
        "sharded": ("gqe", SHARDED),
        "checkpointed": ("gqe", SHARDED | {"activation_checkpointing": True}),
        "copies": ("dense", {}),
    },
    4: {
        "copies of shards": ("dense", DEEP | {"fsdp_size": 2}),
        "copies of shards that accumulate": ("gqe", DEEP | SHARDED),
    },
}
needs_sharding = pytest.mark.skipif(not SHARDS_BY_GROUP, reason="Transformers can't shard models of this kind")


def tracked(case: str) -> tuple:
    """The arguments of `track` for a case."""
    ((ranks, (arm, settings)),) = [(ranks, cases[case]) for ranks, cases in CASES.items() if case in cases]
    plan = PlanSettings(**SIZE | settings, gpus=ranks)
    return arm_config(arm, plan.model_size()), plan.step(), plan.batch_size


@pytest.fixture(scope="module")
def sharded():
    return track(*tracked("sharded"))


# in a real run


def recorded_peak(recorded: profile) -> int:
    """The most bytes that torch's allocator had given out at once, in a step that has the optimizer's moments.

    It doesn't see what gloo's threads free, until it gives out the address again. So the step with the lowest peak
    counts.
    """
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
    found, steps = [], []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name.startswith("Optimizer.step"):
            steps.append(event.start_time_ns)
    steps.sort()
    assert len(steps) == STEPS
    live, held, peaks = {}, 0, [0] * (STEPS + 1)
    for time, address, size in sorted(found):
        held -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            held += size
        number = bisect(steps, time)
        peaks[number] = max(peaks[number], held)
    return min(peaks[1:-1])


def train_for_real(case: str, arm: str, more: dict, folder: Path) -> int:
    """The peak of a short run with the trainer's own model and arguments, in bytes."""
    from query_experts.study.settings import TrainSettings
    from query_experts.study.train import initial_model, training_arguments
    from query_experts.training import GQETrainer

    settings = TrainSettings(**SIZE | more, device="cpu", steps=STEPS)
    tokens = torch.arange(settings.seq_len)
    data = [{"input_ids": tokens, "labels": tokens}] * (STEPS * settings.sequences_per_step)
    (folder / case).mkdir(exist_ok=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = initial_model(settings, arm, 0, folder / case)
        for parameter in model.parameters():
            if settings.is_sharded:  # on a CPU Transformers reads views of whole tensors; on a GPU it copies its part
                parameter._local_tensor = parameter._local_tensor.clone()
        arguments = training_arguments(settings, 0, folder / case)
        arguments.save_strategy = arguments.eval_strategy = "no"
        arguments.dataloader_pin_memory = False
        GQETrainer(model=model, args=arguments, train_dataset=data).train()
    return recorded_peak(recorded)


def main(folder: Path) -> None:
    from query_experts.distributed.ranks import is_first, join_ranks

    torch.set_num_threads(1)
    join_ranks()
    peaks = {case: train_for_real(case, *run, folder) for case, run in CASES[dist.get_world_size()].items()}
    if is_first():
        (folder / "peaks.json").write_text(json.dumps(peaks), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def record(ranks: int, folder: Path) -> dict[str, int]:
    """The peak of every case of so many ranks."""
    run_ranks(__file__, ranks, folder)
    return json.loads((folder / "peaks.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(2, tmp_path_factory.mktemp("ranks"))


@needs_sharding
@pytest.mark.parametrize("case", CASES[2])
def test_the_memory_of_a_run_on_two_ranks_is_within_a_tenth_of_what_torch_records(recorded, sharded, case):
    memory = track(*tracked(case)) if case == "copies" else sharded
    assert memory[case == "checkpointed"].total(BATCH) == pytest.approx(recorded[case], rel=0.1)


@needs_sharding
@pytest.mark.full
def test_the_memory_of_copies_of_shards_on_four_ranks_is_within_a_tenth_of_what_torch_records(tmp_path):
    for case, peak in record(4, tmp_path).items():
        config, step, batch = tracked(case)
        assert track(config, step, batch)[False].total(batch) == pytest.approx(peak, rel=0.1), case


@pytest.mark.parametrize("arm", ["dense", "gqe"])
def test_attention_is_tracked_without_a_mask_as_the_trainer_s_sequences_have_none(arm, monkeypatch):
    attend, called = F.scaled_dot_product_attention, []

    def spy(query, key, value, attn_mask=None, **more):
        called.append((attn_mask, more["is_causal"], key.shape[1] == query.shape[1]))
        return attend(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    plan = PlanSettings(**SIZE | {"num_hidden_layers": 1}, gpus=1)
    with fake_processes(plan.step()) as mesh:
        track_shallow(arm_config(arm, plan.model_size()), 1, plan.step(), (1,), mesh)
    repeated = arm == "gqe"  # its keys are those of its experts; dense leaves it to SDPA to share them
    assert {*called} == {(None, True, repeated)}


# from shallow models and two batches to others


def test_two_shallow_models_and_two_batches_tell_the_memory_of_a_deeper_one_with_a_larger_batch():
    plan = PlanSettings(**SIZE | {"num_hidden_layers": 5}, gpus=2, fsdp_size=2)
    config, step = arm_config("dense", plan.model_size()), plan.step()
    with fake_processes(step) as mesh:
        whole = track_shallow(config, 5, step, (4 * BATCH,), mesh)
    for checkpointing, memory in track(config, step, BATCH).items():
        for phase, parts in whole[checkpointing, 4 * BATCH].items():
            told = sum(memory.base[phase].values()) + 4 * BATCH * sum(memory.each[phase].values())
            assert told == pytest.approx(sum(parts.values()), rel=0.005), phase


@pytest.mark.full
def test_a_deeper_model_gathers_no_more_layers_at_once_than_the_shallow_ones():
    size = {"vocab_size": 32, "hidden_size": 128, "intermediate_size": 352, "batch_size": 1}
    plan = PlanSettings(**SIZE | size | SHARDED, gpus=4)  # gathered weights take much of it
    config, step = arm_config("dense", plan.model_size()), plan.step()
    with fake_processes(step) as mesh:
        shallow, deeper, whole = (track_shallow(config, depth, step, (1,), mesh) for depth in (*SHALLOW, 6))
    for key, peaks in whole.items():
        told = extended(shallow[key], deeper[key], 6 - SHALLOW[1])
        for phase, parts in peaks.items():
            assert sum(told[phase].values()) == pytest.approx(sum(parts.values()), rel=0.001), phase


def test_shards_moments_and_unsharded_gradients_are_those_that_fsdp_keeps(sharded):
    config, _, _ = tracked("sharded")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(config).parameters())
    parts = sharded[False].parts(BATCH)
    assert parts["weights"] == pytest.approx(4 * parameters / 2, rel=0.001)
    assert parts["optimizer"] == pytest.approx(2 * 4 * parameters / 2, rel=0.001)
    assert parts["gradients"] == 0  # whole ones stay between micro-batches
    assert parts["unsharded"] > 4 * parameters


def test_several_copies_of_a_model_hold_their_own_shards_and_reduce_every_micro_batch():
    plan = PlanSettings(**SIZE | {"num_hidden_layers": 1}, gpus=4, fsdp_size=2, gradient_accumulation_steps=2)
    config = arm_config("dense", plan.model_size())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(config).parameters())
    parts = track(config, plan.step(), BATCH)[False].parts(BATCH)
    assert parts["weights"] == pytest.approx(4 * parameters / 2, rel=0.001)
    assert parts["gradients"] == pytest.approx(parts["weights"], rel=0.001)  # of the micro-batch before


def test_the_largest_batch_is_the_last_that_fits_in_every_phase():
    memory = Memory(
        base={"forward": {"weights": 10.0, "activations": 0.0}, "optimizer": {"weights": 50.0, "activations": 0.0}},
        each={"forward": {"weights": 0.0, "activations": 10.0}, "optimizer": {"weights": 0.0, "activations": 0.0}},
    )
    assert memory.largest_batch(100) == 9
    assert memory.largest_batch(99) == 8
    assert memory.largest_batch(49) == 0  # the optimizer's step doesn't fit
    assert memory.total(1) == 50
    assert memory.parts(9) == {"weights": 10, "activations": 90}


# the process


def test_tracking_leaves_no_process_group_and_refuses_to_replace_one(sharded):
    assert not dist.is_initialized()
    config, step, batch = tracked("copies")
    hook = sys.excepthook
    with fake_processes(step):
        assert sys.excepthook is hook  # torch would put [rank0] before every line of a traceback
        with pytest.raises(SettingError, match="belongs to a process group"):
            track(config, step, batch)
        assert dist.is_initialized()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
