"""The queue of a ladder: its runs, several workers, kills, deadlines and what it prints."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from query_experts.cli import main
from query_experts.common.errors import SettingError
from query_experts.data import prepare
from query_experts.study.callbacks import StopRequest
from query_experts.study.ladder import worker
from query_experts.study.ladder.queue import Queue, Rates
from query_experts.study.ladder.status import print_status, status
from query_experts.study.ladder.worker import run_lock, run_queue
from query_experts.study.settings import RunSettings
from query_experts.study.train import new_model
from queue_helpers import LADDER, RUNG, StopAfterLooks, results_of, scaling, write_ladder
from study_helpers import quiet, said

ONE = {"plan": [{"rungs": ["small"], "arms": ["dense", "gqe"], "seeds": 1}]}


def test_only_takes_rungs_and_arms_and_refuses_other_names(tmp_path):
    file = write_ladder(tmp_path)
    names = lambda only: [run.name for run in Queue.read(file, only).runs]  # noqa: E731
    assert names(["large", "gqe"]) == ["large-gqe-seed0", "large-gqe-seed1"]
    assert len(names(["gqe"])) == len(names(["small"])) == 4
    with pytest.raises(SettingError, match="only holds 'huge'; it must hold some of small, large, dense, gqe"):
        Queue.read(file, ["huge"])


def test_a_worker_takes_only_the_rungs_of_its_device(tmp_path):
    file = write_ladder(tmp_path, rungs={"small": RUNG, "large": RUNG | {"device": "cuda"}})
    assert {run.rung for run in Queue.read(file, device="cpu").runs} == {"small"}
    assert {run.rung for run in Queue.read(file, device="cuda").runs} == {"large"}


def test_the_queue_trains_what_is_missing_and_nothing_twice(tmp_path):
    file, console = write_ladder(tmp_path, **ONE), quiet()
    assert run_queue(scaling(file), console)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")}
    assert len(first) == 6
    assert "small-gqe-seed0, 50.0%: " in said(console)
    (tmp_path / "results" / "small-gqe-seed0-050.json").rename(tmp_path / "kept.json")
    assert run_queue(scaling(file), quiet())
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")}
    assert {name for name in again if again[name] != first[name]} == {"small-gqe-seed0-050.json"}
    kept = json.loads((tmp_path / "kept.json").read_text())
    new = results_of(tmp_path)["small-gqe-seed0-050.json"]
    assert {name: kept[name] for name in new} == new


def test_tokens_are_found_without_their_texts_and_must_be_those_of_the_ladder(tmp_path):
    file = write_ladder(tmp_path, **ONE)
    with pytest.raises(SettingError, match="data isn't given, and out holds 0 folders of the ladder's tokens"):
        run_queue(scaling(file, data=None), quiet())
    run_queue(scaling(file), quiet())
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    (tmp_path / "results" / "small-gqe-seed0-100.json").unlink()
    assert run_queue(scaling(file, data=None), quiet())
    tokens = next((tmp_path / "out" / "tokens").glob("corpus-*"))
    assert run_queue(scaling(file, data=str(tokens), out=str(tmp_path / "elsewhere")), quiet())
    with pytest.raises(SettingError, match=r"hash \w+; ladder .* has data_hash abc"):
        run_queue(scaling(write_ladder(tmp_path, **ONE, data_hash="abc", results="other"), data=str(tokens)), quiet())


def test_a_text_that_is_missing_is_named(tmp_path):
    file = write_ladder(tmp_path, **ONE)
    (tmp_path / "other.txt").unlink()
    with pytest.raises(SettingError, match=r"data is .*, which lacks other.txt; it must have every text file of"):
        run_queue(scaling(file), quiet())


def test_more_than_four_epochs_are_refused(tmp_path):
    file = write_ladder(tmp_path, **ONE, tokens_per_parameter=100)
    with pytest.raises(SettingError, match=r"of which rung small would train \d+\.\d epochs; it must be 4 at most"):
        run_queue(scaling(file), quiet())


@pytest.mark.full
def test_a_locked_run_is_left_to_its_worker(tmp_path):
    file = write_ladder(tmp_path, **ONE)
    queue = Queue.read(file)
    with locked(queue, queue.runs[0]):
        assert not run_queue(scaling(file), quiet())
        assert {name.split("-")[1] for name in results_of(tmp_path)} == {"gqe"}
    assert run_queue(scaling(file), quiet())


@pytest.mark.full
def test_a_result_made_with_other_settings_is_refused(tmp_path):
    run_queue(scaling(write_ladder(tmp_path, **ONE)), quiet())
    file = write_ladder(tmp_path, **ONE, rungs={"small": RUNG | {"learning_rate": 0.5}, "large": RUNG})
    with pytest.raises(SettingError, match=r"run small-.*-seed0 has learning_rate 0.5; its result was made with 0.002"):
        Queue.read(file).results()


@pytest.mark.full
def test_results_of_more_seeds_than_the_plan_has_must_have_its_settings_too(tmp_path):
    plan = {"plan": [{"rungs": ["small"], "arms": ["gqe"], "seeds": 2}]}
    run_queue(scaling(write_ladder(tmp_path, **plan)), quiet())
    plan["plan"][0]["seeds"] = 1
    file = write_ladder(tmp_path, **plan)
    assert len(Queue.read(file).results()) == 6
    changed = tmp_path / "results" / "small-gqe-seed1-100.json"
    result = json.loads(changed.read_text())
    changed.write_text(json.dumps(result | {"settings": result["settings"] | {"learning_rate": 0.5}}))
    with pytest.raises(SettingError, match=r"small-gqe-seed1 has learning_rate \S+; its result was made with 0.5"):
        Queue.read(file).results()


@pytest.mark.full
def test_results_of_one_tag_only_stand_in_a_rung_that_is_not_complete(tmp_path, monkeypatch):
    file = write_ladder(tmp_path, **ONE, tag="one", commit="1234567890")
    for running in (None, "1234567+", "7654321"):
        monkeypatch.setattr(worker, "commit", lambda found=running: found)
        with pytest.raises(SettingError, match="whose tag is 'one', commit 1234567890; the code that runs is that of"):
            run_queue(scaling(file), quiet())
    monkeypatch.setattr(worker, "commit", lambda: "1234567")
    run_queue(scaling(file), quiet())
    assert {result["tag"] for result in results_of(tmp_path).values()} == {"one"}
    other = write_ladder(tmp_path, **ONE, tag="two", commit="1234567aaa")
    assert run_queue(scaling(other), quiet())
    (tmp_path / "results" / "small-gqe-seed0-100.json").unlink()
    with pytest.raises(SettingError, match="rung small has begun with 'one' and must be completed with it"):
        run_queue(scaling(other), quiet())


@pytest.mark.full
def test_hours_stop_a_run_that_goes_on_later(tmp_path, monkeypatch):
    alone, stopped, minutes = tmp_path / "alone", tmp_path / "stopped", []
    alone.mkdir(), stopped.mkdir()
    assert run_queue(scaling(write_ladder(alone, **ONE)), quiet())
    file = write_ladder(stopped, **ONE)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "stop_after", lambda after: minutes.append(after) or StopAfterLooks(20))
        assert not run_queue(scaling(file, hours=2), quiet())
    assert minutes == [120]
    assert len(results_of(stopped)) < 6
    assert [*(stopped / "out" / "runs" / "ladder" / "small-dense-seed0").glob("*/checkpoints/checkpoint-*")]
    console = quiet()
    assert run_queue(scaling(file), console)
    assert "begins anew" not in said(console)
    assert results_of(stopped) == results_of(alone)


def test_checkpoints_of_other_settings_are_not_gone_on_from(tmp_path):
    plan = {"plan": [{"rungs": ["small"], "arms": ["dense"], "seeds": 1}], "tokens_per_parameter": 2}
    changed = {"rungs": {"small": RUNG | {"learning_rate": 0.01}, "large": RUNG}}
    assert run_queue(scaling(write_ladder(tmp_path, **plan, **changed)), quiet())
    alone = results_of(tmp_path)
    shutil.rmtree(tmp_path / "results")
    file = write_ladder(tmp_path, **plan)
    run = Queue.read(file).runs[0]
    begun = subprocess.Popen(command(file), stderr=subprocess.DEVNULL)
    while not [*(tmp_path / "out" / "runs" / "ladder" / run.name).glob("*/checkpoints/checkpoint-*")]:
        assert begun.poll() is None
        time.sleep(0.01)
    begun.kill()
    begun.wait()
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
    console = quiet()
    assert run_queue(scaling(write_ladder(tmp_path, **plan, **changed)), console)
    assert "small-dense-seed0 was begun with other values of learning_rate: it begins anew" in said(console)
    assert results_of(tmp_path) == alone


@pytest.mark.parametrize(
    "changes",
    [{"warmup": 0.5}, {"budgets": [0.5, 1]}, {"tokens_per_parameter": 2}, {"threads": 2},
     {"rungs": {"small": RUNG | {"weight_decay": 0.0}}}, {"tag": "one", "commit": "1234567"}],
)  # fmt: skip
def test_all_that_a_checkpoint_depends_on_is_kept_beside_it(tmp_path, changes):
    plan = {"plan": [{"rungs": ["small"], "arms": ["gqe"], "seeds": 1}], "rungs": {"small": RUNG}}
    folder = begin(write_ladder(tmp_path, **plan))
    (folder / "progress").touch()
    begin(write_ladder(tmp_path, **plan))
    assert (folder / "progress").exists()
    begin(write_ladder(tmp_path, **plan | changes))
    assert not (folder / "progress").exists()


def test_ladders_that_share_out_have_folders_of_their_own(tmp_path):
    file = write_ladder(tmp_path, **ONE)
    other = shutil.copy(file, tmp_path / "other.yaml")
    (begin(file) / "progress").touch()
    assert begin(other) != begin(file)
    assert (begin(file) / "progress").exists()


def begin(file):
    """What a worker does before it trains the ladder's first run; the folder of its checkpoints."""
    queue, facts = Queue.read(file), SimpleNamespace(data_hash="abc")
    own = worker.Worker(queue, file.parent / "out", SimpleNamespace(facts=facts), StopRequest(), quiet())
    folder = worker.run_folder(own.out, queue, queue.runs[0])
    own.discard_others(queue.runs[0], folder)
    return folder


@pytest.mark.full
def test_minutes_leave_out_runs_that_would_not_end_in_time(tmp_path):
    file = write_ladder(tmp_path, plan=[{"rungs": ["small"], "arms": ["dense"], "seeds": 2}])
    run_queue(scaling(file), quiet())
    (tmp_path / "results" / "small-dense-seed1-100.json").unlink()
    queue = Queue.read(file)
    seconds = Rates(queue, queue.results()).seconds(queue.runs[1], [1.0])
    assert not run_queue(scaling(file, minutes=seconds / 60 / 2), quiet())
    assert len(results_of(tmp_path)) == 5
    assert run_queue(scaling(file, minutes=seconds + 10), quiet())


@pytest.mark.full
def test_rates_of_other_runs_stand_in_by_their_flops(tmp_path):
    file = write_ladder(tmp_path)
    run_queue(scaling(file, only=["small", "dense"]), quiet())
    queue = Queue.read(file)
    rates = Rates(queue, queue.results())
    large = next(run for run in queue.runs if run.rung == "large")
    small = queue.runs[0]
    ratio = queue.ladder.flops_per_token(large) / queue.ladder.flops_per_token(small)
    assert rates.tokens_per_s(large) == pytest.approx(rates.tokens_per_s(small) / ratio, rel=0.5)
    settings = queue.ladder.run_settings(small)
    validated = sum(part.predicted_tokens for part in rates.results[0].parts)
    whole = (1.15 * settings.steps * settings.tokens_per_step + validated) / rates.tokens_per_s(small)
    assert rates.seconds(small, [0.25, 0.5, 1.0]) == pytest.approx(whole)
    assert Rates(queue, []).seconds(small, [1.0]) is None


@pytest.mark.full
def test_status_counts_what_is_done_running_and_missing(tmp_path):
    file = write_ladder(tmp_path)
    run_queue(scaling(file, only=["small", "dense"]), quiet())
    queue = Queue.read(file)
    running = next(run for run in queue.runs if run.name == "small-gqe-seed1")
    with locked(queue, running):
        rows = {(row.rung, row.arm): row for row in status(queue, tmp_path / "out")}
        console = quiet()
        print_status(scaling(file, "status"), console)
    assert (rows["small", "dense"].done, rows["small", "dense"].missing) == (2, 0)
    assert rows["small", "dense"].hours_left == 0
    assert rows["small", "dense"].hours_done > 0
    assert (rows["small", "gqe"].done, rows["small", "gqe"].missing) == (0, 1)
    assert rows["small", "gqe"].running[0].startswith("seed 1 0%")
    assert rows["large", "gqe"].hours_left > rows["small", "gqe"].hours_left > 0
    assert "2 runs done" in said(console)
    assert "5 missing, about " in said(console)


def locked(queue: Queue, run):
    lock = run_lock(queue, run)
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    return lock


def command(file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "query_experts.cli", "scaling", "run", str(file), "--data", str(file.parent),
            "--out", str(file.parent / "out"), *more]  # fmt: skip


@pytest.mark.full
def test_two_workers_and_kills_at_random_moments_give_the_results_of_one_quiet_worker(tmp_path):
    plan = {"plan": [{"rungs": ["small"], "arms": ["dense", "gqe"], "seeds": 2}], "tokens_per_parameter": 2}
    quiet_one, killed = tmp_path / "one", tmp_path / "killed"
    quiet_one.mkdir(), killed.mkdir()
    run_queue(scaling(write_ladder(quiet_one, **plan)), quiet())
    file = write_ladder(killed, **plan)
    moments, environment, interrupted = random.Random(0), os.environ | {"OMP_NUM_THREADS": "1"}, 0
    for _ in range(2):
        workers = [subprocess.Popen(command(file), env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
        begun = time.monotonic()
        while not (killed / "out" / "runs").exists() and time.monotonic() < begun + 120:
            time.sleep(0.1)
        time.sleep(moments.uniform(2, 8))
        interrupted += sum(one.poll() is None for one in workers)
        for one in workers:
            one.send_signal(signal.SIGKILL)
            one.wait()
    assert interrupted
    assert run_queue(scaling(file), quiet())
    assert results_of(killed) == results_of(quiet_one)


@pytest.mark.full
def test_each_run_of_a_sweep_trains_a_model_with_its_own_values(tmp_path):
    vary = {"router_aux_loss_coef": [0.0, 10.0]}
    file = write_ladder(tmp_path, plan=[{"rungs": ["small"], "arms": ["gqe"], "seeds": 1, "vary": vary}])
    assert run_queue(scaling(file), quiet())
    whole = [result for result in results_of(tmp_path).values() if result["budget"] == 1]
    assert [result["settings"]["router_aux_loss_coef"] for result in whole] == [0.0, 10.0]
    assert whole[0]["routing"]["load"] != whole[1]["routing"]["load"]


@pytest.mark.full
def test_a_routed_run_that_diverges_is_kept_as_such_and_the_queue_goes_on(tmp_path):
    vary = {"learning_rate": [1e6, 0.002]}
    file = write_ladder(tmp_path, plan=[{"rungs": ["small"], "arms": ["gqe"], "seeds": 1, "vary": vary}])
    assert run_queue(scaling(file), quiet())
    results = results_of(tmp_path)
    assert len(results) == 6
    for result in results.values():
        assert (result["validation_loss"] is None) == (result["settings"]["learning_rate"] == 1e6)


def test_rungs_of_one_size_that_are_prepared_otherwise_have_models_of_their_own(tmp_path):
    rungs = {"plain": RUNG, "again": RUNG, "saving": RUNG | {"activation_checkpointing": True}}
    file = write_ladder(tmp_path, rungs=rungs, plan=[{"rungs": [*rungs], "arms": ["gqe"], "seeds": 1}])
    queue = Queue.read(file)
    own = worker.Worker(queue, tmp_path, None, StopRequest(), quiet())
    branches = [SimpleNamespace(run=run, settings=queue.ladder.run_settings(run)) for run in queue.runs]
    plain, again, saving = map(own.model, branches)
    assert plain is again
    assert [one.is_gradient_checkpointing for one in (plain, saving)] == [False, True]


@pytest.mark.full
def test_every_model_of_a_worker_is_compiled_however_many_there_are():
    torch._dynamo.reset()
    settings = RunSettings(**LADDER["settings"] | RUNG, compile=True)
    counters = torch._dynamo.utils.counters["stats"]
    for number in range(10):  # torch's own limit is 8
        before = counters["unique_graphs"]
        model = new_model(dataclasses.replace(settings, intermediate_size=16 + 8 * number), "dense", 0)
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        assert counters["unique_graphs"] > before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"out": "file/out"}, "out is .*file/out, which can't be written to"),
        ({"out": "file"}, "out is .*file, which is a file; it must be a folder"),
        ({"collect": "file/all.json"}, "the folder of collect is .*file, which is a file"),
        ({"collect": "folder"}, "collect is .*folder, which is a folder; it must be a file"),
    ],
)
def test_a_place_that_can_not_be_written_to_is_named_before_anything_is_trained(tmp_path, more, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    file = write_ladder(tmp_path)
    with pytest.raises(SettingError, match=words):
        run_queue(scaling(file, **{name: str(tmp_path / value) for name, value in more.items()}), quiet())
    assert not (tmp_path / "out").exists()


def test_a_ladder_without_a_rung_for_the_device_is_refused(tmp_path):
    file = write_ladder(tmp_path, settings=LADDER["settings"] | {"device": "cuda"})
    with pytest.raises(
        SettingError, match=r"device is .cpu., for which the chosen runs .* have no rung; it must be cuda"
    ):
        run_queue(scaling(file, device="cpu"), quiet())


def test_minutes_with_nothing_left_to_do_end_well(tmp_path):
    file = write_ladder(tmp_path, **ONE)
    assert run_queue(scaling(file), quiet())
    assert run_queue(scaling(file, minutes=1.0), quiet())


def test_hours_and_minutes_together_are_refused(tmp_path):
    with pytest.raises(SettingError, match=r"hours is 1\.0 and minutes 2\.0; one of them must be left out"):
        run_queue(scaling(write_ladder(tmp_path), hours=1.0, minutes=2.0), quiet())


def test_tokens_without_validation_files_are_refused(tmp_path):
    file = write_ladder(tmp_path, **ONE)
    prepare([str(tmp_path / "train.txt")], cache_dir=tmp_path / "cache", seq_len=16, vocab_size=300, progress=False)
    folder = next((tmp_path / "cache").glob("corpus-*"))
    with pytest.raises(SettingError, match="tokens without validation files"):
        run_queue(scaling(file, data=str(folder)), quiet())


def test_an_action_that_does_not_exist_is_refused(tmp_path, capsys):
    assert main(["scaling", "start", str(write_ladder(tmp_path))]) == 2
    assert "action is 'start'; it must be run, status, fit, report" in capsys.readouterr().err


@pytest.mark.full
def test_the_same_tokens_made_twice_are_found_without_their_texts(tmp_path):
    file = write_ladder(tmp_path, **ONE)
    run_queue(scaling(file), quiet())
    tokens = next((tmp_path / "out" / "tokens").glob("corpus-*"))
    shutil.copytree(tokens, tokens.with_name("corpus-again"))
    assert run_queue(scaling(file, data=None), quiet())


def test_a_file_in_place_of_the_folder_out_is_refused(tmp_path):
    file = write_ladder(tmp_path)
    with pytest.raises(SettingError, match="which is a file; it must be a folder"):
        run_queue(scaling(file, out=str(file)), quiet())
