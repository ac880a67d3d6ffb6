"""The result files of a ladder: what is written, read and refused."""

import dataclasses
import json

import pytest

from ladder_helpers import run
from query_experts.common.errors import SettingError
from query_experts.study.ladder.results import absolute_paths, file_name, read_results, write_result
from query_experts.study.results import PartLoss


def test_a_result_is_read_as_it_was_written(tmp_path):
    parts = [PartLoss("textbooks", 3.9, 1.8, 512)]
    result = run("gqe", seed=3, budget=0.25, parts=parts)
    file = write_result(tmp_path / "results", result)
    assert file.name == file_name(result) == "d64-gqe-seed3-025.json"
    assert read_results(tmp_path / "results") == [result]


def test_a_run_that_diverged_is_written_without_a_loss(tmp_path):
    write_result(tmp_path, run(loss=None))
    (read,) = read_results(tmp_path)
    assert read.diverged
    assert read.validation_loss is None


def test_a_file_may_hold_a_list_of_results_and_keys_of_newer_versions(tmp_path):
    results = [run("dense"), run("gqe")]
    values = [dataclasses.asdict(result) | {"newer": 1} for result in results]
    (tmp_path / "gpu.json").write_text(json.dumps(values))
    write_result(tmp_path, run("half"))
    assert [result.arm for result in read_results(tmp_path)] == ["half", "dense", "gqe"]


def test_an_empty_folder_has_no_results(tmp_path):
    assert read_results(tmp_path) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"results is .*absent; it must be a folder"):
        read_results(tmp_path / "absent")


def test_a_finished_run_is_not_overwritten(tmp_path):
    write_result(tmp_path, run(loss=4.0))
    with pytest.raises(SettingError, match=r"d64-gqe-seed0-100.json; a finished run is not overwritten"):
        write_result(tmp_path, run(loss=3.0))
    assert read_results(tmp_path)[0].validation_loss == 4.0


def test_two_results_for_one_key_are_refused_and_both_files_named(tmp_path):
    write_result(tmp_path, run())
    (tmp_path / "gpu.json").write_text(json.dumps([dataclasses.asdict(run("dense")), dataclasses.asdict(run())]))
    with pytest.raises(SettingError, match=r"d64-gqe-seed0-100.json and .*gpu.json, both with d64, gqe, seed 0"):
        read_results(tmp_path)


def test_two_results_for_one_key_in_one_file_are_refused(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps([dataclasses.asdict(run())] * 2))
    with pytest.raises(SettingError, match="a run must have one result"):
        read_results(tmp_path)


@pytest.mark.parametrize("content", ["{", "3", "[]3", '{"rung": "d64"}', "\xff"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "d64-gqe-seed0-100.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(SettingError, match=r"d64-gqe-seed0-100.json, which is damaged \(.+\); move it away"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("variant", "junk", "variant is 'junk' in .*; it must be empty or like"),
        ("variant", "learning_rate=x", "variant is 'learning_rate=x'"),
        ("settings", {"learning_rate": "x"}, "settings.learning_rate is 'x' in .*; it must be a number"),
        ("train_tokens", 0, "train_tokens is 0; it must be 1 or more"),
        ("budget", 0, "budget is 0"),
        ("budget", -1, "budget is -1"),
        ("seed", -1, "seed is -1"),
        ("validation_loss", -1.0, "validation_loss is -1.0"),
        ("rung", "", "rung is empty"),
        ("validation_loss", "3", "validation_loss is '3'"),
        ("seed", True, "seed is True"),
        ("train_tokens", 1.0, "train_tokens is 1.0"),
        ("flops", "1e9", "flops is '1e9'"),
        ("tag", 1, "tag is 1"),
        ("validation_loss", None, "validation_loss is null in .*; it must be a number, or diverged_at_tokens given"),
    ],
)
def test_a_value_that_no_run_has_is_refused(tmp_path, field, value, words):
    (tmp_path / "one.json").write_text(json.dumps(dataclasses.asdict(run()) | {field: value}))
    with pytest.raises(SettingError, match=rf"(^|\(){words}"):
        read_results(tmp_path)


def test_an_unknown_arm_is_refused(tmp_path):
    write_result(tmp_path, run("gqe-m64"))
    with pytest.raises(SettingError, match=r"arm is 'gqe-m64' in .*; it must be one of dense, "):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["/data/x", "C:\\data", "~/data", "file:///data", "--data=/data/x", "read from '/tmp/x'", "\\\\host\\x"],
)
def test_an_absolute_path_anywhere_in_a_result_is_refused(tmp_path, path):
    with pytest.raises(SettingError, match="it must hold file names without folders"):
        write_result(tmp_path, run(settings={"data": [{"file": path}]}))
    assert absolute_paths({path: 1}) == [path]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["text.txt", "tokens/s", "a / b", "AVX512_BF16", "sha256:abc", "https://host/x", ""])
def test_other_strings_are_no_absolute_paths(text):
    assert absolute_paths([text]) == []


def test_a_curve_of_many_points_is_refused(tmp_path):
    with pytest.raises(SettingError, match="has 41 points; it must have at most 40"):
        write_result(tmp_path, run(curve=[(i, 4.0) for i in range(41)]))
