"""The ladder on a GPU, as far as a CPU can show it: time, speed, one file of results, processes beside one another."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from ladder_helpers import HERE, run
from query_experts.common.device import peak_flops
from query_experts.common.errors import SettingError
from query_experts.common.settings import parse_settings
from query_experts.data import portion, read_meta
from query_experts.study.callbacks import StopRequest
from query_experts.study.ladder import callbacks, worker
from query_experts.study.ladder.beside import run_beside
from query_experts.study.ladder.callbacks import EndInTime
from query_experts.study.ladder.queue import Queue, Rates
from query_experts.study.ladder.results import collect_result, read_files
from query_experts.study.ladder.settings import Run, ScalingSettings, read_ladder
from query_experts.study.ladder.speed import assumed_seconds, flops_per_s, speed_text
from query_experts.study.ladder.tokens import write_tokens
from query_experts.study.ladder.worker import processes, run_queue
from query_experts.study.results import Piece
from queue_helpers import refuse, results_of, scaling, wait_until_asked, write_ladder
from study_helpers import quiet, said

ROOT = Path(__file__).resolve().parents[3]
GPU = ROOT / "benchmarks" / "ladder" / "gpu.yaml"
H100 = "NVIDIA H100 80GB HBM3"
ABSENT = ["datasets", "lm_eval", "trl", "zstandard", "parameterized"]  # on a machine with what CONTRIBUTING.md names
BLOCKER = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_unless_absent(cls, name, *rest):
    return None if name.partition(".")[0] in {ABSENT} else find_spec(name, *rest)
PathFinder.find_spec = classmethod(find_unless_absent)
"""
TWO = {"plan": [{"rungs": ["small"], "arms": ["dense", "gqe"], "seeds": 1}]}


def on_gpu(**fields):
    """A result of an H100."""
    piece = Piece(first_step=0, **HERE | {"device": "cuda", "hardware": H100, "dtype": "bfloat16"})
    fields = {"settings": {"device": "cuda"}, "instructions": H100} | fields
    return dataclasses.replace(run(**{name: fields.pop(name) for name in ("rung", "arm") if name in fields}),
                               pieces=[piece], **fields)  # fmt: skip


# speed


def test_mfu_is_the_work_of_a_token_times_tokens_per_second_over_the_peak():
    result = on_gpu(train_tokens=1000, flops=3e10, tokens_per_s=3.297e6)
    assert flops_per_s(result) == pytest.approx(3e7 * 3.297e6)
    assert speed_text(result) == "98.9 TFLOP/s, 10.0% of the peak of 989.0 TFLOP/s"
    three = dataclasses.replace(result, beside=3)
    assert speed_text(three).startswith("98.9 TFLOP/s, 30.0% of the peak of 989.0 TFLOP/s by 3 processes")


def test_a_device_without_a_known_peak_has_no_share():
    assert speed_text(run(tokens_per_s=1000.0)) == f"{6.5 * 340_000 / 1e6:.1f} GFLOP/s"
    assert peak_flops(H100) == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GH200 480GB") is None
    assert peak_flops(H100, "float32") is None


# the ladder's file


def test_gpu_rungs_end_within_nine_minutes_of_an_h100():
    ladder = read_ladder(GPU)
    for name, seconds in {"d256": 7, "d384": 66, "d512": 330}.items():
        slowest = max(assumed_seconds(ladder, Run(name, arm, 0), peak_flops(H100)) for arm in ladder.arms())
        assert slowest < 9 * 60
        assert assumed_seconds(ladder, Run(name, "dense", 0), peak_flops(H100)) == pytest.approx(seconds, rel=0.1)


# time


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


def stops_at(limit, clock, durations):
    """The step after which the callback stops a run, and None where it doesn't."""
    control = TrainerControl()
    for step, duration in enumerate(durations, 1):
        clock.now += duration
        limit.on_step_end(None, TrainerState(global_step=step, max_steps=len(durations)), control)
        if control.should_training_stop:
            return step
    return None


def test_first_steps_show_that_a_run_would_not_end_in_time(clock):
    limit = EndInTime(clock.now + 60, steps_after=0)
    assert stops_at(limit, clock, [1.0] * 100) == 7
    assert limit.needed == 93


def test_a_run_that_ends_in_time_goes_on_though_it_pauses_to_compile(clock):
    limit = EndInTime(clock.now + 130, steps_after=0)
    assert stops_at(limit, clock, [20.0, 2.0, *[1.0] * 38, 5.0, *[1.0] * 59]) is None
    assert limit.needed is None


def test_later_budgets_and_validation_count(clock):
    limit = EndInTime(clock.now + 130, steps_after=40)
    assert stops_at(limit, clock, [1.0] * 100) == 7


def test_a_run_that_slows_down_is_given_up_when_it_shows(clock):
    limit = EndInTime(clock.now + 110, steps_after=0)
    assert 50 < stops_at(limit, clock, [1.0] * 50 + [3.0] * 50) < 90


def test_a_run_that_would_not_end_in_time_leaves_no_result_and_its_rung_is_not_begun_again(tmp_path, monkeypatch):
    file, console = write_ladder(tmp_path), quiet()
    monkeypatch.setattr(worker, "EndInTime", lambda deadline, after: EndInTime(deadline, after + 1e9))
    assert not run_queue(scaling(file, minutes=5), console)
    assert results_of(tmp_path) == {}
    words = said(console)
    assert words.count("is given up: by its first steps it needs") == 2
    assert "small-dense-seed0 is given up" in words
    assert "large-dense-seed0 is given up" in words


@pytest.mark.full
def test_what_is_measured_on_another_device_or_beside_others_predicts_nothing(tmp_path):
    file = write_ladder(tmp_path, **TWO)
    run_queue(scaling(file), quiet())
    queue = Queue.read(file)
    for file in (tmp_path / "results").glob("*.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"tokens_per_s": 1.0}))
    (tmp_path / "results" / "small-gqe-seed0-100.json").unlink()
    assert not run_queue(scaling(queue.file, minutes=1), quiet())  # too slow
    for file in (tmp_path / "results").glob("*.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"instructions": "others"}))
    assert run_queue(scaling(queue.file, minutes=1), quiet())


def test_on_a_gpu_smaller_rungs_say_nothing_about_a_larger_one(tmp_path):
    queue = Queue.read(GPU, ["d256", "d384"])
    first, other = (next(r for r in queue.runs if (r.rung, r.arm) == key) for key in (("d256", "gqe"), ("d384", "gqe")))
    rates = Rates(queue, [on_gpu(rung="d256", arm="dense")])
    assert rates.tokens_per_s(first) is not None
    assert rates.tokens_per_s(other) is None


def test_compiling_counts_where_an_arm_is_not_compiled_yet():
    queue = Queue.read(GPU, ["d256"])
    timed = {"train_tokens": 1000, "tokens_per_s": 100.0}
    results = [on_gpu(rung="d256", arm="gqe", train_seconds=seconds, **timed) for seconds in (10.5, 70.0)]
    gqe, dense = (next(r for r in queue.runs if r.arm == arm) for arm in ("gqe", "dense"))
    assert Rates(queue, results).warm_up(gqe) == Rates(queue, results).warm_up(dense) == 60.0
    slow = [*results, on_gpu(rung="d256", arm="dense", train_seconds=30.0, **timed)]
    assert Rates(queue, slow).warm_up(dense) == 20.0
    assert Rates(queue, []).warm_up(dense) == 0.0


@pytest.mark.full
def test_an_unmeasured_run_says_what_is_assumed(tmp_path, monkeypatch):
    file, console = write_ladder(tmp_path, **TWO), quiet()
    monkeypatch.setattr(worker, "peak_flops", lambda hardware: 1e9)
    run_queue(scaling(file, minutes=5), console)
    assert said(console).count("nothing of its rung is measured on") == 1
    assert "at an assumed 25% of the peak" in " ".join(said(console).split())


# one file


@pytest.mark.full
def test_collected_results_are_those_of_separate_files(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    run_queue(scaling(write_ladder(one, **TWO)), quiet())
    file, collected = write_ladder(other, **TWO), other / "new" / "results.json"
    assert run_queue(scaling(file, collect=str(collected)), quiet())
    assert results_of(other) == {}
    collected.rename(other / "results" / "gpu.json")
    assert run_queue(scaling(file, minutes=0), quiet())  # nothing is missing
    times = {"train_seconds": 0, "tokens_per_s": 0, "pieces": []}
    facts = [
        {(r.arm, r.budget): dataclasses.replace(r, **times) for r in read_files((folder / "results").glob("*.json"))}
        for folder in (one, other)
    ]
    assert facts[0] == facts[1]
    assert len(facts[0]) == 6


def test_a_file_of_results_refuses_a_key_twice_and_paths(tmp_path):
    file = tmp_path / "results.json"
    collect_result(file, run(seed=0))
    collect_result(file, run(seed=1))
    with pytest.raises(SettingError, match="a run must have one result"):
        collect_result(file, run(seed=1))
    with pytest.raises(SettingError, match="holds the path /home"):
        collect_result(file, run(seed=2, settings={"data": "/home/x"}))
    assert [result.seed for result in read_files([file])] == [0, 1]


@pytest.mark.full
def test_results_of_other_tokens_are_refused(tmp_path, monkeypatch):
    file = write_ladder(tmp_path, **TWO)
    run_queue(scaling(file), quiet())
    (tmp_path / "results" / "small-gqe-seed0-100.json").unlink()
    source = next((tmp_path / "out" / "tokens").glob("corpus-*"))
    part = tmp_path / "part"
    monkeypatch.setattr(portion, "BLOCK", 16)
    tokens = portion.write_portion(source, part, 4000, 1000)
    with pytest.raises(SettingError, match=rf"hash {tokens.data_hash}; rung small has begun with"):
        run_queue(scaling(file, data=str(part)), quiet())
    result = tmp_path / "results" / "small-gqe-seed0-050.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"data_hash": tokens.data_hash}))
    with pytest.raises(SettingError, match="all must be made with the same tokens"):
        Queue.read(file).results()


# tokens


def test_a_part_of_the_tokens_is_written_for_a_rung_and_says_how_often_it_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(portion, "BLOCK", 16)
    file, console, part = write_ladder(tmp_path), quiet(), tmp_path / "part"
    asked = {"data": str(tmp_path), "to": str(part), "tokens": 1000, "shard_megabytes": 0.0005}
    write_tokens(scaling(file, "tokens", **asked), console)
    words = said(console)
    info = read_meta(part).info
    assert info.train_tokens == 992
    assert info.data_hash in "".join(words.split())
    assert "small: 2.6 epochs\nlarge: 5.2 epochs; only 4 are allowed" in words
    assert max(path.stat().st_size for path in part.glob("*.bin")) <= 500
    with pytest.raises(SettingError, match=r"rung large would train \d+\.\d epochs; it must be 4 at most"):
        run_queue(scaling(file, data=str(part), out=str(tmp_path / "fresh")), quiet())


def test_tokens_that_have_not_all_come_are_refused_by_name(tmp_path):
    file, part = write_ladder(tmp_path), tmp_path / "part"
    write_tokens(scaling(file, "tokens", data=str(tmp_path), to=str(part), shard_megabytes=0.002), quiet())
    (part / "train-00001.bin").unlink()
    with pytest.raises(SettingError, match=r"which lacks 1 file of tokens .*, such as train-00001.bin"):
        run_queue(scaling(file, data=str(part), out=str(tmp_path / "fresh")), quiet())


@pytest.mark.parametrize(
    ("action", "given", "words"),
    [
        ("tokens", {}, "to isn't given; it must be a new folder"),
        ("run", {"to": "x"}, "to is 'x', which belongs to scaling tokens"),
        ("status", {"collect": "x"}, "collect is 'x', which belongs to scaling run"),
        ("tokens", {"to": "x", "beside": 2}, "beside is 2, which belongs to scaling run"),
        ("run", {"beside": 0}, "beside is 0; it must be 1 or more"),
        ("tokens", {"to": "x", "shard_megabytes": 0.0}, "shard_megabytes is 0.0; it must be a number above 0"),
    ],
)
def test_options_of_another_action_and_values_that_cannot_be_are_refused(tmp_path, action, given, words):
    with pytest.raises(SettingError) as caught:
        scaling(tmp_path / "ladder.yaml", action, **given).check()
    assert words in str(caught.value)


# processes beside one another


@pytest.mark.full
def test_a_machine_with_tokens_and_few_packages_takes_each_run_once_in_two_processes(tmp_path):
    plan = {"plan": [{"rungs": ["small"], "arms": ["dense", "gqe"], "seeds": 2}]}
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir(), both.mkdir()
    run_queue(scaling(write_ladder(alone, **plan), collect=str(alone / "all.json")), quiet())
    file = write_ladder(both, **plan)
    write_tokens(scaling(file, "tokens", data=str(both), to=str(both / "tokens"), shard_megabytes=0.01), quiet())
    for text in both.glob("*.txt"):
        text.unlink()
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)  # in child processes too
    command = [sys.executable, "-m", "query_experts.cli", "scaling", "run", str(file), "--data", str(both / "tokens"),
               "--device", "cpu", "--minutes", "5", "--beside", "2", "--collect", str(both / "all.json"),
               "--out", str(both / "fresh")]  # fmt: skip
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes beside one another." in done.stdout
    assert done.stdout.count("FLOP/s") == 12
    assert "tok/s" in done.stderr  # the bars
    one, two = ({r.key: r for r in read_files([folder / "all.json"])} for folder in (alone, both))
    assert one.keys() == two.keys()
    assert {key: r.validation_loss for key, r in one.items()} == {key: r.validation_loss for key, r in two.items()}
    assert {r.beside for r in two.values()} == {2}


def test_a_gpu_is_shared_by_runs_that_do_not_fill_it():
    def count(rung, **more):
        return processes(Queue.read(GPU, [rung]), scaling(GPU, **more))

    assert count("d256") == 4
    assert count("d384") == count("d512") == 1
    assert count("d512", beside=3) == 3
    assert count("d512", beside=99) == 15


def test_on_a_cpu_one_process_works_unless_more_are_asked_for(tmp_path):
    queue = Queue.read(write_ladder(tmp_path, **TWO))
    assert processes(queue, scaling(queue.file)) == 1
    assert processes(queue, scaling(queue.file, beside=2)) == 2


def test_a_last_run_that_is_alone_counts_as_alone(tmp_path):
    file = write_ladder(tmp_path, plan=[{"rungs": ["small"], "arms": ["dense"], "seeds": 1}])
    run_queue(scaling(file, beside=3), quiet())
    assert {result["beside"] for result in results_of(tmp_path).values()} == {1}


@pytest.mark.full
def test_a_signal_goes_on_to_the_processes_which_save(tmp_path):
    class WhenReady(StopRequest):
        """Asked as soon as the processes listen."""

        @property
        def signal(self):
            return signal.SIGTERM if len([*tmp_path.glob("ready-*")]) == 2 else None

        @signal.setter
        def signal(self, number):
            assert number is None

    assert run_beside(wait_until_asked, (str(tmp_path),), 2, WhenReady()) == [0, 0]
    assert len([*tmp_path.glob("saved-*")]) == 2


@pytest.mark.full
def test_a_process_that_cannot_work_says_so(capfd):
    assert run_beside(refuse, (), 2, StopRequest()) == [2, 2]
    assert capfd.readouterr().err.count("steps is 0; it must be 1 or more") == 2


@pytest.mark.full
def test_processes_save_and_end_when_the_one_that_started_them_is_killed(tmp_path):
    helpers = Path(__file__).resolve().parents[2] / "helpers"
    program = (
        "from query_experts.study.callbacks import StopRequest\n"
        "from query_experts.study.ladder.beside import run_beside\n"
        "from queue_helpers import wait_until_asked\n"
        f"if __name__ == '__main__': run_beside(wait_until_asked, ({str(tmp_path)!r},), 2, StopRequest())\n"
    )
    (tmp_path / "parent.py").write_text(program)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=os.environ | {"PYTHONPATH": str(helpers)})
    wait_for(lambda: len([*tmp_path.glob("ready-*")]) == 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: len([*tmp_path.glob("saved-*")]) == 2)


def wait_for(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_make_gpu_ladder_asks_for_the_rungs_of_a_gpu_and_one_file():
    command = ["make", "--dry-run", "--silent", "gpu-ladder", "VENV=none", "ARGS=--only d256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = done.stdout.replace("\\\n", " ").splitlines()[-1].split()
    assert words[:2] == ["none/bin/query-experts", "scaling"]
    settings = parse_settings(ScalingSettings, words[2:], prog="scaling", about="")
    settings.check()
    assert (settings.action, settings.device, settings.minutes) == ("run", "cuda", 8.5)
    assert Path(settings.collect).parent == Path(settings.out)
    queue = Queue.read(ROOT / settings.ladder, settings.only, "cuda")
    assert {run.rung for run in queue.runs} == {"d256"}
