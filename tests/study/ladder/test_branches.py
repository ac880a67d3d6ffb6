"""A branch of a run: it equals the straight run of its budget, whatever interrupts it and whatever ran before."""

import dataclasses
import shutil
from pathlib import Path

import accelerate
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from query_experts.data import prepare
from query_experts.study.callbacks import StopRequest
from query_experts.study.ladder import branches
from query_experts.study.ladder.branches import Branch
from query_experts.study.ladder.settings import LOGS, Run, read_ladder
from query_experts.study.train import new_model, train_arm
from queue_helpers import StopAfterLooks, write_ladder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    return folder, read_ladder(write_ladder(folder))


def corpus_of(folder: Path):
    names = ["held-out.txt", "other.txt"]
    return prepare([str(folder / "train.txt")], validation=[str(folder / name) for name in names],
                   cache_dir=folder / "cache", seq_len=16, vocab_size=300, progress=False)  # fmt: skip


def branch(place, folder: Path, budget: float, arm: str = "gqe", seed: int = 0, **settings) -> Branch:
    ladder = dataclasses.replace(place[1], settings=place[1].settings | settings)
    return Branch(ladder, "ladder", Run("small", arm, seed), budget, folder)


def trained(branch: Branch, corpus, model=None, stop: StopRequest | None = None):
    """The result of a branch and its final weights."""
    model = new_model(branch.settings, branch.run.arm, 7) if model is None else model
    result = branch.train(model, corpus, stop or StopRequest())
    return result, {name: value.clone() for name, value in model.state_dict().items()}


def facts(result) -> dict:
    values = dataclasses.asdict(result)
    return {name: value for name, value in values.items() if name not in ("train_seconds", "tokens_per_s", "pieces")}


@pytest.mark.parametrize("arm", [pytest.param("dense", marks=pytest.mark.full), "gqe"])
def test_every_branch_equals_the_straight_run_of_its_budget_bit_for_bit(place, tmp_path, arm):
    corpus = corpus_of(place[0])
    losses = {}
    for budget in (0.25, 0.5, 1.0):
        own = branch(place, tmp_path / "run", budget, arm)
        result, weights = trained(own, corpus)
        straight = dataclasses.replace(own.settings, evaluations=1, validation=["given"])
        other = train_arm(straight, arm, 0, corpus, tmp_path / f"straight-{budget}", StopRequest())
        assert result.train_tokens == other.train_tokens == round(budget * own.whole.steps) * 32
        for name, value in load_file(tmp_path / f"straight-{budget}" / "model" / "model.safetensors").items():
            assert torch.equal(value, weights[name]), name
        assert result.validation_loss == pytest.approx(other.validation_loss, abs=1e-5)
        losses[budget] = result.validation_loss
    assert len({*losses.values()}) == 3


@pytest.mark.full
def test_a_branch_goes_on_from_the_stable_part_before_it(place, tmp_path, monkeypatch):
    corpus, begun = corpus_of(place[0]), []
    real = branches.train_from
    monkeypatch.setattr(branches, "train_from", lambda trainer, point: (begun.append(point), real(trainer, point)))
    for budget in (0.25, 0.5, 1.0):
        own = branch(place, tmp_path / "run", budget)
        trained(own, corpus)
    steps = own.whole.steps
    assert [point and point.name for point in begun] == [
        None, f"checkpoint-{steps // 5}", f"checkpoint-{2 * steps // 5}",
    ]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("lost", ["nothing", "forks", "all checkpoints"])
def test_a_branch_that_was_stopped_ends_as_if_it_had_not_been(place, tmp_path, lost):
    corpus = corpus_of(place[0])
    whole = [trained(branch(place, tmp_path / "whole", budget), corpus) for budget in (0.25, 0.5, 1.0)]
    for number, budget in enumerate((0.25, 0.5, 1.0)):
        own, stops = branch(place, tmp_path / "run", budget), 0
        while True:
            result, weights = trained(own, corpus, stop=StopAfterLooks(3))
            if result is not None:
                break
            stops += 1
            if lost == "forks":
                shutil.rmtree(tmp_path / "run" / "forks", ignore_errors=True)
            if lost == "all checkpoints" and stops == 1:
                shutil.rmtree(tmp_path / "run")
        assert stops > 1
        assert facts(result) == facts(whole[number][0])
        assert all(torch.equal(value, whole[number][1][name]) for name, value in weights.items())


class StopBetweenLogs(StopRequest):
    """A request that has waited too long for a log after some steps of each piece."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    @property
    def made(self) -> bool:
        return False

    @property
    def presses(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_stops_between_logs_leave_the_curve_as_it_is_without_them(place, tmp_path):
    folder, ladder = place
    longer = folder, dataclasses.replace(ladder, tokens_per_parameter=3 * ladder.tokens_per_parameter)
    corpus = corpus_of(folder)
    whole, weights = trained(branch(longer, tmp_path / "whole", 1.0), corpus)
    pieces, stopped = 0, None
    while stopped is None:
        stopped, other = trained(branch(longer, tmp_path / "pieces", 1.0), corpus, stop=StopBetweenLogs(13))
        pieces += 1
    assert pieces > 3
    assert len(whole.curve) == len(stopped.curve) == LOGS
    assert [tokens for tokens, _ in whole.curve] == [tokens for tokens, _ in stopped.curve]
    assert [loss for _, loss in stopped.curve] == pytest.approx([loss for _, loss in whole.curve], abs=2e-5)
    assert facts(stopped) | {"curve": 0} == facts(whole) | {"curve": 0}
    assert all(torch.equal(value, other[name]) for name, value in weights.items())


@pytest.mark.full
def test_a_model_that_trained_another_seed_before_gives_the_same(place, tmp_path):
    corpus = corpus_of(place[0])
    fresh = trained(branch(place, tmp_path / "a", 0.25, seed=1), corpus)
    used = new_model(branch(place, tmp_path, 0.25).settings, "gqe", 0)
    trained(branch(place, tmp_path / "b", 0.25, seed=0), corpus, used)
    again = trained(branch(place, tmp_path / "c", 0.25, seed=1), corpus, used)
    assert facts(fresh[0]) == facts(again[0])
    assert all(torch.equal(value, again[1][name]) for name, value in fresh[1].items())


@pytest.mark.full
def test_a_compiled_branch_resumes_bit_for_bit(place, tmp_path):
    corpus = corpus_of(place[0])
    whole = trained(branch(place, tmp_path / "whole", 0.25, compile=True), corpus)
    own, pieces = branch(place, tmp_path / "run", 0.25, compile=True), 0
    result = None
    while result is None:
        result, weights = trained(own, corpus, stop=StopAfterLooks(4))
        pieces += 1
    assert pieces > 1
    assert facts(result) == facts(whole[0])
    assert all(torch.equal(value, whole[1][name]) for name, value in weights.items())


WRAPS_AGAIN = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"), reason="older accelerate wraps a model at each training"
)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=WRAPS_AGAIN)])
def test_a_model_is_compiled_once_for_all_seeds_and_budgets(place, tmp_path, dtype):
    corpus, compiled = corpus_of(place[0]), []
    torch._dynamo.reset()
    counters.clear()
    model = new_model(branch(place, tmp_path, 1, compile=True, dtype=dtype).settings, "gqe", 0)
    for seed in range(2):
        for budget in (0.25, 0.5):
            own = branch(place, tmp_path / str(seed), budget, seed=seed, compile=True, dtype=dtype)
            trained(own, corpus, model)
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] > 0
    assert {*compiled} == {compiled[0]}
    assert sum(counters["graph_break"].values()) == 0


def test_a_result_says_what_was_trained_and_at_what_cost(place, tmp_path):
    corpus = corpus_of(place[0])
    result, _ = trained(branch(place, tmp_path / "run", 0.25), corpus)
    assert (result.rung, result.arm, result.seed, result.budget) == ("small", "gqe", 0, 0.25)
    assert result.parameters > result.active_parameters > result.embedding_parameters == 300 * 16
    assert result.active_heads == 3
    assert result.flops > result.active_flops > 6 * result.train_tokens * (result.active_parameters - 300 * 16)
    assert [part.name for part in result.parts] == ["held-out", "other"]
    assert sum(part.predicted_tokens for part in result.parts) >= 8 * 15
    assert len(result.curve) == 10
    assert [point.tokens for point in result.routing_curve] == [n * result.train_tokens // 5 for n in range(1, 6)]
    assert result.settings["learning_rate"] == 2e-3
    assert result.settings["threads"] == 1
    assert not {"out", "data", "validation"} & result.settings.keys()
    assert result.instructions == result.pieces[0].instructions
    assert result.data_hash == corpus.facts.data_hash


def test_a_run_that_diverges_is_a_result_without_a_loss(place, tmp_path):
    corpus = corpus_of(place[0])
    result, _ = trained(branch(place, tmp_path / "run", 0.25, learning_rate=1e6), corpus)
    assert result.diverged
    assert result.validation_loss is None
    assert result.parts == []
    assert 0 < result.diverged_at_tokens <= branch(place, tmp_path, 0.25).settings.steps * 32


@pytest.mark.full
def test_a_budget_that_is_added_later_does_not_go_on_from_a_later_stable_part(place, tmp_path):
    corpus = corpus_of(place[0])
    alone = trained(branch(place, tmp_path / "alone", 0.5), corpus)
    for budget in (0.25, 1.0):
        trained(branch(place, tmp_path / "run", budget), corpus)
    later = trained(branch(place, tmp_path / "run", 0.5), corpus)
    assert facts(later[0]) == facts(alone[0])


def test_a_stable_part_is_kept_although_a_kill_came_before_its_copy(place, tmp_path, monkeypatch):
    corpus, own = corpus_of(place[0]), branch(place, tmp_path / "run", 0.25)
    end = own.settings.steps - own.settings.decay_steps

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(own, corpus)
    assert not (own.forks / f"checkpoint-{end}").exists()
    (own.forks / f"copying-checkpoint-{end}").mkdir(parents=True)
    trained(own, corpus)
    assert [path.name for path in own.forks.iterdir()] == [f"checkpoint-{end}"]
