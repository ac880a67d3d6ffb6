"""`kernels` in training: no part of a checkpoint, and they bind no folder; each piece of a run says what was chosen."""

import json

import pytest

from query_experts.common.errors import SettingError
from query_experts.layers.attention import GQEAttention
from query_experts.model.kernel_choice import check_kernels_setting
from query_experts.ops import kernels
from query_experts.study.compare import compare
from query_experts.study.prefill import conditions
from query_experts.study.single import train
from query_experts.study.workspace import fingerprint
from study_helpers import options, quiet, tiny_compare, tiny_train


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "interpreted", lambda: False)


def test_a_run_goes_on_with_other_kernels_and_says_which_computed_each_piece(tmp_path, monkeypatch):
    used, original = [], GQEAttention.set_kernels
    monkeypatch.setattr(GQEAttention, "set_kernels", lambda self, name: used.append(name) or original(self, name))
    tiny = {"num_hidden_layers": 1, "steps": 2, "evaluations": 2}
    assert not train(tiny_train(tmp_path, kernels="torch", stop_after_minutes=0, **tiny), quiet())
    used.clear()
    assert train(tiny_train(tmp_path, kernels="triton", **tiny), quiet())
    assert "triton" in used
    out = tmp_path / "out"
    pieces = json.loads((out / "result.json").read_text())["pieces"]
    assert [piece["kernels"] for piece in pieces] == [
        {"asked": "torch", "chosen": "torch"}, {"asked": "triton", "chosen": "triton"},
    ]  # fmt: skip
    assert "kernels" not in json.loads((out / "settings.json").read_text())
    assert "kernels" not in (out / "model" / "config.json").read_text()


def test_stock_llama_has_no_kernels_to_choose(tmp_path):
    assert train(tiny_train(tmp_path, arm="dense", num_hidden_layers=1, steps=1, evaluations=1), quiet())
    (piece,) = json.loads((tmp_path / "out" / "result.json").read_text())["pieces"]
    assert piece["kernels"] is None


def test_kernels_bind_no_folder(tmp_path):
    found = [fingerprint(tiny_train(tmp_path, kernels=name)) for name in kernels.KERNELS]
    assert found[0] == found[1] == found[2]


def test_prefill_by_other_kernels_is_timed_anew(tmp_path):
    made_with = [conditions(tiny_compare(tmp_path, kernels=name), {}) for name in ("auto", "torch")]
    assert made_with[0] != made_with[1]


@pytest.mark.parametrize("command", ["train", "compare"])
def test_triton_where_it_cannot_run_is_refused_before_anything_is_written(
    tmp_path, text, refused, no_interpreter, command
):
    argv = options(command, tmp_path / "out", text, kernels="triton")
    refused(argv, "kernels is 'triton', which needs an NVIDIA GPU, where the device is cpu; it must be torch or auto")
    assert not (tmp_path / "out").exists()


def test_triton_for_an_arm_that_it_does_not_cover_is_refused_before_anything_is_written(tmp_path):
    layout = {
        "num_attention_heads": 256,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "hidden_size": 512,
        "kernels": "triton",
    }
    with pytest.raises(SettingError, match="kernels is 'triton', which takes up to 64 groups and 64 experts in a "):
        compare(tiny_compare(tmp_path, **layout), quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_other_kernels_are_allowed_on_every_device(name, no_interpreter):
    for device in ("cpu", "mps", "cuda"):
        check_kernels_setting(name, device)
