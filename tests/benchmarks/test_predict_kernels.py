"""The committed prediction is what its script computes from the committed results, and says how far off it is."""

import dataclasses
import json

import pytest

import predict_kernels


def test_the_committed_prediction_is_what_the_script_computes():
    def check(old, new):
        if isinstance(old, dict):
            assert list(old) == list(new)
            for name in old:
                check(old[name], new[name])
        elif isinstance(old, list):
            assert len(old) == len(new)
            for pair in zip(old, new, strict=True):
                check(*pair)
        else:
            assert new == (pytest.approx(old, rel=1e-3) if isinstance(old, float) else old)

    committed = json.loads(predict_kernels.RESULT.read_text(encoding="utf-8"))
    assert committed["predicted"] is True
    check(committed, json.loads(json.dumps(dataclasses.asdict(predict_kernels.predict()))))


def test_the_model_meets_what_was_measured_where_the_gpu_is_the_limit():
    prediction = predict_kernels.read_prediction()
    assert set(prediction.worst) == set(prediction.sources) - {"bench-h100-parts.json"}
    assert max(prediction.worst.values()) < 0.06


def test_no_time_of_a_fused_layer_is_said_to_be_measured():
    for point in predict_kernels.read_prediction().points:
        assert not any(arm.endswith("-fused") for arm in point.measured)
        assert point.modelled.keys() == predict_kernels.COUNTS.keys()
