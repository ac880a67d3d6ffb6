"""YAML files of which nothing is passed over."""

import pytest
import yaml

from query_experts.common.yaml_reader import read_yaml


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("[2E5, -1.5e+2]", [2e5, -150.0]), ("e3", "e3")])
def test_a_number_may_have_an_exponent_without_a_point(text, value):
    assert read_yaml(text) == value


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: {b: 1, b: 1}", "- {x: 1, 'x': 2}"])
def test_a_key_that_is_given_twice_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="is given twice"):
        read_yaml(text)


def test_nesting_without_an_end_is_an_error_of_yaml():
    with pytest.raises(yaml.YAMLError, match="nested too deeply"):
        read_yaml("[" * 1000)


def test_merged_keys_may_be_set_again():
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {x: 4}")["b"] == {"x": 3, "y": 2}
