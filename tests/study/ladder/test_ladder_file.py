"""The ladder's file: the runs that it describes, and what is refused in it."""

from pathlib import Path

import pytest
import torch

from query_experts.common.errors import SettingError
from query_experts.model import costs
from query_experts.study.ladder.queue import Queue
from query_experts.study.ladder.settings import LOGS, parameters_without_embeddings, read_ladder
from query_experts.study.settings import RunSettings
from query_experts.study.train import new_model
from queue_helpers import LADDER, RUNG, scaling, write_ladder

ROOT = Path(__file__).resolve().parents[3]


def refusal(file: Path) -> str:
    with pytest.raises(SettingError) as caught:
        read_ladder(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_runs_come_smallest_rung_first_and_seed_by_seed(tmp_path):
    extra = {"rungs": ["small"], "arms": ["dense", "frozen"], "seeds": 1, "vary": {"learning_rate": [0.1, 0.2]}}
    ladder = read_ladder(write_ladder(tmp_path, plan=[*LADDER["plan"], extra]))
    assert [run.name for run in ladder.runs()] == [
        "small-dense-seed0", "small-gqe-seed0", "small-dense-seed1", "small-gqe-seed1",
        "large-dense-seed0", "large-gqe-seed0", "large-dense-seed1", "large-gqe-seed1",
        "small-learning_rate-0.1-dense-seed0", "small-learning_rate-0.1-frozen-seed0",
        "small-learning_rate-0.2-dense-seed0", "small-learning_rate-0.2-frozen-seed0",
    ]  # fmt: skip


def test_tokens_follow_the_parameters_of_dense_without_embeddings(tmp_path):
    ladder = read_ladder(write_ladder(tmp_path, tokens_per_parameter=20))
    for run in ladder.runs():
        settings = ladder.run_settings(run)
        counts = costs.parameters(new_model(settings, "dense", 0))
        wanted = 20 * (counts["total"] - counts["embedding"])
        assert parameters_without_embeddings(settings.model_size()) * 20 == wanted
        assert abs(settings.steps * settings.tokens_per_step - wanted) <= LOGS / 2 * settings.tokens_per_step
        assert settings.steps % LOGS == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": [0.5, 0.25, 1]}, "budgets are [0.5, 0.25, 1.0]; they must rise"),
        ({"budgets": [0.25, 0.5]}, "the last must be 1"),
        ({"budgets": [0.3, 1]}, "budgets hold 0.3; each must be a multiple of 0.125"),
        ({"settings": {"steps": 5}}, "settings holds 'steps'; it must hold some of"),
        ({"settings": {"out": "x"}}, "settings holds 'out'"),
        ({"settings": {"tp_size": 2}}, "settings holds 'tp_size'; it must hold some of"),
        ({"settings": {"report_to": ["wandb"]}}, "settings holds 'report_to'; it must hold some of"),
        ({"learning_rate_factors": {"best": 2}}, "learning_rate_factors hold 'best'; it must be one of dense, static"),
        ({"learning_rate_factors": {"gqe": 0}}, "learning_rate_factors"),
        ({"learning_rate_factors": {"gqe": float("nan")}}, "learning_rate_factors"),
        ({"rungs": {"small": {"hidden": 1}, "large": {}}}, "rungs.small holds 'hidden'"),
        ({"rungs": {"small": RUNG, "large": RUNG | {"num_attention_heads": 3}}}, "run large-dense-seed0 can't be"),
        ({"rungs": {"small": RUNG | {"learning_rate": -1.0}, "large": RUNG}}, "learning_rate is -1.0"),
        ({"plan": [{"rungs": ["tiny"], "arms": ["dense"], "seeds": 1}]}, "holds 'tiny'; it must be one of small"),
        ({"plan": [{"rungs": ["small"], "arms": ["densest"], "seeds": 1}]}, "holds 'densest'; it must be one of dense"),
        ({"plan": [{"rungs": ["small"], "arms": ["dense"], "seeds": 0}]}, "seeds"),
        ({"plan": [{"rungs": ["small"], "arms": ["dense"], "seeds": 1, "vary": {"seed": [1]}}]}, "holds 'seed'"),
        ({"surprise": 1}, "surprise"),
        ({"tokens_per_parameter": 0}, "tokens_per_parameter"),
        ({"threads": 0}, "threads"),
        ({"warmup": 0.9}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
        ({"tag": "one"}, "tag is 'one' and commit None; both must be given, or neither"),
        ({"tag": "", "commit": "1234567"}, "tag is empty; it must be the name of the code, or left out"),
        ({"tag": "one", "commit": ""}, "commit is empty; it must be a commit, or left out"),
        ({"validation": []}, "validation"),
    ],
)  # fmt: skip
def test_a_ladder_that_can_not_be_run_is_refused_in_a_sentence(tmp_path, changes, words):
    assert words in refusal(write_ladder(tmp_path, **changes))


@pytest.mark.parametrize("warmup", [0, 0.1, 0.2, 0.8])
def test_all_budgets_of_a_run_warm_up_for_a_share_of_the_smallest(tmp_path, warmup):
    ladder = read_ladder(write_ladder(tmp_path, warmup=warmup, tokens_per_parameter=20))
    for run in ladder.runs():
        whole = ladder.run_settings(run)
        branches = [ladder.branch_settings(whole, budget) for budget in (0.25, 0.5, 1.0)]
        assert {branch.warmup_steps for branch in branches} == {round(warmup * branches[0].steps)}
        for branch in branches:
            branch.check()


def test_a_file_that_is_no_ladder_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1")
    (tmp_path / "b.yaml").write_text("a: [")
    for name in ("a.yaml", "b.yaml", "c.yaml"):
        assert str(tmp_path / name) in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("action", "more", "words"),
    [
        ("status", {"data": "x"}, "data is 'x', which belongs to scaling run"),
        ("fit", {"hours": 1.0}, "hours is 1.0, which belongs to scaling run"),
        ("report", {"only": ["small"]}, "only is ['small'], which belongs to scaling run, status and tokens"),
        ("status", {"device": "cuda"}, "device is 'cuda', which belongs to scaling run"),
        ("fit", {"data": "auto"}, "data is 'auto', which belongs to scaling run"),
        ("walk", {}, "action is 'walk'"),
    ],
)
def test_options_of_another_action_are_refused(tmp_path, action, more, words):
    with pytest.raises(SettingError, match=".*".join(map(str, [words.replace("[", r"\[").replace("]", r"\]")]))):
        scaling(write_ladder(tmp_path), action, **more).check()


def one_run(**more):
    return {"plan": [{"rungs": ["small"], "arms": ["dense"], "seeds": 1, **more}]}


def test_a_ladder_is_for_a_cpu_unless_it_says_so_whatever_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = {name: value for name, value in LADDER["settings"].items() if name != "device"}
    ladder = read_ladder(write_ladder(tmp_path, settings=settings))
    trained = ladder.run_settings(ladder.runs()[0])
    assert (ladder.device("small"), trained.device, trained.torch_device) == ("cpu", "cpu", "cpu")


@pytest.mark.parametrize("device", ["auto", "mps", ["cpu"], None])
def test_a_device_must_be_said(tmp_path, device):
    settings = LADDER["settings"] | {"device": device}
    assert f"device is {device!r}; it must be cpu or cuda" in refusal(write_ladder(tmp_path, settings=settings))


def test_a_dtype_must_be_said(tmp_path):
    without = {name: value for name, value in LADDER["settings"].items() if name != "dtype"}
    for settings in (without, without | {"dtype": "auto"}):
        words = "run small-dense-seed0 can't be trained; dtype is 'auto'; it must be float32 or bfloat16"
        assert words in refusal(write_ladder(tmp_path, settings=settings))
    rungs = {name: values | {"dtype": "bfloat16"} for name, values in LADDER["rungs"].items()}
    read_ladder(write_ladder(tmp_path, settings=without, rungs=rungs))


@pytest.mark.parametrize(
    ("name", "value"),
    [("seq_len", 32), ("vocab_size", 400), ("text_field", "body"), ("tokenizer", "gpt2"), ("validation_sequences", 4)],
)
def test_what_makes_the_tokens_can_not_differ_between_rungs(tmp_path, name, value):
    read_ladder(write_ladder(tmp_path, settings=LADDER["settings"] | {name: value}))
    words = f"holds {name!r}; it must stand in settings, as all rungs share the tokens"
    assert words in refusal(write_ladder(tmp_path, rungs=LADDER["rungs"] | {"large": RUNG | {name: value}}))
    assert words in refusal(write_ladder(tmp_path, **one_run(vary={name: [value]})))


def test_all_held_out_text_is_validated_on_unless_the_ladder_says_how_much(tmp_path):
    settings = {name: value for name, value in LADDER["settings"].items() if name != "validation_sequences"}
    ladder = read_ladder(write_ladder(tmp_path, settings=settings))
    assert ladder.run_settings(ladder.runs()[0]).validation_sequences is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"batch_size": "4"}, "batch_size is '4'; it must be a whole number"),
        ({"hidden_size": [64]}, r"hidden_size is [64]; it must be a whole number"),
        ({"hidden_size": 10**30}, f"hidden_size is {10**30}; it must be 1,000,000 or less"),
        ({"seq_len": None}, "seq_len is None; it must be a whole number"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_before_steps_are_computed(tmp_path, changed, words):
    rungs = {name: {k: v for k, v in RUNG.items() if k not in changed} for name in LADDER["rungs"]}
    assert words in refusal(write_ladder(tmp_path, settings=LADDER["settings"] | changed, rungs=rungs))


@pytest.mark.parametrize("changes", [{"plan": []}, {"rungs": {}}])
def test_an_empty_plan_or_no_rungs_are_refused(tmp_path, changes):
    assert "empty; " in refusal(write_ladder(tmp_path, **changes))


@pytest.mark.parametrize("name", ["a/b", "../../x", "", ".a", "d64-8x16", "a b", "x" * 41, "a\n"])
def test_a_rung_must_have_a_name_that_file_names_can_hold(tmp_path, name):
    file = write_ladder(tmp_path, rungs={name: RUNG}, plan=[{"rungs": [name], "arms": ["dense"], "seeds": 1}])
    assert f"rungs hold {name!r}; a name must be 1 to 40 letters" in refusal(file)


def test_a_rung_can_not_be_named_like_an_arm(tmp_path):
    file = write_ladder(tmp_path, rungs={"half": RUNG}, plan=[{"rungs": ["half"], "arms": ["dense"], "seeds": 1}])
    assert "rungs hold 'half', which is the name of an arm" in refusal(file)


@pytest.mark.parametrize("values", [[], 0.1, [0.1, 0.1], [1, 1.0], ["a"], [True], [None], {"a": 1}])
def test_a_sweep_must_hold_numbers_each_once(tmp_path, values):
    words = f"plan.0.vary.learning_rate is {values!r}; it must be a list of numbers, each once"
    assert words in refusal(write_ladder(tmp_path, **one_run(vary={"learning_rate": values})))


def test_an_arm_can_have_a_learning_rate_of_its_own(tmp_path):
    plan = [{"rungs": ["small"], "arms": ["dense", "gqe"], "seeds": 1}]
    plan += [plan[0] | {"vary": {"learning_rate": [0.5]}}]
    factors = {"gqe": 1.5, "half": 3}

    def written(rate: dict) -> Path:
        rungs = {name: values | rate for name, values in LADDER["rungs"].items()}
        return write_ladder(tmp_path, plan=plan, rungs=rungs, learning_rate_factors=factors)

    for rate, own in (({"learning_rate": 0.25}, 0.25), ({}, RunSettings.learning_rate)):
        ladder = read_ladder(written(rate))
        rates = [ladder.run_settings(run).learning_rate for run in ladder.runs()]
        assert rates == [own, own * 1.5, 0.5, 0.5]  # a rate that is swept is the run's
    for wrong in ("high", True):
        assert f"learning_rate is {wrong!r}; it must be a number" in refusal(written({"learning_rate": wrong}))


def test_whole_numbers_can_be_swept(tmp_path):
    ladder = read_ladder(write_ladder(tmp_path, **one_run(vary={"batch_size": [4, 8]})))
    assert [ladder.run_settings(run).batch_size for run in ladder.runs()] == [4, 8]
    assert [run.name for run in ladder.runs()] == ["small-batch_size-4-dense-seed0", "small-batch_size-8-dense-seed0"]


def test_values_that_differ_in_the_tenth_digit_are_two_runs(tmp_path):
    ladder = read_ladder(write_ladder(tmp_path, **one_run(vary={"learning_rate": [0.001, 0.001000001]})))
    assert len({run.key for run in ladder.runs()}) == len({run.name for run in ladder.runs()}) == 2


@pytest.mark.parametrize("tokens", [1e30, 1e308])
def test_steps_beyond_any_run_are_refused(tmp_path, tokens):
    words = refusal(write_ladder(tmp_path, tokens_per_parameter=tokens))
    assert f"tokens_per_parameter is {tokens:g}, which makes" in words
    assert "steps; they must be 10,000,000 or fewer" in words


@pytest.mark.parametrize("more", ["2020-01-01: 3\n", "rungs: &a {b: *a}\n", "rungs: {2020-01-01: {}}\n"])
def test_what_only_yaml_can_hold_is_refused_in_a_sentence(tmp_path, more):
    file = tmp_path / "ladder.yaml"
    file.write_text(more)
    assert "its keys must be words, and no value may hold itself" in refusal(file)


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    file = write_ladder(tmp_path)
    text = file.read_text()
    for line in ("tokens_per_parameter: 2\n", "rungs: {}\n"):
        file.write_text(text + line)
        assert f"{line.partition(':')[0]} is given twice in" in refusal(file)
    file.write_text(text.replace("  batch_size: 2\n", "  batch_size: 2\n  batch_size: 4\n"))
    assert "batch_size is given twice in" in refusal(file)


def test_seeds_have_a_limit(tmp_path):
    assert len(read_ladder(write_ladder(tmp_path, **one_run(seeds=1000))).runs()) == 1000
    assert "plan.0.seeds" in refusal(write_ladder(tmp_path, **one_run(seeds=10**9)))


@pytest.mark.parametrize("results", ["train.txt", "train.txt/results"])
def test_results_that_are_a_file_are_refused_before_training(tmp_path, results):
    words = f"results is {results!r}, but {tmp_path / 'train.txt'} is a file; it must be a folder"
    assert words in refusal(write_ladder(tmp_path, results=results))


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "ladder").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_committed_ladders_can_be_read(file):
    assert read_ladder(file).runs()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup": "fast"}, "warmup is 'fast'; it must be a number"),
        ({"warmup": "0.1"}, "warmup is '0.1'; it must be a number"),
        ({"threads": True}, "threads is True; it must be a whole number"),
        ({"tokens_per_parameter": True}, "tokens_per_parameter is True; it must be a number"),
        ({"budgets": 1}, "budgets is 1; it must be a list"),
        ({"rungs": ["small"]}, "rungs is ['small']; it must be lines of `field: value`"),
        ({"plan": [3]}, "plan.0 is 3; it must be lines of `field: value`"),
        ({"plan": [{"rungs": ["small"], "arms": ["dense"], "seeds": True}]}, "seeds is True; it must be a whole"),
        ({"plan": [{"rungs": ["small"], "arms": ["dense"], "seeds": "3"}]}, "seeds is '3'; it must be a whole"),
        ({"plan": [{"rungs": ["small"], "arms": ["dense"]}]}, "plan.0.seeds isn't given; it must be"),
        ({"results": ""}, "results is empty; it must be a folder"),
        ({"data": [""]}, "data.0 is empty; it must be the name of a text file"),
        ({"data_hash": ""}, "data_hash is empty; it must be the hash"),
        ({"surprise": 1}, "surprise is not known; it must be left out"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_what_it_held_and_what_is_allowed(tmp_path, changes, words):
    assert words in refusal(write_ladder(tmp_path, **changes))


def test_an_only_that_leaves_no_run_is_refused(tmp_path):
    file = write_ladder(tmp_path)
    assert len(Queue.read(file, ["small", "gqe"]).runs) == 2
    with pytest.raises(SettingError, match=r"only is \['hard'\]; the plan of .* must have a run of these rungs"):
        Queue.read(file, ["hard"])
