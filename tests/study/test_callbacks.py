"""The Trainer callbacks: ZClip against the paper's equations, the progress bar, and the stop that saves."""

import io
import json
import math
import os
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from query_experts.model.arms import arm_config, build
from query_experts.model.initialization import initialise_by_name
from query_experts.study.callbacks import StopRequest, StopWhenAsked, TokenProgress, ZClipCallback
from query_experts.training import GQETrainer
from study_helpers import SIZE, Rows


def zclip_by_the_paper(norms, alpha=0.97, threshold=2.5, warmup=25, eps=1e-6):
    """arXiv 2504.02507, written from its equations: yields the clipped norm, the mean and the variance of each step.

    The first `warmup` norms pass; their mean and (population) variance start the averages. Then z = (g - mean) / std;
    where z > threshold the norm becomes mean + (threshold**2 / z) * std; the averages take the norm as clipped.
    """
    mean, variance = np.mean(norms[:warmup]), np.var(norms[:warmup])
    yield from ((norm, None, None) for norm in norms[: warmup - 1])
    yield norms[warmup - 1], mean, variance
    for norm in norms[warmup:]:
        z = (norm - mean) / (np.sqrt(variance) + eps)
        clipped = mean + threshold**2 / z * np.sqrt(variance) if z > threshold else norm
        mean = alpha * mean + (1 - alpha) * clipped
        variance = alpha * variance + (1 - alpha) * (clipped - mean) ** 2
        yield clipped, mean, variance


def norms_with_spikes(count=300, seed=0):
    rng = random.Random(seed)
    return [
        rng.lognormvariate(0, 0.3) * (rng.choice([5, 40, 1000]) if rng.random() < 0.06 else 1) for _ in range(count)
    ]


def arguments(tmp_path, **changes):
    defaults = {
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True,
        "max_grad_norm": 0.0, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "remove_unused_columns": False, "log_level": "error",
    }  # fmt: skip
    return TrainingArguments(**defaults | changes)


def tiny_model(arm="gqe"):
    model = build(arm_config(arm, SIZE))
    initialise_by_name(model, 0, model.config.initializer_range)
    return model


class Gradients(TrainerCallback):
    """Keeps a copy of the gradients that it finds before each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append([p.grad.double().clone() for p in model.parameters() if p.grad is not None])


def norm_of(gradients):
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


@pytest.mark.parametrize(("seed", "warmup"), [(0, 25), (1, 25), (2, 3)])
def test_zclip_follows_the_papers_equations_on_norms_with_spikes(seed, warmup):
    norms = norms_with_spikes(seed=seed)
    zclip = ZClipCallback(warmup_steps=warmup)
    clipped = 0
    for norm, (target, mean, variance) in zip(norms, zclip_by_the_paper(norms, warmup=warmup), strict=True):
        assert zclip.target_norm(norm) == pytest.approx(target, rel=1e-12)
        assert zclip.mean == (mean if mean is None else pytest.approx(mean, rel=1e-12))
        if mean is not None:
            assert zclip.variance == pytest.approx(variance, rel=1e-9)
        clipped += target < norm
    assert clipped > 5


def test_zclip_has_the_papers_settings_by_default_and_clips_nothing_in_25_steps_of_warm_up():
    zclip = ZClipCallback()
    assert (zclip.alpha, zclip.z_threshold, zclip.warmup_steps) == (0.97, 2.5, 25)
    norms = [1.0] * 24 + [1e6]
    assert [zclip.target_norm(norm) for norm in norms] == norms
    assert zclip.mean == pytest.approx(sum(norms) / 25)


def test_zclip_scales_harder_the_farther_out_a_norm_is():
    def target(norm):
        zclip = ZClipCallback()
        zclip.mean, zclip.variance = 1.0, 0.04
        return zclip.target_norm(norm)

    assert target(1.4999) == 1.4999  # z just below 2.5
    assert 1.0 < target(100.0) < target(3.0) < target(1.6) < 1.5


def test_zclip_brings_a_spike_after_constant_norms_back_to_their_mean():
    zclip = ZClipCallback(warmup_steps=4)
    for _ in range(4):
        zclip.target_norm(2.0)
    assert zclip.target_norm(50.0) == pytest.approx(2.0)
    assert zclip.target_norm(2.0) == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("after", [3, 60], ids=["in warm-up", "after warm-up"])
def test_a_norm_that_is_not_finite_passes_through_and_leaves_zclips_averages_as_they_were(bad, after):
    with_bad, without = ZClipCallback(), ZClipCallback()
    for step, norm in enumerate(norms_with_spikes(120)):
        if step == after:
            passed = with_bad.target_norm(bad)
            assert passed == bad or math.isnan(passed)
        assert with_bad.target_norm(norm) == without.target_norm(norm)
    assert with_bad.state() == without.state()
    assert math.isfinite(with_bad.mean)


def test_zclip_scales_the_trainers_gradients_to_exactly_the_target_norm(tmp_path):
    before, after, zclip = Gradients(), Gradients(), ZClipCallback()
    zclip.mean, zclip.variance = 0.01, 1e-6
    trainer = GQETrainer(tiny_model(), arguments(tmp_path), train_dataset=Rows(), callbacks=[before, zclip, after])
    trainer.train()
    norm = norm_of(before.seen[0])
    z = (norm - 0.01) / (1e-3 + 1e-6)
    assert z > 2.5
    assert norm_of(after.seen[0]) == pytest.approx(0.01 + 2.5**2 / z * 1e-3, rel=1e-5)
    factor = norm_of(after.seen[0]) / norm
    for raw, scaled in zip(before.seen[0], after.seen[0], strict=True):  # all by one factor
        torch.testing.assert_close(scaled, raw * factor, rtol=1e-5, atol=1e-12)
    assert zclip.clipped_steps == 1
    log = trainer.state.log_history[0]
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert log["grad_norm_clipped"] == pytest.approx(norm_of(after.seen[0]), rel=1e-5)
    assert log["clipped_steps"] == 1


def test_zclip_leaves_gradients_that_are_no_outliers_bit_for_bit_alone(tmp_path):
    before, after, zclip = Gradients(), Gradients(), ZClipCallback()
    zclip.mean, zclip.variance = 1e3, 1.0
    trainer = GQETrainer(
        tiny_model(), arguments(tmp_path, max_steps=2), train_dataset=Rows(), callbacks=[before, zclip, after]
    )
    trainer.train()
    assert all(
        torch.equal(a, b) for x, y in zip(before.seen, after.seen, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert zclip.clipped_steps == 0
    assert zclip.mean < 1e3


def test_zclip_starts_again_where_its_state_was_stored_as_json():
    norms = norms_with_spikes(120)
    for stop in (7, 25, 60):  # in warm-up, at its end, after it
        whole, first = ZClipCallback(0.9, 2.0, 25), ZClipCallback(0.9, 2.0, 25)
        expected = [whole.target_norm(norm) for norm in norms]
        for norm in norms[:stop]:
            first.target_norm(norm)
        state = json.loads(json.dumps(first.state()))
        second = ZClipCallback(**state["args"])
        for name, value in state["attributes"].items():
            setattr(second, name, value)
        assert [second.target_norm(norm) for norm in norms[stop:]] == expected[stop:]
        assert second.state() == whole.state()


def test_zclip_refuses_fp16_and_another_clipping_naming_the_field_and_what_to_use():
    with pytest.raises(ValueError, match=r"fp16 is True; .*must be False.*bf16"):
        ZClipCallback().on_train_begin(SimpleNamespace(fp16=True, max_grad_norm=0.0), None, None)
    with pytest.raises(ValueError, match=r"max_grad_norm is 1\.0; .*must be 0"):
        ZClipCallback().on_train_begin(SimpleNamespace(fp16=False, max_grad_norm=1.0), None, None)
    ZClipCallback().on_train_begin(SimpleNamespace(fp16=False, max_grad_norm=0.0), None, None)


def test_the_progress_bar_counts_tokens_and_shows_the_language_model_loss(tmp_path, capsys):
    progress = TokenProgress("gqe seed 3", 48)
    GQETrainer(
        tiny_model(), arguments(tmp_path, max_steps=3), train_dataset=Rows(), callbacks=[progress]
    ).train()  # fmt: skip
    assert (progress.cold_steps, progress.warm_steps) == (2, 1)
    assert 0 < progress.warm_seconds < progress.seconds < 60
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "gqe seed 3: 100%" in last
    assert "144/144" in last
    assert "loss=5." in last


ON_A_GPU = SimpleNamespace(device=torch.device("cuda"))  # where wall-clock time counts


def test_on_one_thread_of_a_cpu_a_pause_does_not_count_as_training():
    cpu, state = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(global_step=1)
    threads = torch.get_num_threads()
    for count, most in ((1, 0.05), (2, 9.0)):
        torch.set_num_threads(count)
        progress = TokenProgress("run", 10)
        progress.on_step_begin(cpu, state, None)
        time.sleep(0.1)
        progress.on_step_end(cpu, state, None)
        assert progress.seconds < most
    torch.set_num_threads(threads)
    assert progress.seconds >= 0.1


def progress_of(pieces, waits=()):
    """A progress callback after pieces of that many steps, with a wait before each of the steps in `waits`."""
    progress, done = TokenProgress("run", 10), 0
    for steps in pieces:
        state = SimpleNamespace(is_world_process_zero=False, max_steps=9, global_step=done)
        progress.on_train_begin(ON_A_GPU, state, None)
        for _ in range(steps):
            progress.on_step_begin(ON_A_GPU, state, None)
            if done in waits:
                time.sleep(0.1)
            done += 1
            state.global_step = done
            progress.on_step_end(ON_A_GPU, state, None)
            time.sleep(0.02)  # a validation
    return progress


def test_the_progress_bar_times_training_steps_alone():
    assert progress_of([5]).seconds < 0.02


def test_the_first_steps_of_a_piece_do_not_count_in_tokens_per_second():
    progress = progress_of([3, 4], waits=[0, 1, 3, 4])
    assert (progress.cold_steps, progress.warm_steps) == (4, 3)
    assert progress.seconds > 0.4
    assert progress.tokens_per_s == pytest.approx(30 / progress.warm_seconds)
    assert progress.warm_seconds < 0.1


def test_a_run_of_first_steps_alone_has_a_speed_too():
    progress = progress_of([2, 1])
    assert progress.tokens_per_s == pytest.approx(30 / progress.seconds)


def test_a_run_saves_and_stops_when_its_time_has_come_and_not_after_the_last_step():
    def ask(deadline, step):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        state = SimpleNamespace(global_step=step, max_steps=6, logging_steps=1)
        StopWhenAsked(StopRequest(deadline)).on_step_end(SimpleNamespace(device="cpu"), state, control)
        return control.should_save, control.should_training_stop

    now = time.monotonic()
    assert ask(now - 1, 2) == (True, True)
    assert ask(now + 60, 2) == (False, False)
    assert ask(now - 1, 6) == (False, False)
    assert ask(None, 2) == (False, False)


SIGNALS = [signal.SIGINT, signal.SIGTERM]


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act()


@pytest.fixture
def handlers():
    """Puts a handler of its own in place of pytest's, yields the signals that it got, and puts that back."""
    before, got = {number: signal.getsignal(number) for number in SIGNALS}, []

    def note(number, frame):
        got.append(number)

    for number in SIGNALS:
        signal.signal(number, note)
    yield got
    assert {signal.getsignal(number) for number in SIGNALS} == {note}
    for number, handler in before.items():
        signal.signal(number, handler)


def trained(tmp_path, request, act):
    trainer = GQETrainer(
        tiny_model(), arguments(tmp_path, max_steps=5, logging_steps=1), train_dataset=Rows(),
        callbacks=[StopWhenAsked(request), At(1, act)],
    )  # fmt: skip
    with request.listening():
        trainer.train()
    return trainer.state.global_step


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_asked_to_end_saves_and_stops(tmp_path, handlers, number):
    request = StopRequest()
    assert trained(tmp_path, request, lambda: os.kill(os.getpid(), number)) == 2
    assert (tmp_path / "run" / "checkpoint-2").exists()
    assert request.signal == number
    assert handlers == []


def test_a_run_that_nobody_asked_to_end_or_that_fails_leaves_the_signals_as_they_were(tmp_path, handlers):
    assert trained(tmp_path, StopRequest(), lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, StopRequest(), lambda: 1 / 0)
    os.kill(os.getpid(), signal.SIGINT)
    assert handlers == [signal.SIGINT]


def test_the_second_signal_acts_at_once_even_beside_the_first(tmp_path, handlers):
    def both():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    assert trained(tmp_path, StopRequest(), both) == 2
    assert len(handlers) == 1


def test_an_ignored_signal_stays_ignored(tmp_path, handlers):
    noting = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    assert trained(tmp_path, request, lambda: os.kill(os.getpid(), signal.SIGINT)) == 5
    assert request.signal is None
    assert signal.signal(signal.SIGINT, noting) == signal.SIG_IGN


def test_a_closed_pipe_stops_neither_the_saving_nor_the_training(tmp_path, handlers, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(transformers_logging, "_tqdm_active", False)  # as the study switches its bars off
    monkeypatch.setattr(sys, "stderr", Closed())
    progress = TokenProgress("name", 10)
    progress.bar = SimpleNamespace(update=lambda _: sys.stderr.write(""), close=lambda: sys.stderr.write(""))
    progress.on_step_end(ON_A_GPU, SimpleNamespace(global_step=1), None)
    progress.close()
    assert progress.bar is None
    assert trained(tmp_path, StopRequest(), lambda: os.kill(os.getpid(), signal.SIGINT)) == 2
    assert (tmp_path / "run" / "checkpoint-2").exists()


def test_a_bar_that_failed_to_write_leaves_tqdms_lock_to_other_threads(monkeypatch):
    class Closing(io.StringIO):
        closed_now = False

        def write(self, text):
            if self.closed_now:
                raise BrokenPipeError
            return super().write(text)

    stream = Closing()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = TokenProgress("name", 10)
    progress.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=4, is_world_process_zero=True), None)
    stream.closed_now = True
    progress.draw(lambda bar: bar.refresh())
    assert progress.bar is None
    acquired = []

    def draw_another():
        for lock in tqdm.get_lock().locks:
            acquired.append(lock.acquire(timeout=5))
            lock.release()

    thread = threading.Thread(target=draw_another)
    thread.start()
    thread.join()
    assert acquired
    assert all(acquired)
